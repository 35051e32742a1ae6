"""Small networks on images, trained in a loop of one's own: contestants, the search of learning rates, and the runs."""

import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_collate

from benchmarks.report import read, write
from lightning_ief import EF, IEF, KFAC, GaussNewton, NaturalGradient, SampledFisher, linearize
from lightning_ief.experiments.search import at_border, further
from lightning_ief.objectives import CrossEntropy
from lightning_ief.optim import DirectionOptimizer
from lightning_ief.tasks import MLP, MuonAdamW, VisionDataModule
from lightning_ief.tasks.schedules import multiple

__all__ = [
    "BATCH", "CONTESTANTS", "POINTS", "Contestant", "Data", "MissingRunError", "Regime", "Run", "Runs", "Search",
    "Step", "StepTime", "batches", "load", "step_times", "stepping",
]  # fmt: skip

BATCH = 64

Step: TypeAlias = Callable[[Any, Tensor], None]
"""A step on inputs and targets."""

POINTS = 20
"""How often the accuracy of held-out images is measured in a run."""

_TURNS, _SAMPLES = 5, 6_400  # of the optimizers, to measure their steps; samples that each takes in a turn, or more


class MissingRunError(Exception):
    """A run is not in the file, and is not to be done."""


class Contestant(NamedTuple):
    """An optimizer.

    Attributes:
        title: What the pages call it.
        make: Makes it from parameters and lr.
        lr: The middle of the learning rates that are searched.
        cycle: Steps after which what it costs repeats.
    """

    title: str
    make: Callable[..., Optimizer]
    lr: float
    cycle: int = 20


def _metric(fisher: str = "improved", every: int = 20) -> Callable[..., Optimizer]:
    options = {"metric": "kronecker", "fisher": fisher, "metric_every": every}
    return partial(IEF, relative_damping=1.0, momentum=0.5, **options)


def _kfac(fisher: str) -> Contestant:
    name = {"sampled": "KFAC", "empirical": "eKFAC", "improved": "ieKFAC"}[fisher]
    return Contestant(f"{name}: λ = 10", partial(KFAC, damping=10.0, fisher=fisher, every=20), 0.3)


CONTESTANTS = {
    "sgd": Contestant("SGD, Nesterov 0.9", partial(torch.optim.SGD, momentum=0.9, nesterov=True), 0.1),
    "adamw": Contestant("AdamW", partial(torch.optim.AdamW, weight_decay=0.0), 3e-3),
    "muon": Contestant("Muon, AdamW beside it", partial(MuonAdamW, weight_decay=0.0), 3e-3),
    "adafactor": Contestant("Adafactor", torch.optim.Adafactor, 1e-2),
    "ef": Contestant("EF, the paper's", partial(EF, damping=4.1e-4, normalize=True), 0.1),
    "sampled_fisher": Contestant("F̂(1), the paper's", partial(SampledFisher, damping=4.1e-4, normalize=True), 0.1),
    "ief": Contestant("iEF, the paper's", partial(IEF, damping=4.1e-4), 1.0),
    "preset": Contestant("iEF, preset: ρ = 0.3", partial(IEF, relative_damping=0.3), 3.0),
    "spring": Contestant("iEF, SPRING: ρ = 1, μ = 0.9", partial(IEF, relative_damping=1.0, momentum=0.9), 1.0),
    "layerwise": Contestant("iEF by layers: ρ = 0.3", partial(IEF, relative_damping=0.3, layerwise=True), 3.0),
    "kfac_sampled": _kfac("sampled"),
    "kfac_empirical": _kfac("empirical"),
    "kfac_improved": _kfac("improved"),
    "gauss_newton": Contestant("Gauss-Newton: ρ = 0.3", partial(GaussNewton, relative_damping=0.3), 3.0),
    "natural_gradient": Contestant("natural gradient: λ = 100", partial(NaturalGradient, damping=100.0), 1.0),
    "metric": Contestant("iEF, metric", _metric(), 3.0),
    "metric_100": Contestant("iEF, metric, every 100", _metric(every=100), 3.0, 100),
    "empirical": Contestant("iEF, metric, empirical Ĝ", _metric("empirical"), 3.0),
    "sampled": Contestant("iEF, metric, sampled Ĝ", _metric("sampled"), 3.0),
}


