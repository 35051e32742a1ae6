"""Damping of what a direction inverts: iEF's own matrix F̃ = JᵀS⁻¹J, and λ as a multiple of a mean diagonal."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ief import directions, linearize, objectives
from lightning_ief.capture import Linearization, LinearizedBatch
from lightning_ief.distributed import across
from tests.distributed.test_linearization import of_rank
from tests.helpers import flatten, per_sample_jacobian, relative_error
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVES: dict[str, tuple[objectives.Objective, Any]] = {
    "cross entropy": (objectives.CrossEntropy(), lambda n, c: torch.arange(n) % c),
    "least squares": (objectives.LeastSquares(), lambda n, c: torch.linspace(-1, 1, n * c).view(n, c)),
}


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


def linearized(samples: int, outputs: int = 3, objective: str = "cross entropy") -> Linearization:
    chosen, targets = OBJECTIVES[objective]
    model, x = network(outputs), torch.randn(samples, 4)
    return linearize(model, x, targets(samples, outputs), chosen)


def solved(F: Tensor, lam: float, g: Tensor) -> Tensor:
    return torch.linalg.solve(F + lam * torch.eye(len(g)), g)


def improved(lin: Linearization) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of S^-½J, F̃ and ∇L, from autograd."""
    J = per_sample_jacobian(lin.model, lin.inputs, lin.targets, lin.objective)
    scaled = J / lin.logit_gradient_norms.sqrt()[:, None]
    return scaled, scaled.T @ scaled, J.sum(0)


@pytest.mark.parametrize("samples", [1, 7, 90], ids="N={}".format)  # P = 43
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_matrix_of_ief_is_damped(objective: str, samples: int) -> None:
    lin = linearized(samples, objective=objective)
    rows, F, g = improved(lin)
    for lam in (1e-4, 1e-2, 10.0):
        assert relative_error(flatten(directions.ief(lin, absolute_damping=lam)), solved(F, lam, g)) < 1e-9
    mean = float(rows.square().sum(1).mean())
    for rho in (1e-3, 1.0):
        assert relative_error(flatten(directions.ief(lin, relative_damping=rho)), solved(F, rho * mean, g)) < 1e-9


@pytest.mark.parametrize("samples", [7, 90], ids="N={}".format)
def test_scalar_least_squares_is_the_damped_natural_gradient(samples: int) -> None:
    """With more samples than parameters, too, where the paper's damping makes another direction."""
    lin = linearized(samples, outputs=1, objective="least squares")
    natural = flatten(directions.natural_gradient(lin, 1e-3))
    assert relative_error(flatten(directions.ief(lin, absolute_damping=1e-3)), natural) < 1e-8
    assert relative_error(flatten(directions.ief(lin, 1e-3)), natural) > 1e-2


def test_much_damping_is_the_gradient() -> None:
    lin = linearized(7)
    _, _, g = improved(lin)
    d = flatten(directions.ief(lin, relative_damping=1e9))
    assert relative_error(d / d.norm(), g / g.norm()) < 1e-8
    papers = flatten(directions.ief(lin, 1e9))
    assert relative_error(papers / papers.norm(), g / g.norm()) > 1e-2


def test_samples_of_all_sizes() -> None:
    """s over 20 decades and a sample without gradient; λ means the same for each."""
    model, x = network(1), torch.randn(6, 4)
    z = model(x).detach()
    residuals = torch.tensor([1e-10, 1e-6, 1e-3, 1.0, 1e3, 0.0])[:, None]
    lin = linearize(model, x, z + residuals, objectives.LeastSquares())
    assert lin.logit_gradient_norms.max() / lin.logit_gradient_norms[:5].min() > 1e20
    J = per_sample_jacobian(model, x, lin.targets, lin.objective)[:5]
    scaled = J / lin.logit_gradient_norms[:5].sqrt()[:, None]
    truth = solved(scaled.T @ scaled, 0.1, J.sum(0))
    assert relative_error(flatten(directions.ief(lin, absolute_damping=0.1)), truth) < 1e-9


