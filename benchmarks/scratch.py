"""A network from scratch: iEF by its preset and in the Kronecker metric, SGD and AdamW, each searched as hard."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_collate

from benchmarks.report import machine, markdown_table, read, write
from lightning_ief import IEF, linearize
from lightning_ief.experiments.comparison import spread
from lightning_ief.objectives import CrossEntropy
from lightning_ief.optim import DirectionOptimizer
from lightning_ief.tasks import MLP, VisionDataModule
from lightning_ief.tasks.schedules import multiple

__all__ = ["BATCH", "FULL", "SMOKE", "Contestant", "Data", "Run", "Size", "batches", "load", "report", "study"]


class Contestant(NamedTuple):
    """An optimizer.

    Attributes:
        title: What the page calls it.
        make: Makes it from parameters and lr.
        lr: The middle of the learning rates that are searched.
    """

    title: str
    make: Callable[..., Optimizer]
    lr: float


def _metric(fisher: str) -> Callable[..., Optimizer]:
    return partial(IEF, relative_damping=1.0, momentum=0.5, metric="kronecker", fisher=fisher)


CONTESTANTS = {
    "sgd": Contestant("SGD, Nesterov 0.9", partial(torch.optim.SGD, momentum=0.9, nesterov=True), 0.1),
    "adamw": Contestant("AdamW", torch.optim.AdamW, 3e-3),
    "ief": Contestant("iEF, the paper's", partial(IEF, damping=4.1e-4), 1.0),
    "preset": Contestant("iEF, preset: ρ = 0.3", partial(IEF, relative_damping=0.3), 3.0),
    "improved": Contestant("iEF, metric, improved Ĝ", _metric("improved"), 3.0),
    "empirical": Contestant("iEF, metric, empirical Ĝ", _metric("empirical"), 3.0),
    "sampled": Contestant("iEF, metric, sampled Ĝ", _metric("sampled"), 3.0),
}


class Size(NamedTuple):
    """The study at one of its sizes.

    Attributes:
        contestants: By name.
        factors: What their learning rates are multiplied by.
        search: Seeds whose mean held-out accuracy chooses the learning rate.
        seeds: Other ones, of the results.
        epochs: Of each run.
        train_size: Training images.
        width: Of the hidden layers.
    """

    contestants: Sequence[str] = tuple(CONTESTANTS)
    factors: Sequence[float] = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
    search: Sequence[int] = (100, 101)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    epochs: int = 2
    train_size: int = 10_000
    width: int = 256


FULL = Size()
SMOKE = Size(("sgd", "improved"), (1.0, 3.0), (100,), (0, 1), 1, 256, 8)

BATCH = 64


@dataclass(frozen=True)
class Run:
    """A run; the CSV file has these columns.

    Attributes:
        contestant: Its name.
        lr: Learning rate at the beginning.
        seed: Of weights and order.
        part: "search", if it took part in the choice of the learning rate, or "result".
        train_loss: Mean loss of the training images at the end.
        val_accuracy: Of held-out images, 0 to 1.
        test_accuracy: Of images that chose nothing.
        step_ms: Mean time of a step.
    """

    contestant: str
    lr: float
    seed: int
    part: str
    train_loss: float
    val_accuracy: float
    test_accuracy: float
    step_ms: float


class Data(NamedTuple):
    """Images and classes of each part, all in memory."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def study(size: Size, output: Path, root: Path, tell: Callable[[str], None]) -> Path:
    """Search, measure and write the page; runs that are in its CSV file are not done again.

    Args:
        size: Size of the study.
        output: Folder of the page; the CSV file goes to scratch/ in it.
        root: Folder of the images.
        tell: Is told of each run.

    Returns:
        The page.
    """
    path = output / "scratch" / "runs.csv"
    runs = read(path, Run)
    data = load(size.train_size, root)
    for name in size.contestants:
        contestant = CONTESTANTS[name]

        def done(lr: float, seed: int, part: str, name: str = name, made: Contestant = contestant) -> Run:
            known = [r for r in runs if (r.contestant, r.seed, r.part) == (name, seed, part) and _close(r.lr, lr)]
            if not known:
                runs.append(Run(name, lr, seed, part, *_trained(size, data, made, lr, seed)))
                write(runs, path, Run)
                tell(f"{name}, lr {lr:.3g}, seed {seed}: {100 * runs[-1].val_accuracy:.2f} %")
            return (known or runs[-1:])[0]

        means = {
            lr: statistics.fmean(done(lr, seed, "search").val_accuracy for seed in size.search)
            for lr in (contestant.lr * factor for factor in size.factors)
        }
        best = max(means, key=means.__getitem__)
        for seed in size.seeds:
            done(best, seed, "result")
    page = output / "scratch.md"
    page.write_text(report(size, runs), encoding="utf-8")
    return page


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-4 * b


