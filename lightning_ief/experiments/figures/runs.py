"""Figures that compare runs: what their CSVLoggers wrote, and what `lightning-ief evaluate` wrote.

They show what was logged and nothing else. Each is saved as PNG and PDF; lines differ in style and marker as well as in
colour, so that they can be read in grey.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_ief.callbacks.gamma_evaluation import deviation_key
from lightning_ief.experiments.evaluation import Result, SampleProjection
from lightning_ief.experiments.figures.training import NAMES, STYLES, logarithmic, plain, save_both
from lightning_ief.experiments.tables import Series, read_metrics, read_table

if TYPE_CHECKING:  # an extra, imported where a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Drawn", "draw_runs", "draw_what_there_is", "existing", "experiment", "metrics_of", "named"]

Metrics = Mapping[str, Series]
_COLUMNS = 3  # panels side by side


@dataclass(frozen=True)
class Drawn:
    """A figure.

    Attributes:
        title: What it shows.
        png: The file.
        pdf: The same as PDF.

    """

    title: str
    png: Path
    pdf: Path


def draw_runs(
    runs: Sequence[Path],
    directory: Path = Path("figures"),
    evaluations: Sequence[Path] = (),
    projections: Sequence[Path] = (),
    metric: str = "val/accuracy",
    figures: Sequence[str] = (),
) -> list[Path]:
    """Draw figures of several runs and evaluations.

    * `gamma_over_training`: γ of EF, iEF and F̂ over that of SGD, γ of F̂ over those of EF and iEF, and the gradient-norm
      imbalance, over the training stage; a line for each run, error bars over the batches (none where a ratio was not
      logged itself).
    * `cosine_over_training`: cosine of each direction to SGD, a panel for each: large damping turns EF into SGD.
    * `curves`: training loss and a validation metric over epochs; runs whose folders differ in their version or seed
      alone (version_0, version_1; lr_0.1_seed_0, lr_0.1_seed_1) are repetitions of one experiment, drawn as their mean
      with the range between them.
    * `gamma_against_damping`: γ over that of SGD against λ, a panel for each checkpoint of each evaluation.
    * `projections`: for one batch, the projection of each update on each sample, cos(d, ∇l_n), against the sample's
      gradient norm; a panel for each checkpoint, at the smallest λ there is.

    A figure whose values were not logged is left out with a warning that says what logs them.

    Args:
        runs: Folders with a metrics.csv of Lightning's CSVLogger.
        directory: Where the figures go; made if it does not exist.
        evaluations: CSV files of `lightning-ief evaluate`.
        projections: CSV files of its option projections.
        metric: The validation metric of `curves`.
        figures: Names of those to draw; all of them if none.

    Returns:
        The files drawn.

    Raises:
        ValueError: If a figure is unknown.
        FileNotFoundError: If a run has no metrics.csv, or an evaluation is not there.

    """
    drawn, left_out = draw_what_there_is(runs, directory, evaluations, projections, metric, figures)
    for note in left_out:
        warnings.warn(note, stacklevel=2)
    return [path for figure in drawn for path in (figure.png, figure.pdf)]


def draw_what_there_is(
    runs: Sequence[Path],
    directory: Path,
    evaluations: Sequence[Path],
    projections: Sequence[Path],
    metric: str,
    figures: Sequence[str] = (),
) -> tuple[list[Drawn], list[str]]:
    """Do what `draw_runs` does, which explains the arguments.

    Args:
        runs: Folders with a metrics.csv.
        directory: Where the figures go.
        evaluations: CSV files.
        projections: CSV files.
        metric: The validation metric.
        figures: Names of figures; all if none.

    Returns:
        The figures, and a note for each that was left out.

    Raises:
        ValueError: If a figure is unknown.

    """
    read = {name: read_metrics(metrics_of(run)) for name, run in named(runs).items()}
    results = [result for path in map(existing, evaluations) for result in read_table(path, Result)]
    samples = [row for path in map(existing, projections) for row in read_table(path, SampleProjection)]
    available: dict[str, tuple[str, Callable[[], Figure | None], str]] = {
        "gamma_over_training": (
            "γ over training: how far each direction is from the natural gradient",
            lambda: _gamma_figure(read), "gamma_relative/*, which GammaIndicators logs",
        ),
        "cosine_over_training": (
            "Cosine of each direction to SGD",
            lambda: _cosine_figure(read), "cosine/*, which GammaIndicators logs",
        ),
        "curves": (
            "Loss and validation metric",
            lambda: _curves_figure(read, metric), f"train/loss and {metric}",
        ),
        "gamma_against_damping": (
            "γ against damping",
            lambda: _damping_figure(results), "evaluations at several dampings",
        ),
        "projections": (
            "Projection of each update on each sample",
            lambda: _projections_figure(samples), "projections, which evaluate --projections writes",
        ),
    }  # fmt: skip
    if unknown := set(figures) - available.keys():
        raise ValueError(f"draw_runs(figures={[*figures]}): there is no {sorted(unknown)}; there are {[*available]}.")
    drawn, left_out = [], []
    for name in figures or available:
        title, draw, source = available[name]
        figure = draw()
        if figure is None:
            left_out.append(f"{name} was left out: there are no values of {source}.")
        else:
            drawn.append(Drawn(title, *save_both(figure, directory, name)))
    return drawn, left_out


def metrics_of(run: Path) -> Path:
    """The metrics.csv of a run.

    Args:
        run: Its folder, or that file.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If it is not there.

    """
    hint = " A run is a folder in which Lightning's CSVLogger wrote metrics.csv."
    return existing(run / "metrics.csv" if run.is_dir() else run, hint)


def existing(path: Path, hint: str = "") -> Path:
    """Require that a file is there.

    Args:
        path: The file.
        hint: What the error says besides.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If it is not there.

    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}.{hint}")
    return path


