"""The cost model that chooses how a matrix's per-sample gradient is kept, against the clock."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import machine, read
from benchmarks.timing import seconds
from lightning_ief.capture.factors import MOST_FLAT, Dense, Outer
from lightning_ief.experiments.figures.drawing import canvas, plain, save
from lightning_ief.linalg.gram import (
    Form,
    InnerProducts,
    Sizes,
    add_pairwise,
    add_products,
    columns_gram,
    form_costs,
    mirror,
)

__all__ = ["FILE", "GRID", "SMOKE_GRID", "Measured", "draw", "measure", "section"]

FILE = "forms.csv"

Shape = tuple[int, int, int, int]
GRID: list[Shape] = [
    (n, t, *sizes)
    for n, t, sizes in product(
        (8, 32, 128), (1, 4, 16, 64, 256), ((64, 64), (256, 256), (768, 768), (768, 3072), (1000, 512))
    )
] + [
    (n, t, *sizes) for n, t, sizes in product((32, 256, 1024), (1, 2, 3, 6), ((16, 16), (32, 32), (64, 32), (128, 128)))
]
"""N, T (positions of all uses), d_out, d_in."""

SMOKE_GRID: list[Shape] = [(4, 1, 16, 16), (4, 8, 16, 16), (8, 64, 16, 16)]

_LARGEST = 1.5e10  # multiplications: what takes more is left out
_REPEATS = 3

_TEXT = """\
## Which form of a layer

A matrix's per-sample gradient is kept as G itself, or as both sides of its outer products, with the Gram taken by
pairs of positions or from a few rows of G at a time. The choice is that of
`lightning_ief.linalg.gram.cheapest_form`: counted multiplications of Gram and update, and G only where it takes less
memory than both sides, or little. The figure shows {points} shapes (N, T of all uses, d_out, d_in) on {machine}.

Choosing by the model takes {median:.2f} × the time of the best form in the median, {high:.2f} × at the 95 % quantile
and {worst:.2f} × at worst ({where}); it chooses the best form for {right:.0%} of the shapes.

![Predicted and measured cost of the forms](benchmarks/forms.png)
"""


@dataclass
class Measured:
    """One form at one shape.

    Attributes:
        samples: N.
        positions: T.
        height: d_out.
        width: d_in.
        form: Name of the form.
        multiplications: As the model predicts.
        seconds: Median time of Gram and update.
        machine: Where.
    """

    samples: int
    positions: int
    height: int
    width: int
    form: str
    multiplications: float
    seconds: float
    machine: str

    @property
    def shape(self) -> Shape:
        """N, T, d_out, d_in."""
        return self.samples, self.positions, self.height, self.width


def measure(grid: Sequence[Shape], device: torch.device, report: Callable[[str], None]) -> list[Measured]:
    """Time Gram and update in every form that is allowed, over a grid of shapes."""
    rows = []
    for shape in grid:
        report(f"forms: N={shape[0]} T={shape[1]} {shape[2]}×{shape[3]}")
        rows += [
            Measured(*shape, form.name, cost, _seconds(form, shape, device), machine(device))
            for form, cost in form_costs(Sizes(*shape), room=MOST_FLAT).items()
            if cost <= _LARGEST
        ]
    return rows


def _seconds(form: Form, shape: Shape, device: torch.device) -> float:
    samples, positions, height, width = shape
    left = torch.randn(1, samples, positions, height, device=device)
    right = torch.randn(1, samples, positions, width, device=device)
    weights, into = torch.randn(1, samples, device=device), torch.zeros(height, width, device=device)

    def once() -> Tensor:
        factor: Dense | Outer = Outer(left, right, into.shape)
        gram = torch.zeros(samples, samples, dtype=torch.float64, device=device)
        if form is Form.KEPT:
            factor = Dense(factor.rows(slice(0, samples)))
            add_products(gram, factor.flat[0], InnerProducts())
        elif form is Form.PAIRWISE:
            add_pairwise(gram, left[0], right[0])
        else:
            gram += columns_gram([factor.term])[0, :, 0]
        mirror(gram)
        factor.add_weighted_sum(weights, into, alpha=1e-6, beta=1.0)
        return gram

    times = [seconds(device, once) for _ in range(1 + _REPEATS)]
    return statistics.median(times[1:])


def _by_shape(rows: Sequence[Measured]) -> Iterator[tuple[Shape, list[Measured]]]:
    for shape in dict.fromkeys(row.shape for row in rows):
        yield shape, [row for row in rows if row.shape == shape]


def _regrets(rows: Sequence[Measured]) -> dict[Shape, float]:
    """Time of the chosen form over that of the best, by shape, where there is a choice."""
    regrets = {}
    for shape, forms in _by_shape(rows):
        if len(forms) > 1:
            chosen = min(forms, key=lambda row: row.multiplications)
            regrets[shape] = chosen.seconds / min(row.seconds for row in forms)
    return regrets


def draw(rows: Sequence[Measured], path: Path) -> Path:
    """Draw measured over predicted cost, and how much slower than the best the chosen form is.

    Args:
        rows: What was measured.
        path: The PNG file.

    Returns:
        The file.
    """
    figure = canvas(10.0, 4.2)
    left, right = figure.subplots(1, 2)
    for form, color, marker in zip(Form, ("#009E73", "#0072B2", "#D55E00"), "osv", strict=True):
        mine = [row for row in rows if row.form == form.name]
        left.scatter(
            [row.multiplications for row in mine], [1e3 * row.seconds for row in mine],
            s=16, color=color, marker=marker, alpha=0.7, linewidths=0, label=f"{form.name.lower()}: {form.value}",
        )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="predicted: multiplications", ylabel="measured: ms")
    left.legend(frameon=False, fontsize=7)
    regrets = np.sort(list(_regrets(rows).values()))
    right.plot(np.arange(1, len(regrets) + 1) / len(regrets), regrets, color="#404040", linewidth=1.8)
    right.set(xlabel="share of shapes", ylabel="chosen form over best form, time", xlim=(0, 1))
    right.set_ylim(bottom=0.95)
    for axes in (left, right):
        plain(axes)
    return save(figure, path)


def section(folder: Path) -> str:
    """The section of the report, from the CSV file in a folder; empty if there is none."""
    rows = read(folder / FILE, Measured)
    if not rows:
        return ""
    regrets = _regrets(rows)
    worst = max(regrets, key=regrets.__getitem__)
    values = list(regrets.values())
    return _TEXT.format(
        points=len(regrets),
        machine=rows[0].machine.partition(", Linux")[0],
        median=statistics.median(values),
        high=float(np.quantile(values, 0.95)),
        worst=regrets[worst],
        where="N={}, T={}, {} × {}".format(*worst),
        right=sum(value == 1 for value in values) / len(values),
    )
