"""GLUE: what is asked, tokens, order, and what is said when data are missing."""

import socket
import sys
import time
from pathlib import Path

import pytest
import torch

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

from lightning_ief.tasks.glue import TASKS, GlueDataModule  # noqa: E402
from tests.tasks.text_stand_ins import sentences, write_glue, write_tokenizer  # noqa: E402

# The paper's Table 2, for S1 = "a {S2}" and S2 = "b": braces in a sentence are text. Words in the order of the labels.
ASKED = {
    "cola": (
        "Classify if the following sentence's grammar is acceptable or unacceptable: a {S2}",
        ["unacceptable", "acceptable"],
        ["matthews", "accuracy"],
    ),
    "sst2": (
        "Classify if the following sentence's sentiment is positive or negative: a {S2}",
        ["negative", "positive"],
        ["accuracy"],
    ),
    "qqp": (
        "Classify if the following Q1 and Q2 are semantically equivalent, answer yes or no: Q1: a {S2} Q2: b",
        ["no", "yes"],
        ["f1", "accuracy"],
    ),
    "mrpc": (
        "Classify if the following S1 and S2 are semantically equivalent, answer yes or no: S1: a {S2} S2: b",
        ["no", "yes"],
        ["f1", "accuracy"],
    ),
    "mnli": (
        "Predict whether the premise entails the hypothesis, contradicts the hypothesis,or neither, answer yes, no or "
        "maybe: premise: a {S2} hypothesis: b",
        ["yes", "maybe", "no"],
        ["accuracy"],
    ),
    "qnli": (
        "Determine whether the context sentence S contains the answer to the question Q, answer yes or no: Q: a {S2} "
        "S: b",
        ["yes", "no"],
        ["accuracy"],
    ),
    "rte": (
        "Classify if S1 entailment S2 or not, answer yes or no: S1: a {S2} S2: b",
        ["yes", "no"],
        ["accuracy"],
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def make(tmp_path, tokenizer):
    """Make a data module on a stand-in of its task."""

    def module(task: str = "cola", **options) -> GlueDataModule:
        if task in TASKS and not (tmp_path / task).is_dir():
            write_glue(tmp_path, task)
        return GlueDataModule(task, tokenizer, **{"source": str(tmp_path), **options})

    return module


def prepared(module: GlueDataModule) -> GlueDataModule:
    module.prepare_data()
    module.setup()
    return module


def texts(module: GlueDataModule, batch) -> list[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(module.tokenizer)
    return tokenizer.batch_decode(batch[0]["input_ids"], skip_special_tokens=True)


def test_all_tasks_are_asked_for():
    assert TASKS.keys() == ASKED.keys()


@pytest.mark.parametrize("task", TASKS)
def test_task_is_asked_as_in_the_paper(task, make):
    text, words, metrics = ASKED[task]
    assert TASKS[task].text("a {S2}", "b") == text
    module = prepared(make(task))
    assert module.num_classes == len(words) and list(module.metrics) == metrics
    tokenizer = transformers.AutoTokenizer.from_pretrained(module.tokenizer)
    assert [tokenizer.decode(tokens) for tokens in module.label_tokens] == [f"{word}</s>" for word in words]
    batch = next(iter(module.val_dataloader()))
    rows = sentences(24, len(words), seed=1)
    assert texts(module, batch) == [TASKS[task].text(*row[:2]) for row in rows]
    assert batch[1].tolist() == [row[2] for row in rows] and batch[1].dtype == torch.int64


def test_batches_are_padded_to_their_longest(make):
    module = prepared(make(batch_size=4))
    lengths = set()
    for inputs, classes in module.train_dataloader():
        assert inputs.keys() == {"input_ids", "attention_mask"} and len(classes) == 4
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape
        assert mask.sum(1).max() == ids.shape[1]
        assert torch.equal(mask, (ids != 0).long())  # 0 is the padding
        assert bool((mask.diff(dim=1) <= 0).all())  # on the right
        lengths.add(ids.shape[1])
    assert len(lengths) > 1
    inputs, label = module.train_set[0]
    assert bool(inputs["attention_mask"].all()) and label == sentences(48, 2)[0][2]


def test_pairs_are_encoded_as_they_are(make):
    module = prepared(make("rte", encoding="pair"))
    first, second, _ = sentences(24, 2, seed=1)[0]
    assert texts(module, next(iter(module.val_dataloader())))[0].split() == f"{first} {second}".split()


def test_long_inputs_are_cut(make):
    ids = next(iter(prepared(make(max_length=9)).val_dataloader()))[0]["input_ids"]
    assert ids.shape == (24, 9) and bool((ids[:, -1] == 1).all())  # the end of the text is kept


def test_jsonl_is_read_and_mnli_validated_on_its_matched_set(tmp_path, make):
    write_glue(tmp_path, "mnli", kind="jsonl")
    module = prepared(make("mnli"))
    assert [len(x) for x in (module.train_set, module.val_set, module.test_set)] == [48, 24, 6]


def test_order_depends_on_seed_and_epoch_alone(make):
    def order(epoch: int, **options) -> list[str]:
        module = prepared(make(**options))
        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)  # as Lightning does
        return [text for batch in loader for text in texts(module, batch)]

    torch.manual_seed(1)
    first = order(0)
    torch.manual_seed(2)
    assert order(0) == first != order(1)
    assert sorted(order(1)) == sorted(first)
    assert order(0, seed=1) != first
    other = order(0, train_size=10, order_seed=1)  # of the same subset
    assert other != order(0, train_size=10) and sorted(other) == sorted(order(0, train_size=10))


def test_subset_depends_on_its_seed_alone(make):
    def chosen(seed: int) -> list[list[int]]:
        return prepared(make(train_size=10, seed=seed)).train_set.rows["input_ids"]

    assert len(chosen(0)) == 10 and chosen(0) == chosen(0) != chosen(1)


def test_tokens_are_cached(make, cache):
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}

    prepared(make())
    before = files()
    assert len(before) == 6  # three sets, as they are and as tokens
    prepared(make())
    assert files() == before
    prepared(make(max_length=9))
    assert len(files()) == 9


def test_test_set_needs_labels(tmp_path, make):
    with pytest.raises(ValueError, match="lightning-ief validate"):
        prepared(make()).test_dataloader()
    for path in (tmp_path / "cola").glob("test-*"):
        path.unlink()
    with pytest.raises(ValueError, match="no test set with labels"):
        prepared(make()).test_dataloader()
    (validation,) = (tmp_path / "cola").glob("validation-*")
    (tmp_path / "cola" / "test.parquet").write_bytes(validation.read_bytes())
    assert len(next(iter(prepared(make()).test_dataloader()))[1]) == 24


def test_other_labels_and_columns_are_refused(tmp_path, make):
    folder = write_glue(tmp_path, "sst2", kind="jsonl")
    file = folder / "train.jsonl"
    rows = file.read_text()
    file.write_text(rows.replace('"label": 1', '"label": 2'))
    with pytest.raises(ValueError, match=r"labels of 'train' must be 0 … 1, there are \[2\]"):
        prepared(make("sst2"))
    for file in folder.iterdir():
        file.write_text(file.read_text().replace("sentence", "text"))
    with pytest.raises(ValueError, match=r"no column sentence among \['text', 'label', 'idx'\]"):
        prepared(make("sst2"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"train_size": 0}, "train_size=0"),
        ({"train_size": 49}, "cola has 48 training samples"),
        ({"task": "wnli"}, "task='wnli'"),
        ({"encoding": "prompt"}, "encoding='prompt'"),
    ],
)
def test_arguments_out_of_range_are_refused(options, named, make):
    with pytest.raises(ValueError, match=named):
        prepared(make(**options))