def named(runs: Sequence[Path]) -> dict[str, Path]:
    """Names of runs: the last two parts of their folders, or as many as it takes to tell them apart.

    Args:
        runs: Their folders, or their metrics.csv.

    Returns:
        The runs by name, such as quickstart/version_0; one that is given twice once.

    """
    folders = {(run if run.is_dir() else run.parent).resolve(): run for run in runs}
    count = 2
    while len(names := {"/".join(folder.parts[-count:]): run for folder, run in folders.items()}) < len(folders):
        count += 1
    return names


def experiment(name: str) -> str:
    """What a run is a repetition of.

    Args:
        name: Name of the run, such as quickstart/version_0, or ief/lr_0.1_seed_0 of a comparison.

    Returns:
        The name without version and seed: quickstart, ief/lr_0.1.

    """
    return re.sub(r"(/version_\d+|_seed_-?\d+)$", "", name)


# --- the figures


def _gamma_figure(runs: Mapping[str, Metrics]) -> "Figure | None":
    series = {label: {n: found for n, m in runs.items() if (found := find(m))} for label, find in _PANELS.items()}
    wanted = {label: found for label, found in series.items() if found}
    if not any(label.startswith("γ") for label in wanted):
        return None
    figure, axes = _panels(len(wanted))
    styles = dict(zip(runs, cycle(STYLES)))
    for each, (label, lines) in zip(axes, wanted.items(), strict=True):
        for name, (steps, values, deviations) in lines.items():
            last = max(max(steps) for steps, _ in runs[name].values())
            stage = [step / last if last else 0.0 for step in steps]
            each.errorbar(stage, values, deviations, label=name, **_line(styles[name]))
        if label.startswith("γ"):
            each.axhline(1.0, color="#404040", linewidth=1.0, zorder=1)
        logarithmic(each)
        each.set(title=label, xlabel="training stage")
    _legend(figure, axes)
    return figure


_Values = tuple[list[int], list[float], list[float] | None]
"""Steps, values and standard deviations."""


def _logged(key: str) -> Callable[[Metrics], _Values | None]:
    return lambda metrics: (*metrics[key], _deviations(metrics, key)) if key in metrics else None


def _quotient(above: str, below: str) -> Callable[[Metrics], _Values | None]:
    """Of two means that were logged at the same steps."""

    def find(metrics: Metrics) -> _Values | None:
        if above not in metrics or below not in metrics:
            return None
        divisors = dict(zip(*metrics[below], strict=True))
        points = [
            (step, value / divisors[step]) for step, value in zip(*metrics[above], strict=True) if divisors.get(step)
        ]
        return [step for step, _ in points], [value for _, value in points], None

    return find


_PANELS: dict[str, Callable[[Metrics], _Values | None]] = {
    "γ(EF) / γ(SGD)": _logged("gamma_relative/ef"),
    "γ(iEF) / γ(SGD)": _logged("gamma_relative/ief"),
    r"γ($\hat{F}$) / γ(EF)": _quotient("gamma/sampled_fisher", "gamma/ef"),
    r"γ($\hat{F}$) / γ(iEF)": _quotient("gamma/sampled_fisher", "gamma/ief"),
    r"γ($\hat{F}$) / γ(SGD)": _logged("gamma_relative/sampled_fisher"),
    "gradient-norm imbalance": _logged("gradient_norm_imbalance"),
}


