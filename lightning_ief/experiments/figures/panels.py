"""The figures of several runs and evaluations, each None if its values are not there.

A panel for which there are no values is left out, and what is said of it handed to `note`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_ief.callbacks.gamma_evaluation import deviation_key
from lightning_ief.directions.registry import REFERENCE
from lightning_ief.experiments.evaluation import Result, SampleProjection
from lightning_ief.experiments.figures.drawing import (
    GREY,
    REFERENCE_LABEL,
    STYLES,
    canvas,
    direction_label,
    direction_styles,
    logarithmic,
    mark_one,
    plain,
)
from lightning_ief.experiments.figures.folders import experiment
from lightning_ief.experiments.outcomes import TIMING, Outcome, elapsed
from lightning_ief.experiments.search import best_lr, searching, value_of
from lightning_ief.experiments.tables import Series

if TYPE_CHECKING:  # an extra, imported where a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "cosine_figure",
    "curves_figure",
    "damping_figure",
    "gamma_figure",
    "lr_figure",
    "progress_figure",
    "projections_figure",
]

Metrics = Mapping[str, Series]
_COLUMNS = 3  # panels side by side
_Row = TypeVar("_Row", Result, SampleProjection)

_X = TypeVar("_X", int, float)
_Note = Callable[[str], None]

_Values = tuple[list[int], list[float], list[float] | None]
"""Steps, values and standard deviations."""


def _curve(metrics: Metrics, key: str, below: str | None = None) -> _Values | None:
    """What was logged of a key, or its quotient with another one at the same steps; None if it was not logged."""
    if key not in metrics or (below is not None and below not in metrics):
        return None
    steps, values = metrics[key]
    if below is None:
        return steps, values, _deviations(metrics, key)
    divisors = dict(zip(*metrics[below], strict=True))
    points = [(step, value / divisors[step]) for step, value in zip(steps, values, strict=True) if divisors.get(step)]
    return [step for step, _ in points], [value for _, value in points], None


def _deviations(metrics: Metrics, key: str) -> list[float] | None:
    """Standard deviations at the steps of a key; None if there are none, as for a single batch."""
    logged = metrics.get(deviation_key(key))
    if logged is None:
        return None
    by_step = dict(zip(*logged, strict=True))
    return [by_step.get(step, math.nan) for step in metrics[key][0]]


_RATIO = "gamma_relative/"
_IMBALANCE = "gradient-norm imbalance"
# The panels of the paper's figure, and the directions whose ratios to the reference they show.
_OF_THE_PAPER = ("ef", "ief", "sampled_fisher")
_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("γ(EF) / γ(SGD)", ("gamma_relative/ef",)),
    ("γ(iEF) / γ(SGD)", ("gamma_relative/ief",)),
    (r"γ($\hat{F}$) / γ(EF)", ("gamma/sampled_fisher", "gamma/ef")),
    (r"γ($\hat{F}$) / γ(iEF)", ("gamma/sampled_fisher", "gamma/ief")),
    (r"γ($\hat{F}$) / γ(SGD)", ("gamma_relative/sampled_fisher",)),
)


def gamma_figure(runs: Mapping[str, Metrics], note: _Note) -> "Figure | None":
    """γ of each direction over that of the reference, and the gradient-norm imbalance, over the training stage."""
    others = [name for name in _directions(runs, _RATIO) if name not in _OF_THE_PAPER]
    panels = [
        *_PANELS,
        *((f"γ({direction_label(name)}) / γ({REFERENCE_LABEL})", (_RATIO + name,)) for name in others),
        (_IMBALANCE, ("gradient_norm_imbalance",)),
    ]
    wanted = []
    for title, keys in panels:
        logged = _curves(runs, *keys)
        curves = {name: found for name, found in logged.items() if any(value > 0 for value in found[0][1])}
        if curves:
            wanted.append((title, curves))
        elif logged:
            note(f"gamma_over_training: the panel {title} was left out: no value of {', '.join(keys)} is above zero.")
    if all(title == _IMBALANCE for title, _ in wanted):
        return None
    figure, axes = _panels(len(wanted))
    last = {name: max(max(steps) for steps, _ in metrics.values()) for name, metrics in runs.items() if metrics}
    for each, (title, curves) in zip(axes, wanted, strict=True):
        for name, ((steps, values, deviations), style) in curves.items():
            stage = [step / last[name] if last[name] else 0.0 for step in steps]
            each.errorbar(stage, values, deviations, label=name, **_line(style))
        if title != _IMBALANCE:
            mark_one(each)
        logarithmic(each)
        each.set(title=title, xlabel="training stage")
    _legend(figure, axes)
    return figure


def cosine_figure(runs: Mapping[str, Metrics]) -> "Figure | None":
    """Cosine of each direction to the reference, a panel for each."""
    names = _directions(runs, "cosine/")
    if not names:
        return None
    figure, axes = _panels(len(names))
    for each, name in zip(axes, names, strict=True):
        for run, (curve, style) in _curves(runs, f"cosine/{name}").items():
            each.errorbar(*curve, label=run, **_line(style))
        each.set(title=f"cosine({direction_label(name)}, {REFERENCE_LABEL})", xlabel="training step", ylim=(None, 1.0))
    _legend(figure, axes)
    return figure


def _directions(runs: Mapping[str, Metrics], prefix: str) -> list[str]:
    """The directions of which there are values under a prefix, but for the reference."""
    keys = dict.fromkeys(key for metrics in runs.values() for key in metrics if key.startswith(prefix))
    return [name for key in keys if (name := key.removeprefix(prefix)) != REFERENCE]


def _curves(runs: Mapping[str, Metrics], *keys: str) -> dict[str, tuple[_Values, Mapping[str, Any]]]:
    """The curve of each run that has one, with the style of the run."""
    styled = zip(runs.items(), cycle(STYLES))
    return {name: (curve, style) for (name, metrics), style in styled if (curve := _curve(metrics, *keys))}


def curves_figure(runs: Mapping[str, Metrics], metric: str, note: _Note) -> "Figure | None":
    """Training loss and a validation metric over epochs; repetitions of one experiment as mean and range."""
    experiments = _experiments(runs)
    panels: dict[str, list[_Line]] = {}
    for key in ("train/loss", metric):
        series = {
            name: [_by_epoch(metrics, key) for metrics in of if key in metrics] for name, of in experiments.items()
        }
        panels[key] = _lines_of("curves", key, series, note)
    panels = {key: lines for key, lines in panels.items() if lines}
    if not panels:
        return None
    figure, axes = _panels(len(panels))
    for each, (key, lines) in zip(axes, panels.items(), strict=True):
        for line in lines:
            line.draw(each)
        each.set(title=key if key != "train/loss" else "train/loss, mean of each epoch", xlabel="epoch")
        each.locator_params(axis="x", integer=True)
        if key == "train/loss" and all(y > 0 for one in runs.values() for y in one.get(key, ([], []))[1]):
            logarithmic(each)
    _legend(figure, axes)
    return figure


def progress_figure(runs: Mapping[str, Metrics], metric: str, note: _Note) -> "Figure | None":
    """Training loss and a validation metric at each validation, over steps and over the time of these."""
    timed = {name: metrics for name, metrics in runs.items() if metric in metrics and TIMING in metrics}
    if not timed:
        return None
    panels: list[tuple[str, str, list[_Line]]] = []
    for key in ("train/loss", metric):
        series, times = {}, {}
        for name, repetitions in _experiments(timed).items():
            logged = [metrics for metrics in repetitions if key in metrics]
            series[name] = [_at_validations(metrics, key, metric) for metrics in logged]
            # Runs of one experiment differ in their pace: a step is drawn at its mean time.
            times[name] = [
                {n: elapsed(one[TIMING], n) for n in steps} for one, steps in zip(logged, series[name], strict=True)
            ]
        if by_step := _lines_of("curves_over_time", key, series, note):
            panels.append((key, "training step", by_step))
            panels.append((key, "seconds of training steps", _lines_of("curves_over_time", key, series, None, times)))
    if not panels:
        return None
    figure, axes = _panels(len(panels), columns=2)
    for each, (key, xlabel, lines) in zip(axes, panels, strict=True):
        for line in lines:
            line.draw(each)
        each.set(title=key, xlabel=xlabel)
        if key == "train/loss":
            logarithmic(each)
    _legend(figure, axes)
    return figure


def lr_figure(outcomes: Sequence[Outcome], minimize: bool = False) -> "Figure | None":
    """The metric that chose the learning rate over all that were tried, as multiples of the chosen one."""
    rows = searching(outcomes)
    optimizers = {name: [o for o in rows if o.optimizer == name] for name in dict.fromkeys(o.optimizer for o in rows)}
    searched = {name: mine for name, mine in optimizers.items() if len({o.lr for o in mine}) > 1}
    if not searched:
        return None
    figure, (axes,) = _panels(1)
    for (name, mine), style in zip(searched.items(), cycle(STYLES)):
        best = best_lr(mine, minimize) or math.nan
        # Of the seeds that tried each: not all do (successive halving), so that they are no repetitions of one line.
        means = {lr / best: fmean(value_of(o) for o in mine if o.lr == lr) for lr in sorted({o.lr for o in mine})}
        finite = {x: mean for x, mean in means.items() if math.isfinite(mean)}
        if line := _Line.of(f"{name}, {best:.3g}", [finite], style):
            line.draw(axes)
    logarithmic(axes, "x")
    axes.set(title=f"{rows[0].metric}, search", xlabel="lr over the best one")
    _legend(figure, [axes])
    return figure


def _experiments(runs: Mapping[str, Metrics]) -> dict[str, list[Metrics]]:
    """Repetitions of one experiment together."""
    found: dict[str, list[Metrics]] = {}
    for name, metrics in runs.items():
        found.setdefault(experiment(name), []).append(metrics)
    return found


@dataclass(frozen=True)
class _Line:
    """A line at the mean of several series, in the range between them (None for one)."""

    label: str
    x: list[float]
    y: list[float]
    bounds: tuple[list[float], list[float]] | None
    style: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        name: str,
        series: Sequence[Mapping[_X, float]],
        style: Mapping[str, Any],
        places: Sequence[Mapping[_X, float]] | None = None,
    ) -> "_Line | None":
        """The line of what all series have.

        Args:
            name: Of the line.
            series: Values by what they are at.
            style: Of the line.
            places: Where in the figure that is, in each series; at itself if None.

        Returns:
            The line; None if there is nothing that all of them have.
        """
        shared = sorted(set.intersection(*map(set, series))) if series else []
        if not shared:
            return None
        columns = [[one[x] for one in series] for x in shared]
        drawn_at = [float(x) if places is None else fmean(one[x] for one in places) for x in shared]
        several = len(series) > 1
        bounds = ([min(column) for column in columns], [max(column) for column in columns]) if several else None
        label = f"{name} ({len(series)} runs)" if several else name
        return cls(label, drawn_at, [fmean(column) for column in columns], bounds, style)

    def draw(self, axes: "Axes") -> None:
        """Draw it."""
        axes.plot(self.x, self.y, label=self.label, **_line(self.style))
        if self.bounds is not None:
            axes.fill_between(self.x, *self.bounds, color=self.style["color"], alpha=0.2, linewidth=0)


def _lines_of(
    figure: str,
    key: str,
    series: Mapping[str, Sequence[Mapping[int, float]]],
    note: _Note | None,
    places: Mapping[str, Sequence[Mapping[int, float]]] | None = None,
) -> list[_Line]:
    """The lines of a panel, one for each experiment; a note on what has no values, if it is to be noted."""
    lines = []
    for (name, repetitions), style in zip(series.items(), cycle(STYLES)):
        if line := _Line.of(name, repetitions, style, places[name] if places else None):
            lines.append(line)
        elif repetitions and note:
            note(
                f"{figure}: {name} was left out of {key}: no epoch is in all of its {len(repetitions)} runs. Were some "
                "resumed from others? Name those, too, with the config.yaml beside their metrics.csv."
            )
    if not lines and note:
        note(f"{figure}: the panel {key} was left out: it has no values.")
    return lines


def _at_validations(metrics: Metrics, key: str, metric: str) -> dict[int, float]:
    """Mean of the values logged up to each validation since the one before, by the steps done."""
    found, before = {}, -1
    for last in metrics[metric][0]:
        values = [value for step, value in zip(*metrics[key], strict=True) if before < step <= last]
        if values:
            found[last + 1] = fmean(values)
        before = last
    return found


def _by_epoch(metrics: Metrics, key: str) -> dict[int, float]:
    """Mean of the values logged in each epoch."""
    epoch_of = dict(zip(*metrics.get("epoch", ([], [])), strict=True))
    found: dict[int, list[float]] = {}
    for step, value in zip(*metrics[key], strict=True):
        if step in epoch_of:
            found.setdefault(int(epoch_of[step]), []).append(value)
    return {epoch: fmean(values) for epoch, values in found.items()}


def damping_figure(results: Sequence[Result], note: _Note) -> "Figure | None":
    """γ over that of the reference against λ, a panel for each checkpoint."""
    checkpoints = []
    for title, rows in _by_checkpoint(results):
        if any(r.damping > 0 and math.isfinite(r.gamma_relative) and r.gamma_relative > 0 for r in rows):
            checkpoints.append((title, rows))
        elif any(r.damping > 0 for r in rows):
            note(f"gamma_against_damping: the panel {title} was left out: no γ / γ({REFERENCE}) there is finite.")
    if not checkpoints:
        return None
    figure, axes = _panels(len(checkpoints))
    styles = direction_styles(r.direction for r in results if r.direction != REFERENCE)
    for each, (title, rows) in zip(axes, checkpoints, strict=True):
        for name, style in styles.items():
            mine = sorted((r for r in rows if r.direction == name and r.damping > 0), key=lambda r: r.damping)
            if not mine:
                continue
            deviations = [r.gamma_relative_std for r in mine]
            bars = None if any(map(math.isnan, deviations)) else deviations
            points = [r.damping for r in mine], [r.gamma_relative for r in mine]
            each.errorbar(*points, bars, label=direction_label(name), **_line(style))
        mark_one(each)
        each.set_xscale("log")
        logarithmic(each)
        each.set(title=title, xlabel="damping λ")
    axes[0].set_ylabel(f"γ / γ({REFERENCE_LABEL})  (lower is better)")
    _legend(figure, axes)
    return figure


def projections_figure(projections: Sequence[SampleProjection], note: _Note) -> "Figure | None":
    """cos(d, ∇l_n) against ‖∇l_n‖ on the samples of one batch, a panel for each checkpoint."""
    finite = [row for row in projections if row.update_norm > 0 and row.gradient_norm > 0]  # neither NaN
    checkpoints = _by_checkpoint(finite)
    for title in dict(_by_checkpoint(projections)).keys() - dict(checkpoints).keys():
        note(f"projections: the panel {title} was left out: no gradient or no update there is finite and not zero.")
    if not finite:
        return None
    styles = direction_styles(r.direction for r in finite)
    figure, axes = _panels(len(checkpoints))
    for each, (title, rows) in zip(axes, checkpoints, strict=True):
        for name, style in styles.items():
            mine = [row for row in rows if row.direction == name]
            if not mine:
                continue
            least = min(row.damping for row in mine)
            chosen = [row for row in mine if row.damping == least]
            each.plot(
                [row.gradient_norm for row in chosen],
                [row.projection / row.gradient_norm / row.update_norm for row in chosen],
                label=direction_label(name), color=style["color"], marker=style["marker"],
                linestyle="none", markersize=3.5, markeredgecolor="black", markeredgewidth=0.3, alpha=0.8,
            )  # fmt: skip
        logarithmic(each, "x")
        # Samples whose loss an update raises lie below zero: linear around it, logarithmic beyond.
        each.set_yscale("symlog", linthresh=1e-3)
        each.set_ylim(-1.5, 1.5)
        each.axhline(0.0, color=GREY, linewidth=1.0, zorder=1)
        each.set(title=title, xlabel=r"$\Vert\nabla l_n\Vert$, norm of the sample's gradient")
    axes[0].set_ylabel(r"cos($d$, $\nabla l_n$)")
    _legend(figure, axes)
    return figure


def _by_checkpoint(rows: Sequence[_Row]) -> list[tuple[str, list[_Row]]]:
    """The rows of each checkpoint, with the title of its panel."""
    found: dict[str, list[_Row]] = {}
    for row in rows:
        found.setdefault(row.checkpoint, []).append(row)
    return [(f"{'/'.join(Path(name).parts[-4:-2])}, step {of[0].step}", of) for name, of in found.items()]


def _panels(count: int, columns: int = _COLUMNS) -> "tuple[Figure, list[Axes]]":
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = canvas(max(6.0, 3.6 * columns), 0.6 + 3.4 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    for each in axes[:count]:
        plain(each)
    return figure, axes[:count]


def _line(style: Mapping[str, Any]) -> dict[str, Any]:
    return {"markersize": 4, "linewidth": 1.5, **style}


def _legend(figure: "Figure", axes: "Iterable[Axes]") -> None:
    """One legend below all panels, each line once."""
    lines: dict[str, Any] = {}
    for each in axes:
        for handle, text in zip(*each.get_legend_handles_labels(), strict=True):
            lines.setdefault(text, handle)
    # As many columns as there is room for; in this size some 18 characters take an inch, and a line and gaps 6 of them.
    columns = int(min(4, len(lines), max(1, 18 * figure.get_figwidth() / (6 + max(map(len, lines), default=0)))))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
