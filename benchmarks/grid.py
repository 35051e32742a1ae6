"""One exact iEF direction of small networks, ours beside the plain dense way, over samples, sizes and uses."""

import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.report import machine, markdown_table, milliseconds, read
from benchmarks.timing import flop_counter, seconds
from lightning_ief import directions, linearize
from lightning_ief.experiments.figures.drawing import canvas, plain, save
from lightning_ief.objectives import CrossEntropy

__all__ = ["FILE", "SMOKE", "DisagreementError", "Measured", "Point", "draw", "measure", "points", "section"]

FILE = "grid.csv"

_CLASSES = 10
_OBJECTIVE = CrossEntropy()
_DTYPES = {"float32": torch.float32, "float64": torch.float64}

# λ in units of the mean diagonal of K, and the relative difference of the two directions that is rounding.
_DAMPING = {"float32": 1e-3, "float64": 1e-7}
_TOLERANCE = {"float32": 1e-2, "float64": 1e-6}

_LARGEST_ROWS = 2**30  # bytes of the dense J
_LARGEST_COST = 8e10  # floating-point operations of the dense way's Gram and solve
_SECONDS, _AT_LEAST = 6.0, 2  # a point's rounds end after so many seconds, not before there are so many of them
_SMALL_ROWS = 2**26  # bytes of the dense J, up to which time is held against counted operations
_ALLOWED = 2.5  # times what those take at the rate of a matrix product

_TEXT = """\
## Small networks: ours beside the dense way

One exact iEF direction, formed: ours (`linearize`, `directions.ief`) over the plain dense way: J [N, P] by
`vmap(grad)` of torch.func, K = JJᵀ, Cholesky's solve in float64, Jᵀv. {points} networks of N = 16 … 4,096 samples,
1 … 4 hidden layers 16 … 256 wide, each layer used 1 … 4 times in a row, at 1 … 16 positions: a fixed sample of those
whose dense J takes no more than 1 GiB, half in float32 and half in float64. Before anything is timed, both must give
the same direction. They take turns; ratios are medians over the rounds.

On {machine}.

* **ours / dense**: median **{median:.2f}**, at worst **{worst:.2f}**; beyond 1 at {beyond} of {points} points.
* **ours / counted operations** at {small} points whose dense J fits in 64 MiB: median {median_counted:.2f}, at worst
  {worst_counted:.2f}; beyond {allowed} at {beyond_counted}. Counted are forward and backward pass, the Gram of the
  smaller side (2 N²P or 2 NP²), the solve there (n³/3) and Jᵀv; the time they would take is that of a product of two
  1,024 × 1,024 matrices of the same precision: {rates}. The solve is in float64 always.

The points at which ours does worst:

{table}

![Ours over the dense way](benchmarks/grid.png)
"""
_HEADER = ("N", "width", "hidden layers", "uses", "positions", "dtype", "P", "ours ms", "dense ms", "ours / dense",
           "ours / counted")  # fmt: skip
_WORST = 8


class Point(NamedTuple):
    """A network and its batch.

    Attributes:
        samples: N.
        width: Of all layers but the last.
        depth: Hidden layers.
        uses: How often each is applied, one use after the other.
        positions: T; inputs are [N, T, width], and averaged over the positions before the last layer.
        dtype: float32 or float64.
    """

    samples: int
    width: int
    depth: int
    uses: int
    positions: int
    dtype: str

    @property
    def parameters(self) -> int:
        """P."""
        return self.depth * (self.width + 1) * self.width + (self.width + 1) * _CLASSES

    @property
    def bytes_of_rows(self) -> int:
        """Size of the dense J."""
        return self.samples * self.parameters * _DTYPES[self.dtype].itemsize


SMOKE = [Point(8, 16, 1, 2, 1, "float64"), Point(16, 16, 1, 1, 2, "float32")]


def points(number: int = 72, seed: int = 0) -> list[Point]:
    """A sample of the grid, the same at every call: as many points of each N, float32 and float64 by turns.

    Args:
        number: How many.
        seed: Of the sample.

    Returns:
        The points, by N.
    """
    draw, sizes, found = random.Random(seed), [2**k for k in range(4, 13)], list[Point]()
    layers = list(itertools.product((16, 32, 64, 128, 256), (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 4, 8, 16)))
    orders = {samples: draw.sample(layers, len(layers)) for samples in sizes}
    for turn, samples in enumerate(itertools.islice(itertools.cycle(sizes), number)):
        dtype = ("float32", "float64")[turn % 2]
        while not _fits(point := Point(samples, *orders[samples].pop(), dtype)):
            pass
        found.append(point)
    return sorted(found)


def _fits(point: Point) -> bool:
    cost = 2 * point.samples**2 * point.parameters + point.samples**3 / 3
    return point.bytes_of_rows <= _LARGEST_ROWS and cost <= _LARGEST_COST


