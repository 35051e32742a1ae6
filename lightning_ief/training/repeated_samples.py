"""Samples that `DistributedSampler` repeats, so that all ranks have equally many: they must count once only."""

import warnings
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler
from torch.utils.data.distributed import DistributedSampler

__all__ = ["warn_of_repeated", "without_repeated"]


def warn_of_repeated(trainer: pl.Trainer) -> None:
    """Warn where repeated samples can't be told from others."""
    loaders = pytree.tree_leaves(trainer.train_dataloader)
    if any(_repeats(loader) and not (len(loaders) == 1 and _in_order(loader)) for loader in loaders):
        warnings.warn(
            "The samples with which DistributedSampler fills up the shares of the ranks will count twice: with several "
            "data loaders, or a batch sampler of another kind than BatchSampler, it is not known where they end up. "
            "Use DistributedSampler(..., drop_last=True), or as many samples as the ranks can share evenly.",
            RuntimeWarning,
            stacklevel=2,
        )


def without_repeated(trainer: pl.Trainer, inputs: Any, targets: Tensor) -> tuple[Any, Tensor]:
    """Drop the sample with which `DistributedSampler` has filled up this rank's share of an epoch, its very last."""
    loaders = pytree.tree_leaves(trainer.train_dataloader)
    if len(loaders) != 1 or not (sampler := _repeats(loaders[0])) or not _in_order(loaders[0]):
        return inputs, targets
    whole, samples = loaders[0].batch_sampler is None, len(targets)
    size = 1 if whole else loaders[0].batch_sampler.batch_size
    left = len(sampler) - trainer.fit_loop.batch_idx * size
    if left > size:
        return inputs, targets
    if not whole and samples != left:
        warnings.warn(
            f"A sample that DistributedSampler has repeated counts twice: there are {samples} samples in this rank's "
            f"last batch, not {left}, and it is not known which it is. Use DistributedSampler(..., drop_last=True).",
            RuntimeWarning,
            stacklevel=2,
        )
        return inputs, targets
    kept = 0 if whole else samples - 1
    return pytree.tree_map(
        lambda x: x[:kept] if isinstance(x, Tensor) and x.shape[:1] == (samples,) else x, (inputs, targets)
    )


def _repeats(loader: Any) -> DistributedSampler | None:
    """The sampler of a loader, if it ends this rank's share of an epoch with a sample that another rank has, too."""
    source = getattr(loader, "batch_sampler", None)  # None for data that come in batches
    sampler = getattr(loader if source is None else source, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return None
    own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    return sampler if len(sampler) > own else None


def _in_order(loader: Any) -> bool:
    """Whether batches are made of what the sampler yields, one after the other."""
    return loader.batch_sampler is None or type(loader.batch_sampler).__iter__ is BatchSampler.__iter__
