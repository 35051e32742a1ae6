"""Every rule against the default rule: the operation's own derivative, for each sample. A rule without a case fails."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ief import linearize, objectives
from lightning_ief.capture import Jacobian, rules
from lightning_ief.capture.factors import Dense, Outer, PerOperation
from tests.helpers import Function, relative_error

pytestmark = pytest.mark.usefixtures("float64")
N, T, D, K = 4, 3, 5, 2
Case = tuple[Callable[..., Tensor], tuple[int, ...], dict[str, tuple[int, ...]]]


def case(body: Callable[..., Tensor], shape: tuple[int, ...] = (T, D), **parameters: tuple[int, ...]) -> Case:
    """A model `body(m, x)`, the shape of one sample, and the shapes of its parameters."""
    return body, shape, parameters


def index(x: Tensor) -> Tensor:
    return (x > 0).long()


W, WB = {"w": (K, D)}, {"w": (K, D), "b": (K,)}
P, CHANNELS = {"p": (T, 1)}, {"w": (6,), "b": (6,)}

CASES: dict[Callable[..., Tensor], list[Case]] = {
    F.linear: [
        case(lambda m, x: F.linear(x, m.w, m.b), **WB),
        case(lambda m, x: F.linear(x, m.w), (D,), **W),
        case(lambda m, x: F.linear(x.transpose(0, 1), m.w, m.b).transpose(0, 1), **WB),
        case(lambda m, x: F.linear(x.flatten(0, 1), m.w, m.b).view(len(x), -1), **WB),
    ],
    torch.matmul: [case(lambda m, x: torch.matmul(x, m.w), w=(D, K))],
    Tensor.matmul: [case(lambda m, x: x @ m.w, w=(D, K)), case(lambda m, x: x.matmul(m.w), (D,), w=(D, K))],
    torch.mm: [case(lambda m, x: torch.mm(x, m.w), (D,), w=(D, K))],
    Tensor.mm: [case(lambda m, x: x.mm(m.w), (D,), w=(D, K))],
    torch.addmm: [case(lambda m, x: torch.addmm(m.b, x, m.w), (D,), w=(D, K), b=(K,))],
    Tensor.addmm: [case(lambda m, x: m.b.addmm(x.flatten(0, 1), m.w).view(len(x), -1), w=(D, K), b=(K,))],
    F.conv1d: [
        case(lambda m, x: F.conv1d(x, m.w, m.b), w=(K, T, 2), b=(K,)),
        case(lambda m, x: F.conv1d(x.view(-1, 1, D), m.w, m.b, 2, 1, 2).view(len(x), -1), w=(K, 1, 2), b=(K,)),
    ],
    F.conv2d: [
        case(lambda m, x: F.conv2d(x, m.w, m.b, stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (T, 6, 5),
             w=(K, T, 2, 3), b=(K,)),
        case(lambda m, x: F.conv2d(x, m.w, stride=(2,), padding=1), (T, 6, 5), w=(K, T, 3, 1)),
    ],
    F.conv3d: [case(lambda m, x: F.conv3d(x, m.w, m.b, padding=1), (T, 2, 3, 4), w=(K, T, 2, 1, 2), b=(K,))],
    F.embedding: [
        case(lambda m, x: F.embedding(index(x), m.w), w=(2, K)),
        case(lambda m, x: F.embedding(index(x), m.w, padding_idx=-1), (D,), w=(2, K)),
    ],
    F.layer_norm: [
        case(lambda m, x: F.layer_norm(x, (D,), m.w, m.b), w=(D,), b=(D,)),
        case(lambda m, x: F.layer_norm(x, (T, D), m.w, m.b, eps=0.1), w=(T, D), b=(T, D)),
        case(lambda m, x: F.layer_norm(x.transpose(0, 1), (D,), m.w).transpose(0, 1), w=(D,)),
    ],
    F.rms_norm: [
        case(lambda m, x: F.rms_norm(x, (D,), m.w), w=(D,)),
        case(lambda m, x: F.rms_norm(x, (T, D), m.w, 0.1), w=(T, D)),
    ],
    F.group_norm: [
        case(lambda m, x: F.group_norm(x, 2, m.w, m.b), (6, T), **CHANNELS),
        case(lambda m, x: F.group_norm(x, 2, m.w, m.b, eps=0.1), (6,), **CHANNELS),
        case(lambda m, x: F.group_norm(x.flatten(0, 1), 1, m.w, m.b).view(len(x), -1), (2, 6, T, T), **CHANNELS),
    ],
    F.batch_norm: [
        case(lambda m, x: F.batch_norm(x, x.new_ones(6), x.new_full((6,), 2), m.w, m.b), (6, T), **CHANNELS),
        case(lambda m, x: F.batch_norm(x, x.new_ones(6), x.new_full((6,), 2), m.w, m.b, eps=0.1), (6,), **CHANNELS),
    ],
    torch.mul: [case(lambda m, x: torch.mul(x, m.p), **P), case(lambda m, x: torch.mul(m.p, x), p=(D,))],
    Tensor.mul: [
        case(lambda m, x: x.mul(m.p), p=()),
        case(lambda m, x: x.clone().mul_(m.p), **P),
        case(lambda m, x: x * m.p, p=(1, T, D)),
        case(lambda m, x: m.p * x, p=(1,)),
        case(lambda m, x: (x * m.p).transpose(0, 1), p=(2, 1, T, D)),
    ],
    torch.add: [
        case(lambda m, x: torch.add(x, m.p, alpha=3), **P),
        case(lambda m, x: torch.add(m.p, x, alpha=3), p=(D,)),
    ],
    Tensor.add: [
        case(lambda m, x: x.add(m.p), p=()),
        case(lambda m, x: m.p.add(x, alpha=3), **P),
        case(lambda m, x: x.clone().add_(m.p, alpha=3), **P),
        case(lambda m, x: x + m.p, p=(1, T, D)),
        case(lambda m, x: m.p + x, p=(1,)),
        case(lambda m, x: (x + m.p).transpose(0, 1), p=(2, 1, T, D)),
    ],
    torch.sub: [
        case(lambda m, x: torch.sub(x, m.p, alpha=3), **P),
        case(lambda m, x: torch.sub(m.p, x, alpha=3), p=(D,)),
    ],
    Tensor.sub: [
        case(lambda m, x: x - m.p, p=(1, T, D)),
        case(lambda m, x: m.p - x, p=()),
        case(lambda m, x: x.clone().sub_(m.p, alpha=3), **P),
    ],
    Tensor.expand: [
        case(lambda m, x: m.p.expand(len(x), -1, -1) * x, p=(1, T, D)),
        case(lambda m, x: m.p.expand(2, len(x), T, D).transpose(0, 1) * x[:, None], p=(D,)),
        case(lambda m, x: m.p.expand(T, len(x), 1).transpose(0, 1) * x, p=(T, 1, 1)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("function", rules.known_rules(), ids=rules.call_name)
def test_rule_agrees_with_the_default(function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch):
    assert function in CASES, f"{rules.call_name(function)} has a rule, but no case in CASES"
    for body, shape, parameters in CASES[function]:
        model, x = Function(body, **parameters), torch.randn(N, *shape)
        logits = model(x).detach()
        lin = linearize(model, x, torch.randn_like(logits), objectives.LeastSquares(), verify=False)
        assert any(use.call.func == function for use in lin.recorder.uses), "the case does not call the function"
        cotangents = [torch.randn_like(logits) for _ in range(2)]
        fast = lin.pullback(cotangents)
        with monkeypatch.context() as patch:
            patch.setattr(rules, "_rules", {})
            default = lin.pullback(cotangents)
        assert "PerOperation" not in kinds_read(fast, monkeypatch), "the rule does not cover its own case"
        assert kinds_read(default, monkeypatch) == {"PerOperation"}
        assert relative_error(fast.to_dense(), default.to_dense()) < 1e-12
        assert relative_error(fast.gram(), default.gram()) < 1e-12


def kinds_read(jacobian: Jacobian, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Kinds of factors that the rows are read from."""
    found: set[str] = set()
    with monkeypatch.context() as patch:
        for kind in (Dense, Outer, PerOperation):
            read = lambda self, chunk, rows=kind.rows: found.add(type(self).__name__) or rows(self, chunk)  # noqa: E731
            patch.setattr(kind, "rows", read)
        jacobian.to_dense()
    return found


