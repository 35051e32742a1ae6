"""Recurrent layers are recorded as products over all steps, as exact as one sample at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_ief import directions, linearize, objectives
from lightning_ief.capture.types import CaptureError
from tests.helpers import (
    Function,
    assert_exact,
    assert_jacobian,
    flatten,
    jacobian_of_graph,
    per_sample_jacobian,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("float64")
N, T, D, H = 3, 4, 5, 3  # samples, length, features, units
SQUARES = objectives.LeastSquares()
KINDS = (nn.LSTM, nn.GRU, nn.RNN)


def everything(m: nn.Module, x: Tensor) -> Tensor:
    """The outputs and all last states."""
    y, states = m.inner(x)
    states = states if isinstance(states, tuple) else (states,)
    return torch.cat([y.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


def model(
    kind: type[nn.RNNBase], *, body: Callable[..., Tensor] = everything, p: Any = None, **options: Any
) -> Function:
    inner = kind(D, options.pop("hidden_size", H), batch_first=True, **options)
    return Function.of(inner, body, **({} if p is None else {"p": p}))


def frozen(m: Function, part: str) -> Function:
    for name, p in m.inner.named_parameters():
        p.requires_grad_(part not in name)
    return m


def given_states(m: nn.Module, x: Tensor) -> Tensor:
    state = torch.tanh(x.mean(1)[:, :H] * m.p)
    y, (h, c) = m.inner(x, (state.unsqueeze(0), state.sin().unsqueeze(0)))
    return y.sum(1) + h[0] * c[0]


def learned_state(m: nn.Module, x: Tensor) -> Tensor:
    return m.inner(x, m.p.expand(-1, len(x), -1).contiguous())[0].sum(1)


def twice(m: nn.Module, x: Tensor) -> Tensor:
    y, state = m.inner(x)
    return m.inner(x.flip(1), state)[0].sum(1) + y[:, 0]


def second_use(m: nn.Module, x: Tensor) -> Tensor:
    return F.linear(m.inner(x)[0], m.inner.weight_hh_l0).flatten(1)


def from_a_parameter(m: nn.Module, x: Tensor) -> Tensor:
    """A prompt that comes out of a recurrent layer: a tensor made from parameters alone."""
    return (x * m.inner(m.p)[0].mean(1, keepdim=True).repeat(1, 1, 2)[..., :D]).flatten(1)


def activated_in_place(m: nn.Module, x: Tensor) -> Tensor:
    return m.inner(x)[0].relu_().flatten(1)


def checkpointed(m: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: m.inner(x.sin())[0].tanh(), x * m.p, use_reentrant=False).flatten(1)


def of_input_gradient(m: nn.Module, x: Tensor, create_graph: bool = False) -> Tensor:
    x = x.detach().requires_grad_()
    y = m.inner(x)[0]
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=create_graph, retain_graph=True)
    return (y * gradient[..., :H]).flatten(1)


def reparametrized() -> Function:
    m = model(nn.LSTM)
    parametrizations.weight_norm(m.inner, "weight_hh_l0")
    return m


CASES: dict[str, Callable[[], Function]] = {
    "all options": lambda: model(nn.LSTM, num_layers=2, bidirectional=True, proj_size=2, bias=False),
    "dropout in evaluation": lambda: model(nn.GRU, num_layers=2, dropout=0.5).eval(),
    "one unit": lambda: model(nn.LSTM, hidden_size=1),
    "given states": lambda: model(nn.LSTM, body=given_states, p=(H,)),
    "a learned state": lambda: model(nn.GRU, body=learned_state, p=(1, 1, H)),
    "frozen weights of the input": lambda: frozen(model(nn.LSTM), "weight_ih"),
    "frozen weights of the state": lambda: frozen(model(nn.GRU), "hh"),
    "a frozen first layer": lambda: frozen(model(nn.RNN, num_layers=2), "l0"),
    "a frozen second layer": lambda: frozen(model(nn.LSTM, num_layers=2), "l1"),
    "used twice": lambda: model(nn.GRU, body=twice),
    "a weight used elsewhere": lambda: model(nn.RNN, body=second_use),
    **{
        f"{kind.__name__} of a parameter": lambda kind=kind: model(kind, body=from_a_parameter, p=(1, T, D))
        for kind in KINDS
    },
    "a weight made from parameters": reparametrized,
    "activated in place": lambda: model(nn.LSTM, body=activated_in_place),
    "a checkpoint": lambda: model(nn.LSTM, body=checkpointed, p=(D,)),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_recurrent_layer_is_exact(make: Callable[[], Function]):
    lin = assert_exact(make(), torch.randn(N, T, D))
    assert lin.escaping == []


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_has_one_use_whatever_the_length(kind: type[nn.RNNBase]):
    m = model(kind, num_layers=2, bidirectional=True)
    for length in (2, 9):
        x = torch.randn(N, length, D)
        lin = linearize(m, x, torch.randn_like(m(x)), SQUARES)
        assert [use.call.func for use in lin.recorder.uses] == [F.linear] * 2 * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_logits_are_those_of_the_fused_kernel(kind: type[nn.RNNBase], training: bool):
    """With dropout between the layers, too: the same random numbers are drawn."""
    m = model(kind, num_layers=3, bidirectional=True, dropout=0.5).train(training)
    x = torch.randn(N, T, D)
    torch.manual_seed(1)
    expected = m(x).detach()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    lin = linearize(m, x, torch.zeros_like(expected), SQUARES, verify=False)
    assert torch.equal(torch.rand(1), drawn)
    assert relative_error(lin.logits, expected) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_the_layers(kind: type[nn.RNNBase]):
    """Rows belong to the mask that was drawn; the derivative along a direction to the same one."""
    m, x = model(kind, num_layers=2, dropout=0.5), torch.randn(N, T, D)
    lin = linearize(m, x, torch.randn_like(m(x)), SQUARES)
    truth = jacobian_of_graph(lin)
    assert_jacobian(lin, truth)
    d = {name: torch.randn_like(p) for name, p in lin.parameters.items()}
    change = (lin.jvp(d) * lin.logit_gradients).flatten(1).sum(1)
    assert relative_error(change, truth @ flatten(d)) < 1e-10


def test_directions_are_those_of_dense_rows():
    m, x = model(nn.LSTM), torch.randn(N, T, D)
    targets, damping = torch.randn_like(m(x)), 1e-3
    rows = per_sample_jacobian(m, x, targets, SQUARES)
    lin = linearize(m, x, targets, SQUARES)
    K = rows @ rows.T
    for direction, right in ((directions.ief, lin.logit_gradient_norms), (directions.ef, torch.ones(N))):
        expected = rows.T @ torch.linalg.solve(K + damping * torch.eye(N), right)
        assert relative_error(flatten(direction(lin, damping)), expected) < 1e-8


def test_rows_of_several_cotangents():
    m, x = model(nn.GRU, num_layers=2), torch.randn(N, T, D)
    lin = linearize(m, x, torch.randn_like(m(x)), SQUARES)
    cotangents = [torch.randn_like(lin.logits) for _ in range(2)]
    expected = [
        torch.cat([g.flatten() for g in torch.autograd.grad((m(x[n : n + 1]) * c[n]).sum(), [*m.parameters()])])
        for c in cotangents
        for n in range(N)
    ]
    assert relative_error(lin.pullback(cotangents).to_dense(), torch.stack(expected)) < 1e-10


def test_what_went_in_and_what_came_back():
    """The sides of a weight: its rows are their products, added up over the steps."""
    m, x = model(nn.LSTM), torch.randn(N, T, D)
    lin = linearize(m, x, torch.randn_like(m(x)), SQUARES, keep_sides=["inner.weight_hh_l0"])
    (side,) = lin.jacobian.sides("inner.weight_hh_l0")
    assert side.left.shape[-2:] == (T, 4 * H) and side.right.shape[-2:] == (T, H)
    assert not side.right[..., 0, :].any()  # the first state is zero


def test_in_half_precision():
    m, x = model(nn.LSTM).float(), torch.randn(N, T, D).float()
    truth = per_sample_jacobian(m, x, targets := torch.randn_like(m(x)).detach(), SQUARES)
    with torch.autocast("cpu", torch.bfloat16):
        lin = linearize(m, x, targets, SQUARES)
    assert relative_error(lin.jacobian.to_dense(), truth) < 0.05


def test_a_gradient_taken_within_the_forward_pass():
    """As a feature it is a constant; what depends on it by second derivatives is refused."""
    m, x = model(nn.LSTM, body=of_input_gradient), torch.randn(N, T, D)
    lin = linearize(m, x, torch.zeros(N, T * H), SQUARES)
    assert_jacobian(lin, jacobian_of_graph(lin))
    m.body = lambda m, x: of_input_gradient(m, x, create_graph=True)
    with pytest.raises(CaptureError, match="recurrent layer") as error:
        linearize(m, x, torch.zeros(N, T * H), SQUARES)
    assert "LSTMCell" in str(error.value) and "freeze" in str(error.value).lower()
