"""Where the time of a training step goes (Table 3 of Wu et al., arXiv 2406.06420)."""

import statistics
from itertools import pairwise
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ief.callbacks._rendering import numbers_table, print_table

__all__ = ["StepTiming"]

_PHASES = ("forward", "backward", "update")


class _HostEvent:
    """A reading of the host's clock, with the methods of `torch.cuda.Event`."""

    def record(self) -> None:
        self.at = perf_counter()

    def elapsed_time(self, end: "_HostEvent") -> float:
        return 1e3 * (end.at - self.at)


class StepTiming(Callback):
    """Logs per epoch how long forward, backward and update of a batch took, and prints a table.

    The phases are told apart by Lightning's hooks, so any LightningModule can be timed, under automatic and manual
    optimization:

    * *backward* is the time within backward passes, of which a batch may have several.
    * *update* is what follows the last backward pass until the batch ends (Gram matrix, solve, applying, logging),
      optimizer steps and zeroing of gradients before that, and the recording of parameter uses within the forward
      pass, if the module has an attribute `capture_seconds` (host time of the batch, in seconds).
    * *forward* is the rest. Zeroing by hand under manual optimization has no hook and counts as forward, too.

    Data loading and validation are not timed. Batches without a backward pass (skipped ones) are left out. On CUDA the
    times are those of the device's stream, elsewhere of the host.

    Logged, as means over the epoch's batches in milliseconds: `timing/forward_ms`, `timing/backward_ms`,
    `timing/update_ms`, `timing/step_ms` (their sum). The table has medians too. An epoch of which all batches are left
    out logs nothing.

    Args:
        skip_first: Batches at the start of each run that are left out: they pay for warming up and for verification.
        print_table: Whether to print a table after each epoch.

    Raises:
        ValueError: If skip_first is negative.

    """

    def __init__(self, skip_first: int = 1, print_table: bool = True) -> None:
        if skip_first < 0:
            raise ValueError(f"StepTiming(skip_first={skip_first}): must be at least 0.")
        self.skip_first = skip_first
        self.print_table = print_table
        self._on_cuda = False
        self._to_skip = skip_first
        self._marks: list[tuple[str, Any]] = []  # of the present batch: which phase began at which event
        self._batches: list[tuple[list[tuple[str, Any]], float]] = []  # marks and recording seconds, for each batch
        self._handles: list[RemovableHandle] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the clock, and ask to be told where optimizer steps end, for which Lightning has no hook."""
        self._on_cuda = pl_module.device.type == "cuda"
        self._to_skip = self.skip_first
        self._handles = [optimizer.register_step_post_hook(self._on_after_step) for optimizer in trainer.optimizers]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the optimizers as they were."""
        for handle in self._handles:
            handle.remove()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the batches of the last epoch."""
        self._batches = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the batch, with its forward pass."""
        self._marks = []
        self._mark("forward")

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Mark the zeroing of gradients; automatic optimization does it between forward and backward pass."""
        self._mark("update")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Mark a backward pass."""
        self._mark("backward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark its end; if there is another one, a forward pass comes first."""
        self._mark("forward")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Mark an optimizer step; the closure of automatic optimization has run by then."""
        self._mark("update")

    def _on_after_step(self, *_: Any) -> None:
        # A step that calls that of its base class may end more than once: the last time counts.
        if [phase for phase, _ in self._marks[-2:]] == ["update", "forward"]:
            self._marks.pop()
        self._mark("forward")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the batch, and keep its marks if it counts."""
        self._mark("end")
        if not any(phase == "backward" for phase, _ in self._marks):
            return
        if self._to_skip > 0:
            self._to_skip -= 1
        else:
            self._batches.append((self._marks, float(getattr(pl_module, "capture_seconds", 0.0))))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the means, and print the table."""
        if not self._batches:
            return
        times = self.compute()
        pl_module.log_dict({f"timing/{phase}_ms": statistics.fmean(values) for phase, values in times.items()})
        if self.print_table:
            print_table(trainer, self.render(times, f"time per batch, epoch {trainer.current_epoch}"))

    def _mark(self, phase: str) -> None:
        # Events stand in the stream of the device: no step waits for it.
        event: Any = torch.cuda.Event(enable_timing=True) if self._on_cuda else _HostEvent()
        event.record()
        self._marks.append((phase, event))

    def compute(self) -> dict[str, list[float]]:
        """Wait for the events; milliseconds of each batch by phase: forward, backward, update, step (their sum)."""
        if self._on_cuda:
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {phase: [] for phase in (*_PHASES, "step")}
        for marks, recording in self._batches:
            spent = dict.fromkeys(_PHASES, 0.0)
            last = max(number for number, (phase, _) in enumerate(marks) if phase == "backward")
            for number, ((phase, start), (_, end)) in enumerate(pairwise(marks)):
                spent["update" if number > last else phase] += start.elapsed_time(end)
            moved = min(1e3 * recording, spent["forward"])  # host time may exceed the device's
            spent["forward"] -= moved
            spent["update"] += moved
            for phase, value in {**spent, "step": sum(spent.values())}.items():
                times[phase].append(value)
        return times

    def render(self, times: dict[str, list[float]], title: str) -> Table:
        """A table of the times, in milliseconds for every batch, by phase: mean, median and share."""
        means = {phase: statistics.fmean(values) for phase, values in times.items()}
        rows = [
            (phase, f"{mean:.2f}", f"{statistics.median(times[phase]):.2f}", f"{mean / means['step']:.0%}")
            for phase, mean in means.items()
        ]
        columns = ("phase", "mean ms", "median ms", "share")
        return numbers_table(columns, rows, title=title, caption=f"{len(times['step'])} batches")
