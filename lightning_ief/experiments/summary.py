"""The tables of a comparison: results with a paired test, steps and time with what it took to reach a target."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from rich.table import Table

from lightning_ief.callbacks._rendering import numbers_table
from lightning_ief.experiments.outcomes import TIMING, Outcome, elapsed, steps_to
from lightning_ief.experiments.search import at_border, chosen, tried
from lightning_ief.experiments.tables import read_metrics
from lightning_ief.tasks.extras import import_extra

__all__ = ["paired_p", "scipy_stats", "spread", "summarize", "summarize_times", "target_of"]

Rows = Mapping[str, Sequence[Outcome]]


def summarize(outcomes: Iterable[Outcome], minimize: bool = False, reference: str | None = None) -> Table:
    """The table of the comparison: each optimizer at its best learning rate.

    Args:
        outcomes: Rows of finished runs.
        minimize: Whether a smaller metric is better.
        reference: The optimizer that the others are tested against, where seeds of their own give the results.

    Returns:
        Best validation metric and final training loss, mean ± standard deviation over seeds. Where other seeds have
        searched: the metric and the test metric at the end, with the number of settings that were searched, * where
        the best is at the border of these, and p of a paired test.

    """
    outcomes = list(outcomes)
    rows = chosen(outcomes, minimize)
    if any(o.part for o in outcomes):
        return _summarize_results(outcomes, rows, reference)
    metric = outcomes[0].metric if outcomes else "metric"
    columns = ("optimizer", "lr", "searched", f"best {metric}", "final train/loss", "runs")
    lines = []
    for name, mine in rows.items():
        values = spread([o.best for o in mine]), spread([o.train_loss for o in mine])
        grid = tried(outcomes, name)
        searched = ", ".join(f"{lr:g}" for lr in grid)
        lines.append((name, f"{mine[0].lr:g}{_border(grid, mine[0].lr)}", searched, *values, str(len(mine))))
    title = "Mean ± standard deviation over the seeds"
    return numbers_table(columns, lines, title=title, caption="*: the best is at the border of what was searched.")


def _summarize_results(outcomes: Sequence[Outcome], rows: Rows, reference: str | None) -> Table:
    metric = outcomes[0].metric
    tested = all(o.test is not None for mine in rows.values() for o in mine)
    test = "test" + metric.removeprefix("val")
    columns = ["optimizer", "lr", "settings", metric, test, *(["p"] if reference else []), "train/loss", "runs"]
    lines = []
    for name, mine in rows.items():
        grid = tried(outcomes, name)
        lr = f"{mine[0].lr:.4g}{_border(grid, mine[0].lr)}"
        p = paired_p(_by_seed(mine, tested), _by_seed(rows.get(reference, []), tested)) if reference else None
        cells = [_cell([o.last for o in mine]), _cell([o.test for o in mine])]
        cells += ["-" if p is None or name == reference else f"{p:.2g}"] if reference else []
        lines.append((name, lr, str(max(1, len(grid))), *cells, spread([o.train_loss for o in mine]), str(len(mine))))
    notes = ["Settings: how many learning rates were searched; *: the best is at the border of these."]
    if reference:
        notes.append(
            f"p: two-sided paired t-test against {reference} over the seeds, of {test if tested else metric}; "
            f"{len(rows) - 1} such tests are made."
        )
    title = "At the end of training, mean ± standard deviation over the seeds"
    return _folded(numbers_table(columns, lines, title=title, caption=" ".join(notes)))


def summarize_times(outcomes: Iterable[Outcome], baselines: Sequence[str] = (), minimize: bool = False) -> Table:
    """The table of steps and time, without validation, and of those until a target is reached.

    Args:
        outcomes: Rows of finished runs, whose folders are there.
        baselines: Optimizers of which the best sets the target; no target if there are none.
        minimize: Whether a smaller metric is better.

    Returns:
        Medians over the seeds; "-" where most seeds did not reach the target, or nothing was timed.

    """
    rows = chosen(outcomes, minimize)
    target = target_of(rows, baselines, minimize)
    columns = ["optimizer", "steps", "seconds"]
    columns += [] if target is None else ["steps to target", "seconds to target", "reached"]
    lines = []
    for name, mine in rows.items():
        line = [name, _median([o.steps for o in mine], ".0f"), _median([o.seconds for o in mine])]
        if target is not None:
            reached = [_reached(o, target, minimize) for o in mine]
            count = sum(steps is not None for steps, _ in reached)
            line += [_median([steps for steps, _ in reached], ".0f"), _median([seconds for _, seconds in reached])]
            line += [f"{count} of {len(mine)}"]
        lines.append(line)
    caption = None
    if target is not None:
        caption = f"Target: {_metric_of(rows)} {target:.4f}, the best of {', '.join(baselines)} at the end."
    return _folded(numbers_table(columns, lines, title="Median over the seeds, without validation", caption=caption))


def target_of(rows: Rows, baselines: Sequence[str], minimize: bool = False) -> float | None:
    """The median validation metric at the end of the best of the baselines; None if none of them has finished."""
    found = [median(_numbers([o.last for o in rows[name]])) for name in baselines if name in rows]
    found = [value for value in found if math.isfinite(value)]
    return (min(found) if minimize else max(found)) if found else None


def paired_p(values: Mapping[int, float], others: Mapping[int, float]) -> float | None:
    """Make a two-sided paired t-test.

    Args:
        values: A value for each seed.
        others: Those of the other optimizer.

    Returns:
        Its p over the seeds that both have; None if there are fewer than two, or all differences are the same.

    Raises:
        ModuleNotFoundError: If scipy is missing.

    """
    pairs = [(value, others[seed]) for seed, value in values.items() if seed in others]
    differences = [one - other for one, other in pairs]
    rounding = 1e-12 * max((abs(value) for pair in pairs for value in pair), default=0.0)
    if len(pairs) < 2 or max(differences) - min(differences) <= rounding:
        return None
    return float(scipy_stats().ttest_rel(*zip(*pairs, strict=True)).pvalue)


def scipy_stats() -> Any:
    """scipy.stats, which comes with scikit-learn."""
    return import_extra("scipy.stats", "recipes", "compare(--reference) takes its paired test from scipy")


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation, with so many digits behind the point; the mean alone where there is no deviation."""
    mean = fmean(values)
    if len(values) < 2 or not math.isfinite(mean):  # as of runs that diverged
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {stdev(values):.{digits}f}"


