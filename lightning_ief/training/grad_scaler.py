"""The Trainer's GradScaler, for fp16: gradients are scaled by it, and it is told when they overflow."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_ief.capture import Linearization
from lightning_ief.optim import DirectionOptimizer

__all__ = ["grad_scaler_of", "loss_scale_of", "reported_to_scaler", "require_scaled"]


def grad_scaler_of(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    """The Trainer's GradScaler, if it has one that is switched on."""
    plugin = trainer.precision_plugin
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    return scaler if scaler is not None and scaler.is_enabled() else None


def loss_scale_of(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """The factor S by which fp16 gradients are to be scaled, a scalar that the host has not waited for."""
    return scaler.scale(torch.ones((), device=device))


@contextmanager
def reported_to_scaler(
    scaler: torch.amp.GradScaler, optimizer: DirectionOptimizer, device: torch.device
) -> Iterator[None]:
    """Tell a GradScaler whether gradients overflowed in the step within, so that it changes its scale.

    Args:
        scaler: The GradScaler.
        optimizer: Steps within.
        device: Where.

    Yields:
        Nothing.

    """
    # A GradScaler looks at .grad only, which natural-gradient updates do not have: this stands for it. It must be there
    # until the scaler is updated, which knows optimizers by their address.
    stand_in = nn.Parameter(torch.zeros((), device=device))
    watched = torch.optim.SGD([stand_in])

    def report(stepped: Any, *_: Any) -> None:
        if stand_in.grad is None:  # a step that calls that of its base class comes here twice
            # Losses that are not finite say nothing of the scale: they do not depend on it.
            stand_in.grad = torch.full_like(stand_in, math.inf if stepped.overflowed else 0.0)
            scaler.unscale_(watched)

    handle = optimizer.register_step_post_hook(report)
    try:
        yield
    finally:
        handle.remove()


def require_scaled(linearization: Linearization, loss_scale: Tensor | None) -> None:
    """Refuse a model that computes in fp16 by itself.

    Args:
        linearization: Model and batch, in which something was computed in fp16.
        loss_scale: S, None if nothing is scaled.

    Raises:
        MisconfigurationException: If nothing scales its gradients, or parameters are fp16.

    """
    narrow = [name for name, p in linearization.parameters.items() if p.dtype == torch.float16]
    if narrow:
        raise MisconfigurationException(
            f"Parameter '{narrow[0]}' is fp16, in which updates are lost: use float32 parameters, model.float(), with "
            "Trainer(precision='16-mixed')."
        )
    if loss_scale is None and torch.float16 in linearization.autocasts:
        raise MisconfigurationException(
            f"{type(linearization.model).__name__} computes in fp16 under an autocast of its own, and nothing scales "
            "its gradients. Use Trainer(precision='16-mixed') on a GPU, which does, or bfloat16."
        )
