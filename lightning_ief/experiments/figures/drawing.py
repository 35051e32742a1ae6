"""What the figures share: how directions and runs are told apart, axes, and files."""

import math
from collections.abc import Iterable, Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_ief.directions.registry import REFERENCE, find, names

if TYPE_CHECKING:  # an extra, imported where a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GREY",
    "REFERENCE_LABEL",
    "STYLES",
    "canvas",
    "direction_label",
    "direction_styles",
    "logarithmic",
    "mark_one",
    "plain",
    "save",
    "save_both",
]

GREY = "#404040"

REFERENCE_LABEL = find(REFERENCE).label
"""What the direction is called that the others are compared with."""

# Colours of Okabe and Ito, which the colour-blind tell apart, with another line style and marker each.
STYLES = (
    *(find(name).style for name in names()),
    {"color": "#56B4E9", "linestyle": (0, (3, 1)), "marker": "P"},
    {"color": "#000000", "linestyle": (0, (1, 1)), "marker": "X"},
)
"""Those of the directions and two more, for runs too: no figure tells both apart."""


def direction_label(name: str) -> str:
    """What a direction is called; its name, if it is not registered."""
    return find(name).label if name in names() else name


def direction_styles(present: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """Colour, line style and marker of each direction, registered ones first.

    Args:
        present: Names of the directions in a figure.

    Returns:
        By name; for registered ones the same in all figures, for others what those leave.

    """
    given = set(present)
    found = {name: find(name).style for name in names() if name in given}
    taken = {style["color"] for style in found.values()}
    left = [style for style in STYLES if style["color"] not in taken] or STYLES
    return found | dict(zip(sorted(given - found.keys()), cycle(left)))


def canvas(width: float, height: float) -> "Figure":
    """An empty figure of this size, in inches."""
    # The object-oriented interface draws to a file without a window and leaves pyplot's global state alone.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def mark_one(axes: "Axes") -> None:
    """Mark the value 1, at which a ratio of two γ is that of equals."""
    axes.axhline(1.0, color=GREY, linewidth=1.0, zorder=1)


def plain(axes: "Axes") -> None:
    """Give axes a light grid behind the lines, and no frame above and on the right."""
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
    return [save(figure, directory / f"{name}.{suffix}") for suffix in ("png", "pdf")]


def logarithmic(axes: "Axes", which: Literal["x", "y"] = "y") -> None:
    """Make an axis logarithmic, with labels even where it spans few decades; it stays as it is without a value above 0.

    Args:
        axes: The axes.
        which: The horizontal or the vertical one.

    """
    from matplotlib.ticker import LogLocator, NullFormatter

    if not math.isfinite(axes.dataLim.minposx if which == "x" else axes.dataLim.minposy):
        return
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    # Powers of ten alone would leave an axis of few decades with a label or none.
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def save(figure: "Figure", path: Path) -> Path:
    """Save a figure, in a folder that is made if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
