"""How far a step goes: a bound on its norm, and a search along it."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ief import EF, IEF, NaturalGradient, SampledFisher, directions, linearize, objectives
from lightning_ief.distributed import across
from lightning_ief.linalg.vectors import norm
from lightning_ief.optim import DirectionOptimizer
from tests.helpers import flatten, relative_error
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVE = objectives.CrossEntropy()
X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3))


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def losses(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    with torch.no_grad():
        return OBJECTIVE.losses(model(x), y)


def moved(optimizer: DirectionOptimizer, model: nn.Module) -> Tensor:
    before = weights(model)
    optimizer.step(linearization=linearize(model, X, Y, OBJECTIVE))
    return weights(model) - before


# --- max_norm


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "momentum_type": "heavy-ball"}], ids=str)
@pytest.mark.parametrize("lr", [0.5, (0.5, 0.2)], ids=str)
def test_longer_steps_are_scaled(lr: Any, options: dict[str, Any]) -> None:
    def groups(model: nn.Module) -> Any:
        if isinstance(lr, float):
            return model.parameters()
        return [{"params": model[0].parameters(), "lr": lr[0]}, {"params": model[3].parameters(), "lr": lr[1]}]

    options = {"relative_damping": 0.1, "lr": lr if isinstance(lr, float) else 1.0, **options}
    model, free = network(), network()
    step = moved(IEF(groups(free), **options), free)
    size = float(step.norm())
    bounded = moved(IEF(groups(model), max_norm=0.3 * size, **options), model)
    assert relative_error(bounded, 0.3 * step) < 1e-10
    model = network()
    assert relative_error(moved(IEF(groups(model), max_norm=1.1 * size, **options), model), step) < 1e-12


def test_weight_decay_is_beside_it() -> None:
    model, free = network(), network()
    before = weights(model)
    step = moved(IEF(free.parameters(), damping=1e-2), free)
    found = moved(IEF(model.parameters(), damping=1e-2, weight_decay=0.1, max_norm=0.5 * float(step.norm())), model)
    assert relative_error(found, 0.5 * step - 0.1 * before) < 1e-10


def test_normalised_directions_with_momentum() -> None:
    model = network()
    optimizer = IEF(model.parameters(), lr=0.25, relative_damping=0.1, normalize=True, momentum=0.9)
    for _ in range(3):
        assert abs(float(moved(optimizer, model).norm()) - 0.25) < 1e-10


# --- line_search


@pytest.mark.parametrize(
    "make",
    [
        lambda p, **o: IEF(p, damping=1e-2, **o),
        lambda p, **o: EF(p, damping=1e-2, **o),
        lambda p, **o: NaturalGradient(p, damping=1.0, **o),
        lambda p, **o: SampledFisher(p, damping=1.0, **o),
        lambda p, **o: IEF(p, relative_damping=0.1, momentum=0.5, weight_decay=0.05, **o),
    ],
    ids=["ief", "ef", "natural gradient", "sampled", "momentum and decay"],
)
def test_the_best_of_all_lengths(make: Callable[..., DirectionOptimizer]) -> None:
    lr, k = 8.0, 7
    found = []
    for j in range(k + 1):
        model = network()
        moved(make(model.parameters(), lr=lr * 2.0**-j), model)
        found.append((float(losses(model).sum()), weights(model)))
    best, truth = min(found, key=lambda each: each[0])
    assert found[0][0] != best
    assert found[-1][0] != best
    model = network()
    moved(make(model.parameters(), lr=lr, line_search=k), model)
    assert relative_error(weights(model), truth) < 1e-12


def test_none_lowers_the_loss() -> None:
    model = network()
    before = weights(model)

    class Uphill(DirectionOptimizer):
        def direction(self, linearization: Any) -> Any:
            d = directions.sgd(linearization).form()
            return {name: -x for name, x in d.items()}

    optimizer = Uphill(model.parameters(), lr=0.1, line_search=3)
    with pytest.warns(RuntimeWarning, match=r"no learning rate of lr · 2⁻ʲ, j = 0 … 3, lowers the loss"):
        assert float(moved(optimizer, model).norm()) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved(optimizer, model)
    assert torch.equal(weights(model), before)
    assert "lowers the loss" in (optimizer.skipped or "")


def test_lengths_at_which_the_loss_is_not_finite() -> None:
    class Bounded(objectives.CrossEntropy):
        def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
            found = super().losses(logits, targets)
            return torch.where(logits.detach().abs().amax(1) > 2, torch.nan, found)

    model = network()
    optimizer = IEF(model.parameters(), lr=64.0, damping=1e-2, line_search=12)
    before = float(losses(model).sum())
    optimizer.step(linearization=linearize(model, X, Y, Bounded()))
    assert float(losses(model).sum()) < before
    assert float(model(X).detach().abs().max()) <= 2


def test_random_numbers_are_those_of_the_batch() -> None:
    model, lr, k = network(0.5), 4.0, 5

    def trial(j: int) -> tuple[float, Tensor]:
        other = network(0.5)
        optimizer = IEF(other.parameters(), lr=lr * 2.0**-j, damping=1e-2)
        torch.manual_seed(5)
        lin = linearize(other, X, Y, OBJECTIVE)
        optimizer.step(linearization=lin)
        torch.manual_seed(5)
        return float(losses(other).sum()), weights(other)

    best = min((trial(j) for j in range(k + 1)), key=lambda each: each[0])[1]
    optimizer = IEF(model.parameters(), lr=lr, damping=1e-2, line_search=k)
    torch.manual_seed(5)
    lin = linearize(model, X, Y, OBJECTIVE)
    state = torch.get_rng_state()
    optimizer.step(linearization=lin)
    assert relative_error(weights(model), best) < 1e-12
    assert torch.equal(torch.get_rng_state(), state)


def test_all_samples_decide() -> None:
    """With micro-batches, on ranks and in groups of ranks."""
    options: dict[str, Any] = {"lr": 8.0, "damping": 1e-2, "line_search": 6}
    alone = network()
    moved(IEF(alone.parameters(), **options), alone)
    model = network()
    optimizer = IEF(model.parameters(), accumulate=2, **options)
    for part in (slice(0, 3), slice(3, 8)):
        optimizer.step(linearization=linearize(model, X[part], Y[part], OBJECTIVE))
    assert relative_error(weights(model), weights(alone)) < 1e-10

    def work(rank: int) -> tuple[Tensor, Tensor]:
        found = []
        for sync in ("global", "local"):
            model = network()
            part = slice(0, 3) if rank == 0 else slice(3, 8)
            lin = across(linearize(model, X[part], Y[part], OBJECTIVE), sync)
            IEF(model.parameters(), sync=sync, **options).step(linearization=lin)
            found.append(weights(model))
        return found[0], found[1]

    (first, local), (second, other) = on_ranks(2, work)
    assert relative_error(first, weights(alone)) < 1e-10
    assert torch.equal(first, second)
    assert torch.equal(local, other)
    model = network()
    nn.utils.vector_to_parameters(local, model.parameters())
    assert float(losses(model).sum()) < float(losses(network()).sum())


def test_max_norm_and_search_together() -> None:
    model = network()
    d = directions.ief(linearize(model, X, Y, OBJECTIVE), 1e-2).form()
    step = moved(IEF(model.parameters(), lr=8.0, damping=1e-2, max_norm=1.0, line_search=6), model)
    along = flatten(d) / float(norm(d))
    length = float(step.norm())
    assert relative_error(step, -length * along) < 1e-10
    assert min(abs(length - 2.0**-j) for j in range(7)) < 1e-10


def test_refused() -> None:
    parameters = [*network().parameters()]
    with pytest.raises(ValueError, match=r"IEF\(max_norm=0.0\): must be a finite number > 0, or None"):
        IEF(parameters, max_norm=0.0)
    with pytest.raises(ValueError, match=r"IEF\(line_search=-1\): must be at least 0, or None"):
        IEF(parameters, line_search=-1)


# --- what is told


@pytest.mark.parametrize("kind", [EF, IEF, NaturalGradient, SampledFisher])
def test_an_lr_that_suits_others_is_told(kind: type[DirectionOptimizer]) -> None:
    with pytest.warns(RuntimeWarning, match=rf"{kind.__name__}\(lr=2e-05\).*lr = 1 is the natural scale"):
        kind(network().parameters(), lr=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(network().parameters(), lr=2e-5, normalize=True)
        kind(network().parameters(), lr=0.0)
        model = network()
        kind([{"params": model[0].parameters(), "lr": 1.0}, {"params": model[3].parameters(), "lr": 1e-4}])
        kind(network().parameters(), lr=1e-2)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_beyond_the_weights_is_told_once(momentum: float) -> None:
    """The first step is 15 times as long as the weights, or 5 times: at the start they are small."""

    def take(share: float, steps: int) -> list[str]:
        free, model = network(), network()
        options = {"relative_damping": 0.1, "momentum": momentum}
        size = float(moved(IEF(free.parameters(), lr=1.0, **options), free).norm())
        optimizer = IEF(model.parameters(), lr=share * float(weights(model).norm()) / size, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(steps):
                moved(optimizer, model)
        return [str(w.message) for w in caught]

    (told,) = take(15.0, 12)
    expected = float(weights(network()).norm())
    assert f"of length {15 * expected:.3g}, where the weights it moves have norm {expected:.3g}" in told
    assert take(5.0, 1) == []
