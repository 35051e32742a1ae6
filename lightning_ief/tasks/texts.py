"""Texts in a folder, as tokens for language models."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_ief.tasks.extras import import_extra
from lightning_ief.tasks.hub import MissingError, load
from lightning_ief.tasks.loaders import InMemoryDataModule, padded

if TYPE_CHECKING:  # an extra that takes seconds to import
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextFolderDataModule"]


class TextFolderDataModule(InMemoryDataModule):
    """Texts of a folder, in pieces of at most T tokens; batches are {input_ids, attention_mask}, padded on the right.

    The last pieces of every text are held out, so that no piece of a held-out part has been trained on.

    Args:
        folder: Where the files `*.txt` are, in it or below it; UTF-8.
        tokenizer: Id on the Hugging Face hub, or a folder; 'bytes' for those of UTF-8 with transformers' ByT5Tokenizer,
            a vocabulary of 384.
        max_length: T, tokens of a piece.
        separator: What stands between samples, such as a newline, or two between paragraphs; None for texts as a whole.
            What is longer than T is cut into pieces of T.
        val_share: Share of each text for validation, behind the training set.
        test_share: Share of each text for the test, behind that.
        batch_size: N, pieces per batch; the last batch of an epoch may hold fewer.
        seed: Unused, for nothing else is drawn; see order_seed.
        num_workers: Processes that load the data; the samples are in memory, so 0 is fastest.
        order_seed: Seed of the order of the training samples.

    Raises:
        ValueError: If an argument is out of range.

    """

    def __init__(
        self,
        folder: str,
        tokenizer: str = "bytes",
        max_length: int = 128,
        separator: str | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        order_seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, order_seed)
        if max_length < 2:  # noqa: PLR2004
            raise ValueError(
                f"TextFolderDataModule(max_length={max_length}): a piece needs two tokens, one to predict."
            )
        if not (val_share >= 0 and test_share >= 0 and val_share + test_share < 1):
            raise ValueError(
                f"TextFolderDataModule(val_share={val_share}, test_share={test_share}): must be ≥ 0, and less than 1 "
                "together."
            )
        if separator == "":
            raise ValueError("TextFolderDataModule(separator=''): give None where nothing separates samples.")
        self.folder = folder
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.separator = separator
        self.val_share = val_share
        self.test_share = test_share

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the texts.

        Args:
            stage: What Lightning is about to do; the data are the same for all.

        Raises:
            MissingError: If there are no texts, or the tokenizer is missing.
            ValueError: If a part has no piece of two tokens.

        """
        paths = sorted(Path(self.folder).expanduser().rglob("*.txt"))
        if not paths:
            raise MissingError(f"TextFolderDataModule.folder={self.folder}: there are no files *.txt in it.")
        tokenizer = self._tokenizer()
        parts: tuple[list[list[int]], ...] = ([], [], [])
        for path in paths:
            pieces = self._pieces(path.read_text(encoding="utf-8"), tokenizer)
            count = len(pieces)
            test = round(count * self.test_share)
            val = round(count * self.val_share)
            ends = (count - val - test, count - test, count)
            for part, start, end in zip(parts, (0, *ends), ends, strict=False):
                part.extend(pieces[start:end])
        shares = (1.0, self.val_share, self.test_share)
        for name, part, share in zip(("training", "validation", "test"), parts, shares, strict=True):
            if share and not part:
                raise ValueError(
                    f"TextFolderDataModule(folder={self.folder!r}): {len(paths)} files leave no {name} set. Give "
                    f"longer texts, a smaller max_length ({self.max_length}), or another share."
                )
        # Models without a token for padding never see what stands there: the mask leaves it out.
        pad = tokenizer.pad_token_id or 0
        self.train_set, self.val_set, self.test_set = (_Pieces(part, pad) for part in parts)

    def _pieces(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
        samples = [text] if self.separator is None else text.split(self.separator)
        encoded: Sequence[list[int]] = tokenizer([each.strip() for each in samples], verbose=False)["input_ids"]
        cut = [ids[k : k + self.max_length] for ids in encoded for k in range(0, len(ids), self.max_length)]
        return [piece for piece in cut if len(piece) > 1]

    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        transformers = import_extra("transformers", "text", "TextFolderDataModule needs transformers")
        if self.tokenizer == "bytes":
            tokenizer: PreTrainedTokenizerBase = transformers.ByT5Tokenizer()
            return tokenizer
        return load(transformers.AutoTokenizer.from_pretrained, self.tokenizer, option="TextFolderDataModule.tokenizer")


class _Pieces(Dataset[Any]):
    """Samples which, taken together, are padded to the longest of them."""

    def __init__(self, pieces: Sequence[list[int]], pad: int) -> None:
        self.pieces = pieces
        self.pad = pad

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        ids = [self.pieces[n] for n in indices]
        return padded({"input_ids": ids, "attention_mask": [[1] * len(each) for each in ids]}, {"input_ids": self.pad})
