"""Rows and J_z·d of models in fp16, with a loss scale and without: under the autocast of the CPU."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ief import linearize, objectives
from lightning_ief.capture.linearization import push_forward
from lightning_ief.capture.types import CaptureError
from lightning_ief.directions import ief
from lightning_ief.indicators import gamma, measure_gammas
from tests.helpers import flatten, relative_error


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))


def data(samples: int = 24) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(samples, 6), torch.randint(3, (samples,))


@pytest.mark.parametrize("scale", [1.0, 1024.0, 1000.0])
def test_rows_are_not_scaled(scale: float) -> None:
    net, (x, y), objective = network(), data(5), objectives.CrossEntropy()
    truth = linearize(copy.deepcopy(net).double(), x.double(), y, objective).jacobian.to_dense()
    with torch.autocast("cpu", torch.float16):
        lin = linearize(net, x, y, objective)
    lin.loss_scale = torch.tensor(scale)
    assert lin.logits.dtype == torch.float16
    assert 1e-6 < relative_error(lin.jacobian.to_dense(), truth) < 2e-3
    assert 1e-6 < relative_error(lin.target_rows([y]).to_dense(), truth) < 2e-3
    rows, c = lin.hessian_rows()
    assert relative_error(flatten(rows.rmatvec(c)), truth.sum(0)) < 2e-3


class Halving(nn.Module):
    """Its gradients shrink on the way back, as in a deep network."""

    def __init__(self, depth: int, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8, bias)
        self.depth = depth
        self.last = nn.Linear(8, 3, bias)

    def forward(self, x: Tensor) -> Tensor:
        z = 1024.0 * self.first(x)
        for _ in range(self.depth):
            z = 0.5 * z
        return self.last(z)


def test_scaling_keeps_gradients_that_fp16_would_lose() -> None:
    """Behind 24 halvings, a gradient of about 1 is below fp16's smallest number; scaled, it is not."""
    model, (x, y), objective = Halving(24), data(5), objectives.CrossEntropy()
    truth = linearize(copy.deepcopy(model).double(), x.double(), y, objective).jacobian
    with torch.autocast("cpu", torch.float16):
        lin = linearize(model, x, y, objective)
    (name,) = [name for name in lin.parameters if name == "first.weight"]
    expected = truth.rmatvec(torch.ones(5))[name]
    errors = []
    for scale in (1.0, 2.0**16):
        lin.loss_scale = torch.tensor(scale)
        lin.backward(retain_graph=True)
        errors.append(relative_error(lin.jacobian.rmatvec(torch.ones(5))[name].double(), expected))
    assert errors[1] < 5e-3 < 0.02 < errors[0]


@pytest.mark.parametrize("length", [1e-9, 1.0, 1e9])
def test_gamma_whatever_the_length_of_the_direction(length: float) -> None:
    net, (x, y), objective = network(), data(8), objectives.CrossEntropy()
    exact = copy.deepcopy(net).double()
    found = ief(linearize(exact, x.double(), y, objective), 1e-2)
    direction = {name: (length * d).float() for name, d in found.items()}
    wide = {name: d.double() for name, d in direction.items()}
    expected = float(gamma(linearize(exact, x.double(), y, objective), wide))
    with torch.autocast("cpu", torch.float16):
        lin = linearize(net, x, y, objective)
        assert float(gamma(lin, direction)) == pytest.approx(expected, rel=5e-3)
        assert relative_error(lin.jvp(direction), linearize(exact, x.double(), y, objective).jvp(wide)) < 5e-3


def test_samples_that_are_almost_fitted_keep_their_rows() -> None:
    """Gradients down to 1e-30, far below what fp16 can hold."""
    net, (x, _), objective = network(), data(8), objectives.CrossEntropy()
    with torch.no_grad():
        net[-1].weight.mul_(100)
    y = net(x).argmax(1)
    with torch.autocast("cpu", torch.float16):
        lin = linearize(net, x, y, objective)
    lin.loss_scale = torch.tensor(2.0**12)
    exact = linearize(copy.deepcopy(net).double(), x.double(), y, objective)
    norms = exact.jacobian.row_norms()
    assert norms.min() < 1e-30
    # Rounding of two logits, 2⁻¹¹ of each, is what changes p.
    rounding = 2**-10 * float(exact.logits.abs().max())
    assert rounding < 0.2
    assert ((lin.jacobian.row_norms() / norms).log().abs() < rounding + 0.01).all()
    assert ((lin.logit_gradient_norms / exact.logit_gradient_norms).log().abs() < 2 * rounding).all()


class Product(nn.Module):
    """A weight that is a product, as of LoRA, and shifts its inputs: all samples pull at it alike."""

    def __init__(self, down: float = 1.0) -> None:
        super().__init__()
        self.low, self.up = nn.Parameter(torch.randn(2, 6) / 2), nn.Parameter(torch.randn(3, 2) / 2)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.up @ self.low) * self.down


def test_a_sum_over_samples_stays_in_the_range_of_fp16() -> None:
    """Each row fits, the sum of all of them, pulled back through a product in fp16, would not."""
    torch.manual_seed(0)
    model, x, y, objective = Product(), torch.ones(64, 6), torch.zeros(64, dtype=torch.int64), objectives.CrossEntropy()
    truth = linearize(copy.deepcopy(model).double(), x.double(), y, objective).jacobian
    with torch.autocast("cpu", torch.float16):
        lin = linearize(model, x, y, objective, loss_scale=torch.tensor(2.0**21))
    assert lin.jacobian.gram().isfinite().all()
    ones = torch.ones(64)
    assert relative_error(flatten(lin.jacobian.rmatvec(ones)).double(), flatten(truth.rmatvec(ones))) < 2e-3
    assert relative_error(lin.jacobian.to_dense(), truth.to_dense()) < 2e-3


