"""Where the time of a training step goes (Table 3 of Wu et al., arXiv 2406.06420), and that of an epoch."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from time import perf_counter, perf_counter_ns
from typing import Any, Concatenate, ParamSpec, cast

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

# What Lightning's profilers are told of, which is how loading and transfer of a batch can be seen.
_LOADING = (".train_dataloader_next", ".batch_to_device")

_OTHERS = {
    "wait": "wait for data",
    "validation": "validation",
    "indicators": "γ and statistics",
    "own": "this timing",
}

P = ParamSpec("P")


class _HostEvent:
    """A reading of the host's clock, with the methods of `torch.cuda.Event`."""

    def record(self) -> None:
        self.at = perf_counter()

    def elapsed_time(self, end: "_HostEvent") -> float:
        return 1e3 * (end.at - self.at)


@dataclass
class _Mark:
    """Where a phase began.

    Attributes:
        phase: Which one, or 'end'.
        event: When.
        spent: Seconds that callbacks had spent by then on batches of their own.

    """

    phase: str
    event: Any
    spent: float


@dataclass
class _Batch:
    """A batch that has ended.

    Attributes:
        marks: Its phases.
        waits: Beginning and end of what it was waited for.
        recording: Seconds of recording within the forward pass.
        counts: Whether it counts in means.

    """

    marks: list[_Mark]
    waits: list[tuple[Any, Any]]
    recording: float
    counts: bool


def _at_own_cost(hook: "Callable[Concatenate[StepTiming, P], None]") -> "Callable[Concatenate[StepTiming, P], None]":
    @wraps(hook)
    def timed(self: "StepTiming", *args: P.args, **kwargs: P.kwargs) -> None:
        start = perf_counter_ns()
        try:
            hook(self, *args, **kwargs)
        finally:
            self._own_ns += perf_counter_ns() - start

    return cast(Any, timed)


