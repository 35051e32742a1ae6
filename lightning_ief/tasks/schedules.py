"""Learning rates over a run: optimizer and scheduler of the modules that recipes train."""

import math
from functools import partial
from typing import Literal, TypeAlias

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI, LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["Schedule", "configured", "multiple", "require_schedule"]

Schedule: TypeAlias = Literal["linear", "cosine"] | LRSchedulerCallable | None
"""'linear' or 'cosine': from lr down to 0 over all steps of the run; or what makes a scheduler from the optimizer,
stepped after each epoch; or None for a constant lr."""


def require_schedule(lr_scheduler: Schedule, warmup: float) -> None:
    """Require a schedule and a warm-up that go together.

    Args:
        lr_scheduler: The schedule.
        warmup: Share of the run's steps in which lr rises.

    Raises:
        ValueError: If they do not.

    """
    if isinstance(lr_scheduler, str) and lr_scheduler not in ("linear", "cosine"):
        raise ValueError(f"lr_scheduler='{lr_scheduler}': must be 'linear', 'cosine', a class path, or None.")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup={warmup}: must be at least 0 and less than 1, a share of the run's steps.")
    if warmup and callable(lr_scheduler):
        raise ValueError(
            f"warmup={warmup}: goes with lr_scheduler 'linear', 'cosine' or None; a scheduler of your own has to warm "
            "up by itself, as torch's OneCycleLR does."
        )


def configured(
    module: L.LightningModule, optimizer: OptimizerCallable, lr_scheduler: Schedule, warmup: float = 0.0
) -> OptimizerLRScheduler:
    """Make what `configure_optimizers` returns, of the parameters that are trained.

    Args:
        module: Whose parameters.
        optimizer: Makes the optimizer.
        lr_scheduler: The schedule of its lr.
        warmup: Share of the run's steps in which lr rises from 0, before that.

    Returns:
        What Lightning expects.

    Raises:
        MisconfigurationException: If lr is to move over a run without end.

    """
    made = optimizer([p for p in module.parameters() if p.requires_grad])
    if callable(lr_scheduler) or (lr_scheduler is None and not warmup):
        scheduler = None if lr_scheduler is None else lr_scheduler(made)
        found: OptimizerLRScheduler = LightningCLI.configure_optimizers(module, made, scheduler)
        return found
    steps = float(module.trainer.estimated_stepping_batches)  # updates, which NaturalGradientMixin sees to
    if steps == float("inf"):
        raise MisconfigurationException(
            f"lr_scheduler='{lr_scheduler}' and warmup={warmup} need to know when training ends: set max_epochs or "
            "max_steps of the Trainer, to other than -1."
        )
    # Its function is not in checkpoints, so that a run which is resumed for longer falls to 0 at its new end.
    over_the_run = LambdaLR(made, partial(multiple, steps=steps, warmup=warmup, decay=lr_scheduler))
    return {"optimizer": made, "lr_scheduler": {"scheduler": over_the_run, "interval": "step"}}


def multiple(step: int, steps: float, warmup: float, decay: Literal["linear", "cosine"] | None) -> float:
    """What lr is multiplied by in a step of a run.

    Args:
        step: Steps before it.
        steps: Steps of the run.
        warmup: Share of them in which lr rises linearly, from next to 0.
        decay: How it falls to 0 after that; it does not if None.

    Returns:
        From 0 to 1.

    Example:
        >>> [multiple(step, steps=10, warmup=0.2, decay="linear") for step in (0, 1, 2, 6, 10)]
        [0.333..., 0.666..., 1.0, 0.5, 0.0]

    """
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    done = min(1.0, (step - rise) / max(1.0, steps - rise))
    return {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, None: 1.0}[decay]
