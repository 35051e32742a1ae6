"""Losses and gradients of one rank that are not finite: all ranks skip alike."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_ief import IEF, NaturalGradient, SampledFisher
from tests.helpers import Configure
from tests.ranks import on_ranks
from tests.training.runs import fit

pytestmark = pytest.mark.usefixtures("float64")


def poison(trainer: L.Trainer, batch: Any, number: int) -> None:
    if number == 1 and trainer.global_rank == trainer.world_size - 1:
        batch[0][2] = torch.nan


SKIPPING: dict[str, Configure] = {
    "ief": lambda p: IEF(p, lr=0.5, damping=1e-3),
    "ief, local": lambda p: IEF(p, lr=0.5, damping=1e-3, sync="local"),
    "ief, pairs of micro-batches": lambda p: IEF(p, lr=0.5, damping=1e-3, accumulate=2),
    "sampled_fisher": lambda p: SampledFisher(p, lr=0.3),
    "sampled_fisher, local": lambda p: SampledFisher(p, lr=0.3, sync="local"),
    "natural_gradient": lambda p: NaturalGradient(p, lr=0.1, damping=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", SKIPPING)
def test_all_ranks_skip_alike(name: str) -> None:
    results = on_ranks(2, lambda rank: fit(SKIPPING[name], 6, poison, 2))
    for weights, messages in results:
        said = [message for message in messages if "kipped a" in message]
        assert len(said) == 1 and f"samples [{8 if 'pairs' in name else 2}] of rank 1" in said[0], said
        assert torch.equal(weights[0], weights[1])  # skipped
        assert not torch.equal(weights[1], weights[3]) and weights[-1].isfinite().all()
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][0], strict=True))


class Length(nn.Module):
    """Inputs of zeros have finite losses, and gradients that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4, bias=False), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).square().sum(1, keepdim=True).sqrt())


@pytest.mark.parametrize("name", ["ief", "ief, local", "sampled_fisher", "sampled_fisher, local"])
def test_gradients_of_one_rank_that_are_not_finite(name: str) -> None:
    def zeros(trainer: L.Trainer, batch: Any, number: int) -> None:
        if number == 1 and trainer.global_rank == 1:
            batch[0][2] = 0.0

    results = on_ranks(2, lambda rank: fit(SKIPPING[name], 6, zeros, 2, net=Length()))
    for weights, messages in results:
        assert len([message for message in messages if "skipped a step" in message]) == 1
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][0], strict=True))


@pytest.mark.parametrize("name", ["ief, local", "sampled_fisher, local"])
def test_a_rank_without_gradients_moves_with_the_others(name: str) -> None:
    def ignored(trainer: L.Trainer, batch: Any, number: int) -> None:
        if number == 1 and trainer.global_rank == 1:
            batch[1].fill_(-100)

    results = on_ranks(2, lambda rank: fit(SKIPPING[name], 6, ignored, 2))
    for weights, messages in results:
        assert not [message for message in messages if "skipped a step" in message]
        assert not torch.equal(weights[0], weights[1])
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][0], strict=True))