class StepTiming(Callback):
    """Logs per epoch how long forward, backward and update of a batch took, and what else took time; prints a table.

    The phases are told apart by Lightning's hooks, so any LightningModule can be timed, under automatic and manual
    optimization:

    * *backward* is the time within backward passes, of which a batch may have several.
    * *update* is what follows the last backward pass until the batch ends (Gram matrix, solve, applying, logging),
      optimizer steps and zeroing of gradients before that, and the recording of parameter uses within the forward
      pass, if the module has an attribute `capture_seconds` (host time of the batch, in seconds).
    * *forward* is the rest. Zeroing by hand under manual optimization has no hook and counts as forward, too.
    * *wait* is what comes before: the next batch from the loader and its transfer to the device, as long as the step
      has to wait for them. The start of the loader's workers, at the beginning of an epoch, is none of it.

    Batches without a backward pass (skipped ones), and those on which the capture was verified (the module's attribute
    `capture_checks`), are left out of these means. On CUDA the times are those of the device's stream, elsewhere of
    the host.

    Logged, as means over the epoch's batches in milliseconds: `timing/forward_ms`, `timing/backward_ms`,
    `timing/update_ms`, `timing/step_ms` (their sum), `timing/wait_ms`. The table has medians too. And of the epoch, all
    batches included: `timing/epoch_s`, seconds from the end of the one before to its own; and the shares of it that
    went into steps (`timing/step_share`), waiting for data (`timing/wait_share`), validation
    (`timing/validation_share`), evaluations by `GammaIndicators` and `GradientStatistics` on batches of their own
    (`timing/indicators_share`, in none of the others), and this callback (`timing/own_share`, most of it within steps).
    What is left is the rest: other callbacks, checkpoints, logging. It sees what comes before it: put it last in the
    list. An epoch of which all batches are left out logs nothing.

    Args:
        skip_first: Batches at the start of each run that are left out: they pay for warming up and for verification.
        print_table: Whether to print tables.
        every_n_epochs: Print one after every n-th epoch. What is logged is logged after each.

    Raises:
        ValueError: If skip_first is negative, or every_n_epochs is not positive.

    """

    def __init__(self, skip_first: int = 1, print_table: bool = True, every_n_epochs: int = 1) -> None:
        if skip_first < 0:
            raise ValueError(f"StepTiming(skip_first={skip_first}): must be at least 0.")
        if every_n_epochs < 1:
            raise ValueError(f"StepTiming(every_n_epochs={every_n_epochs}): must be at least 1.")
        self.skip_first = skip_first
        self.print_table = print_table
        self.every_n_epochs = every_n_epochs
        self._on_cuda = False
        self._to_skip = skip_first
        self._callbacks: list[Callback] = []
        self._begin: _Mark | None = None  # of what counts to the present epoch
        self._own_ns = 0
        self._marks: list[_Mark] = []  # of the present batch
        self._waits: list[tuple[Any, Any]] = []  # for the next one
        self._waiting: dict[str, Any] = {}  # since when, by what is waited for
        self._validations: list[_Mark] = []  # beginnings and ends
        self._batches: list[_Batch] = []
        self._handles: list[RemovableHandle] = []
        self._profiler: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the clock, and ask to be told of what Lightning has no hooks for: ends of steps, loading."""
        self._on_cuda = pl_module.device.type == "cuda"
        self._to_skip = self.skip_first
        self._callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        self._handles = [optimizer.register_step_post_hook(self._on_after_step) for optimizer in trainer.optimizers]
        self._watch(trainer)
        self._begin, self._own_ns = self._mark_of("epoch"), 0
        self._forget()

    def _watch(self, trainer: pl.Trainer) -> None:
        self._profiler = profiler = trainer.profiler  # type: ignore[attr-defined]  # set by a connector
        start, stop = profiler.start, profiler.stop

        def started(action_name: str) -> None:
            start(action_name)
            if trainer.training and action_name.endswith(_LOADING):
                self._wait(action_name)

        def stopped(action_name: str) -> None:
            if action_name in self._waiting:
                self._wait_no_more(action_name)
            stop(action_name)

        profiler.start, profiler.stop = started, stopped

    @_at_own_cost
    def _wait(self, action: str) -> None:
        self._waiting[action] = self._event()

    @_at_own_cost
    def _wait_no_more(self, action: str) -> None:
        self._waits.append((self._waiting.pop(action), self._event()))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the optimizers and the profiler as they were."""
        if self._profiler is None:
            return
        for handle in self._handles:
            handle.remove()
        for method in ("start", "stop"):
            vars(self._profiler).pop(method, None)
        self._callbacks, self._profiler = [], None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same where training ends early."""
        self.on_train_end(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the batches of the last epoch."""
        self._forget()

    def _forget(self) -> None:
        self._batches, self._validations, self._waits = [], [], []
        self._waiting.clear()

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
        if [mark.phase for mark in self._marks[-2:]] == ["update", "forward"]:
            self._marks.pop()
        self._mark("forward")

    @_at_own_cost
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the batch, and see whether it counts."""
        self._marks.append(self._mark_of("end"))
        counts = any(mark.phase == "backward" for mark in self._marks)
        if counts and self._to_skip > 0:
            self._to_skip -= 1
            counts = False
        counts &= not getattr(pl_module, "capture_checks", 0)
        recording = float(getattr(pl_module, "capture_seconds", 0.0))
        self._batches.append(_Batch(self._marks, self._waits, recording, counts))
        self._waits = []

    @_at_own_cost
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark a validation."""
        self._validations.append(self._mark_of("validation"))

    @_at_own_cost
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark its end."""
        self._validations.append(self._mark_of("end"))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the means and shares, and print the table."""
        end = self._mark_of("end")
        if any(batch.counts for batch in self._batches):
            assert self._begin is not None
            times, epoch = self.compute(), self._epoch(self._begin, end)
            waits = epoch.pop("wait_ms", None)
            logged = {f"timing/{phase}_ms": statistics.fmean(values) for phase, values in times.items()}
            logged |= {} if waits is None else {"timing/wait_ms": statistics.fmean(waits)}
            pl_module.log_dict(logged | {f"timing/{key}": value for key, value in epoch.items()})
            if self.print_table and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
                title = f"time per batch, epoch {trainer.current_epoch}"
                print_table(trainer, self.render(times, title, epoch, waits))
        self._begin, self._own_ns = end, 0

    def _event(self) -> Any:
        # Events stand in the stream of the device: no step waits for it.
        event: Any = torch.cuda.Event(enable_timing=True) if self._on_cuda else _HostEvent()
        event.record()
        return event

    def _mark_of(self, phase: str) -> _Mark:
        return _Mark(phase, self._event(), sum(getattr(each, "spent_seconds", 0.0) for each in self._callbacks))

    @_at_own_cost
    def _mark(self, phase: str) -> None:
        self._marks.append(self._mark_of(phase))

    @staticmethod
    def _between(start: _Mark, end: _Mark) -> float:
        """Milliseconds, without those of batches of callbacks' own, which the host has waited for."""
        return max(0.0, start.event.elapsed_time(end.event) - 1e3 * (end.spent - start.spent))

    def compute(self) -> dict[str, list[float]]:
        """Wait for the events; milliseconds of each batch by phase: forward, backward, update, step (their sum)."""
        if self._on_cuda:
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {phase: [] for phase in (*_PHASES, "step")}
        for batch in self._batches:
            if not batch.counts:
                continue
            spent = dict.fromkeys(_PHASES, 0.0)
            last = max(number for number, mark in enumerate(batch.marks) if mark.phase == "backward")
            for number, (start, end) in enumerate(pairwise(batch.marks)):
                spent["update" if number > last else start.phase] += self._between(start, end)
            moved = min(1e3 * batch.recording, spent["forward"])  # host time may exceed the device's
            spent["forward"] -= moved
            spent["update"] += moved
            for phase, value in {**spent, "step": sum(spent.values())}.items():
                times[phase].append(value)
        return times

    def _epoch(self, begin: _Mark, end: _Mark) -> dict[str, Any]:
        """Seconds of the epoch and shares of it; and the milliseconds that each batch was waited for, if known."""
        if self._on_cuda:
            end.event.synchronize()  # all others have been waited for
        whole = max(begin.event.elapsed_time(end.event), 1e-9)
        waits = [(sum(a.elapsed_time(b) for a, b in batch.waits), batch.counts) for batch in self._batches]
        found: dict[str, Any] = {"epoch_s": 1e-3 * whole}
        found["step_share"] = sum(self._between(batch.marks[0], batch.marks[-1]) for batch in self._batches) / whole
        if any(batch.waits for batch in self._batches):
            found["wait_share"] = sum(wait for wait, _ in waits) / whole
            found["wait_ms"] = [wait for wait, counts in waits if counts]
        pairs = zip(self._validations[::2], self._validations[1::2], strict=False)
        found["validation_share"] = sum(self._between(a, b) for a, b in pairs) / whole
        found["indicators_share"] = 1e3 * (end.spent - begin.spent) / whole
        found["own_share"] = 1e-6 * self._own_ns / whole
        return found

    def render(
        self,
        times: Mapping[str, list[float]],
        title: str,
        epoch: Mapping[str, float] | None = None,
        waits: list[float] | None = None,
    ) -> Table:
        """A table of the times, in milliseconds for every batch, by phase: mean, median and share.

        Args:
            times: Milliseconds of each batch, see `compute`.
            title: The title.
            epoch: Shares of the epoch, by their keys without `timing/`; no column of them if None.
            waits: Milliseconds that each batch was waited for.

        Returns:
            The table.

        """
        step = statistics.fmean(times["step"])
        rows = [
            [phase, *_mean_and_median(values), _share(statistics.fmean(values), step)]
            for phase, values in times.items()
        ]
        columns, caption = ["phase", "mean ms", "median ms", "share"], f"{len(times['step'])} batches"
        if epoch is not None:
            rows = [[*row, _share(epoch["step_share"]) if row[0] == "step" else ""] for row in rows]
            for key, name in _OTHERS.items():
                if epoch.get(f"{key}_share"):  # there is such a thing, and it took time
                    mean = _mean_and_median(waits) if key == "wait" and waits else ["", ""]
                    rows.append([name, *mean, "", _share(epoch[f"{key}_share"])])
            columns.append("of epoch")
            caption += f" of an epoch of {epoch['epoch_s']:.3g} s"
        return numbers_table(columns, rows, title=title, caption=caption)


def _mean_and_median(values: list[float]) -> list[str]:
    return [f"{statistics.fmean(values):.2f}", f"{statistics.median(values):.2f}"]


def _share(part: float, whole: float = 1.0) -> str:
    if not whole:
        return ""
    return "< 1%" if 0 < part / whole < 0.005 else f"{part / whole:.0%}"
