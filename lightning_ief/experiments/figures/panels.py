"""The figures of several runs and evaluations, each None if its values are not there."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_ief.callbacks.gamma_evaluation import deviation_key
from lightning_ief.directions.registry import REFERENCE
from lightning_ief.experiments.evaluation import Result, SampleProjection
from lightning_ief.experiments.figures.drawing import (
    GREY,
    REFERENCE_LABEL,
    STYLES,
    direction_label,
    direction_styles,
    logarithmic,
    mark_one,
    plain,
)
from lightning_ief.experiments.figures.folders import experiment
from lightning_ief.experiments.tables import Series

if TYPE_CHECKING:  # an extra, imported where a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cosine_figure", "curves_figure", "damping_figure", "gamma_figure", "projections_figure"]

Metrics = Mapping[str, Series]
_COLUMNS = 3  # panels side by side


_Values = tuple[list[int], list[float], list[float] | None]
"""Steps, values and standard deviations."""


def _logged(key: str) -> Callable[[Metrics], _Values | None]:
    return lambda metrics: (*metrics[key], _deviations(metrics, key)) if key in metrics else None


def _quotient(above: str, below: str) -> Callable[[Metrics], _Values | None]:
    """The quotient of two means that were logged at the same steps."""

    def find(metrics: Metrics) -> _Values | None:
        if above not in metrics or below not in metrics:
            return None
        divisors = dict(zip(*metrics[below], strict=True))
        points = [
            (step, value / divisors[step]) for step, value in zip(*metrics[above], strict=True) if divisors.get(step)
        ]
        return [step for step, _ in points], [value for _, value in points], None

    return find


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
_PANELS = (
    ("γ(EF) / γ(SGD)", _logged("gamma_relative/ef")),
    ("γ(iEF) / γ(SGD)", _logged("gamma_relative/ief")),
    (r"γ($\hat{F}$) / γ(EF)", _quotient("gamma/sampled_fisher", "gamma/ef")),
    (r"γ($\hat{F}$) / γ(iEF)", _quotient("gamma/sampled_fisher", "gamma/ief")),
    (r"γ($\hat{F}$) / γ(SGD)", _logged("gamma_relative/sampled_fisher")),
)


def gamma_figure(runs: Mapping[str, Metrics]) -> "Figure | None":
    """γ of each direction over that of the reference, and the gradient-norm imbalance, over the training stage."""
    keys = dict.fromkeys(key for metrics in runs.values() for key in metrics if key.startswith(_RATIO))
    others = [name for key in keys if (name := key.removeprefix(_RATIO)) not in (*_OF_THE_PAPER, REFERENCE)]
    panels = [
        *_PANELS,
        *((f"γ({direction_label(name)}) / γ({REFERENCE_LABEL})", _logged(_RATIO + name)) for name in others),
        (_IMBALANCE, _logged("gradient_norm_imbalance")),
    ]
    found = [
        (title, {name: curve for name, metrics in runs.items() if (curve := find(metrics))}) for title, find in panels
    ]
    wanted = [(title, lines) for title, lines in found if lines]
    if all(title == _IMBALANCE for title, _ in wanted):
        return None
    figure, axes = _panels(len(wanted))
    styles = dict(zip(runs, cycle(STYLES)))
    for each, (title, lines) in zip(axes, wanted, strict=True):
        for name, (steps, values, deviations) in lines.items():
            last = max(max(steps) for steps, _ in runs[name].values())
            stage = [step / last if last else 0.0 for step in steps]
            each.errorbar(stage, values, deviations, label=name, **_line(styles[name]))
        if title != _IMBALANCE:
            mark_one(each)
        logarithmic(each)
        each.set(title=title, xlabel="training stage")
    _legend(figure, axes)
    return figure


def cosine_figure(runs: Mapping[str, Metrics]) -> "Figure | None":
    """Cosine of each direction to the reference, a panel for each."""
    keys = dict.fromkeys(key for metrics in runs.values() for key in metrics if key.startswith("cosine/"))
    names = [key.partition("/")[2] for key in keys if key != f"cosine/{REFERENCE}"]
    if not names:
        return None
    figure, axes = _panels(len(names))
    for each, name in zip(axes, names, strict=True):
        for (run, metrics), style in zip(runs.items(), cycle(STYLES)):
            key = f"cosine/{name}"
            if key in metrics:
                each.errorbar(*metrics[key], _deviations(metrics, key), label=run, **_line(style))
        each.set(title=f"cosine({direction_label(name)}, {REFERENCE_LABEL})", xlabel="training step", ylim=(None, 1.0))
    _legend(figure, axes)
    return figure


def curves_figure(runs: Mapping[str, Metrics], metric: str) -> "Figure | None":
    """Training loss and a validation metric over epochs; repetitions of one experiment as mean and range."""
    experiments: dict[str, list[Metrics]] = {}
    for name, metrics in runs.items():
        experiments.setdefault(experiment(name), []).append(metrics)
    keys = [key for key in ("train/loss", metric) if any(key in metrics for metrics in runs.values())]
    if not keys:
        return None
    figure, axes = _panels(len(keys))
    for each, key in zip(axes, keys, strict=True):
        for (name, repetitions), style in zip(experiments.items(), cycle(STYLES)):
            series = [_by_epoch(metrics, key) for metrics in repetitions if key in metrics]
            epochs = sorted(set.intersection(*map(set, series))) if series else []
            columns = [[one[epoch] for one in series] for epoch in epochs]
            label = f"{name} ({len(series)} runs)" if len(series) > 1 else name
            each.plot(epochs, [fmean(column) for column in columns], label=label, **_line(style))
            if len(series) > 1:
                bounds = [min(column) for column in columns], [max(column) for column in columns]
                each.fill_between(epochs, *bounds, color=style["color"], alpha=0.2, linewidth=0)
        each.set(title=key if key != "train/loss" else "train/loss, mean of each epoch", xlabel="epoch")
        each.locator_params(axis="x", integer=True)
        if key == "train/loss" and all(y > 0 for one in runs.values() for y in one.get(key, ([], []))[1]):
            logarithmic(each)
    _legend(figure, axes)
    return figure


def _by_epoch(metrics: Metrics, key: str) -> dict[int, float]:
    """Mean of the values logged in each epoch."""
    epoch_of = dict(zip(*metrics["epoch"], strict=True))
    found: dict[int, list[float]] = {}
    for step, value in zip(*metrics[key], strict=True):
        if step in epoch_of:
            found.setdefault(int(epoch_of[step]), []).append(value)
    return {epoch: fmean(values) for epoch, values in found.items()}


def damping_figure(results: Sequence[Result]) -> "Figure | None":
    """γ over that of the reference against λ, a panel for each checkpoint."""
    by_checkpoint: dict[str, list[Result]] = {}
    for result in results:
        by_checkpoint.setdefault(result.checkpoint, []).append(result)
    if not any(result.damping > 0 for result in results):
        return None
    figure, axes = _panels(len(by_checkpoint))
    styles = direction_styles(r.direction for r in results if r.direction != REFERENCE)
    for each, rows in zip(axes, by_checkpoint.values(), strict=True):
        for name, style in styles.items():
            mine = sorted((r for r in rows if r.direction == name and r.damping > 0), key=lambda r: r.damping)
            if not mine:
                continue
            deviations = [r.gamma_relative_std for r in mine]
            bars = None if any(map(math.isnan, deviations)) else deviations
            each.errorbar(
                [r.damping for r in mine],
                [r.gamma_relative for r in mine],
                bars,
                label=direction_label(name),
                **_line(style),
            )
        mark_one(each)
        each.set_xscale("log")
        logarithmic(each)
        run = "/".join(Path(rows[0].checkpoint).parts[-4:-2])
        each.set(title=f"{run}, step {rows[0].step}", xlabel="damping λ")
    axes[0].set_ylabel(f"γ / γ({REFERENCE_LABEL})  (lower is better)")
    _legend(figure, axes)
    return figure


def projections_figure(rows: Sequence[SampleProjection]) -> "Figure | None":
    """cos(d, ∇l_n) against ‖∇l_n‖ on the samples of one batch, a panel for each checkpoint."""
    finite = [row for row in rows if row.update_norm > 0 and row.gradient_norm > 0]  # neither NaN
    if not finite:
        return None
    by_checkpoint: dict[str, list[SampleProjection]] = {}
    for row in finite:
        by_checkpoint.setdefault(row.checkpoint, []).append(row)
    styles = direction_styles(r.direction for r in finite)
    figure, axes = _panels(len(by_checkpoint))
    for each, mine in zip(axes, by_checkpoint.values(), strict=True):
        for name, style in styles.items():
            dampings = [row.damping for row in mine if row.direction == name]
            if not dampings:
                continue
            chosen = [row for row in mine if row.direction == name and row.damping == min(dampings)]
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
        run = "/".join(Path(mine[0].checkpoint).parts[-4:-2])
        each.set(title=f"{run}, step {mine[0].step}", xlabel=r"$\Vert\nabla l_n\Vert$, norm of the sample's gradient")
    axes[0].set_ylabel(r"cos($d$, $\nabla l_n$)")
    _legend(figure, axes)
    return figure


def _panels(count: int) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(6.0, 3.6 * columns), 0.6 + 3.4 * rows), dpi=150, layout="constrained")
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
    columns = min(4, len(lines))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
