"""Figures that compare runs: what their CSVLoggers wrote, and what `lightning-ief evaluate` wrote.

They show what was logged and nothing else. Each is saved as PNG and PDF; lines differ in style and marker as well as in
colour, so that they can be read in grey.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_ief.experiments.evaluation import Result, SampleProjection
from lightning_ief.experiments.figures.drawing import REFERENCE_LABEL, save_both
from lightning_ief.experiments.figures.folders import existing, named, read_runs
from lightning_ief.experiments.figures.panels import (
    cosine_figure,
    curves_figure,
    damping_figure,
    gamma_figure,
    lr_figure,
    progress_figure,
    projections_figure,
)
from lightning_ief.experiments.outcomes import TIMING, Outcome
from lightning_ief.experiments.tables import read_table

if TYPE_CHECKING:  # an extra, imported where a figure is drawn
    from matplotlib.figure import Figure

__all__ = ["Drawn", "draw_runs", "draw_what_there_is"]


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
    comparison: Path | None = None,
    minimize: bool = False,
) -> list[Path]:
    """Draw figures of several runs and evaluations.

    * `gamma_over_training`: γ of each direction over that of SGD, γ of F̂ over those of EF and iEF, and the
      gradient-norm imbalance, over the training stage; a line for each run, error bars over the batches (none where a
      ratio was not logged itself).
    * `cosine_over_training`: cosine of each direction to SGD, a panel for each: large damping turns EF into SGD.
    * `curves`: training loss and a validation metric over epochs; runs whose folders differ in their version or seed
      alone (version_0, version_1; lr_0.1_seed_0, lr_0.1_seed_1) are repetitions of one experiment, drawn as their mean
      with the range between them.
    * `curves_over_time`: the same at each validation, over steps and over the time of these, which `StepTiming` logs.
    * `metric_over_lr`: of a comparison, the metric at every learning rate that was searched, over the best one.
    * `gamma_against_damping`: γ over that of SGD against λ, a panel for each checkpoint of each evaluation.
    * `projections`: for one batch, the projection of each update on each sample, cos(d, ∇l_n), against the sample's
      gradient norm; a panel for each checkpoint, at the smallest λ there is.

    A run that was resumed is one with the run it went on from, if that is given, too. A figure whose values were not
    logged is left out with a warning that says what logs them, and so is a panel without values.

    Args:
        runs: Folders with a metrics.csv of Lightning's CSVLogger.
        directory: Where the figures go; made if it does not exist.
        evaluations: CSV files of `lightning-ief evaluate`.
        projections: CSV files of its option projections.
        metric: The validation metric of `curves`.
        figures: Names of those to draw; all of them if none.
        comparison: The comparison.csv of `lightning-ief compare`.
        minimize: Whether smaller is better of the metric that was compared.

    Returns:
        The files drawn.

    Raises:
        ValueError: If a figure is unknown.
        FileNotFoundError: If a run has no metrics.csv, or an evaluation is not there.

    """
    drawn, left_out = draw_what_there_is(
        runs, directory, evaluations, projections, metric, figures, comparison, minimize
    )
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
    comparison: Path | None = None,
    minimize: bool = False,
) -> tuple[list[Drawn], list[str]]:
    """Draw as `draw_runs`, which explains the arguments; return the figures, and a note for all that was left out."""
    read = read_runs(named(runs))
    drawn: list[Drawn] = []
    left_out: list[str] = []
    results = [result for path in map(existing, evaluations) for result in read_table(path, Result)]
    samples = [row for path in map(existing, projections) for row in read_table(path, SampleProjection)]
    compared = read_table(existing(comparison), Outcome) if comparison else []
    available: dict[str, tuple[str, Callable[[], Figure | None], str]] = {
        "gamma_over_training": (
            "γ over training: how far each direction is from the natural gradient",
            lambda: gamma_figure(read, left_out.append), "gamma_relative/*, which GammaIndicators logs",
        ),
        "cosine_over_training": (
            f"Cosine of each direction to {REFERENCE_LABEL}",
            lambda: cosine_figure(read), "cosine/*, which GammaIndicators logs",
        ),
        "curves": (
            "Loss and validation metric",
            lambda: curves_figure(read, metric, left_out.append), f"train/loss and {metric}",
        ),
        "curves_over_time": (
            "Loss and validation metric over steps and over time",
            lambda: progress_figure(read, metric, left_out.append), f"{metric} and {TIMING}, which StepTiming logs",
        ),
        "metric_over_lr": (
            "The metric at the learning rates that were searched",
            lambda: lr_figure(compared, minimize), "a comparison that searched learning rates",
        ),
        "gamma_against_damping": (
            "γ against damping",
            lambda: damping_figure(results, left_out.append), "evaluations at several dampings",
        ),
        "projections": (
            "Projection of each update on each sample",
            lambda: projections_figure(samples, left_out.append), "projections, which evaluate --projections writes",
        ),
    }  # fmt: skip
    if unknown := set(figures) - available.keys():
        raise ValueError(f"draw_runs(figures={[*figures]}): there is no {sorted(unknown)}; there are {[*available]}.")
    for name in figures or available:
        title, draw, source = available[name]
        figure = draw()
        if figure is None:
            left_out.append(f"{name} was left out: there are no values of {source}.")
        else:
            drawn.append(Drawn(title, *save_both(figure, directory, name)))
    return drawn, left_out
