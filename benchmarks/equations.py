"""Equations, where nothing is noisy, and a table, where targets are: the error against steps and against time."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.report import machine, markdown_table, write
from lightning_ief.experiments.comparison import Outcome, chosen, compare
from lightning_ief.experiments.figures.drawing import canvas, direction_styles, plain, save
from lightning_ief.experiments.tables import read_metrics

__all__ = ["FULL", "SMOKE", "Curve", "Point", "Size", "draw", "read_curve", "report", "study", "within"]

_RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_METRIC = "val/relative_l2"
_NAMES = {"ief": "iEF", "adam": "Adam", "adamw": "AdamW", "lbfgs": "L-BFGS", "small_damping": "iEF, λ = 1e-12"}
_EQUATIONS = {"poisson_2d": "2-D Poisson equation", "heat": "Heat equation"}
_TABLE = "diabetes"
_GOAL = 1e-6


@dataclass(frozen=True)
class Size:
    """The study at one of its sizes.

    Attributes:
        optimizers: Those of the equations.
        searched: Of these, those whose learning rates are searched.
        lr_factors: Over these multiples of those of the files.
        more: Further options of `lightning-ief fit`.
        points: And of the equations' data.
    """

    optimizers: tuple[str, ...] = ("ief", "adam", "adamw", "lbfgs")
    searched: tuple[str, ...] = ("adam", "adamw")
    lr_factors: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    more: tuple[str, ...] = ()
    points: tuple[str, ...] = ()


FULL = Size()
SMOKE = Size(
    optimizers=("ief", "adam", "lbfgs"),
    searched=("adam",),
    lr_factors=(1.0, 2.0),
    more=("--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"),
    points=tuple(f"--data.init_args.{name}" for name in ("interior=40", "boundary=8", "steps_per_epoch=2")),
)


@dataclass(frozen=True)
class Point:
    """A validation of a run; CSV files have these columns.

    Attributes:
        optimizer: Its name.
        lr: Learning rate.
        seed: Seed of the run.
        steps: Steps taken until then.
        seconds: Time that these took, without validation and loading.
        error: Relative L2 error.
    """

    optimizer: str
    lr: float
    seed: int
    steps: int
    seconds: float
    error: float


Curve = list[Point]
"""The validations of a run."""


def study(size: Size, seeds: Sequence[int], output: Path, folder: Path, note: str = "") -> Path:
    """Measure, draw the figures and write the report; what was done before is not done again.

    Args:
        size: Size of the study.
        seeds: Seeds of the initial weights.
        output: Folder of the report; figures and CSV files go to equations/ in it.
        folder: Where the runs go.
        note: What else is to be known of the measurement.

    Returns:
        The report.
    """
    found, files = {}, output / "equations"
    files.mkdir(parents=True, exist_ok=True)
    for name in (*_EQUATIONS, _TABLE):
        optimizers = size.optimizers if name in _EQUATIONS else ("ief", "small_damping", "adamw")
        outcomes = _compare(size, name, optimizers, seeds, folder / name)
        found[name] = {key: [read_curve(o) for o in rows] for key, rows in chosen(outcomes, minimize=True).items()}
        write(
            [point for curves in found[name].values() for curve in curves for point in curve],
            files / f"{name}.csv",
            Point,
        )
        shutil.copy(folder / name / "comparison.csv", files / f"{name}_runs.csv")
        draw(found[name], files / f"{name}.png")
    path = output / "equations.md"
    path.write_text(report(size, found, len(seeds), note), encoding="utf-8")
    return path


def _compare(size: Size, name: str, optimizers: Sequence[str], seeds: Sequence[int], folder: Path) -> list[Outcome]:
    """The runs of a recipe; learning rates are searched where there is no line search."""
    searched = [key for key in optimizers if key in size.searched]
    others = [key for key in optimizers if key not in size.searched]
    options = [*size.more, *(size.points if name in _EQUATIONS else ())]
    outcomes: list[Outcome] = []
    for mine, factors in ((others, (1.0,)), (searched, size.lr_factors)):
        if mine:
            recipe = _RECIPES / f"{name}.yaml"
            outcomes += compare(recipe, mine, seeds, factors, folder, _METRIC, minimize=True, options=options)
    return sorted(outcomes, key=lambda o: optimizers.index(o.optimizer))


def read_curve(outcome: Outcome) -> Curve:
    """The validations of a run, from what CSVLogger and StepTiming wrote."""
    series = read_metrics(Path(outcome.run, "metrics.csv"))
    errors = dict(zip(*series[_METRIC], strict=True))
    milliseconds = dict(zip(*series["timing/step_ms"], strict=True))
    usual = median(milliseconds.values())  # of epochs whose batches were verified, and not timed
    curve, before, seconds = [], 0, 0.0
    for step, error in errors.items():  # steps are counted from 0
        seconds += milliseconds.get(step, usual) * (step + 1 - before) / 1e3
        before = step + 1
        curve.append(Point(outcome.optimizer, outcome.lr, outcome.seed, before, seconds, error))
    return curve


def within(curve: Curve, seconds: float) -> float | None:
    """The smallest error that a run had within a time; None if it was not validated within it."""
    return min((point.error for point in curve if point.seconds <= seconds), default=None)


# --- figures


def draw(curves: Mapping[str, Sequence[Curve]], path: Path) -> Path:
    """Draw the error against steps and against time, the median as a line and the range of the seeds.

    Args:
        curves: Of each optimizer, those of the seeds.
        path: The PNG file.

    Returns:
        The file.
    """
    figure = canvas(10.0, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    styles = direction_styles(curves)
    for name, runs in curves.items():
        style = styles[name]
        line = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 1.8}
        moments = [*zip(*runs, strict=False)]  # the validations of all seeds, one after the other
        errors = [[point.error for point in moment] for moment in moments]
        for axes, column in zip(panels, ("steps", "seconds"), strict=True):
            x = [median(getattr(point, column) for point in moment) for moment in moments]
            axes.plot(x, [*map(median, errors)], label=_NAMES[name], **line)
            axes.fill_between(
                x, [*map(min, errors)], [*map(max, errors)], color=style["color"], alpha=0.15, linewidth=0
            )
    for axes, label in zip(panels, ("steps", "time of the steps, s"), strict=True):
        plain(axes)
        axes.set(xscale="log", yscale="log", xlabel=label)
    panels[0].set_ylabel("relative L2 error")
    panels[1].legend(frameon=False)
    return save(figure, path)


# --- report

_TEXT = """\
# Equations, and a table with noise