class Detached(torch.autograd.Function):
    """Three times the input, with a backward pass that hides the gradient's own graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient.detach()


def test_a_derivative_that_overflows_proves_nothing() -> None:
    """A direction as long as there are parameters would: what is hidden half of the time must be found nonetheless."""
    model, (x, y), objective = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 3)]), data(6), objectives.CrossEntropy()
    x = torch.randn(6, 64)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(1e-4)

    def forward(x: Tensor) -> Tensor:
        h = model[0](x)
        return model[1](1e4 * (Detached.apply(h) + 0.5 * h))

    model.forward = forward
    with torch.autocast("cpu", torch.float16):
        lin = linearize(model, x, y, objective)
        with pytest.raises(CaptureError, match="have no derivative along a direction"):
            lin.jvp({name: torch.randn_like(p) for name, p in lin.parameters.items()})


@pytest.mark.parametrize("length", [1e-9, 1e-5, 1.0, 1e9])
def test_changes_of_the_logits_whatever_the_length_of_the_direction(length: float) -> None:
    """By way of the graph, of forward mode, after the graph was let go, and without any."""
    net, (x, y), objective = network(), data(8), objectives.CrossEntropy()
    direction = {name: length * torch.randn(p.shape) for name, p in net.named_parameters()}
    wide = {name: d.double() for name, d in direction.items()}
    exact = linearize(copy.deepcopy(net).double(), x.double(), y, objective)
    truth, found = exact.jvp(wide), []
    with torch.autocast("cpu", torch.float16):
        lin = linearize(net, x, y, objective)
        found += [lin.jvp(direction), lin.jvps([direction, direction])[1]]
        lin.release()
        found.append(lin.jvp(direction))
        for _ in range(2):
            found.append(push_forward(net, x, y, objective, [direction])[1][0])
        gamma_of_update = float(measure_gammas(net, x, y, objective, [direction])[0])
    assert all(relative_error(each.double(), truth) < 5e-3 for each in found)
    assert gamma_of_update == pytest.approx(float(gamma(exact, wide)), rel=0.05)


def test_logits_in_float32_above_a_model_in_fp16() -> None:
    net, (x, y), objective = nn.Sequential(network(), nn.Identity()), data(8), objectives.CrossEntropy()
    net[1].forward = lambda z: z.float()
    direction = {name: 1e-8 * torch.randn(p.shape) for name, p in net.named_parameters()}
    truth = linearize(copy.deepcopy(net[0]).double(), x.double(), y, objective)
    with torch.autocast("cpu", torch.float16):
        lin = linearize(net, x, y, objective)
        found = lin.jvp(direction)
    assert lin.logits.dtype == torch.float32
    wide = {name.removeprefix("0."): d.double() for name, d in direction.items()}
    assert relative_error(found.double(), truth.jvp(wide)) < 5e-3


def test_almost_fitted_samples_with_other_cotangents() -> None:
    """Rows for sampled targets, of the Hessian's root, and its product: each in float32 from the logits on."""
    net, (x, _), objective = network(), data(8), objectives.CrossEntropy()
    with torch.no_grad():
        net[-1].weight.mul_(30)
    y = net(x).argmax(1)
    with torch.autocast("cpu", torch.float16):
        lin = linearize(net, x, y, objective, loss_scale=torch.tensor(2.0**10))
        v = {name: torch.randn(p.shape) for name, p in net.named_parameters()}
        product = lin.fisher_product(v)
    exact = linearize(copy.deepcopy(net).double(), x.double(), y, objective)
    norms, expected = lin.target_rows([y]).row_norms(), exact.target_rows([y]).row_norms()
    assert expected.min() < 1e-7
    assert ((norms / expected).log().abs() < 0.2).all()
    rows, expected_rows = lin.hessian_rows()[0].row_norms(), exact.hessian_rows()[0].row_norms()
    assert ((rows / expected_rows).log().abs() < 0.2).all()
    assert (
        relative_error(
            flatten(product).double(), flatten(exact.fisher_product({name: d.double() for name, d in v.items()}))
        )
        < 0.1
    )


def test_a_model_that_needs_the_scale_is_verified_with_it() -> None:
    """Its gradients are subnormal numbers of fp16 unless they are scaled."""
    for seed in range(5):
        torch.manual_seed(seed)
        model, (x, y), objective = Halving(23, bias=False), data(5), objectives.CrossEntropy()
        with torch.autocast("cpu", torch.float16):
            linearize(model, x, y, objective, loss_scale=torch.tensor(2.0**16))


def test_verification_that_overflows_proves_nothing() -> None:
    overflows = set()
    for exponent in range(10, 31):  # at some of them, autograd's gradients are finite and the rows are not
        net, (x, y), objective = network(), data(8), objectives.CrossEntropy()
        with torch.autocast("cpu", torch.float16):
            lin = linearize(net, x, y, objective, loss_scale=torch.tensor(2.0**exponent))
        overflows.add(bool(lin.jacobian.gram().isfinite().all()))
    assert overflows == {True, False}