# --- what is missing


@pytest.fixture
def silent(monkeypatch):
    """A hub that takes connections and never answers."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield


@pytest.fixture
def unreachable(silent, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("network", "why"),
    [("offline", "HF_HUB_OFFLINE is set"), ("unreachable", "does not answer"), ("silent", "does not answer")],
)
def test_missing_data_say_what_to_get_and_where_to_put_it(network, why, make, request):
    request.getfixturevalue(network)
    module = make(source="nyu-mll/glue")
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=why) as caught:
        module.prepare_data()
    assert time.perf_counter() - start < 2.5
    assert "hf download nyu-mll/glue --repo-type dataset --local-dir glue" in str(caught.value)
    assert "GlueDataModule.source=PATH/TO/glue" in str(caught.value)


def test_missing_tokenizer_says_what_to_get(make, unreachable):
    module = make()
    module.tokenizer = "google-t5/t5-base"
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=r"hf download google-t5/t5-base --local-dir t5-base.*GlueDataModule"):
        module.prepare_data()
    assert time.perf_counter() - start < 2.5


def test_missing_folders_are_named(make, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        make(source=str(tmp_path / "nowhere")).prepare_data()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no .*empty/cola/train-\*.parquet .*columns sentence, label.*hf down"):
        make(source=str(tmp_path / "empty")).prepare_data()


@pytest.mark.parametrize("package", ["datasets", "transformers"])
def test_missing_package_names_the_extra(package, make, monkeypatch):
    module = make()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}: pip install 'lightning-ief\[text\]'"):
        module.prepare_data()
