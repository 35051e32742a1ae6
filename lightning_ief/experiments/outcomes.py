"""Rows of a comparison: what finished runs have reached, read from what they logged."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from lightning_ief.experiments.tables import Series, read_metrics

__all__ = ["RESULT", "SEARCH", "TIMING", "Outcome", "Run", "elapsed", "read_outcome", "steps_to"]

SEARCH, RESULT = "search", "result"
"""The part that a run has where some seeds choose the learning rate and others give the results."""

TIMING = "timing/step_ms"
"""What `StepTiming` logs."""

_LOSS = "train/loss"


@dataclass(frozen=True)
class Outcome:
    """A row of the table: a finished run.

    Attributes:
        optimizer: Its name.
        lr: Learning rate.
        seed: Seed of the run.
        metric: Name of the validation metric.
        best: Its best value over the epochs; NaN if it was never finite.
        epoch: The epoch of that value, counted from 0.
        train_loss: Mean training loss of the last epoch.
        run: Folder of the run.
        settings: Digest of recipe and options; rows with another one are of another comparison.
        last: The validation metric at the end; None in tables of older versions.
        test: The test metric of the same name at the end; None if it was not logged.
        steps: Batches trained on.
        seconds: Time of these, without validation; None if nothing timed them.
        part: SEARCH, RESULT, or neither: "" if the first seed has both parts.

    """

    optimizer: str
    lr: float
    seed: int
    metric: str
    best: float
    epoch: int
    train_loss: float
    run: str
    settings: str
    last: float | None = None
    test: float | None = None
    steps: int | None = None
    seconds: float | None = None
    part: str = ""


@dataclass(frozen=True)
class Run:
    """A run to be done."""

    optimizer: str
    lr: float
    seed: int
    arguments: tuple[str, ...]
    folder: Path
    settings: str
    part: str = ""


def read_outcome(run: Run, metric: str, minimize: bool) -> Outcome | None:
    """Read what a finished run has reached.

    Args:
        run: The run; metrics.csv is in its folder.
        metric: The validation metric.
        minimize: Whether smaller is better.

    Returns:
        Its row; None if it did not log the metric.

    """
    path = run.folder / "metrics.csv"
    logged = read_metrics(path, finite=False) if path.is_file() else {}
    if metric not in logged:
        return None
    finite = read_metrics(path)
    best, epoch = _best_epoch(finite.get(metric, ([], [])), logged["epoch"], minimize)
    # A test after training is logged as one more epoch.
    tested = {step for name, (steps, _) in logged.items() if name.startswith("test/") for step in steps}
    losses = _of_last_epoch(finite[_LOSS], finite["epoch"], tested) if _LOSS in finite else [math.nan]
    _, tests = logged.get("test" + metric.removeprefix("val"), ([], []))
    done = 1 + max({*logged["epoch"][0]} - tested)  # they are counted from 0
    return Outcome(
        run.optimizer, run.lr, run.seed, metric, best, epoch, fmean(losses), str(run.folder), run.settings,
        logged[metric][1][-1], tests[-1] if tests else None, done,
        elapsed(finite[TIMING], done) if TIMING in finite else None, run.part,
    )  # fmt: skip


def elapsed(timing: Series, steps: int) -> float:
    """Time of the first steps of a run.

    Args:
        timing: Mean milliseconds of a step in each epoch, at the last step of the epoch, as `StepTiming` logs them.
        steps: How many steps.

    Returns:
        Seconds.

    Example:
        >>> elapsed(([9, 19], [2.0, 4.0]), 15)
        0.04

    """
    milliseconds, before, mean = 0.0, 0, 0.0
    for last, mean in zip(*timing, strict=True):
        milliseconds += mean * max(0, min(last + 1, steps) - before)
        before = last + 1
    return (milliseconds + mean * max(0, steps - before)) / 1e3


def steps_to(target: float, curve: Series, minimize: bool) -> int | None:
    """How many steps a run took until its validation first reached a target.

    Args:
        target: The value to be reached.
        curve: Its validations.
        minimize: Whether smaller is better.

    Returns:
        Steps; None if it never did.

    Example:
        >>> steps_to(0.8, ([9, 19, 29], [0.7, 0.8, 0.75]), minimize=False)
        20

    """
    reached = (step for step, value in zip(*curve, strict=True) if (value <= target if minimize else value >= target))
    first = next(reached, None)
    return None if first is None else first + 1


def _best_epoch(series: Series, epochs: Series, minimize: bool) -> tuple[float, int]:
    steps, values = series
    if not values:  # it diverged before the first validation
        return math.nan, 0
    best = min(values) if minimize else max(values)
    return best, int(dict(zip(*epochs, strict=True))[steps[values.index(best)]])


def _of_last_epoch(values: Series, epochs: Series, tested: Collection[int] = ()) -> list[float]:
    epoch_of = dict(zip(*epochs, strict=True))
    last = max(epoch for step, epoch in epoch_of.items() if step not in tested)
    # Values that are not finite are not in a series: without any, the run has diverged.
    return [value for step, value in zip(*values, strict=True) if epoch_of[step] == last] or [math.nan]
