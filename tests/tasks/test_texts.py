"""Texts in a folder: what becomes a sample, what is held out, padding."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from lightning_ief.tasks import TextFolderDataModule  # noqa: E402
from lightning_ief.tasks.hub import MissingError  # noqa: E402
from tests.tasks.text_stand_ins import write_texts, write_tokenizer  # noqa: E402


def texts_of(rows) -> list[str]:
    tokenizer = transformers.ByT5Tokenizer()
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]


def data(folder, **options) -> TextFolderDataModule:
    module = TextFolderDataModule(str(folder), **{"batch_size": 4, **options})
    module.setup()
    return module


def test_texts_are_cut_into_pieces_of_which_the_last_are_held_out(tmp_path):
    (tmp_path / "deep").mkdir()
    text = "".join(chr(ord("a") + n % 26) for n in range(95))
    (tmp_path / "deep" / "one.txt").write_text(text, encoding="utf-8")
    (tmp_path / "other.md").write_text("not read", encoding="utf-8")
    module = data(tmp_path, max_length=10, val_share=0.2, test_share=0.1)
    parts = [texts_of(part) for part in (module.train_set, module.val_set, module.test_set)]
    assert [len(part) for part in parts] == [7, 2, 1]
    assert "".join("".join(part) for part in parts) == text
    assert len(module.test_set[0]["input_ids"]) == 6  # five bytes that are left, and the end of the text


def test_lines_are_samples_and_batches_are_padded_to_their_longest(tmp_path):
    module = data(write_texts(tmp_path / "texts"), separator="\n", max_length=30)
    lines = [line for path in sorted((tmp_path / "texts").glob("*.txt")) for line in path.read_text().splitlines()]
    assert texts_of(module.train_set)[0] == lines[0][:30]
    for batch in module.train_dataloader():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape and bool(mask.sum(1).max() == mask.shape[1])
        assert torch.equal(mask.cumprod(1), mask)  # padding stands on the right
        assert bool((ids[mask == 0] == 0).all()) and bool((ids[mask == 1] > 0).all())


def test_a_tokenizer_of_a_folder_is_taken(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    module = data(write_texts(tmp_path / "texts"), separator="\n", tokenizer=str(tmp_path / "tokenizer"))
    line = (tmp_path / "texts" / "0.txt").read_text().splitlines()[0]
    assert module.train_set[0]["input_ids"].tolist() == tokenizer(line)["input_ids"]


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"max_length": 1}, ValueError, "two tokens"),
        ({"val_share": 0.6, "test_share": 0.5}, ValueError, "less than 1 together"),
        ({"separator": ""}, ValueError, "give None"),
        ({"max_length": 100_000}, ValueError, "leave no training set|leave no validation set"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, options, error, named):
    with pytest.raises(error, match=named):
        data(write_texts(tmp_path / "texts", files=1), **options)


def test_a_folder_without_texts_is_named(tmp_path):
    with pytest.raises(MissingError, match=r"there are no files \*\.txt"):
        data(tmp_path)
