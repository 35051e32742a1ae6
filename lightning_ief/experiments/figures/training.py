"""Two figures of a training run, from the metrics.csv that Lightning's CSVLogger wrote.

They show what was logged and nothing else: no smoothing, no interpolation of values that are missing. Lines differ in
style and marker as well as in colour, so that the figures can be read in grey.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ief.directions.registry import REFERENCE
from lightning_ief.experiments.figures.drawing import (
    GREY,
    REFERENCE_LABEL,
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
    drawn = []
    if ratios:
        drawn.append(save(_gamma_figure(ratios), directory / "gamma_ratios.png"))
    else:
        _warn_left_out("gamma_ratios.png", metrics_csv, f"{_RATIO}*", "the callback GammaIndicators")
    if losses:
        drawn.append(save(_loss_figure(losses), directory / "loss.png"))
    else:
        _warn_left_out("loss.png", metrics_csv, f"{_TRAIN_LOSS} or {_VAL_LOSS}", "NaturalGradientMixin")
    return drawn


def _warn_left_out(figure: str, metrics_csv: str | Path, keys: str, source: str) -> None:
    warnings.warn(
        f"{figure} was left out: {metrics_csv} holds no finite value of {keys}, which {source} logs.", stacklevel=3
    )


def _gamma_figure(ratios: Mapping[str, Series]) -> "Figure":
    figure, axes = _canvas()
    for name, style in direction_styles(ratios).items():
        steps, values = ratios[name]
        axes.plot(steps, values, label=direction_label(name), markersize=5, linewidth=1.8, **style)
    axes.axhline(1.0, color=GREY, linewidth=1.2, zorder=1)
    axes.annotate(
        REFERENCE_LABEL, (1.0, 1.0), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
        verticalalignment="center", color=GREY, annotation_clip=False,
    )  # fmt: skip
    logarithmic(axes)
    axes.set_ylabel(f"γ / γ({REFERENCE_LABEL})  (a ratio; lower is better)")
    axes.set_title("How far each direction is from the natural gradient")
    axes.legend(frameon=False)
    return figure


def _loss_figure(losses: Mapping[str, Series]) -> "Figure":
    figure, axes = _canvas()
    styles: dict[str, dict[str, Any]] = {
        _TRAIN_LOSS: {"label": "training, each batch", "color": "#8A8A8A", "linewidth": 0.7},
        _VAL_LOSS: {"label": "validation", "color": "#0072B2", "linewidth": 1.8, "marker": "o", "markersize": 5},
    }
    for name, (steps, values) in losses.items():
        axes.plot(steps, values, **styles[name])
    if all(value > 0 for _, values in losses.values() for value in values):
        logarithmic(axes)
    axes.set_ylabel("mean loss per sample")
    axes.set_title("Loss over training")
    axes.legend(frameon=False)
    return figure


def _canvas() -> "tuple[Figure, Axes]":
    # The object-oriented interface draws to a file without a window and leaves pyplot's global state alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("training step (batches seen)")
    plain(axes)
    return figure, axes
