"""Where in the data a run stands: resumed within an epoch, or at its end, where ranks repeat samples."""

import warnings
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler
from torch.utils.data.distributed import DistributedSampler

__all__ = ["progress_of", "restore_position", "restores_position", "warn_of_repeated", "without_repeated"]


def progress_of(trainer: pl.Trainer) -> Any:
    """Lightning's counts of batches: `total`, and of the `current` epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress


def _loaders(trainer: pl.Trainer) -> list[Any]:
    """The loaders of training data; more than one where they are combined."""
    return pytree.tree_leaves(trainer.train_dataloader)


def restores_position(trainer: pl.Trainer) -> bool:
    """Whether a data loader restores its position in an epoch itself, as Lightning lets it."""
    return any(hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") for loader in _loaders(trainer))


def restore_position(trainer: pl.Trainer) -> None:
    """Have a resumed run go on with the data behind those that the checkpoint has seen.

    Lightning counts on from there, but lets data loaders begin anew, in the order of the first epoch if they have
    workers, unless they restore their position themselves.

    Raises:
        MisconfigurationException: If the epoch has fewer batches.

    """
    loop, progress, epochs = trainer.fit_loop, progress_of(trainer), cast(Any, trainer.fit_loop.epoch_progress)
    fetcher = loop._data_fetcher
    # What fetches for training_step(dataloader_iter) is another class: there, it is not known how many were fetched.
    if trainer.ckpt_path is None or restores_position(trainer) or not isinstance(fetcher, _PrefetchDataFetcher):
        return
    for loader in _loaders(trainer):
        _set_sampler_epoch(loader, epochs.current.processed)
    iter(fetcher)
    if not loop.restarting or progress.is_last_batch:
        return
    seen = progress.current.processed
    for number in range(seen):
        if next(fetcher, None) is None:
            raise MisconfigurationException(
                f"The checkpoint was written after {seen} batches of an epoch, the data loader has {number} only: "
                "resume with the same data and the same number of samples in the batches of all ranks together."
            )
    fetcher.fetched -= seen  # to which Lightning adds the same number
    if seen:
        rank_zero_info(f"Passed over the {seen} batches of the epoch that the checkpoint has seen.")


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


def warn_of_repeated(trainer: pl.Trainer) -> None:
    """Warn where repeated samples can't be told from others."""
    loaders = _loaders(trainer) if trainer.world_size > 1 else []
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
    loaders = _loaders(trainer) if trainer.world_size > 1 else []
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
