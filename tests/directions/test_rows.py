"""Gauss-Newton over all logits, and directions by layers, against the dense formulas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ief import EF, IEF, GaussNewton, NaturalGradient, SampledFisher, directions, linearize, objectives
from lightning_ief.capture import Linearization, LinearizedBatch
from lightning_ief.directions.layers import layers_of
from lightning_ief.distributed import across
from tests.helpers import relative_error, weights
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))


def batch_of(samples: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(samples, 4), torch.arange(samples) % 3


def logit_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """J_z, [N, C, P]."""
    rows = []
    for sample in x:
        z = model(sample[None])[0]
        for logit in z.flatten():
            rows.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(logit, [*model.parameters()], retain_graph=True)])
            )
    return torch.stack(rows).view(len(x), -1, rows[0].numel())


def logit_gradients(objective: Any, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = model(x).detach().requires_grad_()
    return torch.autograd.grad(objective.losses(z, y).sum(), z)[0].flatten(1)


def flat(d: Any, model: nn.Module) -> Tensor:
    return torch.cat([d[name].flatten() for name, _ in model.named_parameters()])


@pytest.mark.parametrize("samples", [6, 40])
def test_gauss_newton_is_the_dense_formula(samples: int) -> None:
    model, objective, lam = mlp(), objectives.CrossEntropy(), 0.3
    x, y = batch_of(samples)
    J, g = logit_jacobian(model, x).flatten(0, 1), logit_gradients(objective, model, x, y).flatten()
    lin = linearize(model, x, y, objective)
    expected = torch.linalg.solve(J.T @ J + lam * torch.eye(J.shape[1]), J.T @ g)
    assert relative_error(flat(directions.gauss_newton(lin, lam), model), expected) < 1e-9
    mean = J.square().sum(1).mean()
    expected = torch.linalg.solve(J.T @ J + lam * mean * torch.eye(J.shape[1]), J.T @ g)
    assert relative_error(flat(directions.gauss_newton(lin, relative_damping=lam), model), expected) < 1e-9


def test_logits_move_as_gradient_descent_would_and_samples_as_in_ief() -> None:
    model, objective = mlp(), objectives.CrossEntropy()
    x, y = batch_of(4)
    lin = linearize(model, x, y, objective)
    d = directions.gauss_newton(lin, 0.0)
    assert relative_error(logit_jacobian(model, x) @ flat(d, model), logit_gradients(objective, model, x, y)) < 1e-6
    assert relative_error(lin.jacobian.matvec(d), lin.logit_gradient_norms) < 1e-6


def test_for_least_squares_it_is_the_natural_gradient() -> None:
    model, (x, _) = mlp(), batch_of()
    lin = linearize(model, x, torch.randn(6, 3), objectives.LeastSquares())
    for options in ({"damping": 0.2}, {"relative_damping": 0.2}):
        one, other = directions.gauss_newton(lin, **options), directions.natural_gradient(lin, **options)
        assert relative_error(flat(one, model), flat(other, model)) < 1e-10


def test_positions_that_count_for_nothing_ask_for_nothing() -> None:
    """As if they were not there."""
    objective, lam = objectives.CrossEntropy(), 0.1
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(5, 2, 4), torch.randint(3, (5, 2))
    y[1, 0] = y[3, 1] = -100
    d = directions.gauss_newton(linearize(model, x, y, objective), lam)
    kept = y.flatten() != -100
    alone = directions.gauss_newton(linearize(model, x.flatten(0, 1)[kept], y.flatten()[kept], objective), lam)
    assert relative_error(flat(d, model), flat(alone, model)) < 1e-10


CASES: dict[str, tuple[Callable[..., Any], Callable[[Linearization], tuple[Tensor, Tensor]]]] = {
    "ef": (directions.layerwise_ef, lambda lin: (lin.jacobian.to_dense(), torch.ones(lin.num_samples))),
    "ief": (directions.layerwise_ief, lambda lin: (lin.jacobian.to_dense(), lin.logit_gradient_norms)),
}


def by_layers(model: nn.Module, A: Tensor, b: Tensor, damping: Callable[[Tensor], Tensor | float]) -> Tensor:
    """A_lᵀ(A_l A_lᵀ + λ_l I)⁻¹ b of each layer."""
    found, at = [], 0
    for layer in layers_of(dict(model.named_parameters())):
        size = sum(model.get_parameter(name).numel() for name in layer)
        own = A[:, at : at + size]
        K = own @ own.T
        found.append(own.T @ torch.linalg.solve(K + damping(K) * torch.eye(len(K)), b))
        at += size
    return torch.cat(found)


@pytest.mark.parametrize("samples", [6, 40])
@pytest.mark.parametrize("name", CASES)
def test_layers_are_solved_for_apart(name: str, samples: int) -> None:
    model, (x, y) = mlp(), batch_of(samples)
    lin = linearize(model, x, y, objectives.CrossEntropy())
    function, dense = CASES[name]
    A, b = dense(lin)
    found = function(lin, 0.1)
    assert [*found] == [*lin.parameters]
    assert relative_error(flat(found, model), by_layers(model, A, b, lambda K: 0.1)) < 1e-8
    if name == "ief":  # in each layer's own block of F̃
        s = lin.logit_gradient_norms
        A, b = A / s.sqrt()[:, None], s.sqrt()
        found = directions.layerwise_ief(lin, absolute_damping=0.1)
        assert relative_error(flat(found, model), by_layers(model, A, b, lambda K: 0.1)) < 1e-8
    found = function(lin, relative_damping=0.3)
    assert relative_error(flat(found, model), by_layers(model, A, b, lambda K: 0.3 * K.diagonal().mean())) < 1e-8


def test_gauss_newton_by_layers() -> None:
    model, objective, (x, y) = mlp(), objectives.CrossEntropy(), batch_of()
    J = logit_jacobian(model, x).transpose(0, 1).flatten(0, 1)
    g = logit_gradients(objective, model, x, y).T.flatten()
    found = directions.layerwise_gauss_newton(linearize(model, x, y, objective), 0.1)
    assert relative_error(flat(found, model), by_layers(model, J, g, lambda K: 0.1)) < 1e-9


def test_undamped_layers_reach_b_each() -> None:
    model, (x, y) = mlp(), batch_of(4)
    lin = linearize(model, x, y, objectives.CrossEntropy())
    d = directions.layerwise_ef(lin, 0.0)
    assert relative_error(lin.jacobian.matvec(d), 3 * torch.ones(4)) < 1e-6


MAKERS: dict[str, Callable[..., Any]] = {
    "gauss_newton": lambda p, **o: GaussNewton(p, lr=0.1, damping=0.2, **o),
    "ief": lambda p, **o: IEF(
        p, lr=0.1, relative_damping=0.2, layerwise=True, momentum=0.5, momentum_type="heavy-ball", **o
    ),
    "ef": lambda p, **o: EF(p, lr=0.1, damping=0.2, layerwise=True, max_norm=0.5, **o),
    "natural": lambda p, **o: NaturalGradient(p, lr=0.1, damping=0.2, layerwise=True, **o),
    "spring": lambda p, **o: GaussNewton(p, lr=0.1, damping=0.2, momentum=0.5, **o),
}  # fmt: skip


def trained(name: str, steps: int = 3, parts: int = 1) -> Tensor:
    model, objective = mlp(), objectives.CrossEntropy()
    optimizer = MAKERS[name](model.parameters(), accumulate=parts)
    x, y = batch_of(6)
    for _ in range(steps):
        for part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            optimizer.step(linearization=linearize(model, *part, objective))
    return weights(model)


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_and_micro_batches(name: str) -> None:
    model, (x, y) = mlp(), batch_of(6)
    lin = linearize(model, x, y, objectives.CrossEntropy())
    d = {
        "gauss_newton": lambda: directions.gauss_newton(lin, 0.2),
        "spring": lambda: directions.gauss_newton(lin, 0.2),
        "ief": lambda: directions.layerwise_ief(lin, relative_damping=0.2),
        "ef": lambda: directions.layerwise_ef(lin, 0.2),
    }
    if name in d:
        step = weights(model) - trained(name, 1)
        expected = 0.1 * flat(d[name](), model)
        expected = expected * min(1.0, 0.5 / float(expected.norm())) if name == "ef" else expected
        assert relative_error(step, expected) < 1e-9
    assert relative_error(trained(name, parts=2), trained(name)) < 1e-9


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("split", [4, 0])
def test_ranks_make_the_step_of_one(name: str, split: int) -> None:
    def work(rank: int) -> Tensor:
        model, objective = mlp(), objectives.CrossEntropy()
        optimizer = MAKERS[name](model.parameters())
        part = (slice(0, split), slice(split, 6))[rank]
        x, y = (each[part] for each in batch_of(6))
        for _ in range(3):
            own = (
                linearize(model, x, y, objective)
                if len(y)
                else LinearizedBatch([], dict(model.named_parameters()), objective)
            )
            optimizer.step(linearization=across(own))
        return weights(model)

    first, second = on_ranks(2, work)
    assert torch.equal(first, second)
    assert relative_error(first, trained(name)) < 1e-9


def test_refused() -> None:
    parameters = [*mlp().parameters()]
    for make in (
        lambda: IEF(parameters, layerwise=True, metric="kronecker"),
        lambda: IEF(parameters, layerwise=True, relative_damping=1.0, momentum=0.5),
        lambda: SampledFisher(parameters, layerwise=True),
    ):
        with pytest.raises(ValueError, match="layerwise=True"):
            make()
    with pytest.raises(ValueError, match="gauss_newton takes one of damping, relative_damping"):
        directions.gauss_newton(linearize(mlp(), *batch_of(), objectives.CrossEntropy()))
