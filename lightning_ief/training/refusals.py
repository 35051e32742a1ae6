"""What a Trainer is asked for that the optimizers of this package can't do exactly: refused before the run."""

import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_ief.training.grad_scaler import grad_scaler_of

__all__ = [
    "require_model",
    "require_supported_options",
    "require_supported_strategy",
    "warn_of_idle_hooks",
    "warn_of_idle_loss",
]

_INSTEAD = {
    "optimizer_step": "an lr scheduler for warm-up; Callback.on_before_optimizer_step or optimize for the rest",
    "configure_gradient_clipping": "max_norm=... of the optimizer bounds its steps; there is no .grad to clip",
    "optimizer_zero_grad": "there is no .grad to set to zero",
    "on_before_zero_grad": "on_train_batch_end, which follows the step; there is no .grad",
}
"""Hooks that Lightning calls under automatic optimization alone, and what to use here."""


def require_supported_options(trainer: pl.Trainer, module: pl.LightningModule | None = None) -> None:
    """Refuse options that have another place, and fp16 without a GradScaler, which loses small per-sample gradients."""
    if getattr(module, "_compiler_ctx", None) is not None:  # by which Lightning knows torch.compile(module)
        raise MisconfigurationException(
            f"torch.compile({type(module).__name__}(...)) compiles the training step, in which operations on "
            "parameters could not be seen. Compile what it calls: self.net = torch.compile(self.net)."
        )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, unknown to type checkers
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise MisconfigurationException(
            "GradientAccumulationScheduler adds up gradients, from which the update of the joint batch can't be had. "
            "Remove it and give the optimizer accumulate=k, which makes one exact update of k batches."
        )
    if trainer.gradient_clip_val:
        raise MisconfigurationException(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips .grad, which natural-gradient updates "
            "don't have. Remove it; max_norm=... of the optimizer bounds the length of a step, in units of the "
            "parameters: it is not the same number."
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) adds up gradients, from which "
            "the update of the joint batch can't be had. Remove it and give the optimizer accumulate="
            f"{trainer.accumulate_grad_batches}, which makes one exact update of so many batches."
        )
    fp16 = trainer.precision in ("16-mixed", "16-true", "transformer-engine-float16")
    if fp16 and grad_scaler_of(trainer) is None:
        raise MisconfigurationException(
            f"Trainer(precision='{trainer.precision}') would lose small per-sample gradients. Use '16-mixed' on a "
            "GPU, with a GradScaler that scales them, 'bf16-mixed' or '32-true'."
        )


def require_model(module: pl.LightningModule) -> None:
    """Refuse a module that has no objective or no forward, before the first batch."""
    name = type(module).__name__
    if getattr(module, "objective", None) is None:
        raise MisconfigurationException(
            f"{name} has no objective, which turns logits and targets into losses: write self.objective = "
            "lightning_ief.objectives.CrossEntropy() (or another one) in __init__."
        )
    if not is_overridden("forward", module, pl.LightningModule):
        raise MisconfigurationException(
            f"{name} has no forward, which is what is differentiated: write def forward(self, x): return self.net(x), "
            "which returns logits."
        )


def warn_of_idle_hooks(module: pl.LightningModule) -> None:
    """Say which hooks of a module are overridden, and never called."""
    idle = [f"{name} ({way})" for name, way in _INSTEAD.items() if is_overridden(name, module, pl.LightningModule)]
    if idle:
        warnings.warn(
            f"{type(module).__name__} overrides hooks that are not called, since NaturalGradientMixin optimizes by "
            f"hand. What serves instead: {'; '.join(idle)}.",
            RuntimeWarning,
            stacklevel=2,
        )


def warn_of_idle_loss(module: pl.LightningModule, returned: Any) -> bool:
    """Say that a loss with a graph, which `training_step` returns beside `optimize`, trains nothing.

    Args:
        module: The module.
        returned: What its `training_step` returns.

    Returns:
        Whether there is one.

    """
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not (isinstance(loss, Tensor) and loss.requires_grad):
        return False
    warnings.warn(
        f"{type(module).__name__}.training_step returns a loss that requires gradients: none are taken of it, since "
        "optimize has taken the step already. What such a loss adds belongs to the objective, a penalty of weights to "
        "weight_decay of the optimizer; return losses.mean() of losses = self.optimize(inputs, targets).",
        RuntimeWarning,
        stacklevel=3,
    )
    return True


def require_supported_strategy(strategy: Strategy) -> None:
    """Refuse strategies under which the optimizers of this package are not exact."""
    name = type(strategy).__name__
    remedy = (
        "Use Trainer(strategy='ddp'), or, where the parameters have to be sharded, fully_shard in configure_model with "
        "Trainer(strategy=ModelParallelStrategy(data_parallel_size=<number of ranks>, tensor_parallel_size=1))."
    )
    if isinstance(strategy, ModelParallelStrategy):
        assert strategy.device_mesh is not None  # made before the module is set up
        if (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
            raise MisconfigurationException(
                f"{name} with tensor_parallel_size={size}: the optimizers of lightning_ief need whole layers. {remedy}"
            )
    elif getattr(strategy.model, "static_graph", False):
        raise MisconfigurationException(
            f"{name}(static_graph=True) waits for gradients; the optimizers of lightning_ief have none. Remove it."
        )
    elif not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise MisconfigurationException(
            f"{name} hides parameters and gradients from the optimizers of lightning_ief. {remedy}"
        )
