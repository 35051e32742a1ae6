"""The search of learning rates: which one is the best, and where a grid goes on."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

from lightning_ief.experiments.outcomes import RESULT, SEARCH, Outcome

__all__ = ["at_border", "best_lr", "better_half", "chosen", "further", "searching", "tried", "value_of"]


def best_lr(outcomes: Iterable[Outcome], minimize: bool = False) -> float | None:
    """The learning rate with the best mean over seeds.

    Args:
        outcomes: Rows of the search of one optimizer: the metric at the end decides, the best one over the epochs where
            the first seed has both parts.
        minimize: Whether a smaller metric is better.

    Returns:
        The learning rate, of those with the most seeds finished, the smallest of several as good; one whose metric is
        not finite is the worst. None if there are no rows.

    """
    return next(iter(_ranked(outcomes, minimize)), None)


def better_half(outcomes: Iterable[Outcome], minimize: bool = False) -> list[float]:
    """The learning rates that successive halving goes on with: the better half of those with the most seeds finished.

    Args:
        outcomes: Rows of the search of one optimizer.
        minimize: Whether a smaller metric is better.

    Returns:
        The learning rates, from the best; of an odd number the middle one, too, and two if there are as many.

    """
    ranked = _ranked(outcomes, minimize)
    return ranked[: max(2, (len(ranked) + 1) // 2)]


def _ranked(outcomes: Iterable[Outcome], minimize: bool) -> list[float]:
    """The learning rates with the most seeds finished, from the best; the smallest of several as good is the first."""
    values: dict[float, list[float]] = {}
    for outcome in outcomes:
        values.setdefault(outcome.lr, []).append(value_of(outcome))
    seeds = max(map(len, values.values()), default=0)
    means = {lr: fmean(found) for lr, found in values.items() if len(found) == seeds}
    sign = 1.0 if minimize else -1.0
    return sorted(sorted(means), key=lambda lr: sign * means[lr] if math.isfinite(means[lr]) else math.inf)


def value_of(outcome: Outcome) -> float:
    """The metric by which a run counts: at the end; the best one over the epochs where the first seed has both parts.

    Args:
        outcome: Its row.

    Returns:
        The metric; NaN if it was not finite.

    """
    value = outcome.last if outcome.part else outcome.best
    return math.nan if value is None else value


def searching(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The rows of the search: of its seeds, or of each optimizer's first one where that has both parts."""
    outcomes = list(outcomes)
    first = {o.optimizer: o.seed for o in reversed(outcomes)}
    return [o for o in outcomes if o.part == SEARCH or (not o.part and o.seed == first[o.optimizer])]


def chosen(outcomes: Iterable[Outcome], minimize: bool = False) -> dict[str, list[Outcome]]:
    """The rows of each optimizer at the learning rate that the search found best, as `compare` goes about it.

    Args:
        outcomes: Rows of finished runs, in the order of `compare`.
        minimize: Whether a smaller metric is better.

    Returns:
        Rows by optimizer: those of the results, where other seeds have searched; else all, the first seed having
        searched.

    """
    found: dict[str, list[Outcome]] = {}
    outcomes = list(outcomes)
    for name in dict.fromkeys(o.optimizer for o in outcomes):
        mine = [o for o in outcomes if o.optimizer == name]
        if any(o.part for o in mine):
            lr = best_lr((o for o in mine if o.part == SEARCH), minimize)  # None if nothing was searched
            results = [o for o in mine if o.part == RESULT]
            found[name] = [o for o in results if lr in (None, o.lr)] or results
        else:
            lr = best_lr((o for o in mine if o.seed == mine[0].seed), minimize)
            found[name] = [o for o in mine if o.lr == lr]
    return {name: rows for name, rows in found.items() if rows}


def tried(outcomes: Iterable[Outcome], name: str) -> list[float]:
    """The learning rates that an optimizer was searched with, from small to large; none for one that was not."""
    return sorted({o.lr for o in outcomes if o.optimizer == name and o.part != RESULT})


def at_border(grid: Sequence[float], lr: float) -> bool:
    """Whether a learning rate stands at the border of those that were searched, so that a better one may be beyond."""
    return len(grid) > 1 and lr in (min(grid), max(grid))


def further(grid: Sequence[float], best: float) -> float:
    """The learning rate by which a grid goes on: beyond the border that is nearer to its best.

    Args:
        grid: The learning rates so far, two or more.
        best: The best of them; where it stands in the middle, the grid goes on upwards.

    Returns:
        The next one, by the factor between the last two on that side.

    Example:
        >>> further([1.0, 3.0, 9.0], best=9.0), further([1.0, 2.0, 8.0], best=1.0)
        (27.0, 0.5)

    """
    grid = sorted(grid)
    if 2 * grid.index(best) >= len(grid) - 1:
        return grid[-1] * (grid[-1] / grid[-2])
    return grid[0] / (grid[1] / grid[0])
