"""Momentum: SPRING and the mean of past directions, against recursions written out densely."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ief import EF, IEF, NaturalGradient, SampledFisher, directions, linearize, objectives
from lightning_ief.capture import LinearizedBatch
from lightning_ief.distributed import across
from lightning_ief.optim import DirectionOptimizer
from tests.helpers import flatten, per_sample_jacobian, relative_error
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVE = objectives.CrossEntropy()
STEPS = 10


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(STEPS)]


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def stepped(optimizer: DirectionOptimizer, model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> Tensor:
    for x, y in given:
        optimizer.step(linearization=linearize(model, x, y, OBJECTIVE))
    return weights(model)


def ief_primal(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """F̃, ∇L and the mean diagonal of S^-½ K S^-½, from autograd."""
    J = per_sample_jacobian(model, x, y, OBJECTIVE)
    z = model(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(OBJECTIVE.losses(z, y).sum(), z)
    rows = J / gradient.norm(dim=1)[:, None]
    return rows.T @ rows, J.sum(0), float(rows.square().sum(1).mean())


def ef_primal(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    J = per_sample_jacobian(model, x, y, OBJECTIVE)
    return J.T @ J, J.sum(0), float(J.square().sum(1).mean())


KINDS: dict[str, tuple[Callable[..., DirectionOptimizer], Any]] = {"ief": (IEF, ief_primal), "ef": (EF, ef_primal)}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", KINDS)
def test_spring_is_the_primal_recursion(name: str, weight_decay: float) -> None:
    """φ ← (F + λI)⁻¹(∇L + λμφ), θ ← (1 − η · weight decay) θ − ηφ."""
    make, primal = KINDS[name]
    model, reference, lr, rho, mu = network(), network(), 0.2, 0.4, 0.9
    optimizer = make(model.parameters(), lr=lr, relative_damping=rho, momentum=mu, weight_decay=weight_decay)
    theta, phi = weights(reference), torch.zeros(43)
    for x, y in batches():
        nn.utils.vector_to_parameters(theta, reference.parameters())
        F, g, mean = primal(reference, x, y)
        phi = torch.linalg.solve(F + rho * mean * torch.eye(43), g + rho * mean * mu * phi)
        theta = (1 - lr * weight_decay) * theta - lr * phi
        assert relative_error(stepped(optimizer, model, [(x, y)]), theta) < 1e-10


def test_spring_with_the_papers_damping() -> None:
    """φ ← μφ + Jᵀ(K + λI)⁻¹(s − μJφ)."""
    model, reference, lam, mu = network(), network(), 1e-2, 0.8
    optimizer = IEF(model.parameters(), lr=0.1, damping=lam, momentum=mu)
    phi = torch.zeros(43)
    for x, y in batches():
        J = per_sample_jacobian(reference, x, y, OBJECTIVE)
        s = linearize(reference, x, y, OBJECTIVE).logit_gradient_norms
        phi = mu * phi + J.T @ torch.linalg.solve(J @ J.T + lam * torch.eye(8), s - mu * (J @ phi))
        nn.utils.vector_to_parameters(weights(reference) - 0.1 * phi, reference.parameters())
        assert relative_error(stepped(optimizer, model, [(x, y)]), weights(reference)) < 1e-10


def test_spring_of_the_natural_gradient() -> None:
    model, reference, lam, mu = network(), network(), 1e-1, 0.8
    optimizer = NaturalGradient(model.parameters(), lr=0.1, damping=lam, momentum=mu)
    phi = torch.zeros(43)
    for x, y in batches():
        lin = linearize(reference, x, y, OBJECTIVE)
        A, g = lin.hessian_rows()[0].to_dense(), lin.jacobian.to_dense().sum(0)
        phi = torch.linalg.solve(A.T @ A + lam * torch.eye(43), g + lam * mu * phi)
        nn.utils.vector_to_parameters(weights(reference) - 0.1 * phi, reference.parameters())
        assert relative_error(stepped(optimizer, model, [(x, y)]), weights(reference)) < 1e-10


@pytest.mark.parametrize("make", [EF, IEF, SampledFisher, NaturalGradient])
def test_heavy_ball_is_the_mean_of_directions(make: Callable[..., DirectionOptimizer]) -> None:
    """Bias-corrected: Σ_t μ^(T−t) d_t / Σ_t μ^(T−t)."""
    model, plain, mu, lr = network(), network(), 0.7, 0.05
    options = {"lr": lr, "relative_damping": 1.0, "momentum_type": "heavy-ball"}
    optimizer, alone = make(model.parameters(), momentum=mu, **options), make(plain.parameters(), **options)
    seen: list[Tensor] = []
    for x, y in batches()[:5]:
        nn.utils.vector_to_parameters(weights(model), plain.parameters())
        before = weights(plain)
        seen.append((before - stepped(alone, plain, [(x, y)])) / lr)
        share = torch.tensor([mu**t for t in range(len(seen))]).flip(0)
        mean = (share[:, None] * torch.stack(seen)).sum(0) / share.sum()
        assert relative_error(stepped(optimizer, model, [(x, y)]), before - lr * mean) < 1e-10


def test_micro_batches() -> None:
    model, whole = network(), network()
    options: dict[str, Any] = {"lr": 0.2, "relative_damping": 0.4, "momentum": 0.9}
    optimizer, other = IEF(model.parameters(), accumulate=3, **options), IEF(whole.parameters(), **options)
    for x, y in batches():
        for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
            optimizer.step(linearization=linearize(model, x[part], y[part], OBJECTIVE))
        assert relative_error(weights(model), stepped(other, whole, [(x, y)])) < 1e-10


@pytest.mark.parametrize("momentum_type", ["spring", "heavy-ball"])
def test_ranks(momentum_type: str) -> None:
    options: dict[str, Any] = {"lr": 0.2, "relative_damping": 0.4, "momentum": 0.9, "momentum_type": momentum_type}
    alone = network()
    truth = stepped(IEF(alone.parameters(), **options), alone, batches())

    def work(rank: int) -> Tensor:
        model = network()
        optimizer = IEF(model.parameters(), **options)
        for x, y in batches():
            own = slice(0, 5) if rank == 0 else slice(5, 8)
            optimizer.step(linearization=across(linearize(model, x[own], y[own], OBJECTIVE)))
        return weights(model)

    for found in on_ranks(2, work):
        assert relative_error(found, truth) < 1e-10


@pytest.mark.parametrize("momentum_type", ["spring", "heavy-ball"])
def test_resumed_bit_for_bit(momentum_type: str) -> None:
    options: dict[str, Any] = {"lr": 0.2, "relative_damping": 0.4, "momentum": 0.9, "momentum_type": momentum_type}
    model = network()
    optimizer = IEF(model.parameters(), **options)
    stepped(optimizer, model, batches()[:4])
    other = copy.deepcopy(model)
    resumed = IEF(other.parameters(), **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(stepped(resumed, other, batches()[4:]), stepped(optimizer, model, batches()[4:]))


def test_resumed_with_other_options() -> None:
    """What the new optimizer was made with holds where it differs; else where a schedule has taken it."""
    model = network()
    optimizer = IEF(model.parameters(), relative_damping=0.4, momentum=0.9, lr=0.2)
    optimizer.param_groups[0]["relative_damping"] = 0.1  # by a schedule
    stepped(optimizer, model, batches()[:2])
    resumed = IEF(model.parameters(), relative_damping=0.4, momentum=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    found = resumed.param_groups[0]
    assert (found["relative_damping"], found["momentum"], found["lr"]) == (0.1, 0.5, 0.2)
    another = IEF(model.parameters(), absolute_damping=1e-3)
    another.load_state_dict(optimizer.state_dict())
    found = another.param_groups[0]
    assert (found["damping"], found["relative_damping"], found["absolute_damping"]) == (None, None, 1e-3)


def test_a_state_of_an_older_version() -> None:
    model = network()
    optimizer = IEF(model.parameters(), damping=1e-2)
    old = optimizer.state_dict()
    del old["made_with"]
    for group in old["param_groups"]:
        for option in ("relative_damping", "absolute_damping", "momentum", "momentum_type", "max_norm", "line_search"):
            del group[option]
    optimizer.load_state_dict(old)
    stepped(optimizer, model, batches()[:1])


def test_a_skipped_step_leaves_momentum_alone() -> None:
    model = network()
    optimizer = IEF(model.parameters(), relative_damping=0.4, momentum=0.9)
    (x, y), *_ = batches()
    stepped(optimizer, model, [(x, y)])
    before, buffers = weights(model), [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    x = x.clone()
    x[2] = torch.nan
    with pytest.warns(RuntimeWarning, match=r"samples \[2\] of the batch"):
        stepped(optimizer, model, [(x, y)])
    assert torch.equal(weights(model), before)
    assert all(torch.equal(s["momentum_buffer"], b) for s, b in zip(optimizer.state.values(), buffers, strict=True))


def test_momentum_of_a_part_of_the_model() -> None:
    """As if the others were frozen; two parameter groups with a learning rate each."""
    model, frozen = network(), network()
    frozen[0].requires_grad_(False)
    options: dict[str, Any] = {"relative_damping": 0.4, "momentum": 0.9}
    groups = lambda m: [{"params": [m[2].weight], "lr": 0.1}, {"params": [m[2].bias], "lr": 0.3}]  # noqa: E731
    optimizer, other = IEF(groups(model), **options), IEF(groups(frozen), **options)
    for x, y in batches()[:4]:
        assert relative_error(stepped(optimizer, model, [(x, y)]), stepped(other, frozen, [(x, y)])) < 1e-12


def test_refused() -> None:
    parameters = [*network().parameters()]
    with pytest.raises(ValueError, match=r"IEF\(momentum=1.0\): must be at least 0 and less than 1"):
        IEF(parameters, momentum=1.0)
    with pytest.raises(ValueError, match=r"momentum_type='nesterov'\): must be 'spring' or 'heavy-ball'"):
        IEF(parameters, momentum_type="nesterov")
    with pytest.raises(ValueError, match=r"pulls towards the step before; with 0 it does not"):
        IEF(parameters, damping=0.0, momentum=0.9)
    with pytest.raises(
        ValueError, match=r"SampledFisher\(momentum=0.9\): SPRING needs.*Take momentum_type='heavy-ball'"
    ):
        SampledFisher(parameters, momentum=0.9, momentum_type="spring")
    with pytest.raises(ValueError, match=r"IEF takes one of .*got damping=1.0, relative_damping=0.5"):
        IEF(parameters, damping=1.0, relative_damping=0.5)
    model = network()
    (x, y), *_ = batches()
    with pytest.raises(ValueError, match=r"raise max_rows to at least 24, or do without"):
        stepped(NaturalGradient(model.parameters(), damping=1.0, momentum=0.5, max_rows=3), model, [(x, y)])


def test_no_memory_without_momentum() -> None:
    model = network()
    optimizer = IEF(model.parameters(), relative_damping=0.4)
    stepped(optimizer, model, batches()[:2])
    assert not optimizer.state


def test_directions_know_of_no_momentum() -> None:
    """The first step is the direction itself."""
    model = network()
    (x, y), *_ = batches()
    d = flatten(directions.ief(linearize(model, x, y, OBJECTIVE), relative_damping=0.4))
    before = weights(model)
    optimizer = IEF(model.parameters(), lr=0.5, relative_damping=0.4, momentum=0.9)
    assert relative_error((before - stepped(optimizer, model, [(x, y)])) / 0.5, d) < 1e-12


def test_a_parameter_that_joins_later() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = IEF(model.parameters(), relative_damping=0.4, momentum=0.9)
    given = batches()
    stepped(optimizer, model, given[:2])
    model[0].requires_grad_(True)
    before = weights(model)
    assert not torch.equal(stepped(optimizer, model, given[2:3])[:25], before[:25])
    assert isinstance(linearize(model, *given[3], OBJECTIVE), LinearizedBatch)