def test_a_function_has_one_rule():
    with pytest.raises(ValueError, match="torch.nn.functional.linear has a rule already: linear"):
        rules.rule(F.linear)(lambda operation: iter(()))
    assert rules.known_rules()[F.linear] == "linear"


def test_a_new_rule_is_one_function(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))

    @rules.rule(torch.maximum)
    def maximum(operation, input, other):
        chosen = (other >= operation.split(input, input)).to(other.dtype)
        yield other, rules.Dense(rules.sum_to(operation.cotangent * chosen, other.shape))

    assert rules.known_rules()[torch.maximum] == "maximum"
    model, x = Function(lambda m, x: torch.maximum(x, m.p), p=(D,)), torch.randn(N, D)
    lin = linearize(model, x, torch.randn(N, D), objectives.LeastSquares())  # verified
    assert kinds_read(lin.jacobian, monkeypatch) == {"Dense"}


WIDE = 40


@pytest.mark.parametrize(
    ("make", "held"),
    [
        (lambda: nn.Linear(WIDE, 30, bias=False), "Outer"),
        (lambda: nn.Linear(WIDE, K, bias=False), "Dense"),
        (lambda: nn.Conv1d(T, 64, 20, bias=False), "Outer"),
        (lambda: nn.Conv1d(T, K, 2, bias=False), "Dense"),
        (lambda: nn.Embedding(2, K), "Outer"),
    ],
)
def test_weights_are_held_in_the_smaller_form(
    make: Callable[[], nn.Module], held: str, monkeypatch: pytest.MonkeyPatch
):
    """Nothing of size N · P: rows of a weight are stored only where they are smaller than what they are made from."""
    layer, x = make(), torch.randn(N, T, WIDE)
    x = index(x[..., 0]) if isinstance(layer, nn.Embedding) else x
    lin = linearize(layer, x, torch.randn_like(layer(x)), objectives.LeastSquares())
    assert kinds_read(lin.jacobian, monkeypatch) == {held}