@dataclass
class Measured:
    """Both ways at one point.

    Attributes:
        samples: N.
        width: See `Point`.
        depth: See `Point`.
        uses: See `Point`.
        positions: T.
        dtype: See `Point`.
        parameters: P.
        error: Relative difference of the two directions.
        rounds: How often the ways took turns.
        ours_ms: Median time of ours.
        dense_ms: Median time of the dense way.
        low: First quartile of ours over dense, round by round.
        ratio: Median.
        high: Third quartile.
        gflop: Counted operations, in 10⁹.
        counted_ms: Time of these at the rate of a matrix product.
        over_counted: Ours over that.
        rate: Of a matrix product in this dtype, in 10⁹ operations per second.
        machine: Where.
    """

    samples: int
    width: int
    depth: int
    uses: int
    positions: int
    dtype: str
    parameters: int
    error: float
    rounds: int
    ours_ms: float
    dense_ms: float
    low: float
    ratio: float
    high: float
    gflop: float
    counted_ms: float
    over_counted: float
    rate: float
    machine: str

    @property
    def point(self) -> Point:
        """Where."""
        return Point(self.samples, self.width, self.depth, self.uses, self.positions, self.dtype)


class DisagreementError(Exception):
    """Ours and the dense way give different directions."""


# --- what is measured


class _Net(nn.Module):
    """Hidden layers that are applied several times each, and a last one after the mean over the positions."""

    def __init__(self, point: Point) -> None:
        super().__init__()
        self.uses = point.uses
        self.hidden = nn.ModuleList(nn.Linear(point.width, point.width) for _ in range(point.depth))
        self.last = nn.Linear(point.width, _CLASSES)
        for layer in self.hidden:
            nn.init.normal_(layer.weight, std=point.width**-0.5)  # signals neither grow nor vanish

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            for _ in range(self.uses):
                x = torch.tanh(layer(x))
        return self.last(x.mean(1) if x.ndim > 2 else x)


class _Problem(NamedTuple):
    net: _Net
    inputs: Tensor
    targets: Tensor


def _problem(point: Point, device: torch.device) -> _Problem:
    torch.manual_seed(0)
    dtype, positions = _DTYPES[point.dtype], [point.positions] if point.positions > 1 else []
    inputs = torch.randn(point.samples, *positions, point.width)
    targets = torch.randint(_CLASSES, (point.samples,))
    return _Problem(_Net(point).to(device, dtype), inputs.to(device, dtype), targets.to(device))


def _ours(problem: _Problem, damping: float, verify: bool | None = False) -> dict[str, Tensor]:
    linearization = linearize(problem.net, problem.inputs, problem.targets, _OBJECTIVE, verify=verify)
    return directions.ief(linearization, damping).form()


def _rows(problem: _Problem) -> tuple[Tensor, Tensor]:
    """J [N, P], and s."""

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional_call(problem.net, parameters, (x[None],))
        return _OBJECTIVE.losses(logits, y[None]).sum(), logits[0]

    parameters = {name: p.detach() for name, p in problem.net.named_parameters()}
    each, logits = vmap(grad(loss, has_aux=True), in_dims=(None, 0, 0))(parameters, problem.inputs, problem.targets)
    rows = torch.cat([entry.flatten(1) for entry in each.values()], 1)
    return rows, _OBJECTIVE.gradient(logits, problem.targets).double().square().sum(1)


def _dense(problem: _Problem, damping: float) -> Tensor:
    """d [P] in the order of the parameters."""
    rows, s = _rows(problem)
    gram = (rows @ rows.T).double()
    gram.diagonal().add_(damping)
    v = torch.cholesky_solve(s[:, None], torch.linalg.cholesky(gram))[:, 0]
    return v.to(rows.dtype) @ rows


def _agree(point: Point, problem: _Problem) -> tuple[float, float]:
    """λ, and the relative difference of both directions; raises if that is more than rounding."""
    damping = _DAMPING[point.dtype] * float(_rows(problem)[0].square().sum()) / point.samples
    found = _ours(problem, damping, verify=True)
    ours = torch.cat([found[name].flatten() for name, _ in problem.net.named_parameters()]).double()
    dense = _dense(problem, damping).double()
    error = float((ours - dense).norm() / dense.norm())
    if not error <= _TOLERANCE[point.dtype]:
        raise DisagreementError(f"{point}: ours and the dense way differ by {error:.1e}.")
    return damping, error


# --- operations


def _rates(device: torch.device, size: int = 1024, repeats: int = 15) -> dict[str, float]:
    """Operations per second of a matrix product, by dtype: the fastest, so that other processes count for little."""
    rates = {}
    for name, dtype in _DTYPES.items():
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        times = [seconds(device, lambda a=a, b=b: a @ b) for _ in range(repeats)]
        rates[name] = 2 * size**3 / min(times)
    return rates


def _counted(point: Point, problem: _Problem) -> tuple[float, float]:
    """Operations but those of the solve, and those."""
    with flop_counter() as counter:
        _OBJECTIVE.losses(problem.net(problem.inputs), problem.targets).sum().backward()
    problem.net.zero_grad(set_to_none=True)
    small, large = sorted((point.samples, point.parameters))
    products = 2 * small**2 * large + 2 * small * large
    return counter.get_total_flops() + products, small**3 / 3


