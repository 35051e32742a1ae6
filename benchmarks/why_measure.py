"""Directions of many batches at several stages of a run: what they have in common, and their worth on other data."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.loop import BATCH, batches
from benchmarks.why_estimators import (
    actual_decreases,
    along,
    best_decreases,
    cosine_in_common,
    decrease_at_one_length,
    gram_of,
    share_in_common,
)
from lightning_ief import directions, linearize
from lightning_ief.capture import LinearizedBatch
from lightning_ief.objectives import CrossEntropy
from lightning_ief.optim.metric import KroneckerMetric
from lightning_ief.tasks import MLP
from lightning_ief.tasks.schedules import multiple

__all__ = [
    "CONTESTANTS",
    "FACTORS",
    "FULL",
    "PAPER",
    "SMOKE",
    "BatchesBefore",
    "Contestant",
    "Measured",
    "Size",
    "measure",
    "trained",
]

PAPER = 4.1e-4  # λ
_METRIC_DECAY = 0.95
FACTORS = (0.25, 0.5, 1.0, 2.0)  # of the step length that the local model of the other images has for the best
_OBJECTIVE = CrossEntropy()


class Contestant(NamedTuple):
    """A direction.

    Attributes:
        title: What page and figure call it.
        function: Makes it of a batch.
        in_metric: Whether of a batch in the Kronecker metric.
    """

    title: str
    function: Callable[[LinearizedBatch], Mapping[str, Tensor]]
    in_metric: bool = False


def _ief(rho: float, in_metric: bool = False) -> Contestant:
    title = f"iEF, metric, ρ = {rho:g}" if in_metric else f"iEF, ρ = {rho:g}"
    return Contestant(title, partial(directions.ief, relative_damping=rho), in_metric)


CONTESTANTS = {
    "sgd": Contestant("SGD, ∇L", directions.sgd),
    "sampled": Contestant("F̂(1), the paper's λ", partial(directions.sampled_fisher, damping=PAPER)),
    "sampled-0.3": Contestant("F̂(1), ρ = 0.3", partial(directions.sampled_fisher, relative_damping=0.3)),
    "ef": Contestant("EF, the paper's λ", partial(directions.ef, damping=PAPER)),
    "ef-0.3": Contestant("EF, ρ = 0.3", partial(directions.ef, relative_damping=0.3)),
    "exact-0.3": Contestant("exact F, ρ = 0.3", partial(directions.natural_gradient, relative_damping=0.3)),
    "ief": Contestant("iEF, the paper's λ", partial(directions.ief, damping=PAPER)),
    "ief-0.03": _ief(0.03),
    "ief-0.3": _ief(0.3),
    "ief-3": _ief(3.0),
    "ief-30": _ief(30.0),
    "metric-0.1": _ief(0.1, in_metric=True),
    "metric-1": _ief(1.0, in_metric=True),
    "metric-10": _ief(10.0, in_metric=True),
    "metric": Contestant("metric alone, M⁻¹∇L", directions.sgd, in_metric=True),
}


class Size(NamedTuple):
    """The study at one of its sizes.

    Attributes:
        stages: After how many epochs of training directions are measured; training ends with the last.
        seeds: Of weights, order and batches.
        batches: Whose directions are compared.
        checked: The first of them, with which the local model is held against the loss itself.
        before: Other batches, of which the metric is.
        others: Further images, on which the directions are judged.
        train_size: Training images, of which all these are.
        width: Of the hidden layers.
    """

    stages: Sequence[float] = (0.1, 0.5, 2.0)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    batches: int = 64
    checked: int = 8
    before: int = 50
    others: int = 2_000
    train_size: int = 10_000
    width: int = 256


FULL = Size()
SMOKE = Size((0.3, 1.5), (0, 1), 4, 3, 4, 64, 640, 8)


@dataclass(frozen=True)
class Measured:
    """A direction at one stage of one run; the CSV file has these columns. Decreases are of mean losses.

    Attributes:
        seed: Of the run.
        epochs: The stage.
        direction: Its name.
        loss: Of the other images, at the stage.
        share: c, ‖E d‖²/E‖d‖².
        cosine: In the mean between directions of two batches.
        share_fisher: c in the metric F of the other images.
        own: Best decrease of the local model of the batch itself; the mean over the batches, as all that follow.
        other: That of the other images.
        one_length: The same with one step length for all batches.
        loss_over_model: Decrease of the loss of the other images itself, with the best of a few step lengths, over
            that of its model; NaN where −d leads uphill with all batches that are checked.
        other_low: First quartile of `other` over the batches.
        other_high: Third quartile.
        uphill: Share of the batches whose −d leads uphill on the other images.
    """

    seed: int
    epochs: float
    direction: str
    loss: float
    share: float
    cosine: float
    share_fisher: float
    own: float
    other: float
    one_length: float
    loss_over_model: float
    other_low: float
    other_high: float
    uphill: float


def trained(size: Size, train: tuple[Tensor, Tensor], seed: int) -> list[tuple[float, nn.Module]]:
    """Train by SGD, as `from-scratch` does.

    Args:
        size: Size of the study.
        train: Images and classes.
        seed: Of weights and order.

    Returns:
        Each stage and the network there.
    """
    torch.manual_seed(seed)
    net = MLP([784, size.width, size.width, 10])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    per_epoch = len(train[1]) // BATCH
    stages = {round(epochs * per_epoch): epochs for epochs in size.stages}
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(multiple, steps=max(stages), warmup=0.0, decay="linear")
    )
    found = []
    for step, (x, y) in enumerate(batches(train), 1):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        falling.step()
        if step in stages:
            found.append((stages[step], deepcopy(net)))
        if step == max(stages):
            break
    return found


def measure(size: Size, train: tuple[Tensor, Tensor], net: nn.Module, seed: int, epochs: float) -> Iterator[Measured]:
    """Measure every direction at a stage; batches, those before and the other images have no image in common.

    Args:
        size: Size of the study.
        train: Images and classes.
        net: The network.
        seed: Of the run.
        epochs: The stage.

    Yields:
        A row for each direction.
    """
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed)).split(BATCH)
    drawn = [(train[0][chosen], train[1][chosen]) for chosen in order]
    chosen, before = drawn[: size.batches], drawn[size.batches : size.batches + size.before]
    rest = torch.cat(order[size.batches + size.before :])[: size.others]
    others = train[0][rest], train[1][rest]
    metric = BatchesBefore(net, before)
    loss = float(F.cross_entropy(net(others[0]).detach(), others[1]))
    for name, contestant in CONTESTANTS.items():
        torch.manual_seed(seed)  # of what is sampled
        found, own = [], []
        for x, y in chosen:
            seen = linearize(net, x, y, _OBJECTIVE, keep_sides=metric.sides)
            direction = dict(contestant.function(metric.of(seen) if contestant.in_metric else seen))
            curvatures, slopes = seen.gamma_terms([direction])
            own.append(float(best_decreases(slopes, curvatures)) / len(y))
            found.append(direction)
        there = along(net, others, _OBJECTIVE, found)
        gram, best = gram_of(found), best_decreases(there.slopes, there.curvatures)
        lengths = (there.slopes / there.curvatures)[: size.checked]
        actual = actual_decreases(net, others, _OBJECTIVE, found[: size.checked], lengths, FACTORS)
        yield Measured(
            seed=seed,
            epochs=epochs,
            direction=name,
            loss=loss,
            share=share_in_common(gram),
            cosine=cosine_in_common(gram),
            share_fisher=share_in_common(there.gram),
            own=statistics.fmean(own),
            other=float(best.mean()),
            one_length=decrease_at_one_length(there),
            loss_over_model=float(actual.sum() / best[: size.checked].sum()),
            other_low=float(best.quantile(0.25)),
            other_high=float(best.quantile(0.75)),
            uphill=float((there.slopes <= 0).double().mean()),
        )


class BatchesBefore:
    """The Kronecker metric of batches before, the same for all batches that are then seen in it.

    Args:
        net: The network.
        before: The batches, at the same weights.
    """

    def __init__(self, net: nn.Module, before: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.sides = KroneckerMetric.sides_of(dict(net.named_parameters()))
        self._states: dict[str, dict[str, Any]] = {name: {} for name in self.sides}
        taking = KroneckerMetric("improved", _METRIC_DECAY, every=1)  # every batch, and a look at the last one
        for x, y in before:
            taking.of(linearize(net, x, y, _OBJECTIVE, keep_sides=self.sides), self._states)
        self._metric = KroneckerMetric("improved", _METRIC_DECAY, every=10**9)

    def of(self, batch: LinearizedBatch) -> LinearizedBatch:
        """A batch in the metric, which stays as it is."""
        return self._metric.of(batch, deepcopy(self._states))[0]
