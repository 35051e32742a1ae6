"""What the Kronecker metric costs: a step in it beside SGD's, all of its inversions included."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.report import machine, markdown_table, read
from benchmarks.timing import seconds
from lightning_ief import IEF, linearize
from lightning_ief.objectives import CrossEntropy
from lightning_ief.tasks import MLP

__all__ = ["FILE", "POINTS", "SMOKE", "Measured", "Point", "counted", "measure", "section"]

FILE = "metric.csv"

_WARM_UP = 12  # steps; in the first ten there are more inversions

_TEXT = """\
## The cost of a metric

A step of iEF with `metric="kronecker"` over one of SGD with momentum, on an MLP d-w-w-10: median over {rounds} turns,
each of `metric_every` steps, one of which inverts. "Counted" are the floating-point operations beside SGD's: both sides
of each layer mapped, 2N·d² for a side of d; the averages, N·d² in each step that takes its batch in; an inversion of
d³; and iEF's Gram. "Floor" is without averages and
inversions, towards which a large `metric_every` goes.

{table}

On {machine}.
"""


class Point(NamedTuple):
    """What is measured.

    Attributes:
        inputs: d.
        width: w.
        samples: N.
        every: Steps between two inversions.
    """

    inputs: int
    width: int
    samples: int
    every: int


_NETS = ((784, 256), (3072, 2048))
POINTS = tuple(Point(*net, samples, every) for net in _NETS for samples in (64, 256) for every in (20, 100))
SMOKE = (Point(8, 4, 8, 2),)


@dataclass(frozen=True)
class Measured:
    """A point; the CSV file has these columns.

    Attributes:
        inputs: See `Point`.
        width: See `Point`.
        samples: See `Point`.
        every: See `Point`.
        plain: Time of a step of iEF without a metric, over SGD's.
        ratio: Time of a step with it, over SGD's.
        counted: Operations, over SGD's.
        floor: The same without averages and inversions.
        rounds: Turns.
        machine: Where.
    """

    inputs: int
    width: int
    samples: int
    every: int
    plain: float
    ratio: float
    counted: float
    floor: float
    rounds: int
    machine: str


def measure(points: Sequence[Point], rounds: int, tell: Callable[[str], None]) -> list[Measured]:
    """Measure a step at each point.

    Args:
        points: The points.
        rounds: How often the optimizers take turns.
        tell: Is told of each point.

    Returns:
        A row for each.
    """
    where, found = machine(torch.device("cpu")), []
    for point in points:
        ways = _ways(point)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, step in ways.items():
                steps = point.every if turn else _WARM_UP
                time = seconds(torch.device("cpu"), partial(_repeat, step, steps)) / steps
                times[name] += [time] * bool(turn)
        plain, ratio = (
            statistics.median(a / b for a, b in zip(times[name], times["sgd"], strict=True))
            for name in ("plain", "metric")
        )
        found.append(Measured(*point, plain, ratio, *counted(point), rounds, where))
        tell(f"{point}: {ratio:.2f} of SGD's step, {plain:.2f} without the metric")
    return found


def _repeat(step: Callable[[], None], steps: int) -> None:
    for _ in range(steps):
        step()


def _ways(point: Point) -> dict[str, Callable[[], None]]:
    """A step of each optimizer, each with a network of its own, on the same random samples."""
    torch.manual_seed(0)
    x, y = torch.randn(point.samples, point.inputs), torch.randint(10, (point.samples,))
    nets = [MLP([point.inputs, point.width, point.width, 10]) for _ in range(3)]
    sgd = torch.optim.SGD(nets[0].parameters(), lr=1e-3, momentum=0.9)
    options = {"lr": 1e-3, "relative_damping": 1.0}
    plain = IEF(nets[1].parameters(), **options)
    metric = IEF(nets[2].parameters(), metric="kronecker", metric_every=point.every, **options)

    def by_gradient() -> None:
        sgd.zero_grad()
        F.cross_entropy(nets[0](x), y).backward()
        sgd.step()

    def along(optimizer: IEF, net: MLP) -> None:
        sides = optimizer.sides_of(net)
        optimizer.step(linearization=linearize(net, x, y, CrossEntropy(), keep_sides=sides))

    return {"sgd": by_gradient, "plain": partial(along, plain, nets[1]), "metric": partial(along, metric, nets[2])}


def counted(point: Point) -> tuple[float, float]:
    """Operations of a step in the metric over those of SGD's.

    Args:
        point: The network, N and how often averages are inverted.

    Returns:
        All of them; and without averages and inversions.
    """
    sizes = [point.inputs, point.width, point.width, 10]
    layers, samples = [*zip(sizes[:-1], sizes[1:], strict=True)], point.samples
    weights = sum(a * b for a, b in layers)
    # Forward, weight gradients or Jᵀv, and gradients of activations, of which the first layer has none.
    step = 2 * samples * (3 * weights - layers[0][0] * layers[0][1])
    sides = [side for a, b in layers for side in (a + 1, b)]
    squares = sum(d**2 for d in sides)
    mapped = 2 * samples * squares + 2 * samples**2 * sum(sides)
    taken_in = samples * squares / -(-point.every // 20)
    inverted = sum(d**3 for d in sides) / point.every
    return (step + mapped + taken_in + inverted) / step, (step + mapped) / step


def section(folder: Path) -> str:
    """The section of the report, from the CSV file in a folder; empty if there is none."""
    rows = read(folder / FILE, Measured)
    if not rows:
        return ""
    header = ("d, w", "N", "metric_every", "time / SGD", "without the metric", "counted", "floor")
    cells = [
        [f"{row.inputs}, {row.width}", str(row.samples), str(row.every), f"**{row.ratio:.1f}**", f"{row.plain:.2f}",
         f"{row.counted:.1f}", f"{row.floor:.1f}"]
        for row in rows
    ]  # fmt: skip
    return _TEXT.format(rounds=rows[0].rounds, table=markdown_table(header, cells), machine=rows[0].machine)