def load(train_size: int, root: Path) -> Data:
    """Fashion-MNIST with so many training images."""
    module = VisionDataModule("FashionMNIST", str(root), train_size=train_size, val_size=5_000)
    module.prepare_data()
    module.setup()
    train, val, test = (default_collate([*part]) for part in (module.train_set, module.val_set, module.test_set))
    return Data(*(module.on_after_batch_transfer(list(part), 0) for part in (train, val, test)))


def _trained(size: Size, data: Data, contestant: Contestant, lr: float, seed: int) -> tuple[float, ...]:
    torch.manual_seed(seed)
    net = MLP([784, size.width, size.width, 10])
    optimizer = contestant.make(net.parameters(), lr=lr)
    steps = size.epochs * (len(data.train[1]) // BATCH)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(multiple, steps=steps, warmup=0.0, decay="linear"))
    start = perf_counter()
    for x, y in batches(data.train, size.epochs):
        if isinstance(optimizer, DirectionOptimizer):
            sides = optimizer.sides_of(net)
            optimizer.step(linearization=linearize(net, x, y, CrossEntropy(), keep_sides=sides))
        else:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        falling.step()
    milliseconds = 1e3 * (perf_counter() - start) / steps
    loss, _ = _evaluated(net, *data.train)
    return loss, _evaluated(net, *data.val)[1], _evaluated(net, *data.test)[1], milliseconds


def batches(samples: tuple[Tensor, Tensor], epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches, in a new order in each epoch."""
    for _ in range(epochs):
        for chosen in torch.randperm(len(samples[1])).split(BATCH):
            if len(chosen) == BATCH:
                yield samples[0][chosen], samples[1][chosen]


@torch.no_grad()
def _evaluated(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    logits = net(x)
    return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).double().mean())


_TEXT = """\
# A network from scratch

An MLP 784-{width}-{width}-10 on {train_size:,} images of Fashion-MNIST, {epochs} epochs in batches of {batch}, by
one command:

    python -m benchmarks from-scratch

All optimizers see the same: lr falls linearly to 0, no weight decay, float32, one thread. Each has had {tried} learning
rates, in factors of 3, the best of them by the mean accuracy on 5,000 held-out images with {search} seeds; the table
is of {seeds} other seeds, which differ in the initial weights and the order of the images, and of the 10,000 test
images, which have chosen nothing. Of the options of iEF, ρ and μ were found in earlier trials, and not searched here. A
learning rate at the border of its grid is marked *.

{table}

"Metric" is `metric="kronecker"` with ρ = 1, μ = 0.5 ([Theory](theory.md), section 10). With improved Ĝ its test
accuracy is, in points,

{verdict}

What directions of different batches have in common on the way, and what they are worth on other images:
[Why, measured](why.md).

Every run: [scratch/runs.csv](scratch/runs.csv). Times are of single runs, one after the other. Measured on {machine}.
"""


def report(size: Size, runs: Sequence[Run]) -> str:
    """The page.

    Args:
        size: Size of the study.
        runs: All runs.

    Returns:
        Markdown.
    """
    results = {name: [r for r in runs if r.contestant == name and r.part == "result"] for name in size.contestants}
    time = statistics.median(r.step_ms for r in results[size.contestants[0]])
    cells = []
    for name, rows in results.items():
        grid = sorted({r.lr for r in runs if r.contestant == name and r.part == "search"})
        border = "*" if any(_close(rows[0].lr, lr) for lr in (grid[0], grid[-1])) else ""
        cells.append(
            [CONTESTANTS[name].title, f"{rows[0].lr:.3g}{border}", spread([100 * r.test_accuracy for r in rows], 2),
             spread([r.train_loss for r in rows], 3),
             f"{statistics.median(r.step_ms for r in rows) / time:.1f}"]
        )  # fmt: skip
    header = (
        "optimizer",
        "lr",
        "test accuracy, %",
        "training loss",
        f"step / {CONTESTANTS[size.contestants[0]].title}",
    )
    return _TEXT.format(
        width=size.width,
        train_size=size.train_size,
        epochs=size.epochs,
        batch=BATCH,
        tried=len(size.factors),
        search=len(size.search),
        seeds=len(size.seeds),
        table=markdown_table(header, cells),
        verdict=_verdict(results),
        machine=machine(torch.device("cpu")),
    )


def _verdict(results: dict[str, list[Run]]) -> str:
    """How far the metric with the paper's rescaling is from the others."""
    mine = [100 * r.test_accuracy for r in results["improved"]]
    parts = []
    for name, rows in results.items():
        if name != "improved":
            theirs = [100 * r.test_accuracy for r in rows]
            gap = statistics.fmean(mine) - statistics.fmean(theirs)
            parts.append(f"* {gap:+.2f} from {CONTESTANTS[name].title}")
    return "\n".join(parts)
