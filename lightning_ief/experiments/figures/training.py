"""Two figures of a training run, from the metrics.csv that Lightning's CSVLogger wrote.

They show what was logged and nothing else: no smoothing, no interpolation of values that are missing. Lines differ in
style and marker as well as in colour, so that the figures can be read in grey.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ief.directions.registry import REFERENCE
from lightning_ief.experiments.figures.drawing import (
    GREY,
    REFERENCE_LABEL,
    canvas,
    direction_label,
    direction_styles,
    logarithmic,
    plain,
    save,
)
from lightning_ief.experiments.tables import Series, read_metrics

if TYPE_CHECKING:  # an extra, imported where a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_training"]

_RATIO = "gamma_relative/"
_TRAIN_LOSS, _VAL_LOSS = "train/loss", "val/loss"


def draw_training(metrics_csv: str | Path, directory: str | Path) -> list[Path]:
    """Draw γ ratios and loss over training as PNG files.

    `gamma_ratios.png`: γ of each direction over that of SGD (`gamma_relative/*`), logarithmic. `loss.png`: loss of
    each logged training batch (`train/loss`) and of the validation set (`val/loss`). A figure whose values were not
    logged is left out with a warning that says which callback or option logs them.

    Args:
        metrics_csv: What CSVLogger wrote.
        directory: Where the figures go; made if it does not exist.

    Returns:
        The files drawn.

    """
    series = read_metrics(Path(metrics_csv))
    directory = Path(directory)
    ratios = {
        name.removeprefix(_RATIO): values
        for name, values in series.items()
        if name.startswith(_RATIO) and name != f"{_RATIO}{REFERENCE}"
    }
    losses = {name: series[name] for name in (_TRAIN_LOSS, _VAL_LOSS) if name in series}
    figures: dict[str, tuple[Callable[[Mapping[str, Series]], Figure], Mapping[str, Series], str]] = {
        "gamma_ratios.png": (_gamma_figure, ratios, f"{_RATIO}*, which the callback GammaIndicators"),
        "loss.png": (_loss_figure, losses, f"{_TRAIN_LOSS} or {_VAL_LOSS}, which NaturalGradientMixin"),
    }
    drawn = []
    for name, (draw, found, source) in figures.items():
        if found:
            drawn.append(save(draw(found), directory / name))
        else:
            missing = f"{metrics_csv} holds no finite value of {source} logs."
            warnings.warn(f"{name} was left out: {missing}", stacklevel=2)
    return drawn


def _gamma_figure(ratios: Mapping[str, Series]) -> "Figure":
    title = "How far each direction is from the natural gradient"
    figure, axes = _canvas(title, f"γ / γ({REFERENCE_LABEL})  (a ratio; lower is better)")
    for name, style in direction_styles(ratios).items():
        steps, values = ratios[name]
        axes.plot(steps, values, label=direction_label(name), markersize=5, linewidth=1.8, **style)
    axes.axhline(1.0, color=GREY, linewidth=1.2, zorder=1)
    axes.annotate(
        REFERENCE_LABEL, (1.0, 1.0), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
        verticalalignment="center", color=GREY, annotation_clip=False,
    )  # fmt: skip
    logarithmic(axes)
    axes.legend(frameon=False)
    return figure


def _loss_figure(losses: Mapping[str, Series]) -> "Figure":
    figure, axes = _canvas("Loss over training", "mean loss per sample")
    styles: dict[str, dict[str, Any]] = {
        _TRAIN_LOSS: {"label": "training, each batch", "color": "#8A8A8A", "linewidth": 0.7},
        _VAL_LOSS: {"label": "validation", "color": "#0072B2", "linewidth": 1.8, "marker": "o", "markersize": 5},
    }
    for name, (steps, values) in losses.items():
        axes.plot(steps, values, **styles[name])
    if all(value > 0 for _, values in losses.values() for value in values):
        logarithmic(axes)
    axes.legend(frameon=False)
    return figure


def _canvas(title: str, ylabel: str) -> "tuple[Figure, Axes]":
    figure = canvas(7.0, 4.2)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel="training step (batches seen)", ylabel=ylabel)
    plain(axes)
    return figure, axes
