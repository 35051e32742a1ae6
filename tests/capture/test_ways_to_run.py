"""Compiled code, checkpointing, custom backward passes, no_grad, channels_last and autocast."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ief import linearize, objectives
from lightning_ief.capture import push_forward
from lightning_ief.capture.types import CaptureError
from tests.capture.test_linearization import SQUARES, C, D, N, T, mlp
from tests.helpers import (
    Function,
    assert_exact,
    assert_jacobian,
    flatten,
    per_sample_jacobian,
    random_direction,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("float64")


def test_checkpointing():
    model = Function.of(mlp(), lambda m, x: checkpoint(m.inner, x, use_reentrant=False).tanh() * m.g, g=(C,))
    for samples in (N, N + 1):
        lin = assert_exact(model, torch.randn(samples, D))
        d = random_direction(lin.parameters)
        change = (lin.jvp(d) * lin.logit_gradients).sum(1)
        assert relative_error(change, lin.jacobian.matvec(d)) < 1e-10


@pytest.mark.parametrize("reentrant_anywhere", ["first", "last"])
def test_reentrant_checkpointing_is_refused(reentrant_anywhere):
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        first, last = m.inner[:1], m.inner[1:]
        if reentrant_anywhere == "last":
            return checkpoint(last, first(x), use_reentrant=True)
        return last(checkpoint(first, x, use_reentrant=True))

    x = torch.randn(N, D, requires_grad=True)
    with pytest.raises(CaptureError, match="'use_reentrant': False"):
        linearize(Function.of(mlp(), forward), x, torch.randn(N, C), SQUARES)


class Detaching(torch.autograd.Function):
    """Multiplies by two; its backward pass gives the right values and hides where they came from."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient.detach()


class WithForwardMode(Detaching):
    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent


class OnceDifferentiable(Detaching):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


class ThroughNumpy(WithForwardMode):
    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(2 * gradient.numpy())


def hiding(function: type[torch.autograd.Function]) -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.inner[0](x)
        return m.inner[2](hidden + m.gate * function.apply(hidden))

    return Function.of(mlp(), forward, gate=torch.zeros(()))


@pytest.mark.parametrize("function", [Detaching, OnceDifferentiable, WithForwardMode, ThroughNumpy])
def test_a_backward_pass_that_hides_its_graph_is_noticed(function):
    model, x, y = hiding(function), torch.randn(N, D), torch.randn(N, C)
    for gate in (0.0, 1.0):  # at first there is nothing to be noticed
        with torch.no_grad():
            model.gate.fill_(gate)
        lin = linearize(model, x, y, SQUARES)
        d = random_direction(lin.parameters)
        if gate and function in (Detaching, OnceDifferentiable):
            with pytest.raises(CaptureError, match="no derivative along a direction"):
                lin.jvp(d)
        else:
            assert relative_error((lin.jvp(d) * lin.logit_gradients).sum(1), lin.jacobian.matvec(d)) < 1e-10


def test_directions_that_change_no_loss_are_no_matter():
    model, x, y = mlp().float(), torch.randn(N, D).float(), torch.arange(N) % C
    lin = linearize(model, x, y, objectives.CrossEntropy())
    d = {name: torch.ones_like(p) if name == "2.bias" else torch.zeros_like(p) for name, p in lin.parameters.items()}
    assert (lin.jvp(d) - 1).abs().max() < 1e-6  # a softmax does not care


DERIVED = {
    "a constant gradient": lambda m, x: F.linear(x, m.w * m.p.sign()),
    "its shape": lambda m, x: F.linear(x, m.w) + F.linear(x, m.p.expand_as(m.w)),
    "the shape of another": lambda m, x: F.linear(x, m.p.view_as(m.w) + m.w),
}


@pytest.mark.parametrize("body", DERIVED.values(), ids=DERIVED)
def test_tensors_that_depend_on_a_parameter_in_part(body):
    assert_exact(Function(body, w=(C, D), p=(C, D)), torch.randn(N, D))


def test_what_has_changed_is_not_linearised_again():
    lin = linearize(mlp(), torch.randn(N, D), torch.randn(N, C), SQUARES)
    lin.backward()
    with torch.no_grad():
        lin.parameters["0.weight"].mul_(1.003)
    with pytest.raises(CaptureError, match="parameters were changed"):
        lin.jvp(random_direction(lin.parameters))


def test_a_direction_is_left_as_it_is_by_max_norm():
    model = nn.Sequential(nn.EmbeddingBag(7, D, mode="sum", max_norm=1.0), nn.Tanh(), nn.Linear(D, C))
    indices = torch.randint(7, (N, 3))
    model(indices)
    try:
        lin = linearize(model, indices, torch.randn(N, C), SQUARES)
        d = {name: 4 * x for name, x in random_direction(lin.parameters).items()}
        before = {name: x.clone() for name, x in d.items()}
        lin.jvp(d)
    except CaptureError:
        return  # refused by name
    assert all(torch.equal(d[name], x) for name, x in before.items())
    assert relative_error((lin.jvp(d) * lin.logit_gradients).sum(1), lin.jacobian.matvec(d)) < 1e-10


class PartlyCompiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.compiled = torch.compile(nn.Sequential(nn.Linear(D, D), nn.Tanh()), backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.compiled(self.first(x)))


def compiled_in_place() -> nn.Module:
    model = mlp()
    model.compile(backend="aot_eager")
    return model


COMPILED = {
    "torch.compile": lambda: torch.compile(mlp(), backend="aot_eager"),
    "Module.compile": compiled_in_place,
    "a part of it": PartlyCompiled,
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
def test_compiled_models_are_captured_as_written(make, warm):
    model, x, targets = make(), torch.randn(N, D), torch.randn(N, C)
    if warm:
        model(x)
    lin = linearize(model, x, targets, SQUARES)
    assert_jacobian(lin, per_sample_jacobian(model, x, targets, SQUARES))
    d = random_direction(lin.parameters)
    assert relative_error((lin.jvp(d) * lin.logit_gradients).sum(1), lin.jacobian.matvec(d)) < 1e-10
    assert relative_error(model(x).detach(), lin.logits) < 1e-10


def test_channels_last():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(),
        nn.Linear(16, C),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    assert_exact(model, torch.randn(N, 3, 5, 5).to(memory_format=torch.channels_last))


def test_parts_under_no_grad():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = m.inner[:2](x)
        return m.inner[2:](hidden)

    lin = assert_exact(Function.of(mlp(), forward), torch.randn(N, D))
    assert [name for name, entry in lin.jacobian.rmatvec(torch.ones(N)).items() if not entry.any()] == [
        "inner.0.weight",
        "inner.0.bias",
    ]


class Mixed(nn.Module):
    """Operations with and without a rule, as autocast meets them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(T, 4, 3, padding=1)
        self.grouped = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, 1, batch_first=True)
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.low, self.up = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(D, 2))
        self.scale = nn.Parameter(torch.rand(D))
        self.head = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.grouped(self.convolution(x).relu()))
        x = x + self.attention(x, x, x)[0]
        x = self.mix @ x
        x = F.linear(x, self.up @ self.low) * self.scale
        return self.head(x.mean(1))


def test_autocast():
    model, x, targets = Mixed().float(), torch.randn(N, T, D).float(), torch.randn(N, C).float()
    truth = per_sample_jacobian(copy.deepcopy(model).double(), x.double(), targets.double(), SQUARES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lin = linearize(model, x, targets, SQUARES)
    assert lin.logits.dtype == torch.bfloat16
    # bfloat16 has 8 bits: what rounding leaves over must be all that differs, from the truth and from autograd.
    assert relative_error(lin.jacobian.to_dense(), truth) < 0.05
    assert relative_error(lin.jacobian.gram(), truth @ truth.T) < 0.05
    v, d = torch.randn(N), random_direction(lin.parameters)
    assert relative_error(flatten(lin.jacobian.rmatvec(v)), v @ truth) < 0.05
    assert relative_error(lin.jacobian.matvec(d), truth @ flatten(d).double()) < 0.05
    assert all(p.dtype == torch.float32 for p in lin.jacobian.rmatvec(v).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype: torch.dtype):
    model, x, targets = Mixed().to(dtype), torch.randn(N, T, D).to(dtype), torch.randn(N, C).to(dtype)
    truth = per_sample_jacobian(copy.deepcopy(model).double(), x.double(), targets.double(), SQUARES)
    lin = linearize(model, x, targets, SQUARES)
    v, d = torch.randn(N), random_direction(lin.parameters)
    assert relative_error(lin.jacobian.gram(), truth @ truth.T) < 0.05
    assert relative_error(flatten(lin.jacobian.rmatvec(v)), v @ truth) < 0.05
    assert relative_error(lin.jacobian.matvec(d), truth @ flatten(d).double()) < 0.05


def test_forward_passes_that_run_again_leave_the_parameters_where_they_are():
    """Of a module in several places, and of one parameter in several modules."""
    repeated, tied, first = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
    tied.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), repeated, nn.Tanh(), repeated, tied, repeated)
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    x, y = torch.randn(N, D), torch.randn(N, D)
    truth = per_sample_jacobian(model, x, y, SQUARES)
    for _ in range(3):
        lin = linearize(model, x, y, SQUARES)
        d = random_direction(lin.parameters)
        assert relative_error((lin.jvp(d) * lin.logit_gradients).sum(1), truth @ flatten(d)) < 1e-10
        push_forward(model, x, y, SQUARES, [d])
        assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == before
