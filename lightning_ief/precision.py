"""The Trainer's precision: what is refused, and the loss scale of fp16."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_ief.optim import DirectionOptimizer

__all__ = ["loss_scale_of", "reported_to_scaler", "require_precision"]


def require_precision(trainer: pl.Trainer) -> None:
    """Refuse precisions that lose small per-sample gradients.

    Args:
        trainer: The Trainer.

    Raises:
        MisconfigurationException: If its weights are fp16, or nothing scales the gradients of fp16.

    """
    fp16 = trainer.precision in ("16-mixed", "16-true", "transformer-engine-float16")
    if fp16 and _scaler(trainer) is None:
        raise MisconfigurationException(
            f"Trainer(precision='{trainer.precision}') would lose small per-sample gradients. Use '16-mixed' on a "
            "GPU, which scales them, 'bf16-mixed' or '32-true'."
        )


def loss_scale_of(trainer: pl.Trainer, device: torch.device) -> Tensor | None:
    """The factor by which fp16 gradients are to be scaled.

    Args:
        trainer: The Trainer.
        device: Where.

    Returns:
        S of its GradScaler, a scalar that the host has not waited for; None if it has none.

    """
    scaler = _scaler(trainer)
    return None if scaler is None else scaler.scale(torch.ones((), device=device))


@contextmanager
def reported_to_scaler(trainer: pl.Trainer, optimizer: DirectionOptimizer, device: torch.device) -> Iterator[None]:
    """Tell the Trainer's GradScaler whether gradients overflowed, so that it changes its scale.

    Args:
        trainer: The Trainer, perhaps without a GradScaler.
        optimizer: Steps within.
        device: Where.

    Yields:
        Nothing.

    """
    scaler = _scaler(trainer)
    if scaler is None:
        yield
        return

    def report(stepped: Any, *_: Any) -> None:
        # A GradScaler looks at .grad only, which natural-gradient updates do not have: this stands for it.
        stand_in = nn.Parameter(torch.zeros((), device=device))
        stand_in.grad = torch.full_like(stand_in, 0.0 if stepped.finite else math.inf)
        scaler.unscale_(torch.optim.SGD([stand_in]))

    handle = optimizer.register_step_post_hook(report)
    try:
        yield
    finally:
        handle.remove()


def _scaler(trainer: pl.Trainer) -> "torch.amp.GradScaler | None":
    plugin = trainer.precision_plugin
    return plugin.scaler if isinstance(plugin, MixedPrecision) else None
