"""How step time and memory grow with N and with P: slopes of log-log plots, beside the theory."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.report import Row, markdown_table, read
from lightning_ief.experiments.figures.drawing import canvas, plain, save

__all__ = ["AXES", "draw", "section"]

AXES = {"n": ("samples", "N, samples in the batch"), "p": ("parameters", "P, parameters")}
"""For each plot the column of `Row` on its horizontal axis, and its label."""

_MEASURES = {"step_ms": "step, ms", "memory_mib": "memory above model and batch, MiB"}
_STYLES = {
    "sgd": {"color": "#404040", "linestyle": "-.", "marker": "s"},
    "ief": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "vmap": {"color": "#D55E00", "linestyle": "--", "marker": "^"},
}

_TEXT = """\
## Growth

Step time and memory against N at fixed P = {parameters}, and against P at fixed N = {samples}, each point measured as
above. The slope s of a line says that the quantity grows like N^s or P^s; it is fitted to the upper half of the
points, where the fixed costs of a step matter least.

Theory, for a linear layer d_in → d_out with one position per sample (T = 1): forward, backward and applying the update
cost O(N d_in d_out), as for SGD. The Gram matrix adds O(N² (d_in + d_out)), the solve O(N³) once per step. So the
step grows with N between slope 1 and 2, and overtakes SGD's only where N comes near d_in d_out / (d_in + d_out); with P
at fixed N it grows like SGD's, slope 1. A dense J takes 4 N P bytes, slope 1 in both, and reading it for the Gram
costs O(N² P). iEF keeps inputs and output gradients of the layers, O(N (d_in + d_out)) numbers, and the N × N Gram:
with P at fixed N this is slope ½, until single arrays of the size of a weight matter.

{table}

{figures}
"""


def draw(rows: Sequence[Row], axis: str, path: Path) -> Path:
    """Draw step time and memory over N or P, logarithmic, slopes in the legend.

    Args:
        rows: What was measured.
        axis: A key of `AXES`.
        path: The PNG file.

    Returns:
        The file.
    """
    column, label = AXES[axis]
    figure = canvas(10.0, 4.2)
    for axes, (measure, measured) in zip(figure.subplots(1, 2), _MEASURES.items(), strict=True):
        for name in dict.fromkeys(row.contestant for row in rows):
            x, y = _points(rows, name, column, measure)
            if x:
                text = name if (s := _slope(x, y)) is None else f"{name}, slope {s:.2f}"
                axes.plot(x, y, label=text, markersize=5, linewidth=1.8, **_STYLES.get(name, {"marker": "v"}))
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel=measured)
        plain(axes)
        if axes.lines:
            axes.legend(frameon=False)
    return save(figure, path)


def section(folder: Path) -> str:
    """The section of the report, from the CSV files in a folder; empty unless both are there."""
    found = {axis: read(folder / f"growth-{axis}.csv") for axis in AXES}
    if not all(found.values()):
        return ""
    cells = []
    for axis, rows in found.items():
        for name in dict.fromkeys(row.contestant for row in rows):
            slopes = (_slope(*_points(rows, name, AXES[axis][0], measure)) for measure in _MEASURES)
            cells.append([name, axis.upper(), *("–" if s is None else f"{s:.2f}" for s in slopes)])
    return _TEXT.format(
        parameters=f"{found['n'][0].parameters:,}",
        samples=found["p"][0].samples,
        table=markdown_table(("contestant", "against", "slope of step time", "slope of memory"), cells),
        figures="\n\n".join(f"![Growth with {axis.upper()}](benchmarks/growth-{axis}.png)" for axis in AXES),
    )


def _points(rows: Iterable[Row], name: str, column: str, measure: str) -> tuple[list[float], list[float]]:
    points = ((getattr(row, column), getattr(row, measure)) for row in rows if row.contestant == name)
    kept = sorted((x, y) for x, y in points if y)  # neither missing nor zero
    return [x for x, _ in kept], [y for _, y in kept]


def _slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Slope of log y over log x in the upper half of the points, None for fewer than two."""
    if len(x) < 2:
        return None
    upper = slice(min(len(x) // 2, len(x) - 2), None)
    return float(np.polyfit(np.log(x[upper]), np.log(y[upper]), 1)[0])