Where targets are regressed without noise, iEF of a scalar output is the natural gradient, and both are Gauss-Newton:
exact curvature goes to errors that first-order optimizers don't reach. Where targets are noisy, there is nothing to win
that way. Both by one command:

    python -m benchmarks equations

Networks are tanh MLPs that carry value, gradient and Laplacian forward in one pass (`DerivativeMLP`); each point within
or on a face is a sample, its logit what the equation makes of the network there. All points are in each batch, and the
same in all steps. Everything is float64 on a CPU, threads: {threads}. {seeds} seeds, which differ in the initial
weights; lines are their medians, bands their range.

Learning rates of Adam and AdamW were searched over {factors} times those of their files with the first seed, by the
smallest error, and fall to 0 as a cosine; iEF (`absolute_damping`, `line_search`) and L-BFGS (strong Wolfe) search step
lengths themselves. Settings of iEF and of the networks were found by trying on some seeds. A step of L-BFGS is 20
iterations; its residuals are multiplied by 1,000, without which absolute bounds in torch's code stop it early. Times
are those of the steps alone, by `StepTiming`.

{equations}

## A table with noise

scikit-learn's diabetes table: ten measurements of 442 patients, and how the disease went on; 309 to train on, 133 held
out, standardised, an MLP 10-32-1 (`recipes/diabetes.yaml`). A relative error of 1 is that of always guessing the mean.
"iEF" damps by ρ = 3 times the mean diagonal; "iEF, λ = 1e-12" is the setting of the equations, line search included.
The lr of AdamW was searched as above; it is constant.

{table}

{verdict}

![Error on the held-out part](equations/diabetes.png)

Every validation: [equations/poisson_2d.csv](equations/poisson_2d.csv), [equations/heat.csv](equations/heat.csv),
[equations/diabetes.csv](equations/diabetes.csv); every run, those of the search included, with its smallest error:
[equations/poisson_2d_runs.csv](equations/poisson_2d_runs.csv), [equations/heat_runs.csv](equations/heat_runs.csv),
[equations/diabetes_runs.csv](equations/diabetes_runs.csv).

