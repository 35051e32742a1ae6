"""The private parts of Lightning that this package relies on, each with the reason. Tried on lightning 2.6.6."""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher

__all__ = [
    "as_training_batch", "batch_progress_of", "prefetcher_of", "saved_batch_progress", "set_sampler_epoch",
    "validates_after_batch",
]  # fmt: skip

set_sampler_epoch = _set_sampler_epoch
"""Tells the samplers of a loader the epoch. The fit loop does it after `on_train_start`, too late for a resumed run."""


def prefetcher_of(trainer: pl.Trainer) -> _PrefetchDataFetcher | None:
    """What the fit loop takes batches from, unless it hands its iterator to `training_step(dataloader_iter)`."""
    # A resumed run takes those from it that the checkpoint has seen; for that, Lightning has no hook. How many a
    # training step takes from the iterator itself, nobody counts.
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher if isinstance(fetcher, _PrefetchDataFetcher) else None


def batch_progress_of(trainer: pl.Trainer) -> Any:
    """The counts of batches: `total`, and of the `current` epoch. Reached by public names, but documented nowhere."""
    return trainer.fit_loop.epoch_loop.batch_progress


def validates_after_batch(trainer: pl.Trainer) -> bool:
    """Whether validation follows the present training batch; asked at its end: Lightning decides behind all hooks."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    return fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)


def saved_batch_progress(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same as a checkpoint holds them, which goes back to the last update; a format that is not documented."""
    progress: dict[str, Any] = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return progress


def as_training_batch(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """A batch as the training step gets it, with the hooks around its transfer to the device."""
    batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
    return module._apply_batch_transfer_handler(batch, trainer.strategy.root_device)
