"""Schedules for options of an optimizer other than its learning rate."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

__all__ = ["OptionSchedule"]


class OptionSchedule(Callback):
    """Moves an option of the optimizer in the course of training: damping, momentum, a bound on steps.

    The schedulers of torch move learning rates alone. Here, values are reached at fractions of training, and in between
    it goes from one to the next. The value depends on the number of the batch alone, so that a resumed run needs no
    state.

    Args:
        option: Its name in the parameter groups, such as "relative_damping".
        values: Values that it takes, two or more.
        at: When it has reached each of them, as fractions of training, growing from 0; evenly spread if None.
        scale: "linear", or "log" for equal factors in equal times.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> schedule = OptionSchedule("relative_damping", values=[1.0, 0.01], scale="log")
        >>> [round(schedule.value(progress), 3) for progress in (0.0, 0.5, 1.0)]
        [1.0, 0.1, 0.01]

    """

    def __init__(
        self,
        option: str,
        values: Sequence[float],
        at: Sequence[float] | None = None,
        scale: Literal["linear", "log"] = "linear",
    ) -> None:
        self.option = option
        self.values = [*values]
        self.at = [j / max(1, len(values) - 1) for j in range(len(values))] if at is None else [*at]
        self.scale = scale
        name = f"OptionSchedule({option!r}, values={self.values}, at={at}, scale={scale!r})"
        if len(self.values) < 2 or len(self.at) != len(self.values):
            raise ValueError(f"{name}: takes two values or more, and as many fractions of training.")
        if self.at[0] != 0 or self.at[-1] > 1 or any(a >= b for a, b in pairwise(self.at)):
            raise ValueError(f"{name}: fractions of training grow from 0, to 1 at most.")
        if scale not in ("linear", "log") or (scale == "log" and min(self.values) <= 0):
            raise ValueError(f"{name}: scale must be 'linear', or 'log' for values > 0.")

    def value(self, progress: float) -> float:
        """The value when this fraction of training, 0 to 1, is done."""
        last = next((j for j, at in enumerate(self.at) if at > progress), None)
        if last is None:
            return self.values[-1]
        share = (progress - self.at[last - 1]) / (self.at[last] - self.at[last - 1])
        low, high = self.values[last - 1 : last + 1]
        return low * (high / low) ** share if self.scale == "log" else low + share * (high - low)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look whether there is such an option, and an end of training."""
        for optimizer in trainer.optimizers:
            missing = [group for group in optimizer.param_groups if group.get(self.option) is None]
            if missing:
                known = sorted(name for name in missing[0] if name != "params" and missing[0][name] is not None)
                raise MisconfigurationException(
                    f"OptionSchedule: {type(optimizer).__name__} has no option '{self.option}' that is in use; there "
                    f"are {known}."
                )
        if not math.isfinite(_batches(trainer)):
            raise MisconfigurationException(
                "OptionSchedule needs to know when training ends: set max_epochs or max_steps of the Trainer, to other "
                "than -1."
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the option for this batch."""
        done = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx
        value = self.value(done / max(1.0, _batches(trainer)))
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group[self.option] = value


def _batches(trainer: pl.Trainer) -> float:
    """How many batches training takes, as far as it is known."""
    found = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs != -1:
        found = float(trainer.num_training_batches * trainer.max_epochs)
    return min(found, float(trainer.max_steps)) if trainer.max_steps != -1 else found
