"""A small T5 with a tokenizer of its own, and tasks of GLUE in small, in the formats of the real ones."""

import json
import random
from pathlib import Path

import datasets
import tokenizers
import transformers

from lightning_ief.tasks.glue import TASKS

NOUNS = ["cat", "dog", "tree", "house", "river", "stone"]
VERBS = ["sees", "likes", "finds", "keeps", "moves"]
MARKS = ["never", "often", "always"]  # the n-th stands in texts of class n
CLASS_NAMES = {2: ["zero", "one"], 3: ["zero", "one", "two"]}


def sentences(count: int, classes: int, seed: int = 0) -> list[tuple[str, str, int]]:
    """First sentence, which tells the class by a word, second sentence, class."""
    chosen = random.Random(seed)
    rows = []
    for n in range(count):
        label = n % classes
        words = [f"the {chosen.choice(NOUNS)} {chosen.choice(VERBS)} the {chosen.choice(NOUNS)}" for _ in range(2)]
        tail = " and".join([""] + [f" the {chosen.choice(NOUNS)}" for _ in range(chosen.randrange(4))])
        rows.append((f"{words[0]} {MARKS[label]}{tail} .", f"{words[1]} .", label))
    return rows


def write_glue(root: Path, task: str, train: int = 48, validation: int = 24, kind: str = "parquet") -> Path:
    """The task's folder in `root`; its test set has no labels, as GLUE's."""
    spec = TASKS[task]
    classes = len(spec.words)
    folder = root / task
    folder.mkdir(parents=True)
    splits = {"train": train, spec.validation: validation, spec.validation.replace("validation", "test"): 6}
    if task == "mnli":
        splits |= {"validation_mismatched": 5, "test_mismatched": 5}
    names = datasets.ClassLabel(names=CLASS_NAMES[classes])
    for seed, (split, count) in enumerate(splits.items()):
        rows = [
            dict(zip(spec.columns, (first, second), strict=False))
            | {"label": -1 if split.startswith("test") else label, "idx": n}
            for n, (first, second, label) in enumerate(sentences(count, classes, seed))
        ]
        if kind == "jsonl":
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            table = datasets.Dataset.from_list(rows).cast_column("label", names)
            table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def write_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """A Unigram tokenizer as T5's, trained on all that the stand-ins say."""
    special = ["<pad>", "</s>", "<unk>"]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    texts = [text for row in sentences(200, 3) for text in row[:2]]
    texts += [text for task in TASKS.values() for text in (task.template, task.prompt, *task.words)] * 3
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def t5_config(**options: int) -> dict[str, int]:
    """Arguments of a small T5's configuration."""
    return {"vocab_size": 300, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2, **options}


def write_t5(folder: Path) -> Path:
    """Weights and tokenizer."""
    write_tokenizer(folder)
    config = transformers.T5Config(**t5_config(), decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def write_bert(folder: Path) -> Path:
    """Weights of a small BERT without classifier, and a tokenizer that knows the words of `sentences`."""
    words = sorted({word for first, second, _ in sentences(200, 3) for word in f"{first} {second}".split()})
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def write_texts(folder: Path, files: int = 2, lines: int = 60) -> Path:
    """Texts of some lines each, of different lengths."""
    folder.mkdir(parents=True)
    for n in range(files):
        text = "\n".join(first for first, _, _ in sentences(lines, 3, n))
        (folder / f"{n}.txt").write_text(text + "\n", encoding="utf-8")
    return folder
