"""γ of the family of curvature methods along runs, and what their steps cost: the measurements of `family`."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import default_collate

from benchmarks.loop import CONTESTANTS, StepTime, load, step_times, stepping
from benchmarks.reviews import RECIPE
from lightning_ief import linearize
from lightning_ief.capture import LinearizedBatch
from lightning_ief.curvature import sides_of
from lightning_ief.directions.registry import REFERENCE, find
from lightning_ief.objectives import CrossEntropy
from lightning_ief.tasks import MLP, GlueDataModule, SequenceClassifier

__all__ = [
    "DIRECTIONS", "OPTIMIZERS", "STAGES", "TASKS", "Cost", "Measured", "Source", "Task", "costs", "gammas_by_rows",
    "measure", "minilm", "mlp", "paper_damping",
]  # fmt: skip

DIRECTIONS = (
    "ef", "ief", "layerwise_ef", "layerwise_ief", "kfac_empirical", "kfac_improved", "kfac_sampled", "sampled_fisher",
    "gauss_newton", "layerwise_gauss_newton", "natural_gradient",
)  # fmt: skip
"""By their names in the registry."""

OPTIMIZERS = (
    "sgd", "adamw", "ief", "ef", "layerwise", "kfac_sampled", "kfac_empirical", "kfac_improved", "sampled_fisher",
    "gauss_newton", "natural_gradient",
)  # fmt: skip
"""Whose steps are timed, by their names in `CONTESTANTS`."""

STAGES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Parts of a run after which directions are compared."""

_PAPER = 1e-7  # λ of a mean loss
_BEFORE = 5  # steps of training before steps are timed
_OBJECTIVE = CrossEntropy()
_LENGTH = 32  # tokens


class Source(NamedTuple):
    """A network and its training samples.

    Attributes:
        net: Makes the network; its trainable parameters are trained.
        size: Number of samples.
        draw: Inputs and classes of the samples of these numbers.
    """

    net: Callable[[], nn.Module]
    size: int
    draw: Callable[[Tensor], tuple[Any, Tensor]]


class Task(NamedTuple):
    """What is trained, and how directions are compared on it.

    Attributes:
        name: In the CSV files.
        title: What page and figure call it.
        source: Makes the source, of the folder of its data.
        steps: Updates by AdamW, its lr falling linearly to 0.
        samples: N of these.
        evaluated: N of the batches whose directions are compared.
        batches: Their number at each stage.
        dampings: λ besides the paper's.
        turns: Of the optimizers, to time their steps.
        timed: Steps of each in a turn; K-FAC takes so many that it decomposes its factors once.
    """

    name: str
    title: str
    source: Callable[[Path], Source]
    steps: int
    samples: int
    evaluated: int
    batches: int
    dampings: Sequence[float]
    turns: int
    timed: int


def mlp(root: Path, train_size: int = 10_000, width: int = 256) -> Source:
    """An MLP on Fashion-MNIST, that of `from-scratch`."""
    x, y = load(train_size, root).train
    return Source(lambda: MLP([784, width, width, 10]), len(y), lambda chosen: (x[chosen], y[chosen]))


def minilm(root: Path, train_size: int = 800) -> Source:
    """MiniLM with LoRA in all layers on movie reviews, as the recipe has it but for shorter sentences."""
    from peft import LoraConfig  # an extra

    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["model"]["init_args"]["net"]["init_args"]
    adapter = recipe["adapter"]["init_args"]
    model = str(root / "minilm")
    data = GlueDataModule("sst2", model, str(root), encoding="pair", max_length=_LENGTH, train_size=train_size)
    data.prepare_data()
    data.setup()

    def net() -> nn.Module:
        return SequenceClassifier(2, model, adapter=LoraConfig(**adapter)).eval()  # without dropout

    def draw(chosen: Tensor) -> tuple[Any, Tensor]:
        inputs, classes = default_collate(data.train_set.__getitems__(chosen.tolist()))
        return inputs, classes

    return Source(net, train_size, draw)


