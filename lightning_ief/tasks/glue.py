"""GLUE (Wang et al., arXiv 1804.07461) as text, for text-to-text models and for classifiers of sentence pairs.

Instructions and label words are those of Wu et al., arXiv 2406.06420, Table 2; the texts that prompts start from are
those of the paper's released code.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ief.tasks.extras import import_extra
from lightning_ief.tasks.hub import MissingError, load, load_dataset
from lightning_ief.tasks.loaders import InMemoryDataModule, Sample, padded

if TYPE_CHECKING:  # extras that take seconds to import
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["TASKS", "GlueDataModule", "GlueTask", "Metric"]

Metric = Literal["accuracy", "f1", "matthews"]

_FORMATS = {".parquet": "parquet", ".jsonl": "json"}  # by suffix, the reader of datasets


@dataclass(frozen=True)
class GlueTask:
    """A task of GLUE.

    Attributes:
        columns: Names of its one or two sentences.
        template: Input of a text-to-text model; {S1} and {S2} stand for the sentences.
        words: The word for each class, in the order of GLUE's labels.
        prompt: Text that a trainable prompt starts from.
        metrics: What GLUE evaluates.
        validation: The split to validate on.

    """

    columns: tuple[str, ...]
    template: str
    words: tuple[str, ...]
    prompt: str
    metrics: tuple[Metric, ...] = ("accuracy",)
    validation: str = "validation"

    def text(self, *sentences: str) -> str:
        """Fill in the template.

        Args:
            *sentences: S1, and S2 if the task has two.

        Returns:
            The input of a text-to-text model.

        """
        # Not str.format, for which braces in a sentence would mean something.
        return re.sub(r"\{S([12])\}", lambda place: sentences[int(place[1]) - 1], self.template)


_ALIKE = "semantically equivalent, answer yes or no"
_PAIR = ("sentence1", "sentence2")

TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(
        ("sentence",),
        "Classify if the following sentence's grammar is acceptable or unacceptable: {S1}",
        ("unacceptable", "acceptable"),
        "Grammar Checking Task: ",
        ("matthews", "accuracy"),
    ),
    "sst2": GlueTask(
        ("sentence",),
        "Classify if the following sentence's sentiment is positive or negative: {S1}",
        ("negative", "positive"),
        "Sentiment Classification Task: ",
    ),
    "mrpc": GlueTask(
        _PAIR,
        f"Classify if the following S1 and S2 are {_ALIKE}: S1: {{S1}} S2: {{S2}}",
        ("no", "yes"),
        "Semantically Equivalent Checking Task: ",
        ("f1", "accuracy"),
    ),
    "qqp": GlueTask(
        ("question1", "question2"),
        f"Classify if the following Q1 and Q2 are {_ALIKE}: Q1: {{S1}} Q2: {{S2}}",
        ("no", "yes"),
        "Semantically Equivalent Checking Task: ",
        ("f1", "accuracy"),
    ),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        "Predict whether the premise entails the hypothesis, contradicts the hypothesis,or neither, answer yes, no or "
        "maybe: premise: {S1} hypothesis: {S2}",
        ("yes", "maybe", "no"),  # entailment, neutral, contradiction
        "Textual Entailment Prediction Task: ",
        validation="validation_matched",
    ),
    "qnli": GlueTask(
        ("question", "sentence"),
        "Determine whether the context sentence S contains the answer to the question Q, answer yes or no: "
        "Q: {S1} S: {S2}",
        ("yes", "no"),  # entailment, not_entailment
        "Textual Entailment Prediction Task: ",
    ),
    "rte": GlueTask(
        _PAIR,
        "Classify if S1 entailment S2 or not, answer yes or no: S1: {S1} S2: {S2}",
        ("yes", "no"),  # entailment, not_entailment
        "Textual Entailment Recognition Task: ",
    ),
}
"""The tasks by name."""


class GlueDataModule(InMemoryDataModule):
    """A task of GLUE, tokenised.

    Batches are (inputs, classes): a dictionary of int64 `input_ids` and `attention_mask` [N, T], padded to the longest
    of the batch (and what else the tokenizer returns for pairs), and int64 [N], GLUE's labels. Tokens are cached.
    Training samples are shuffled anew in each epoch, in an order that depends on `seed` and the number of the epoch.
    MNLI is validated on its matched set.

    Args:
        task: cola, sst2, mrpc, qqp, mnli, qnli or rte.
        tokenizer: The model's tokenizer: id on the Hugging Face hub, or a folder.
        source: Where the data are: id on the hub, or a folder that has a folder for each task, in it
            train-*, validation-* (for MNLI validation_matched-*) and test-*, parquet or jsonl.
        encoding: 'instruction', one text that says what is asked, as a text-to-text model takes it; 'pair', the
            sentence or pair of sentences as they are, for models that end in a classifier.
        batch_size: N, samples per batch; the last batch of an epoch may hold fewer.
        max_length: Tokens at which an input is cut.
        train_size: Number of training samples to train on, chosen by `seed`; all of them if None.
        seed: Seed of the subset and the order of the training samples.
        num_workers: Processes that load the data; the tokens are at hand, so 0 is fastest.
        order_seed: Seed of the order alone, which then leaves the subset as it is; `seed` if None.

    Attributes:
        num_classes: C.
        metrics: Names of the metrics that GLUE evaluates.
        label_tokens: Tokens of each class's word, the end of text included; after `setup`.
        prompt_tokens: Tokens that a trainable prompt starts from; after `setup`.

    Raises:
        ValueError: If an argument is out of range.

    """

    label_tokens: list[list[int]]
    prompt_tokens: list[int]

    def __init__(
        self,
        task: Literal["cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte"],
        tokenizer: str,
        source: str = "nyu-mll/glue",
        encoding: Literal["instruction", "pair"] = "instruction",
        batch_size: int = 32,
        max_length: int = 256,
        train_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        order_seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, order_seed)
        if task not in TASKS:
            raise ValueError(f"GlueDataModule(task={task!r}): must be one of {[*TASKS]}.")
        if encoding not in ("instruction", "pair"):
            raise ValueError(f"GlueDataModule(encoding={encoding!r}): must be 'instruction' or 'pair'.")
        self._require_positive(max_length=max_length, train_size=train_size)
        self.task = task
        self.tokenizer = tokenizer
        self.source = source
        self.encoding = encoding
        self.max_length = max_length
        self.train_size = train_size
        self.num_classes = len(TASKS[task].words)
        self.metrics: Sequence[Metric] = TASKS[task].metrics

    def prepare_data(self) -> None:
        """Download what is missing and tokenise; in one process only.

        Raises:
            MissingError: If data or tokenizer are missing and can't be downloaded.

        """
        self._encoded(self._tokenizer())

    def setup(self, stage: str | None = None) -> None:
        """Load the tokens.

        Args:
            stage: What Lightning is about to do; the data are the same for all.

        Raises:
            MissingError: If data or tokenizer are missing.
            ValueError: If there are fewer training samples than asked for, or a label is no class of the task.

        """
        task, tokenizer = TASKS[self.task], self._tokenizer()
        self.label_tokens = [tokenizer(word)["input_ids"] for word in task.words]
        self.prompt_tokens = tokenizer(task.prompt)["input_ids"]
        rows = self._encoded(tokenizer)
        for split in ("train", task.validation):
            if strange := {*rows[split].unique("label")} - {*range(self.num_classes)}:
                raise ValueError(
                    f"GlueDataModule(task={self.task!r}): the labels of '{split}' must be 0 … {self.num_classes - 1}, "
                    f"there are {sorted(strange, key=str)}."
                )
        train = rows["train"]
        if self.train_size is not None:
            if self.train_size > len(train):
                raise ValueError(
                    f"GlueDataModule(train_size={self.train_size}): {self.task} has {len(train)} training samples."
                )
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))
            train = train.select(order[: self.train_size].tolist())
        padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self.train_set = _Tokens(train, padding)
        self.val_set = _Tokens(rows[task.validation], padding)
        test = _name_of_test(task)
        self._labelled_test = test in rows and min(rows[test].unique("label")) >= 0
        if test in rows:
            self.test_set = _Tokens(rows[test], padding)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Batches of the test set, in order.

        Returns:
            The loader.

        Raises:
            ValueError: If there are no labels, as in GLUE's own test sets.

        """
        if not self._labelled_test:
            raise ValueError(
                f"GlueDataModule(task={self.task!r}): '{self.source}' has no test set with labels; GLUE keeps them to "
                "itself. Evaluate on the validation set: lightning-ief validate."
            )
        return super().test_dataloader()

    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        auto = import_extra("transformers", "text", "GlueDataModule needs transformers").AutoTokenizer
        return load(auto.from_pretrained, self.tokenizer, option="GlueDataModule.tokenizer")

    def _raw(self) -> "datasets.DatasetDict":
        """The splits as they are at the source."""
        datasets = import_extra("datasets", "text", "GlueDataModule needs datasets")
        option = "GlueDataModule.source"
        if not Path(self.source).is_dir():
            return load_dataset(self.source, self.task, option=option)
        task, folder = TASKS[self.task], Path(self.source, self.task)
        for suffix, reader in _FORMATS.items():
            names = ("train", task.validation, _name_of_test(task))
            found = {name: [*folder.glob(f"{name}{suffix}"), *folder.glob(f"{name}-*{suffix}")] for name in names}
            files = {name: sorted(map(str, paths)) for name, paths in found.items() if paths}
            if {"train", task.validation} <= files.keys():
                return datasets.load_dataset(reader, data_files=files)
        raise MissingError(
            f"{option}={self.source}: there is no {folder}/train-*.parquet and {task.validation}-*.parquet, or .jsonl, "
            f"with the columns {', '.join(task.columns)}, label. Where there is a network run `hf download "
            f"nyu-mll/glue --repo-type dataset --include '{self.task}/*' --local-dir glue` and put glue/{self.task} "
            "there."
        )

    def _encoded(self, tokenizer: "PreTrainedTokenizerBase") -> "datasets.DatasetDict":
        rows = self._raw()
        task = TASKS[self.task]
        wanted = [*task.columns, "label"]
        if absent := [name for name in wanted if name not in rows["train"].column_names]:
            raise ValueError(
                f"GlueDataModule(task={self.task!r}, source={self.source!r}): there is no column "
                f"{', '.join(absent)} among {rows['train'].column_names}."
            )
        options: dict[str, Any] = {
            "tokenizer": tokenizer, "task": task, "encoding": self.encoding, "max_length": self.max_length
        }  # fmt: skip
        # The first call changes the tokenizer's state, and the cache goes by that.
        _encode({name: ["."] for name in task.columns}, **options)
        drop = [name for name in rows["train"].column_names if name != "label"]
        return rows.map(_encode, fn_kwargs=options, batched=True, remove_columns=drop, desc=f"Tokenising {self.task}")


class _Tokens(Dataset[Any]):
    """Samples (inputs, class) which, taken together, are padded to the longest of them.

    Padding here rather than in the loader lets every loader of these samples batch them as usual.
    """

    def __init__(self, rows: "datasets.Dataset", padding: Mapping[str, int]) -> None:
        self.rows = rows
        self.padding = padding

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[dict[str, Tensor], int]]:
        rows = self.rows[indices]
        classes = rows.pop("label")
        return list(zip(padded(rows, self.padding), classes, strict=True))


def _encode(
    rows: Mapping[str, list[str]], tokenizer: "PreTrainedTokenizerBase", task: GlueTask, encoding: str, max_length: int
) -> Mapping[str, list[list[int]]]:
    sentences = [rows[name] for name in task.columns]
    if encoding == "pair":
        return tokenizer(*sentences, truncation=True, max_length=max_length)
    texts = [task.text(*each) for each in zip(*sentences, strict=True)]
    return tokenizer(texts, truncation=True, max_length=max_length)


def _name_of_test(task: GlueTask) -> str:
    return task.validation.replace("validation", "test")