Measured on {machine}.{note}
"""

_WHAT = {
    "poisson_2d": "−Δu = f on the unit square, u = sin πx sin πy (`recipes/poisson_2d.yaml`: 900 points within, 120 on "
    "the boundary, a network 2-32-1).",
    "heat": "∂_t u = ¼ ∂²_x u for 0 < x, t < 1, u = exp(−π² t / 4) sin πx given at t = 0, x = 0 and x = 1 "
    "(`recipes/heat.yaml`: 900 points within, 120 on these faces, a network 2-16-16-1).",
}


def report(size: Size, found: Mapping[str, Mapping[str, Sequence[Curve]]], seeds: int, note: str = "") -> str:
    """The page.

    Args:
        size: Size of the study.
        found: Curves of the seeds by recipe and optimizer.
        seeds: Number of seeds.
        note: What else is to be known of the measurement.

    Returns:
        Markdown.
    """
    return _TEXT.format(
        threads=torch.get_num_threads(),
        seeds=seeds,
        factors=", ".join(f"{factor:g}" for factor in size.lr_factors),
        equations="\n\n".join(_equation(name, found[name]) for name in _EQUATIONS),
        table=_noisy_table(found[_TABLE]),
        verdict=_noisy_verdict(found[_TABLE]),
        machine=machine(torch.device("cpu")),
        note=note and f" {note}",
    )


def _equation(name: str, curves: Mapping[str, Sequence[Curve]]) -> str:
    """The section of an equation."""
    time = max(curve[-1].seconds for curve in curves["ief"])
    cells = []
    for key, runs in curves.items():
        last = [curve[-1] for curve in runs]
        ends = [min(point.error for point in curve) for curve in runs]
        cells.append(
            [_NAMES[key], f"{last[0].lr:g}", f"{median(p.steps for p in last):g}",
             f"{median(p.seconds for p in last):.1f}", f"{median(ends):.1e}",
             f"{min(ends):.1e} – {max(ends):.1e}", _error_at(runs, time)]
        )  # fmt: skip
    header = ("optimizer", "lr", "steps", "time, s", "smallest error", "of the seeds", f"within {time:.1f} s")
    title = _EQUATIONS[name]
    parts = [f"## {title}", _WHAT[name], markdown_table(header, cells), _verdict(curves, time)]
    return "\n\n".join([*parts, f"![{title}: error against steps and time](equations/{name}.png)"])


def _error_at(runs: Sequence[Curve], seconds: float) -> str:
    errors = [error for curve in runs if (error := within(curve, seconds)) is not None]
    return f"{median(errors):.1e}" if errors else "–"


def _verdict(curves: Mapping[str, Sequence[Curve]], seconds: float) -> str:
    """How far iEF is below the best of the others at equal time, and when it reaches the goal."""
    at = {key: [e for curve in runs if (e := within(curve, seconds)) is not None] for key, runs in curves.items()}
    errors = {key: median(values) for key, values in at.items() if values}
    best = min((key for key in errors if key != "ief"), key=errors.__getitem__)
    text = (
        f"Within the {seconds:.1f} s that the slowest seed of iEF takes, its error (median of the seeds) is "
        f"{errors[best] / errors['ief']:,.0f} times below that of {_NAMES[best]}, the best of the others. "
    )
    reached = [next((p for p in curve if p.error <= _GOAL), None) for curve in curves["ief"]]
    there = [point for point in reached if point is not None]
    if not there:
        return text + f"No seed reaches {_GOAL:g}."
    return text + (
        f"{len(there)} of {len(reached)} seeds reach {_GOAL:g}, after {median(p.steps for p in there):g} steps and "
        f"{median(p.seconds for p in there):.1f} s (median of them)."
    )


def _noisy_table(curves: Mapping[str, Sequence[Curve]]) -> str:
    cells = []
    for key, runs in curves.items():
        smallest = [min(point.error for point in curve) for curve in runs]
        last = [curve[-1].error for curve in runs]
        cells.append(
            [_NAMES[key], f"{runs[0][-1].lr:g}", f"{median(c[-1].steps for c in runs):g}",
             f"{median(c[-1].seconds for c in runs):.1f}", f"{median(smallest):.3f}", f"{median(last):.3f}",
             f"{min(last):.3f} – {max(last):.3f}"]
        )  # fmt: skip
    header = ("optimizer", "lr", "steps", "time, s", "smallest held-out error", "at the end", "of the seeds")
    return markdown_table(header, cells)


def _noisy_verdict(curves: Mapping[str, Sequence[Curve]]) -> str:
    """What noise does, in numbers."""
    lines = []
    for key, runs in curves.items():
        smallest = median(min(point.error for point in curve) for curve in runs)
        when = median(min(curve, key=lambda point: point.error).steps for curve in runs)
        end = median(curve[-1].error for curve in runs)
        then = "stays there" if end < 1.01 * smallest else f"then rises to {end:.3f}: it fits the noise"
        lines.append(f"* {_NAMES[key]} is best after {when:g} steps, at {smallest:.3f}, and {then}.")
    return "\n".join(lines)