class Regime(NamedTuple):
    """What is trained, an MLP with two hidden layers.

    Attributes:
        name: In the CSV file.
        width: Of the hidden layers.
        train_size: Training images; 0 for all that are not held out.
        epochs: Of each run.
        samples: N, of a batch.
        micro: Samples of a micro-batch: more in a batch are accumulated, exactly.
    """

    name: str
    width: int = 256
    train_size: int = 10_000
    epochs: int = 2
    samples: int = BATCH
    micro: int = 512


class Search(NamedTuple):
    """How learning rates are found, alike for all.

    Attributes:
        factors: What the middle one is multiplied by, from small to large.
        widen: How often a grid goes on where its best is at the border.
        seeds: Seeds whose mean held-out accuracy at the end chooses.
        results: Other ones, of the results.
    """

    factors: Sequence[float] = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
    widen: int = 2
    seeds: Sequence[int] = (100, 101)
    results: Sequence[int] = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Run:
    """A run; the CSV file has these columns.

    Attributes:
        regime: Its name.
        contestant: Its name.
        steps: Updates.
        lr: Learning rate at the beginning.
        seed: Of weights and order.
        part: "search", if it took part in the choice of the learning rate, or "result".
        train_loss: Mean loss of the training images at the end.
        val_accuracy: Of held-out images at the end, 0 to 1.
        test_accuracy: Of images that chose nothing, at the end.
        curve: Accuracy of the held-out images after each of `POINTS` parts of the steps, with spaces between.
    """

    regime: str
    contestant: str
    steps: int
    lr: float
    seed: int
    part: str
    train_loss: float
    val_accuracy: float
    test_accuracy: float
    curve: str

    def share_to(self, accuracy: float) -> float:
        """The part of the run after which held-out images are first classified as well; inf if they never are."""
        values = [*map(float, self.curve.split())]
        return next((k / len(values) for k, value in enumerate(values, 1) if value >= accuracy), math.inf)


@dataclass(frozen=True)
class StepTime:
    """The time of a step; the CSV file beside that of the runs has these columns.

    Attributes:
        regime: Its name.
        contestant: Its name.
        milliseconds: The optimizers taking turns; median over the turns.
        ratio: Over SGD's in the same turn.
        low: First quartile of the ratio.
        high: Third quartile.
    """

    regime: str
    contestant: str
    milliseconds: float
    ratio: float
    low: float
    high: float


class Data(NamedTuple):
    """Images and labels.

    Attributes:
        train: To train on.
        val: To choose by.
        test: For the results.
    """

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(train_size: int, root: Path) -> Data:
    """Fashion-MNIST.

    Args:
        train_size: Training images; 0 for all but 5,000 that are held out.
        root: Folder of the images.

    Returns:
        Each part as one batch.
    """
    module = VisionDataModule("FashionMNIST", str(root), train_size=train_size or None, val_size=5_000)
    module.prepare_data()
    module.setup()
    train, val, test = (default_collate([*part]) for part in (module.train_set, module.val_set, module.test_set))
    return Data(*(module.on_after_batch_transfer(list(part), 0) for part in (train, val, test)))


