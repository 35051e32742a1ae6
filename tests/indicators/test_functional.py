"""γ against its definition: F and ∇L dense, one sample at a time, in float64."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_ief import gamma, linearize, objectives
from lightning_ief.indicators import gammas, measure_gammas
from tests.helpers import Function, flatten, random_direction, relative_error, trainable

N, T, D, C = 5, 3, 4, 3


@pytest.fixture(autouse=True)
def _precision(float64: None) -> None:
    """All of these are in float64."""


def tied() -> nn.Module:
    """Sequences, a tied layer and a frozen one."""
    inner = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D).requires_grad_(False), nn.Linear(D, C))

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = nn.functional.gelu(m.inner[0](m.inner[1](m.inner[0](x))))
        return m.inner[3](m.inner[2](h))

    return Function.of(inner, forward)


IGNORED = torch.tensor([[0, -100, 2], [1, 1, -100], [-100, -100, -100], [2, 0, 1], [0, 0, 0]])
CASES = {
    "cross-entropy": (objectives.CrossEntropy(), IGNORED),
    "least squares": (objectives.LeastSquares(), torch.ones(N, T, C, dtype=torch.float64)),
    "binary cross-entropy": (objectives.BinaryCrossEntropy(), torch.full((N, T, C), 0.3, dtype=torch.float64)),
}


def dense(model: nn.Module, x: Tensor, targets: Tensor, objective: objectives.Objective) -> tuple[Tensor, Tensor]:
    """F = Σ_n J_znᵀ (∇²_z l_n) J_zn and ∇L, by autograd and sample by sample."""
    parameters = list(trainable(model).values())
    size = sum(p.numel() for p in parameters)
    fisher, gradient = torch.zeros(size, size), torch.zeros(size)

    def row(output: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(output, parameters, retain_graph=True)])

    for n in range(len(x)):
        z = model(x[n : n + 1])
        rows = torch.stack([row(each) for each in z.flatten()])
        hessian = torch.autograd.functional.hessian(
            lambda flat, n=n, z=z: objective.losses(flat.view_as(z), targets[n : n + 1]).sum(), z.detach().flatten()
        )
        fisher += rows.T @ hessian @ rows
        gradient += row(objective.losses(z, targets[n : n + 1]).sum())
    return fisher, gradient


@pytest.mark.parametrize(("objective", "targets"), CASES.values(), ids=CASES)
def test_gamma_is_what_it_is_defined_as(objective, targets):
    model, x = tied(), torch.randn(N, T, D)
    fisher, gradient = dense(model, x, targets, objective)
    directions = [random_direction(trainable(model)) for _ in range(9)]  # of groups of four, the last is not full
    truth = torch.stack([(v @ fisher @ v).sqrt() / (v @ gradient).abs() for v in map(flatten, directions)])
    lin = linearize(model, x, targets, objective)
    assert relative_error(torch.stack([gamma(lin, d) for d in directions]), truth) < 1e-10
    assert relative_error(gammas(lin, directions), truth) < 1e-10
    for _ in range(2):  # the first batch is verified
        assert relative_error(measure_gammas(model, x, targets, objective, directions), truth) < 1e-10


def test_directions_of_an_iterator_are_few_at_a_time():
    model, x, targets = tied(), torch.randn(N, T, D), IGNORED
    lin = linearize(model, x, targets, objectives.CrossEntropy())
    passes, alive = [], []
    push = lin.jvps
    lin.jvps = lambda group: passes.append(len(group)) or push(group)

    def each() -> Iterator[dict[str, Tensor]]:
        for _ in range(6):
            alive.append(sum(passes))
            yield random_direction(lin.parameters)

    assert gammas(lin, each()).shape == (6,)
    assert passes == [4, 2] and alive == [0, 0, 0, 0, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1e-40, 1e-30, 1e-12, 1e12, 1e30])
def test_the_length_of_a_direction_does_not_matter(dtype, length):
    model, x = tied().to(dtype), torch.randn(N, T, D, dtype=dtype)
    lin = linearize(model, x, IGNORED, objectives.CrossEntropy())
    d = random_direction(lin.parameters)
    scaled = {name: (entry.double() * length).to(dtype) for name, entry in d.items()}
    tolerance = 1e-3 if dtype == torch.float32 and length < 1e-38 else 1e-5  # as a float32 can hold them
    expected = gamma(lin, d)
    assert relative_error(gammas(lin, [d, scaled])[1], expected) < tolerance
    given = model, x, IGNORED, objectives.CrossEntropy()
    assert relative_error(measure_gammas(*given, [scaled, d]), torch.stack([expected, expected])) < tolerance


def test_directions_without_an_effect():
    model, x = tied(), torch.randn(N, T, D)
    zero = {name: torch.zeros_like(p) for name, p in trainable(model).items()}
    undefined = {name: torch.full_like(p, math.nan) for name, p in zero.items()}
    found = measure_gammas(model, x, IGNORED, objectives.CrossEntropy(), [zero, undefined])
    assert found[0] == math.inf and found[1].isnan()
    assert measure_gammas(model, x, IGNORED, objectives.CrossEntropy(), []).shape == (0,)


def test_what_does_not_fit_is_refused():
    model, x = tied(), torch.randn(N, T, D)
    d = random_direction(trainable(model))
    given = model, x, IGNORED, objectives.CrossEntropy()
    with pytest.raises(ValueError, match=r"only in the second: \['inner.0.bias'\]"):
        measure_gammas(*given, [{name: entry for name, entry in d.items() if name != "inner.0.bias"}])
    with pytest.raises(ValueError, match="Empty batch"):
        measure_gammas(model, x[:0], IGNORED[:0], objectives.CrossEntropy(), [d])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"CrossEntropy needs logits \[N, ..., C\]"):
            measure_gammas(model, x, IGNORED[:, 0], objectives.CrossEntropy(), [d])
        measure_gammas(*given, [d])
    with pytest.raises(ValueError, match="no trainable parameter"):
        measure_gammas(model.requires_grad_(False), x, IGNORED, objectives.CrossEntropy(), [{}])