def _border(grid: Sequence[float], lr: float) -> str:
    return "*" if at_border(grid, lr) else ""


def _reached(outcome: Outcome, target: float, minimize: bool) -> tuple[int | None, float | None]:
    """Steps and seconds to the target."""
    path = Path(outcome.run, "metrics.csv")
    logged = read_metrics(path) if path.is_file() else {}
    steps = steps_to(target, logged.get(outcome.metric, ([], [])), minimize)
    timing = logged.get(TIMING)
    return steps, None if steps is None or timing is None else elapsed(timing, steps)


def _by_seed(rows: Iterable[Outcome], tested: bool) -> dict[int, float]:
    return dict(zip((o.seed for o in rows), _numbers([o.test if tested else o.last for o in rows]), strict=True))


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _cell(values: Sequence[float | None]) -> str:
    return "-" if None in values else spread(_numbers(values))


def _median(values: Sequence[float | None], form: str = ".4g") -> str:
    """What is missing counts as larger than all others."""
    middle = median(math.inf if value is None else value for value in values)
    return f"{middle:{form}}" if math.isfinite(middle) else "-"


def _folded(table: Table) -> Table:
    """Where there is no room names go on in the next line, which tells them apart; rich would cut them."""
    for column in table.columns:
        column.overflow = "fold"
    return table


def _metric_of(rows: Rows) -> str:
    return next(o.metric for mine in rows.values() for o in mine)