def test_float32() -> None:
    lin = linearized(7)
    truth = flatten(directions.ief(lin, relative_damping=1e-2))
    model = network().float()
    found = linearize(model, lin.inputs.float(), lin.targets, lin.objective)
    assert relative_error(flatten(directions.ief(found, relative_damping=1e-2)).double(), truth) < 1e-4


def test_under_fp16_autocast() -> None:
    lin = linearized(7)
    truth = flatten(directions.ief(lin, relative_damping=0.1))
    with torch.autocast("cpu", torch.float16):
        found = linearize(network().float(), lin.inputs.float(), lin.targets, lin.objective)
    assert found.in_fp16
    assert 1e-6 < relative_error(flatten(directions.ief(found, relative_damping=0.1)).double(), truth) < 1e-2


@pytest.mark.parametrize("samples", [7, 90], ids="N={}".format)
def test_relative_damping_of_the_others(samples: int) -> None:
    lin = linearized(samples)
    J = per_sample_jacobian(lin.model, lin.inputs, lin.targets, lin.objective)
    lam = 0.3 * float(J.square().sum(1).mean())
    assert relative_error(flatten(directions.ef(lin, relative_damping=0.3)), flatten(directions.ef(lin, lam))) < 1e-12
    rows = lin.hessian_rows()[0].to_dense()
    lam = 0.3 * float(rows.square().sum(1).mean())
    found = directions.natural_gradient(lin, relative_damping=0.3)
    assert relative_error(flatten(found), flatten(directions.natural_gradient(lin, lam))) < 1e-12
    drawn = [lin.sample(generator) for generator in [torch.Generator().manual_seed(3)] for _ in range(2)]
    sampled = lin.target_rows(drawn).to_dense()
    lam = 0.3 * float(sampled.square().sum(1).mean()) / 2
    found = directions.sampled_fisher(
        lin, num_samples=2, generator=torch.Generator().manual_seed(3), relative_damping=0.3
    )
    truth = solved(sampled.T @ sampled / 2, lam, J.sum(0))
    assert relative_error(flatten(found), truth) < 1e-9


@pytest.mark.parametrize("counts", [(6, 5), (11, 0), (4, 4, 3)], ids=str)
def test_ranks_and_micro_batches(counts: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    model, batch = network(), (torch.randn(11, 4), torch.arange(11) % 3)
    objective = OBJECTIVES["cross entropy"][0]

    def every(lin: LinearizedBatch) -> list[Tensor]:
        found = (
            directions.ief(lin, relative_damping=0.1),
            directions.ief(lin, absolute_damping=1e-3),
            directions.ef(lin, relative_damping=0.1),
            directions.natural_gradient(lin, relative_damping=0.1),
        )
        return [flatten(d.form()) for d in found]

    truth = every(linearize(model, *batch, objective))

    def part(rank: int) -> LinearizedBatch:
        inputs, targets = of_rank(batch, counts, rank)
        if len(targets):
            return linearize(model, inputs, targets, objective)
        return LinearizedBatch([], dict(model.named_parameters()), objective)

    for found in (
        every(LinearizedBatch.of([part(k) for k in range(len(counts))])),
        *on_ranks(len(counts), lambda rank: every(across(part(rank)))),
    ):
        for a, b in zip(found, truth, strict=True):
            assert relative_error(a, b) < 1e-10


def test_one_damping_is_given() -> None:
    lin = linearized(4)
    with pytest.raises(ValueError, match=r"ief takes one of damping, relative_damping, absolute_damping, got none"):
        directions.ief(lin)
    with pytest.raises(ValueError, match=r"got damping=1.0, relative_damping=0.5: leave the others out"):
        directions.ief(lin, 1.0, relative_damping=0.5)
    with pytest.raises(ValueError, match=r"ef\(relative_damping=-1.0\): must be a finite number ≥ 0"):
        directions.ef(lin, relative_damping=-1.0)
    with pytest.raises(ValueError, match=r"relative_damping=0.25\).*max_rows of at least 12"):
        directions.natural_gradient(lin, max_rows=1, relative_damping=0.25)
    with pytest.raises(ValueError, match=r"sampled_fisher needs relative_damping \(ρ\) > 0"):
        directions.sampled_fisher(lin, relative_damping=0.0)