TASKS = (
    Task(
        "mlp", "MLP 784-256-256-10, Fashion-MNIST", mlp,
        steps=312, samples=64, evaluated=64, batches=4, dampings=(1e-1, 1.0, 10.0, 100.0), turns=5, timed=20,
    ),
    Task(
        "minilm", "MiniLM with LoRA, movie reviews", minilm,
        steps=75, samples=32, evaluated=64, batches=3, dampings=(1e-1, 1.0, 10.0), turns=3, timed=2,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A direction at one λ and one stage; the CSV file has these columns.

    Attributes:
        task: Its name.
        stage: Part of the run.
        loss: Mean loss of the batches there.
        direction: Its name.
        damping: λ.
        ratio: γ over that of SGD on the same batch, mean over the batches.
        spread: Its standard deviation.
    """

    task: str
    stage: float
    loss: float
    direction: str
    damping: float
    ratio: float
    spread: float


@dataclass(frozen=True)
class Cost:
    """A step of an optimizer; the CSV file has these columns.

    Attributes:
        task: Its name.
        optimizer: Its name.
        milliseconds: Of the processor, the optimizers taking turns; median over the turns.
        ratio: Over SGD's in the same turn.
        low: First quartile of the ratio.
        high: Third quartile.
        state: Numbers that it keeps from step to step, for each trainable parameter.
    """

    task: str
    optimizer: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    state: float


def paper_damping(task: Task) -> float:
    """λ of the paper in units of sums: 1e-7 N², as gradients of a mean loss are N times smaller."""
    return task.evaluated**2 * _PAPER


def measure(task: Task, source: Source) -> Iterator[Measured]:
    """Train by AdamW, and compare the directions at each stage.

    Args:
        task: The task.
        source: Its source.

    Yields:
        A row for each direction at each λ.
    """
    for stage, net in _trained(task, source):
        ratios: dict[tuple[str, float], list[float]] = {}
        losses = []
        for number in range(task.batches):
            order = torch.randperm(source.size, generator=torch.Generator().manual_seed(number))
            batch = _seen(net, *source.draw(order[: task.evaluated]))
            losses.append(float(batch.losses.mean()))
            for key, ratio in _ratios(task, batch, number).items():
                ratios.setdefault(key, []).append(ratio)
        for (name, damping), found in ratios.items():
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            yield Measured(task.name, stage, statistics.fmean(losses), name, damping, statistics.fmean(found), spread)


def _trained(task: Task, source: Source) -> Iterator[tuple[float, nn.Module]]:
    """The network at each stage."""
    torch.manual_seed(0)
    net, contestant = source.net(), CONTESTANTS["adamw"]
    step, _ = stepping(net, contestant, contestant.lr, task.steps)
    stream, stages = _batches(task, source), {round(task.steps * stage): stage for stage in STAGES}
    for taken in range(task.steps + 1):
        if taken in stages:
            yield stages[taken], net
        step(*next(stream))


def _batches(task: Task, source: Source) -> Iterator[tuple[Any, Tensor]]:
    """Whole batches without end, in a new order in each epoch."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for chosen in torch.randperm(source.size, generator=generator).split(task.samples):
            if len(chosen) == task.samples:
                yield source.draw(chosen)


def _seen(net: nn.Module, x: Any, y: Tensor) -> LinearizedBatch:
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    return linearize(net, x, y, _OBJECTIVE, keep_sides=sides_of(parameters))


def _ratios(task: Task, batch: LinearizedBatch, seed: int) -> dict[tuple[str, float], float]:
    """γ over that of SGD, by direction and λ."""

    def along(name: str, damping: float) -> Mapping[str, Tensor]:
        # The same targets are drawn at every λ.
        return find(name).compute(batch, damping, 1, torch.Generator().manual_seed(seed))

    # Backward passes for each logit, whose rows are the same at every λ.
    for method in ("hessian_rows", "logit_rows"):
        setattr(batch, method, cache(getattr(batch, method)))
    asked = [(name, damping) for name in DIRECTIONS for damping in (paper_damping(task), *task.dampings)]
    reference, *found = gammas_by_rows(batch, (along(*each) for each in ((REFERENCE, 0.0), *asked)))
    return {each: gamma / reference for each, gamma in zip(asked, found, strict=True)}


def gammas_by_rows(batch: LinearizedBatch, directions: Iterator[Mapping[str, Tensor]]) -> list[float]:
    """γ of many directions on a batch of few logits: ‖A d‖ / |cᵀA d|, with F = AᵀA and ∇L = Aᵀc.

    What `lightning_ief.gammas` finds by forward passes; the rows A, once there, serve all directions.

    Args:
        batch: Model and batch, with its graph.
        directions: Each {parameter name: tensor}.

    Returns:
        γ of each; inf for one that does not change the loss.
    """
    rows, coordinates = batch.hessian_rows()
    found = []
    for direction in directions:
        u = rows.matvec(dict(direction)).double()
        slope = float((coordinates @ u).abs())
        found.append(float(u.norm()) / slope if slope else float("inf"))
    return found


def costs(task: Task, source: Source) -> list[Cost]:
    """Time and state of a step of each optimizer with lr = 0, in turns, each with a network of its own.

    It is the processor's time: with one thread that of a machine with nothing else to do. The network has been trained
    a little, as parameters whose gradient is 0 in all batches, half of LoRA at its beginning, are looked at longer.

    Args:
        task: The task.
        source: Its source.

    Returns:
        A row for each.
    """
    torch.manual_seed(0)
    net, stream = source.net(), _batches(task, source)
    step, _ = stepping(net, CONTESTANTS["adamw"], CONTESTANTS["adamw"].lr, _BEFORE)
    for _ in range(_BEFORE):
        step(*next(stream))
    steps, optimizers, numbers = {}, {}, {}
    for name in OPTIMIZERS:
        contestant = CONTESTANTS[name]
        steps[name], optimizers[name] = stepping(deepcopy(net), contestant, 0.0, 1)
        numbers[name] = max(contestant.cycle, task.timed) if name.startswith("kfac") else task.timed
    times = step_times(task.name, steps, numbers, stream, task.turns, process_time)
    return [_cost(each, optimizers[each.contestant]) for each in times]


def _cost(time: StepTime, optimizer: torch.optim.Optimizer) -> Cost:
    kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor) and x.dim()]
    parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    task, name, *numbers = asdict(time).values()
    return Cost(task, name, *numbers, sum(x.numel() for x in kept) / parameters)
