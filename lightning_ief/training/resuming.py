"""A run that is resumed within an epoch goes on with the batches that its checkpoint has not seen."""

import warnings
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch.utils import _pytree as pytree

from lightning_ief.training.lightning_internals import (
    batch_progress_of,
    prefetcher_of,
    saved_batch_progress,
    set_sampler_epoch,
)

__all__ = ["go_back_to_update", "pass_over_seen_batches"]


def pass_over_seen_batches(trainer: pl.Trainer) -> None:
    """Have a resumed run go on with the data behind those that the checkpoint has seen.

    Lightning counts on from there, but lets data loaders begin anew, in the order of the first epoch if they have
    workers, unless they restore their position themselves.

    Args:
        trainer: The Trainer, about to train.

    Raises:
        MisconfigurationException: If the epoch has fewer batches.

    """
    loop, progress = trainer.fit_loop, batch_progress_of(trainer)
    fetcher = prefetcher_of(trainer)
    if trainer.ckpt_path is None or fetcher is None or _loaders_restore_themselves(trainer):
        return
    for loader in pytree.tree_leaves(trainer.train_dataloader):
        set_sampler_epoch(loader, cast(Any, loop.epoch_progress).current.processed)
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


def go_back_to_update(trainer: pl.Trainer, checkpoint: dict[str, Any], updated: int) -> None:
    """Have a checkpoint say that the run stands at its last update: no checkpoint holds micro-batches seen since then.

    Args:
        trainer: The Trainer.
        checkpoint: About to be written; its counts of batches are changed.
        updated: Batches of all epochs up to the last update.

    """
    progress = saved_batch_progress(checkpoint)
    since = progress["total"]["processed"] - updated
    if since <= 0:
        return
    if _loaders_restore_themselves(trainer):
        warnings.warn(
            f"A checkpoint between updates: the {since} micro-batches since the last one will be missing from a "
            "run that resumes from it, since the data loader restores its own position. Save after updates: "
            "ModelCheckpoint(every_n_train_steps=...).",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    for counts in (progress["total"], progress["current"]):
        counts.update({name: count - since for name, count in counts.items()})


def _loaders_restore_themselves(trainer: pl.Trainer) -> bool:
    """Whether a data loader restores its position in an epoch itself, as Lightning lets it."""
    loaders = pytree.tree_leaves(trainer.train_dataloader)
    return any(hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") for loader in loaders)