def batches(samples: tuple[Tensor, Tensor], size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches without end, in a new order in each epoch."""
    while True:
        for chosen in torch.randperm(len(samples[1])).split(size):
            if len(chosen) == size:
                yield samples[0][chosen], samples[1][chosen]


class Runs:
    """The runs of a study; those that are in its CSV file are not done again.

    Args:
        path: The CSV file.
        root: Folder of the images.
        search: How learning rates are found.
        tell: Is told of each run; None if none is to be done, but MissingRunError raised where one is missing.
    """

    def __init__(self, path: Path, root: Path, search: Search, tell: Callable[[str], None] | None = None) -> None:
        self.path = path
        self.root = root
        self.search = search
        self.tell = tell
        self.rows = read(path, Run)
        self.least: dict[tuple[str, int], int] = {}  # learning rates that each optimizer is to have had
        self._data: dict[int, Data] = {}

    def data(self, train_size: int) -> Data:
        """The images, read once."""
        if train_size not in self._data:
            self._data[train_size] = load(train_size, self.root)
        return self._data[train_size]

    def steps_of(self, regime: Regime) -> int:
        """Updates of a run."""
        return round(regime.epochs * (regime.train_size or len(self.data(0).train[1])) / regime.samples)

    def results(self, regime: Regime, name: str, steps: int = 0) -> list[Run]:
        """The results of an optimizer at its best learning rate, after a search if there was none.

        Args:
            regime: What is trained.
            name: The optimizer.
            steps: Updates of each run; those of the regime if 0.

        Returns:
            A row for each seed.
        """
        steps = steps or self.steps_of(regime)
        best, _ = self.searched(regime, name, steps)
        return [self.done(regime, name, steps, best, seed, "result") for seed in self.search.results]

    def searched(self, regime: Regime, name: str, steps: int = 0) -> tuple[float, list[float]]:
        """The best learning rate, and all that were tried."""
        steps = steps or self.steps_of(regime)

        def mean(lr: float) -> float:
            runs = [self.done(regime, name, steps, lr, seed, "search") for seed in self.search.seeds]
            return statistics.fmean(run.val_accuracy for run in runs)

        means = {lr: mean(lr) for lr in (CONTESTANTS[name].lr * factor for factor in self.search.factors)}
        while True:
            best = max(means, key=means.__getitem__)
            may_widen = len(means) < len(self.search.factors) + self.search.widen
            if len(means) >= self.least.get((regime.name, steps), 0) and not (may_widen and at_border([*means], best)):
                return best, sorted(means)
            lr = further([*means], best)
            means[lr] = mean(lr)

    def search_alike(self, regime: Regime, names: Sequence[str], steps: int = 0) -> None:
        """Search for all of these until each has had as many learning rates as any of them."""
        key = (regime.name, steps or self.steps_of(regime))
        while len(numbers := {len(self.searched(regime, name, key[1])[1]) for name in names}) > 1:
            self.least[key] = max(numbers)

    def times(self, regime: Regime, names: Sequence[str]) -> dict[str, StepTime]:
        """Time of a step of each optimizer: measured in turns, or as the file has it."""
        path = self.path.with_name(f"{self.path.stem}_times.csv")
        rows = read(path, StepTime)
        if missing := {*names}.difference(row.contestant for row in rows if row.regime == regime.name):
            if self.tell is None:
                raise MissingRunError(f"{path} has no time of {sorted(missing)}.")
            rows += _step_times(regime, self.data(regime.train_size), ["sgd", *sorted(missing - {"sgd"})])
            write(rows, path, StepTime)
        return {row.contestant: row for row in rows if row.regime == regime.name}

    def done(self, regime: Regime, name: str, steps: int, lr: float, seed: int, part: str) -> Run:
        """A run, from the file if it is there."""
        key = (regime.name, name, steps, seed, part)
        for row in self.rows:
            same = (row.regime, row.contestant, row.steps, row.seed, row.part) == key
            if same and abs(row.lr - lr) <= 1e-4 * lr:
                return row
        if self.tell is None:
            raise MissingRunError(f"{self.path} has no run of {name}, {steps} steps, lr {lr:g}, seed {seed}.")
        found = _trained(regime, self.data(regime.train_size), CONTESTANTS[name], steps, lr, seed)
        self.rows.append(Run(regime.name, name, steps, lr, seed, part, *found))
        write(self.rows, self.path, Run)
        row = self.rows[-1]
        self.tell(f"{regime.name}: {name}, {steps} steps, lr {lr:.3g}, seed {seed}: {100 * row.val_accuracy:.2f} %")
        return row


def _trained(
    regime: Regime, data: Data, contestant: Contestant, steps: int, lr: float, seed: int
) -> tuple[float, float, float, str]:
    """Train; lr falls linearly to 0."""
    torch.manual_seed(seed)
    net = MLP([784, regime.width, regime.width, 10])
    step, _ = stepping(net, contestant, lr, steps, -(-regime.samples // regime.micro))
    points = {-(-steps * k // POINTS) for k in range(1, POINTS + 1)}
    curve = dict[int, float]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of steps that are skipped, where lr is far too large
        for number, (x, y) in enumerate(islice(batches(data.train, regime.samples), steps), 1):
            step(x, y)
            if number in points:
                curve[number] = _evaluated(net, *data.val)[1]
    loss, _ = _evaluated(net, *data.train)
    at_points = [curve[-(-steps * k // POINTS)] for k in range(1, POINTS + 1)]
    values = " ".join(f"{value:.4f}" for value in at_points)
    return loss, at_points[-1], _evaluated(net, *data.test)[1], values


def _step_times(regime: Regime, data: Data, names: Sequence[str]) -> list[StepTime]:
    """Steps of all optimizers in turns, each with a network of its own."""
    steps, numbers = {}, {}
    for name in names:
        torch.manual_seed(0)
        net = MLP([784, regime.width, regime.width, 10])
        parts = -(-regime.samples // regime.micro)
        steps[name], _ = stepping(net, CONTESTANTS[name], 0.0, 1, parts)
        numbers[name] = max(CONTESTANTS[name].cycle, _SAMPLES // regime.samples)
    return step_times(regime.name, steps, numbers, batches(data.train, regime.samples))


def step_times(
    regime: str,
    steps: Mapping[str, Step],
    numbers: Mapping[str, int],
    stream: Iterator[tuple[Any, Tensor]],
    turns: int = _TURNS,
    clock: Callable[[], float] = perf_counter,
) -> list[StepTime]:
    """Times of steps, the optimizers taking turns.

    Args:
        regime: What is trained.
        steps: By optimizer; one of them is sgd.
        numbers: Steps of each in a turn.
        stream: Batches.
        turns: Their number, to which one is added that warms up.
        clock: Seconds.

    Returns:
        A row for each.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            taken = [*islice(stream, numbers[name])]
            start = clock()
            for x, y in taken:
                step(x, y)
            if turn:  # the first one warms up
                milliseconds[name].append((clock() - start) / len(taken))
    found = []
    for name, own in milliseconds.items():
        ratios = [a / b for a, b in zip(own, milliseconds["sgd"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found.append(StepTime(regime, name, 1e3 * statistics.median(own), middle, low, high))
    return found


def stepping(net: nn.Module, contestant: Contestant, lr: float, steps: int, parts: int = 1) -> tuple[Step, Optimizer]:
    """What takes a step on a batch, lr falling linearly to 0.

    Args:
        net: The network.
        contestant: The optimizer.
        lr: At the beginning.
        steps: After which it is 0.
        parts: Micro-batches of a batch.

    Returns:
        The step, a function of inputs and targets, and the optimizer.
    """
    optimizer = contestant.make([p for p in net.parameters() if p.requires_grad], lr=lr)
    if isinstance(optimizer, DirectionOptimizer):
        optimizer.accumulate = parts
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(multiple, steps=steps, warmup=0.0, decay="linear"))

    def step(x: Any, y: Tensor) -> None:
        _step(net, optimizer, [x] if parts == 1 else x.chunk(parts), y.chunk(parts))
        falling.step()

    return step, optimizer


def _step(net: nn.Module, optimizer: Optimizer, inputs: Sequence[Any], targets: Sequence[Tensor]) -> None:
    """One update of a batch, in micro-batches."""
    micro = [*zip(inputs, targets, strict=True)]
    if isinstance(optimizer, DirectionOptimizer):
        for x, y in micro:
            sides = optimizer.sides_of(net)
            optimizer.step(linearization=linearize(net, x, y, CrossEntropy(), keep_sides=sides))
        return
    optimizer.zero_grad()
    for x, y in micro:
        logits = net(**x) if isinstance(x, dict) else net(x)
        F.cross_entropy(logits, y, reduction="sum").div(sum(map(len, targets))).backward()
    optimizer.step()


@torch.no_grad()
def _evaluated(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    logits = net(x)
    loss = float(F.cross_entropy(logits, y))
    return loss if math.isfinite(loss) else math.inf, float((logits.argmax(1) == y).double().mean())
