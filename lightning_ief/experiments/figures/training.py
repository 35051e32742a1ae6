"""Two figures of a training run, from the metrics.csv that Lightning's CSVLogger wrote.

They show what was logged and nothing else: no smoothing, no interpolation of values that are missing. Lines differ in
style and marker as well as in colour, so that the figures can be read in grey.
"""

import warnings
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_ief.experiments.tables import Series, read_metrics

if TYPE_CHECKING:  # an extra, imported where a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["NAMES", "STYLES", "draw_training", "logarithmic", "plain", "save_both"]

_RATIO = "gamma_relative/"
_TRAIN_LOSS, _VAL_LOSS = "train/loss", "val/loss"
NAMES = {
    "ef": "EF",
    "ief": "iEF",
    "sampled_fisher": r"$\hat{F}$, sampled Fisher",
    "natural_gradient": "natural gradient",
    "sgd": "SGD",
}
# Colours of Okabe and Ito, which the colour-blind tell apart, with another line style and marker each.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#D55E00", "linestyle": "--", "marker": "^"},
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#009E73", "linestyle": "-.", "marker": "s"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
    {"color": "#E69F00", "linestyle": (0, (6, 1, 1, 1, 1, 1)), "marker": "v"},
)
_REFERENCE = "#404040"


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
        if name.startswith(_RATIO) and name != f"{_RATIO}sgd"
    }
    losses = {name: series[name] for name in (_TRAIN_LOSS, _VAL_LOSS) if name in series}
    drawn = []
    if ratios:
        drawn.append(_save(_gamma_figure(ratios), directory / "gamma_ratios.png"))
    else:
        _warn_left_out("gamma_ratios.png", metrics_csv, f"{_RATIO}*", "the callback GammaIndicators")
    if losses:
        drawn.append(_save(_loss_figure(losses), directory / "loss.png"))
    else:
        _warn_left_out("loss.png", metrics_csv, f"{_TRAIN_LOSS} or {_VAL_LOSS}", "NaturalGradientMixin")
    return drawn


def _warn_left_out(figure: str, metrics_csv: str | Path, keys: str, source: str) -> None:
    warnings.warn(
        f"{figure} was left out: {metrics_csv} holds no finite value of {keys}, which {source} logs.", stacklevel=3
    )


def _gamma_figure(ratios: Mapping[str, Series]) -> "Figure":
    figure, axes = _canvas()
    known = [name for name in NAMES if name in ratios]
    others = sorted(name for name in ratios if name not in NAMES)
    for name, style in zip(known + others, cycle(STYLES)):
        steps, values = ratios[name]
        axes.plot(steps, values, label=NAMES.get(name, name), markersize=5, linewidth=1.8, **style)
    axes.axhline(1.0, color=_REFERENCE, linewidth=1.2, zorder=1)
    axes.annotate(
        "SGD", (1.0, 1.0), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
        verticalalignment="center", color=_REFERENCE, annotation_clip=False,
    )  # fmt: skip
    logarithmic(axes)
    axes.set_ylabel(r"$\gamma\,/\,\gamma_{\mathrm{SGD}}$  (a ratio; lower is better)")
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


def plain(axes: "Axes") -> None:
    """Give axes a light grid behind the lines, and no frame above and on the right.

    Args:
        axes: The axes.

    """
    axes.grid(True, color="#E0E0E0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_both(figure: "Figure", directory: Path, name: str) -> list[Path]:
    """Save a figure as PNG and as PDF.

    Args:
        figure: The figure.
        directory: Where; made if it does not exist.
        name: Name of the files, without suffix.

    Returns:
        The two files.

    """
    return [_save(figure, directory / f"{name}.{suffix}") for suffix in ("png", "pdf")]


def logarithmic(axes: "Axes", which: Literal["x", "y"] = "y") -> None:
    """Make an axis logarithmic, with labels even where it spans few decades.

    Args:
        axes: The axes.
        which: The horizontal or the vertical one.

    """
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    # Powers of ten alone would leave an axis of few decades with a label or none.
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _save(figure: "Figure", path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
