"""What the mixin does in hooks of the Trainer, whichever of its own hooks a subclass overrides."""

import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_ief.optim import DirectionOptimizer
from lightning_ief.training.grad_scaler import grad_scaler_of
from lightning_ief.training.lightning_internals import batch_progress_of, validates_after_batch
from lightning_ief.training.refusals import require_supported_strategy, warn_of_idle_hooks
from lightning_ief.training.repeated_samples import warn_of_repeated
from lightning_ief.training.resuming import go_back_to_update, pass_over_seen_batches
from lightning_ief.training.schedulers import Schedulers

__all__ = ["TrainingHooks"]


class TrainingHooks(Callback):
    """The callback of one module.

    Args:
        schedulers: Steps the schedulers of the module.

    Attributes:
        scales_gradients: Whether the Trainer has a GradScaler.
        first_step: The Trainer's count of steps at the start of this run.
        optimized: Whether `optimize` of the module has been called in this run.
        told_of_loss: Whether it was said that what `training_step` returns trains nothing.

    """

    def __init__(self, schedulers: Schedulers) -> None:
        self.schedulers = schedulers
        self.scales_gradients = False
        self.optimized = False
        self.told_of_loss = False
        # Not in the module, whose plain attributes belong to the state that a forward pass runs in.
        self.ends_epoch = False  # within a hook of a subclass of the mixin
        self.kept_logits: list[Tensor] | None = None  # of the present step, where they are wanted
        self._updated = 0  # batches of all epochs up to the last update
        self._validates = False  # behind an update
        self.first_step = 0

    def note_update(self, trainer: pl.Trainer) -> None:
        """Note that the present batch is the last one of an update: a checkpoint goes back to there."""
        self._updated = batch_progress_of(trainer).total.processed + 1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        self.optimized = False
        self.scales_gradients = grad_scaler_of(trainer) is not None
        warn_of_idle_hooks(pl_module)
        self.schedulers.require_metrics(pl_module)  # now, not after an epoch
        if _direction_optimizers(trainer):
            require_supported_strategy(trainer.strategy)

    def attach_to(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the Trainer call these hooks, where it does not: its Tuner runs without the callbacks of the run."""
        trainer.callbacks.append(self)  # type: ignore[attr-defined]  # set by a connector, unknown to type checkers
        self.on_fit_start(trainer, pl_module)
        self._begin(trainer, pl_module)
        self.optimized = True

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._updated = batch_progress_of(trainer).total.processed
        self.first_step = trainer.global_step
        self.schedulers.begin(pl_module)
        self._validates = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        self._begin(trainer, pl_module)
        pass_over_seen_batches(trainer)
        if trainer.world_size > 1:
            warn_of_repeated(trainer)

    def on_train_batch_start(  # noqa: D102
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        module: Any = pl_module  # of NaturalGradientMixin
        module.capture_checks = 0
        # All ranks start from the buffers of the first, as with automatic optimization.
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.require_forward_param_sync = True

    def on_train_batch_end(  # noqa: D102
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        optimizers = _direction_optimizers(trainer)
        if outputs and optimizers and not self._has_trained(trainer):
            raise MisconfigurationException(_trains_nothing(pl_module))
        is_update = not any(optimizer.pending for optimizer in optimizers)
        # As with automatic optimization: those that follow a metric behind a validation that may log it, others before.
        self._validates = bool(trainer.lr_scheduler_configs) and validates_after_batch(trainer)
        if is_update:
            self.schedulers.step(pl_module, "step", batch_idx + 1)
            if not self._validates:
                self.schedulers.step(pl_module, "step", batch_idx + 1, plateau=True)
        if trainer.is_last_batch:
            self.schedulers.step(pl_module, "epoch", trainer.current_epoch + 1)
        self._validates &= is_update

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        if self._validates:
            self._validates = False
            self.schedulers.step(pl_module, "step", batch_progress_of(trainer).current.ready, plateau=True)

    def end_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What follows the module's own hook at the end of an epoch, in which it may log, or step a scheduler."""
        self.schedulers.take_back(pl_module)
        self.schedulers.step(pl_module, "epoch", trainer.current_epoch + 1, plateau=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        if not self._has_trained(trainer):
            warnings.warn(_trains_nothing(pl_module), RuntimeWarning, stacklevel=2)

    def _has_trained(self, trainer: pl.Trainer) -> bool:
        return self.optimized or trainer.global_step != self.first_step

    def on_save_checkpoint(  # noqa: D102
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if any(optimizer.accumulate > 1 for optimizer in _direction_optimizers(trainer)):
            go_back_to_update(trainer, checkpoint, self._updated)


def _direction_optimizers(trainer: pl.Trainer) -> list[DirectionOptimizer]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, DirectionOptimizer)]


def _trains_nothing(module: pl.LightningModule) -> str:
    return (
        f"{type(module).__name__}.training_step has taken no step yet: a loss that it returns trains nothing, since "
        "NaturalGradientMixin optimizes by hand. Delete training_step, for the mixin has one, and must stand before "
        "other bases that have one; or call losses = self.optimize(inputs, targets) there."
    )
