"""Weights of one's own: exact on ranks and with micro-batches, by YAML, as a row of the γ table."""

import pickle
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_ief import directions, gamma, linearize, objectives
from lightning_ief.capture import LinearizedBatch
from lightning_ief.distributed import across
from lightning_ief.optim import Weighted
from tests.directions.test_damping import linearized, network
from tests.distributed.test_linearization import of_rank
from tests.helpers import flatten, per_sample_jacobian, relative_error
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVE = objectives.CrossEntropy()


def truncated(gram: Tensor, s: Tensor) -> Tensor:
    """Of K's spectrum, what is above a hundredth of the largest."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-2 * values[-1]
    return vectors[:, kept] @ ((vectors[:, kept].T @ s) / values[kept])


class Power:
    """K to a power, K^(−p) s."""

    def __init__(self, power: float = 0.5) -> None:
        self.power = power

    def __call__(self, gram: Tensor, s: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(gram)
        return vectors @ (values.clamp(min=1e-12).pow(-self.power) * (vectors.T @ s))


def overwriting(gram: Tensor, s: Tensor) -> Tensor:
    gram.diagonal().add_(1e-2)
    return torch.linalg.solve(gram, s.mul_(2.0))


@pytest.mark.parametrize("weights", [truncated, Power(), overwriting])
def test_the_weighted_sum_of_gradients(weights: Any) -> None:
    lin = linearized(7)
    J = per_sample_jacobian(lin.model, lin.inputs, lin.targets, lin.objective)
    truth = J.T @ weights(J @ J.T, lin.logit_gradient_norms.clone())
    for _ in range(2):  # what the function has written to is its own
        assert relative_error(flatten(directions.weighted(lin, weights)), truth) < 1e-10
    assert float(gamma(lin, directions.weighted(lin, weights))) >= float(
        gamma(lin, directions.natural_gradient(lin, 0))
    )


def test_ief_is_of_this_kind() -> None:
    lin = linearized(7)
    found = directions.weighted(lin, lambda gram, s: torch.linalg.solve(gram + 1e-2 * torch.eye(7), s))
    assert relative_error(flatten(found), flatten(directions.ief(lin, 1e-2))) < 1e-10


@pytest.mark.parametrize("counts", [(6, 5), (11, 0)], ids=str)
def test_ranks_and_micro_batches(counts: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    batch = torch.randn(11, 4), torch.arange(11) % 3

    def part(model: nn.Module, rank: int) -> LinearizedBatch:
        inputs, targets = of_rank(batch, counts, rank)
        if len(targets):
            return linearize(model, inputs, targets, OBJECTIVE)
        return LinearizedBatch([], dict(model.named_parameters()), OBJECTIVE)

    def stepped(lins: Any, accumulate: int = 1) -> Tensor:
        model = network()
        optimizer = Weighted(model.parameters(), truncated, lr=0.1, momentum=0.5, accumulate=accumulate)
        for _ in range(3):
            for lin in lins(model):
                optimizer.step(linearization=lin)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    truth = stepped(lambda model: [linearize(model, *batch, OBJECTIVE)])
    if all(counts):
        assert relative_error(stepped(lambda model: [part(model, 0), part(model, 1)], 2), truth) < 1e-10
    for found in on_ranks(2, lambda rank: stepped(lambda model: [across(part(model, rank))])):
        assert relative_error(found, truth) < 1e-10


@pytest.mark.parametrize(
    "given",
    [
        f"{__name__}.truncated",
        {"class_path": f"{__name__}.Power", "init_args": {"power": 0.25}},
    ],
    ids=["function", "class"],
)
def test_by_yaml(given: Any) -> None:
    parser = ArgumentParser()
    parser.add_argument("--optimizer", type=OptimizerCallable)
    config = {"class_path": "lightning_ief.optim.Weighted", "init_args": {"weights": given, "max_norm": 0.5}}
    optimizer = parser.instantiate(parser.parse_object({"optimizer": config})).optimizer(network().parameters())
    assert isinstance(optimizer, Weighted)
    assert optimizer.weights is truncated or (isinstance(optimizer.weights, Power) and optimizer.weights.power == 0.25)
    assert optimizer.param_groups[0]["max_norm"] == 0.5


def test_refused() -> None:
    lin = linearized(7)
    with pytest.raises(
        ValueError, match=r"weights\(gram, s\) must return a tensor of 7 entries.*got torch.Size\(\[7, 7\]\)"
    ):
        directions.weighted(lin, lambda gram, s: gram)
    with pytest.raises(ValueError, match=r"one for each sample, got float"):
        directions.weighted(lin, lambda gram, s: 1.0)
    with pytest.raises(ValueError, match=r"Weighted\(momentum=0.9\): SPRING needs"):
        Weighted(network().parameters(), truncated, momentum=0.9, momentum_type="spring")


def test_what_is_not_finite_skips_the_step() -> None:
    model = network()
    before = [p.clone() for p in model.parameters()]
    optimizer = Weighted(model.parameters(), lambda gram, s: s / 0.0)
    with pytest.warns(RuntimeWarning, match=r"the direction is not finite"):
        optimizer.step(linearization=linearize(model, torch.randn(4, 4), torch.arange(4) % 3, OBJECTIVE))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_pickled_optimizer_keeps_its_weights() -> None:
    optimizer = pickle.loads(pickle.dumps(Weighted(network().parameters(), Power(0.25))))
    assert optimizer.weights.power == 0.25
