"""What the data modules of this package share: batches of data sets that are in memory."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

__all__ = ["InMemoryDataModule", "Sample", "padded"]

Sample: TypeAlias = tuple[Tensor, ...]
"""Input and target."""

_APART = 1_000_003


class InMemoryDataModule(L.LightningDataModule):
    """Loads batches of `train_set`, `val_set` and `test_set`, which a subclass's `setup` provides.

    Training samples are shuffled anew in each epoch; their order depends on `order_seed` and the number of the epoch,
    so that a resumed run sees what the uninterrupted one would have seen.

    Args:
        batch_size: N, samples per batch; the last batch of an epoch may hold fewer.
        seed: Seed of whatever else a subclass draws, such as its split.
        num_workers: Processes that load the data; the samples are in memory, so 0 is fastest.
        order_seed: Seed of the order of the training samples, and of nothing else; `seed` if None.
        eval_batch_size: Samples per batch of validation and test; N if None.

    Raises:
        ValueError: If an argument is out of range.

    """

    train_set: Dataset[Sample]
    val_set: Dataset[Sample]
    test_set: Dataset[Sample]

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        order_seed: int | None = None,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._require_positive(batch_size=batch_size, eval_batch_size=eval_batch_size)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.num_workers = num_workers
        # Far apart, since the sampler draws from the sum of its seed and the epoch.
        self.order_seed = seed if order_seed is None else _APART * order_seed

    def _require_positive(self, **counts: int | None) -> None:
        """Raise ValueError if an argument is there and below 1."""
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{type(self).__name__}({name}={value}): must be at least 1.")

    def train_dataloader(self) -> DataLoader[Sample]:
        """Batches of the training set, shuffled.

        Returns:
            The loader.

        """
        # A sampler for one or several processes; Lightning tells it the epoch, from which it draws the order.
        sampler: DistributedSampler[Sample] = DistributedSampler(
            self.train_set,
            num_replicas=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
            seed=self.order_seed,
        )
        return DataLoader(self.train_set, self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Batches of the validation set, in order.

        Returns:
            The loader.

        """
        return DataLoader(self.val_set, self.eval_batch_size or self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Batches of the test set, in order.

        Returns:
            The loader.

        """
        return DataLoader(self.test_set, self.eval_batch_size or self.batch_size, num_workers=self.num_workers)


def padded(columns: Mapping[str, Sequence[list[int]]], padding: Mapping[str, int]) -> list[dict[str, Tensor]]:
    """Pad the tokens of some samples, on the right, to the longest of them.

    Args:
        columns: What the tokenizer returns of each sample, by name.
        padding: What stands behind the end, by name; 0 where nothing is said.

    Returns:
        The samples, each [T] by name.

    Example:
        >>> padded({"input_ids": [[5, 6], [7]]}, {"input_ids": 1})[1]
        {'input_ids': tensor([7, 1])}

    """
    longest = max(len(tokens) for column in columns.values() for tokens in column)
    tensors = {
        name: torch.tensor([tokens + [padding.get(name, 0)] * (longest - len(tokens)) for tokens in column])
        for name, column in columns.items()
    }
    samples = len(next(iter(tensors.values())))
    return [{name: x[n] for name, x in tensors.items()} for n in range(samples)]
