"""Small calls of one kind become rows together, whoever their parameters are: as exact as one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ief import linearize, objectives
from lightning_ief.capture import backward
from lightning_ief.capture.types import CaptureError
from tests.helpers import Function, assert_exact, assert_jacobian, per_sample_jacobian, relative_error

N, T, D = 5, 3, 4
SQUARES = objectives.LeastSquares()

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Notes which functions were called how often where their calls became rows together."""
    found: list[tuple[str, int]] = []
    original = backward.stacked_factors

    def noted(uses: Any, *args: Any) -> Any:
        factors = original(uses, *args)
        if factors is not None:
            found.append((uses[0].call.func.__name__, len(uses)))
        return factors

    monkeypatch.setattr(backward, "stacked_factors", noted)
    return found


def repeated(count: int, make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(*(each for _ in range(count) for each in (make(), nn.Tanh())))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[str, int]]]] = {
    "linear": (lambda: repeated(4, lambda: nn.Linear(D, D)), (D,), [("linear", 4)]),
    "linear on sequences": (lambda: repeated(3, lambda: nn.Linear(D, D)), (T, D), [("linear", 3)]),
    "without bias": (lambda: repeated(3, lambda: nn.Linear(D, D, bias=False)), (D,), [("linear", 3)]),
    "layer norm": (lambda: repeated(3, lambda: nn.LayerNorm(D)), (T, D), [("layer_norm", 3)]),
    "group norm": (lambda: repeated(2, lambda: nn.GroupNorm(2, D)), (D, T), [("group_norm", 2)]),
    "convolution": (lambda: repeated(3, lambda: nn.Conv1d(D, D, 3, padding=1)), (D, T), [("conv1d", 3)]),
    "one layer, used three times": (lambda: nn.Sequential(*[nn.Linear(D, D)] * 3), (D,), [("linear", 3)]),
    "the same on sequences": (lambda: nn.Sequential(*[nn.Linear(D, D)] * 3), (T, D), [("linear", 3)]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_one_kind(name: str, together: list[tuple[str, int]]) -> None:
    make, shape, expected = MODELS[name]
    assert_exact(make(), torch.randn(N, *shape))
    assert expected[0] in together, together


def test_layers_of_one_kind_of_which_some_are_used_again(together: list[tuple[str, int]]) -> None:
    a, b, c = (nn.Linear(D, D) for _ in range(3))
    assert_exact(nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), a, nn.Tanh(), c), torch.randn(N, D))
    assert sorted(together[:2]) == [("linear", 2), ("linear", 2)]


def test_embeddings_products_and_sums(together: list[tuple[str, int]]) -> None:
    def body(m: nn.Module, i: Tensor, j: Tensor) -> Tensor:
        x, y = F.embedding(i, m.a), F.embedding(j, m.b, padding_idx=0)
        return torch.tanh(x * m.p + m.q) + torch.tanh(y * m.r + m.s)

    model = Function(body, a=(7, D), b=(7, D), p=(D,), q=(D,), r=(D,), s=(D,))
    assert_exact(model, (torch.randint(0, 7, (N, T)), torch.randint(0, 7, (N, T))))
    assert {("mul", 2), ("add", 2)} <= {*together}