def _deviations(metrics: Metrics, key: str) -> list[float] | None:
    """Standard deviations at the steps of a key; None if there are none, as for a single batch."""
    logged = metrics.get(deviation_key(key))
    if logged is None:
        return None
    by_step = dict(zip(*logged, strict=True))
    return [by_step.get(step, math.nan) for step in metrics[key][0]]


def _cosine_figure(runs: Mapping[str, Metrics]) -> "Figure | None":
    keys = dict.fromkeys(key for metrics in runs.values() for key in metrics if key.startswith("cosine/"))
    names = [key.partition("/")[2] for key in keys if key != "cosine/sgd"]
    if not names:
        return None
    figure, axes = _panels(len(names))
    for each, name in zip(axes, names, strict=True):
        for (run, metrics), style in zip(runs.items(), cycle(STYLES)):
            key = f"cosine/{name}"
            if key in metrics:
                each.errorbar(*metrics[key], _deviations(metrics, key), label=run, **_line(style))
        each.set(title=f"cosine({NAMES.get(name, name)}, SGD)", xlabel="training step", ylim=(None, 1.0))
    _legend(figure, axes)
    return figure


def _curves_figure(runs: Mapping[str, Metrics], metric: str) -> "Figure | None":
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


def _damping_figure(results: Sequence[Result]) -> "Figure | None":
    by_checkpoint: dict[str, list[Result]] = {}
    for result in results:
        by_checkpoint.setdefault(result.checkpoint, []).append(result)
    if not any(result.damping > 0 for result in results):
        return None
    figure, axes = _panels(len(by_checkpoint))
    styles = _styles(r.direction for r in results if r.direction != "sgd")
    for each, rows in zip(axes, by_checkpoint.values(), strict=True):
        for name, style in styles.items():
            mine = sorted((r for r in rows if r.direction == name and r.damping > 0), key=lambda r: r.damping)
            if not mine:
                continue
            deviations = [r.gamma_relative_std for r in mine]
            bars = None if any(map(math.isnan, deviations)) else deviations
            label = NAMES.get(name, name)
            each.errorbar(
                [r.damping for r in mine], [r.gamma_relative for r in mine], bars, label=label, **_line(style)
            )
        each.axhline(1.0, color="#404040", linewidth=1.0, zorder=1)
        each.set_xscale("log")
        logarithmic(each)
        run = "/".join(Path(rows[0].checkpoint).parts[-4:-2])
        each.set(title=f"{run}, step {rows[0].step}", xlabel="damping λ")
    axes[0].set_ylabel("γ / γ(SGD)  (lower is better)")
    _legend(figure, axes)
    return figure


def _projections_figure(rows: Sequence[SampleProjection]) -> "Figure | None":
    finite = [row for row in rows if row.update_norm > 0 and row.gradient_norm > 0]  # neither NaN
    if not finite:
        return None
    by_checkpoint: dict[str, list[SampleProjection]] = {}
    for row in finite:
        by_checkpoint.setdefault(row.checkpoint, []).append(row)
    styles = _styles(r.direction for r in finite)
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
                label=NAMES.get(name, name), color=style["color"], marker=style["marker"],
                linestyle="none", markersize=3.5, markeredgecolor="black", markeredgewidth=0.3, alpha=0.8,
            )  # fmt: skip
        logarithmic(each, "x")
        # Samples whose loss an update raises lie below zero: linear around it, logarithmic beyond.
        each.set_yscale("symlog", linthresh=1e-3)
        each.set_ylim(-1.5, 1.5)
        each.axhline(0.0, color="#404040", linewidth=1.0, zorder=1)
        run = "/".join(Path(mine[0].checkpoint).parts[-4:-2])
        each.set(title=f"{run}, step {mine[0].step}", xlabel=r"$\Vert\nabla l_n\Vert$, norm of the sample's gradient")
    axes[0].set_ylabel(r"cos($d$, $\nabla l_n$)")
    _legend(figure, axes)
    return figure


# --- what they share


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


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A style for each direction, the same one in all figures for those of the package."""
    others = (name for name in dict.fromkeys(names) if name not in NAMES)
    return dict(zip([*NAMES, *others], cycle(STYLES)))


def _line(style: Mapping[str, Any]) -> dict[str, Any]:
    return {"markersize": 4, "linewidth": 1.5, **style}


def _legend(figure: "Figure", axes: "Iterable[Axes]") -> None:
    """One legend below all panels, each line once."""
    lines: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, handle)
    columns = min(4, len(lines))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