# --- time


def measure(
    chosen: Sequence[Point], rounds: int, device: torch.device, report: Callable[[str], None]
) -> list[Measured]:
    """Measure both ways at some points.

    Args:
        chosen: The points.
        rounds: How often the ways take turns, fewer where they are slow.
        device: Where.
        report: Is told what is going on.

    Returns:
        A row for each point.

    Raises:
        DisagreementError: If the ways give different directions.
    """
    rates = _rates(device)
    report(f"grid: {', '.join(f'{rate / 1e9:.1f} GFLOP/s in {name}' for name, rate in rates.items())}")
    return [_measure(point, rounds, device, rates, report) for point in chosen]


def _measure(
    point: Point, rounds: int, device: torch.device, rates: dict[str, float], report: Callable[[str], None]
) -> Measured:
    problem = _problem(point, device)
    damping, error = _agree(point, problem)
    ours, dense = _in_turn(problem, damping, rounds, device)
    low, ratio, high = np.quantile(np.array(ours) / np.array(dense), (0.25, 0.5, 0.75)).tolist()
    products, solve = _counted(point, problem)
    counted = products / rates[point.dtype] + solve / rates["float64"]
    time = statistics.median(ours)
    n, width, depth, uses, positions, dtype = point
    report(f"grid: N={n}, {width} wide, {depth} deep, {uses} uses, {positions} positions, {dtype}: {ratio:.2f}")
    return Measured(
        *point,
        point.parameters,
        error,
        len(ours),
        1e3 * time,
        1e3 * statistics.median(dense),
        low,
        ratio,
        high,
        (products + solve) / 1e9,
        1e3 * counted,
        time / counted,
        rates[point.dtype] / 1e9,
        machine(device),
    )


def _in_turn(problem: _Problem, damping: float, rounds: int, device: torch.device) -> tuple[list[float], list[float]]:
    ours, dense, start = [], [], perf_counter()
    for turn in range(rounds):
        if turn >= _AT_LEAST and perf_counter() - start > _SECONDS:
            break
        ours.append(seconds(device, lambda: _ours(problem, damping)))
        dense.append(seconds(device, lambda: _dense(problem, damping)))
    return ours, dense


# --- report


def draw(rows: Sequence[Measured], path: Path) -> Path:
    """Draw ours over dense against N, coloured by P.

    Args:
        rows: What was measured.
        path: The PNG file.

    Returns:
        The file.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter

    figure = canvas(7.2, 4.4)
    axes = figure.subplots()
    norm = LogNorm(min(row.parameters for row in rows), max(row.parameters for row in rows))
    for dtype, marker, shift in (("float32", "o", 0.94), ("float64", "s", 1.06)):
        mine = [row for row in rows if row.dtype == dtype]
        drawn = axes.scatter(
            [shift * row.samples for row in mine], [row.ratio for row in mine], c=[row.parameters for row in mine],
            s=30, norm=norm, cmap="viridis", marker=marker, edgecolors="#404040", linewidths=0.4, label=dtype,
        )  # fmt: skip
    axes.axhline(1.0, color="#D55E00", linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="N, samples in the batch", ylabel="time: ours over the dense way")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    plain(axes)
    axes.legend(frameon=False)
    figure.colorbar(drawn, label="P, parameters")
    return save(figure, path)


def section(folder: Path) -> str:
    """The section of the report, from the CSV file in a folder; empty if there is none."""
    rows = read(folder / FILE, Measured)
    if not rows:
        return ""
    ratios = [row.ratio for row in rows]
    small = [row.over_counted for row in rows if row.point.bytes_of_rows <= _SMALL_ROWS]
    rates = {row.dtype: row.rate for row in rows}
    return _TEXT.format(
        points=len(rows),
        machine=rows[0].machine,
        median=statistics.median(ratios),
        worst=max(ratios),
        beyond=sum(ratio > 1 for ratio in ratios),
        small=len(small),
        median_counted=statistics.median(small),
        worst_counted=max(small),
        allowed=_ALLOWED,
        beyond_counted=sum(ratio > _ALLOWED for ratio in small),
        rates=", ".join(f"{rate:.3g} GFLOP/s in {dtype}" for dtype, rate in sorted(rates.items())),
        table=markdown_table(_HEADER, map(_cells, sorted(rows, key=lambda row: -row.ratio)[:_WORST])),
    )


def _cells(row: Measured) -> list[str]:
    sizes = (row.samples, row.width, row.depth, row.uses, row.positions, row.dtype, row.parameters)
    cells = [f"{size:,}" if isinstance(size, int) else size for size in sizes]
    return [
        *cells,
        milliseconds(row.ours_ms),
        milliseconds(row.dense_ms),
        f"**{row.ratio:.2f}**",
        f"{row.over_counted:.2f}",
    ]