def test_options_tell_calls_apart(together: list[tuple[str, int]]) -> None:
    def body(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.add(x, m.a, alpha=2.0) + torch.add(x, m.b, alpha=3.0)
        return F.linear(F.linear(y, m.v, m.a).tanh(), m.w, bias=m.b)

    assert_exact(Function(body, a=(D,), b=(D,), v=(D, D), w=(D, D)), torch.randn(N, D))
    assert not together


def test_lengths_that_differ_on_a_later_batch(together: list[tuple[str, int]]) -> None:
    model = Function.of(
        nn.ModuleList(nn.Linear(D, D) for _ in range(2)),
        lambda m, x, y: m.inner[0](x).tanh().mean(1) + m.inner[1](y).tanh().mean(1),
    )
    assert_exact(model, (torch.randn(N, T, D), torch.randn(N, T, D)))
    assert together.pop() == ("linear", 2)
    together.clear()
    assert_exact(model, (torch.randn(N, T, D), torch.randn(N, T + 2, D)))
    assert not together


def test_large_calls_are_on_their_own(together: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "_SMALL", N * D - 1)
    assert_exact(repeated(3, lambda: nn.Linear(D, D)), torch.randn(N, D))
    assert not together


def test_calls_whose_rule_serves_one_at_a_time_wait_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the last layer are there before those of the first one."""
    order: list[str] = []
    monkeypatch.setattr(backward, "factors_of", lambda use: order.append(use.call.sources[3]) or {})
    model = nn.Sequential(*(each for _ in range(3) for each in (nn.BatchNorm1d(D), nn.Tanh()))).eval()
    lin = linearize(model, torch.randn(N, D), torch.randn(N, D), SQUARES, verify=False)
    assert [call.kind for call in lin.recorder.plan.calls] == [None] * 3
    lin.backward()
    assert order == ["4.weight", "2.weight", "0.weight"]


def test_several_cotangents(together: list[tuple[str, int]]) -> None:
    model, x = nn.Sequential(*[nn.Linear(D, D)] * 2, nn.Tanh(), nn.Linear(D, D), nn.Tanh()), torch.randn(N, T, D)
    lin = linearize(model, x, torch.randn(N, T, D), SQUARES)
    cotangents = [torch.randn(N, T, D) for _ in range(3)]
    each = torch.cat([lin.pullback([c]).to_dense() for c in cotangents])
    together.clear()
    rows = lin.pullback(cotangents)
    assert together
    assert relative_error(rows.to_dense(), each) < 1e-12
    assert relative_error(rows.gram(), each @ each.T) < 1e-12


def test_an_argument_that_was_changed_in_place_is_refused(together: list[tuple[str, int]]) -> None:
    def body(m: nn.Module, x: Tensor) -> Tensor:
        y = x * 1.0
        z = m.inner[0](y).tanh()
        with torch.no_grad():
            y.add_(m.shift)
        return m.inner[1](z)

    model = Function.of(nn.ModuleList(nn.Linear(D, D) for _ in range(2)), body)
    model.shift = 0.0
    with pytest.raises(CaptureError, match="changed in place after the call"):
        linearize(model, torch.randn(N, D), torch.randn(N, D), SQUARES).backward()
    assert not together


@pytest.mark.parametrize("samples", [2, 30, 400])
def test_rows_beside_each_other_and_the_rest(samples: int) -> None:
    """Small parameters lie side by side, larger ones go by pairs, with their bias and without; some are not used."""
    wide = nn.Sequential(nn.Linear(D, 40), nn.Tanh(), nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 2, bias=False))
    model = Function.of(wide, lambda m, x: m.inner(x), unused=(3,))
    x, y = torch.randn(samples, D), torch.randn(samples, 2)
    truth = per_sample_jacobian(model, x, y, SQUARES)
    lin = linearize(model, x, y, SQUARES)
    assert_jacobian(lin, truth)
    rates = torch.rand(samples)
    d = torch.cat([e.flatten() for e in lin.jacobian.solve(rates, 1e-2).values()])
    gram = truth @ truth.T + 1e-2 * torch.eye(samples)
    assert relative_error(d, truth.T @ torch.linalg.solve(gram, rates)) < 1e-8


@pytest.mark.parametrize("damping", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_parameters_than_samples_are_solved_for_themselves(damping: float, dtype: torch.dtype) -> None:
    model = Function.of(
        nn.Linear(D, 2, dtype=dtype), lambda m, x: m.inner(x).tanh(), unused=torch.zeros(3, dtype=dtype)
    )
    x, y, rates = torch.randn(200, D, dtype=dtype), torch.randn(200, 2, dtype=dtype), torch.rand(200)
    lin = linearize(model, x, y, SQUARES)
    rows = lin.jacobian.to_dense().double()
    d = lin.jacobian.solve(rates, damping)
    assert torch.equal(d["unused"], torch.zeros(3, dtype=dtype))
    flat = torch.cat([entry.flatten().double() for entry in d.values()])
    stacked = torch.cat([rows, damping**0.5 * torch.eye(rows.shape[1])])
    target = torch.cat([rates, torch.zeros(rows.shape[1])])[:, None]
    truth = torch.linalg.lstsq(stacked, target, driver="gelsd").solution[:, 0]
    assert relative_error(flat, truth) < (1e-6 if dtype == torch.float32 else 1e-10)


class Joined(nn.Module):
    """Two layers whose outputs are added: their gradients are one tensor."""

    def __init__(self, biases: tuple[bool, bool], positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.a = nn.Linear(700, 300, bias=biases[0])
        self.b = nn.Linear(900 // positions, 300 // positions, bias=biases[1])

    def forward(self, x: Tensor) -> Tensor:
        b = self.b(x[:, 700:].unflatten(1, (self.positions, -1))).flatten(1)
        return torch.tanh(self.a(x[:, :700]) + b).sum(1, keepdim=True)


@pytest.mark.parametrize("biases", [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("positions", [1, 3])
def test_a_bias_counts_once_where_layers_have_one_gradient(biases: tuple[bool, bool], positions: int) -> None:
    model, x, y = Joined(biases, positions), torch.randn(6, 1600) / 30, torch.randn(6, 1)
    lin = linearize(model, x, y, SQUARES)
    truth = per_sample_jacobian(model, x, y, SQUARES)
    assert relative_error(lin.jacobian.gram(), truth @ truth.T) < 1e-12
    assert relative_error(lin.jacobian.gram(precise=True), truth @ truth.T) < 1e-12


CHANGES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], float, float]] = {
    "eps": (lambda m, x: F.layer_norm(F.layer_norm(x, (D,), m.p, m.q, m.c).tanh(), (D,), m.r, m.s, 0.5), 0.5, 2.0),
    "alpha": (lambda m, x: torch.add(x, m.p, alpha=m.c).tanh() + torch.add(x, m.q, alpha=0.5).tanh(), 0.5, 0.9),
    "padding": (lambda m, x: F.embedding(x, m.v, m.c) * 2.0 + F.embedding(x.flip(1), m.w, 1).tanh(), 1, 2),
}


@pytest.mark.parametrize("verify", [None, False])
@pytest.mark.parametrize("name", CHANGES)
def test_constants_that_differ_on_a_later_batch(name: str, verify: bool | None) -> None:
    body, first, later = CHANGES[name]
    shapes = {"v": (5, D), "w": (5, D)} if name == "padding" else dict.fromkeys("pqrs", (D,))
    model = Function(body, **shapes)
    x = torch.randint(0, 5, (N, T)) if name == "padding" else torch.randn(N, T, D)
    y = torch.randn(N, T, D)
    for model.c in (first, later):  # type: ignore[misc]
        lin = linearize(model, x, y, SQUARES, verify=verify)
        assert_jacobian(lin, per_sample_jacobian(model, x, y, SQUARES), 1e-7)


@pytest.mark.parametrize("damping", [1e-5, 1e-8])
@pytest.mark.parametrize("samples", [30, 130])
def test_dead_units_and_rounding(damping: float, samples: int) -> None:
    """Far fewer directions than samples, though more parameters, in float32."""
    model = nn.Sequential(nn.Linear(3, 60), nn.ReLU(), nn.Linear(60, 2)).float()
    with torch.no_grad():
        model[0].bias[3:] = -100.0
    x, y = torch.randn(samples, 3, dtype=torch.float32), torch.randint(0, 2, (samples,))
    ce = objectives.CrossEntropy()
    lin = linearize(model, x, y, ce)
    d = torch.cat([e.flatten().double() for e in lin.jacobian.solve(lin.logit_gradient_norms, damping).values()])
    exact = linearize(model.double(), x.double(), y, ce)
    truth = torch.cat([e.flatten() for e in exact.jacobian.solve(exact.logit_gradient_norms, damping).values()])
    assert relative_error(d, truth) < 1e-5


@pytest.mark.parametrize("damping", [1e-8, 1e-4])
def test_fitted_samples_span_what_others_do_not(damping: float) -> None:
    """In float32, with fewer parameters than samples: small rows have all their digits."""
    x = torch.randn(14, 5, dtype=torch.float32)
    x[4:] *= torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    x[:4, 3:] *= 1e-7
    y = torch.randn(14, 1, dtype=torch.float32)
    lin = linearize(nn.Linear(5, 1).float(), x, y, SQUARES)
    rows, rates = lin.jacobian.to_dense().double(), torch.rand(14)
    d = torch.cat([e.flatten().double() for e in lin.jacobian.solve(rates, damping).values()])
    stacked = torch.cat([rows, damping**0.5 * torch.eye(6)])
    truth = torch.linalg.lstsq(stacked, torch.cat([rates, torch.zeros(6)])[:, None], driver="gelsd").solution[:, 0]
    assert relative_error(d, truth) < 1e-5
