"""Where the time of a training step goes (Table 3 of Wu et al., arXiv 2406.06420)."""

import statistics
from abc import ABC, abstractmethod
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from rich.table import Table
from torch import Tensor

from lightning_ief.callbacks._rendering import print_table

__all__ = ["StepTiming"]

_PHASES = ("forward", "backward", "update")


class _Clock(ABC):
    """Takes readings now, and says later how far apart they were."""

    @abstractmethod
    def read(self) -> Any:
        """Take a reading."""

    @abstractmethod
    def settle(self) -> None:
        """Wait until all readings are there."""

    @abstractmethod
    def between(self, start: Any, end: Any) -> float:
        """Seconds from one reading to another."""


class _HostClock(_Clock):
    def read(self) -> float:
        return perf_counter()

    def settle(self) -> None:
        return

    def between(self, start: float, end: float) -> float:
        return end - start


class _DeviceClock(_Clock):
    """Events in the stream of the device: nothing waits for them within a step."""

    def read(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        torch.cuda.synchronize()

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3


class StepTiming(Callback):
    """Logs per epoch how long forward, backward and update of a training step took, and prints a table.

    The boundaries are Lightning's hooks, so any LightningModule can be timed: *forward* is what precedes each backward
    pass, *backward* the backward passes, *update* all else until the batch ends: Gram matrix, solve, applying, and the
    recording of parameter uses within the forward pass (a module says so by an attribute `capture_seconds`). Steps
    without a backward pass (skipped ones) are left out.

    Logged, as means over the epoch in milliseconds: `timing/forward_ms`, `timing/backward_ms`, `timing/update_ms`,
    `timing/step_ms`.

    Args:
        skip_first: Steps at the start of the run that are left out: they pay for warming up and for verification.
        print_table: Whether to print a table after each epoch.

    Raises:
        ValueError: If skip_first is negative.

    """

    def __init__(self, skip_first: int = 1, print_table: bool = True) -> None:
        if skip_first < 0:
            raise ValueError(f"StepTiming(skip_first={skip_first}): must be at least 0.")
        self.skip_first = skip_first
        self.print_table = print_table
        self._clock: _Clock = _HostClock()
        self._seen = 0
        self._steps: list[tuple[list[Any], float]] = []  # readings at the boundaries, and seconds spent on recording
        self._readings: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the clock of the device.

        Args:
            trainer: The trainer.
            pl_module: The module.

        """
        self._clock = _DeviceClock() if pl_module.device.type == "cuda" else _HostClock()
        self._seen = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew.

        Args:
            trainer: The trainer.
            pl_module: The module.

        """
        self._steps = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The step begins with its forward pass.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The batch.
            batch_idx: Its number.

        """
        self._readings = [self._clock.read()]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """The forward pass ends.

        Args:
            trainer: The trainer.
            pl_module: The module.
            loss: The loss.

        """
        self._readings.append(self._clock.read())

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The backward pass ends.

        Args:
            trainer: The trainer.
            pl_module: The module.

        """
        self._readings.append(self._clock.read())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step ends.

        Args:
            trainer: The trainer.
            pl_module: The module.
            outputs: What the training step returned.
            batch: The batch.
            batch_idx: Its number.

        """
        self._readings.append(self._clock.read())
        self._seen += 1
        if self._seen > self.skip_first and len(self._readings) > 2:
            self._steps.append((self._readings, float(getattr(pl_module, "capture_seconds", 0.0))))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log and print.

        Args:
            trainer: The trainer.
            pl_module: The module.

        """
        times = self.compute()
        if not times["step"]:
            return
        pl_module.log_dict({f"timing/{phase}_ms": statistics.fmean(values) for phase, values in times.items()})
        if self.print_table:
            print_table(trainer, self.table(times, f"time per step, epoch {trainer.current_epoch}"))

    def compute(self) -> dict[str, list[float]]:
        """The times of the epoch's steps.

        Returns:
            Milliseconds of every step, by phase: forward, backward, update, step.

        """
        self._clock.settle()
        times: dict[str, list[float]] = {phase: [] for phase in (*_PHASES, "step")}
        for readings, recording in self._steps:
            spans = [self._clock.between(a, b) for a, b in zip(readings, readings[1:], strict=False)]
            # Spans alternate: forward, backward, (forward, backward, …) update.
            step, backward = sum(spans), sum(spans[1::2])
            forward = sum(spans[:-1:2]) - recording
            for phase, value in zip(times, (forward, backward, step - forward - backward, step), strict=True):
                times[phase].append(1e3 * value)
        return times

    def table(self, times: dict[str, list[float]], title: str) -> Table:
        """The times as a table.

        Args:
            times: Milliseconds of every step, by phase.
            title: Its title.

        Returns:
            The table.

        """
        step = statistics.fmean(times["step"])
        table = Table(title=title, caption=f"{len(times['step'])} steps")
        table.add_column("phase")
        for column in ("mean ms", "median ms", "share"):
            table.add_column(column, justify="right")
        for phase, values in times.items():
            mean = statistics.fmean(values)
            table.add_row(phase, f"{mean:.2f}", f"{statistics.median(values):.2f}", f"{mean / step:.0%}")
        return table
