"""How the learning rate is to change with momentum: small runs over a grid of both."""

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from benchmarks.report import machine, markdown_table, read
from lightning_ief import IEF, linearize
from lightning_ief.objectives import CrossEntropy
from lightning_ief.tasks import MLP, DigitsDataModule

__all__ = ["FILE", "SMOKE", "Grid", "Measured", "measure", "section"]

FILE = "momentum.csv"

_BATCH, _RHO, _NOISE = 32, 1.0, 0.1
_REFERENCE = 3.0  # lr without momentum

_TEXT = """\
## Learning rate and momentum

Which learning rate goes with a momentum μ of the SPRING kind: an MLP 64-64-10 on {samples:,} handwritten digits, a
tenth of whose labels are drawn anew so that there is noise, N = {batch}, {steps} steps, `relative_damping={rho:g}`, lr
falls linearly to 0; {seeds} seeds, means of the losses at the end. "As far" is the lr, interpolated, at which training
comes as far as with lr = {reference:g} and no momentum, to {loss:.3f}; "smallest" that of the smallest held-out loss on
a grid of factors {factor:.2g}.

{table}

{verdict}

On {machine}.
"""


class Grid(NamedTuple):
    """What is tried.

    Attributes:
        momenta: μ.
        rates: lr.
        seeds: Seeds of the initial weights and the order of samples.
        epochs: Of each run.
    """

    momenta: Sequence[float] = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
    rates: Sequence[float] = tuple(3 ** (k / 2) for k in range(-5, 4))
    seeds: Sequence[int] = (0, 1, 2)
    epochs: int = 10


SMOKE = Grid((0.0, 0.5), (1.0, 3.0, 9.0), (0,), 1)


@dataclass(frozen=True)
class Measured:
    """A run; the CSV file has these columns.

    Attributes:
        momentum: μ.
        lr: Learning rate at the beginning.
        seed: Its seed.
        samples: Training samples.
        steps: Its steps.
        train_loss: Mean loss of the training samples at the end.
        val_loss: That of the others.
        machine: Where.
    """

    momentum: float
    lr: float
    seed: int
    samples: int
    steps: int
    train_loss: float
    val_loss: float
    machine: str


def measure(grid: Grid, tell: Callable[[str], None]) -> list[Measured]:
    """Train at each point of the grid.

    Args:
        grid: The grid.
        tell: Is told of each momentum and lr.

    Returns:
        All runs.
    """
    train, val = _digits()
    where, found = machine(torch.device("cpu")), []
    for momentum in grid.momenta:
        for lr in grid.rates:
            for seed in grid.seeds:
                steps, losses = _run(train, val, momentum, lr, seed, grid.epochs)
                found.append(Measured(momentum, lr, seed, len(train[1]), steps, *losses, where))
            tell(f"μ {momentum:g}, lr {lr:.3g}: training loss {found[-1].train_loss:.3f}")
    return found


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training samples, a tenth of them with a random label, and validation samples."""
    data = DigitsDataModule(val_fraction=0.3, test_fraction=0.01)
    data.setup("fit")
    train, val = (default_collate([*part]) for part in (data.train_set, data.val_set))
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(len(train[1]), generator=generator) < _NOISE
    other = torch.randint(10, train[1].shape, generator=generator)
    return (train[0], torch.where(chosen, other, train[1])), val


def _run(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], momentum: float, lr: float, seed: int, epochs: int
) -> tuple[int, list[float]]:
    torch.manual_seed(seed)
    net = MLP([64, 64, 10])
    optimizer = IEF(net.parameters(), lr, relative_damping=_RHO, momentum=momentum)
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(train[1])).split(_BATCH)]
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of steps that are skipped, where lr is far too large
        for batch in batches:
            optimizer.step(linearization=linearize(net, train[0][batch], train[1][batch], CrossEntropy()))
            falling.step()
    return len(batches), [_loss(net, *samples) for samples in (train, val)]


@torch.no_grad()
def _loss(net: nn.Module, x: Tensor, y: Tensor) -> float:
    loss = float(F.cross_entropy(net(x), y))
    return loss if math.isfinite(loss) else math.inf


def section(folder: Path) -> str:
    """The section of the report, from the CSV file in a folder; empty if there is none."""
    rows = read(folder / FILE, Measured)
    if not rows:
        return ""
    train, val = (_means(rows, name) for name in ("train_loss", "val_loss"))
    reference = min(train[0.0], key=lambda lr: abs(math.log(lr / _REFERENCE)))
    loss = train[0.0][reference]
    cells, exponents = [], []
    for momentum, by_rate in train.items():
        lr = _rate_at(by_rate, loss)
        smallest = min(val[momentum], key=val[momentum].__getitem__)
        if lr is not None and momentum:
            exponents.append(math.log(lr / reference) / math.log(1 - momentum))
        cells.append(
            [f"{momentum:g}", "–" if lr is None else f"{lr:.2f}", "–" if lr is None else f"{lr / reference:.3f}",
             f"{1 - momentum:.3f}", f"{math.sqrt(1 - momentum**2):.3f}", f"{smallest:.2f}",
             f"{val[momentum][smallest]:.3f}"]
        )  # fmt: skip
    rates = sorted(train[0.0])
    return _TEXT.format(
        samples=rows[0].samples,
        batch=_BATCH,
        steps=rows[0].steps,
        rho=_RHO,
        seeds=len({row.seed for row in rows}),
        reference=reference,
        loss=loss,
        factor=rates[1] / rates[0],
        table=markdown_table(
            ("μ", "as far: lr", "over that of μ = 0", "1 − μ", "√(1 − μ²)", "smallest: lr", "held-out loss"), cells
        ),
        verdict=f"By each μ alone, lr would be as (1 − μ) to a power of {min(exponents):.2f} to {max(exponents):.2f}, "
        f"{statistics.median(exponents):.2f} in the median."
        if exponents
        else "No learning rate comes as far.",
        machine=rows[0].machine,
    )


def _means(rows: Sequence[Measured], name: str) -> dict[float, dict[float, float]]:
    """The mean over the seeds by momentum and lr."""
    found: dict[float, dict[float, list[float]]] = {}
    for row in rows:
        found.setdefault(row.momentum, {}).setdefault(row.lr, []).append(getattr(row, name))
    return {m: {lr: statistics.fmean(values) for lr, values in by_rate.items()} for m, by_rate in found.items()}


def _rate_at(losses: dict[float, float], wanted: float) -> float | None:
    """The smallest lr at which the loss has fallen to this, between those that were tried; None if there is none."""
    rates = sorted(losses)
    if losses[rates[0]] == wanted:
        return rates[0]
    for low, high in zip(rates, rates[1:], strict=False):
        if losses[low] > wanted >= losses[high]:
            share = math.log(losses[low] / wanted) / math.log(losses[low] / losses[high])
            return low * (high / low) ** share
    return None
