"""What is written to, hooked or switched after a batch was linearised is refused: it would be wrong without a word."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ief import IEF, gamma, linearize, objectives
from lightning_ief.capture import Linearization, push_forward
from lightning_ief.capture.types import CaptureError
from lightning_ief.indicators import measure_gammas
from tests.helpers import (
    Function,
    assert_jacobian,
    flatten,
    jacobian_of_graph,
    per_sample_jacobian,
    random_direction,
    relative_error,
    trainable,
)

N, D, C = 6, 4, 3
CE = objectives.CrossEntropy()
SQUARES = objectives.LeastSquares()

pytestmark = pytest.mark.usefixtures("float64")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C))


def wide() -> nn.Module:
    """So many weights that their rows are held by what they are made of, the inputs themselves."""
    return nn.Sequential(nn.Linear(D, 12_000), nn.Tanh(), nn.Linear(12_000, C))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D), torch.arange(N) % C


# --- tensors that are read later --------------------------------------------------------------------------------------

READS: dict[str, Callable[[Linearization], object]] = {
    "gram": lambda lin: lin.jacobian.gram(),
    "row_norms": lambda lin: lin.jacobian.row_norms(),
    "rmatvec": lambda lin: lin.jacobian.rmatvec(torch.ones(N)),
    "matvec": lambda lin: lin.jacobian.matvec(random_direction(lin.parameters)),
    "to_dense": lambda lin: lin.jacobian.to_dense(),
    "solve": lambda lin: lin.jacobian.solve(torch.ones(N), 1e-3),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_an_input_that_is_overwritten_before_the_rows_are_used(read):
    x, y = batch()
    lin = linearize(wide(), x, y, CE)
    lin.backward()
    x.copy_(torch.randn(N, D))
    with pytest.raises(CaptureError, match="such as an input of the model, was changed in place"):
        read(lin)


def test_a_buffer_of_inputs_is_not_reused_between_micro_batches():
    model, (x, y) = wide(), batch()
    optimizer = IEF(model.parameters(), damping=1e-3, accumulate=2)
    optimizer.step(linearization=linearize(model, x, y, CE))
    x.copy_(torch.randn(N, D))
    with pytest.raises(CaptureError, match="Put the next batch into another tensor"):
        optimizer.step(linearization=linearize(model, x, y, CE))


def test_a_direction_is_not_applied_with_other_inputs():
    model, (x, y) = wide(), batch()
    d = linearize(model, x, y, CE).jacobian.solve(torch.ones(N), 1e-3)
    x.mul_(2)
    with pytest.raises(CaptureError, match="changed in place"):
        d.form()


TARGETS: dict[str, Callable[[Linearization], object]] = {
    "losses": lambda lin: lin.losses,
    "logit_gradients": lambda lin: lin.logit_gradients,
    "logit_gradient_norms": lambda lin: lin.logit_gradient_norms,
    "jacobian": lambda lin: lin.jacobian,
    "hessian_rows": lambda lin: lin.hessian_rows(),
    "sample": lambda lin: lin.sample(),
    "gamma_terms": lambda lin: lin.gamma_terms([random_direction(lin.parameters)]),
    "fisher_product": lambda lin: lin.fisher_product(random_direction(lin.parameters)),
}


@pytest.mark.parametrize("read", TARGETS.values(), ids=TARGETS)
def test_targets_that_are_overwritten(read):
    x, y = batch()
    lin = linearize(mlp(), x, y, CE, verify=False)  # which would read them now
    y.copy_((y + 1) % C)
    with pytest.raises(CaptureError, match="targets of a linearization were changed in place"):
        read(lin)


@pytest.mark.parametrize("name", ["logits", "losses", "logit_gradients", "logit_gradient_norms"])
def test_what_is_handed_out_is_not_written_to(name):
    lin = linearize(mlp(), *batch(), CE)
    getattr(lin, name).mul_(2)
    with pytest.raises(CaptureError, match=f"{name.replace('_', ' ')} of a linearization were changed in place"):
        getattr(lin, name)
    optimizer = IEF(lin.parameters.values(), damping=1e-3)
    if name != "logits":  # from which nothing has to be computed any more
        with pytest.raises(CaptureError, match="changed in place"):
            optimizer.step(linearization=lin)


def test_what_is_handed_out_may_be_copied_and_read_in_inference_mode():
    model, (x, y) = mlp(), batch()
    lin = linearize(model, x, y, CE)
    with torch.inference_mode():
        losses, norms = lin.losses.clone().mul_(2), lin.logit_gradient_norms.sqrt()
    assert torch.equal(losses, 2 * lin.losses) and torch.equal(norms, lin.logit_gradient_norms.sqrt())
    assert_jacobian(lin, per_sample_jacobian(model, x, y, CE))


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [None, False])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_are_refused_whenever_they_come(verify, late, kind):
    model = mlp()
    if late:
        linearize(model, *batch(), CE, verify=verify)
    called = []
    handle = getattr(model[0].weight, kind)(called.append)
    with pytest.raises(CaptureError, match=r"'0.weight' has a hook"):
        linearize(model, *batch(), CE, verify=verify)
    assert not called
    handle.remove()
    linearize(model, *batch(), CE, verify=verify)


def test_frozen_parameters_are_not_linearised_by():
    model, (x, y) = mlp(), batch()
    parameters = trainable(model)
    linearize(model, x, y, CE, parameters=parameters)
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0.weight' is frozen"):
        linearize(model, x, y, CE, parameters=parameters)
    with pytest.raises(ValueError, match=r"'0.weight' is frozen"):
        push_forward(model, x, y, CE, [random_direction(parameters)], parameters=parameters)


@pytest.mark.parametrize("verify", [None, False])
def test_a_parameter_under_two_names_is_refused(verify):
    model = mlp()
    parameters = {**trainable(model), "again": model[0].weight}
    with pytest.raises(TypeError, match="under several names"):
        linearize(model, *batch(), CE, parameters=parameters, verify=verify)


# --- directions and forward passes that do not fit --------------------------------------------------------------------


def test_directions_that_do_not_fit_are_refused():
    lin = linearize(mlp(), *batch(), CE)
    d = random_direction(lin.parameters)
    for wrong in (
        {**d, "other": torch.ones(1)},
        {name: x for name, x in d.items() if name != "0.bias"},
        {**d, "0.bias": torch.ones(1)},
    ):
        for ask in (lin.jvp, lin.fisher_product, lambda w: lin.jvps([d, w])):
            with pytest.raises(ValueError, match="spaces|shape"):
                ask(wrong)


class Offset(nn.Module):
    """Logits far from zero, on which a frozen weight, an attribute and a mode have a say."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.frozen, self.gain = mlp(), nn.Linear(D, C).requires_grad_(False), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.inner(x + self.frozen(x).sum(1, keepdim=True)) + 100.0


def scale_frozen(m: Offset) -> None:
    with torch.no_grad():
        m.frozen.weight.mul_(1.2)


SWITCHES: dict[str, tuple[Callable[[Offset], object], str]] = {
    "a frozen weight": (scale_frozen, "Frozen parameters of Offset were changed"),
    "its data": (lambda m: m.frozen.weight.data.mul_(1.00003), "does not repeat"),
    "a mode": (lambda m: m.inner.eval(), "modes .* of Offset were changed"),
}


@pytest.mark.parametrize(("switch", "message"), SWITCHES.values(), ids=SWITCHES)
def test_a_forward_pass_that_is_another_one_now_has_no_derivative(switch, message):
    model, (x, _) = Offset(), batch()
    lin = linearize(model, x, torch.randn(N, C), SQUARES)
    d = random_direction(lin.parameters)
    change = (lin.jvp(d) * lin.logit_gradients).sum(1)
    assert relative_error(change, lin.jacobian.matvec(d)) < 1e-10
    switch(model)
    with pytest.raises(CaptureError, match=message):
        lin.jvp(d)


def test_a_forward_pass_runs_again_with_the_attributes_it_had():
    model, (x, _) = Offset(), batch()
    lin = linearize(model, x, torch.randn(N, C), SQUARES)
    d = random_direction(lin.parameters)
    model.gain = 1.5
    assert relative_error((lin.jvp(d) * lin.logit_gradients).sum(1), lin.jacobian.matvec(d)) < 1e-10
    assert model.gain == 1.5


@pytest.mark.parametrize("linearised_under", [False, True])
def test_forward_passes_run_again_in_the_autocast_of_the_linearization(linearised_under):
    model, (x, y) = mlp().float(), batch()
    x = x.float()
    d = random_direction(trainable(model))
    with torch.autocast("cpu", torch.bfloat16, enabled=linearised_under):
        lin = linearize(model, x, y, CE)
        inside = lin.jvp(d)
    with torch.autocast("cpu", torch.bfloat16, enabled=not linearised_under):
        # Kernels may round otherwise in another run; the other dtype's rounding is 4e-3.
        assert relative_error(lin.jvp(d), inside) < 1e-6


def test_the_row_of_the_padding_does_not_change_along_a_direction():
    model = nn.Sequential(nn.Embedding(7, D, padding_idx=0), nn.Flatten(), nn.Linear(3 * D, C))
    y = torch.arange(N) % C
    d = random_direction(trainable(model))
    truth = {}
    for padded in (False, True, False):
        x = torch.randint(1, 7, (N, 3))
        x[:, -1] *= not padded
        lin = linearize(model, x, y, CE)
        truth = (lin.logit_gradients * lin.jvp(d)).sum(1)
        assert relative_error(truth, lin.jacobian.to_dense() @ flatten(d)) < 1e-10
        assert relative_error(measure_gammas(model, x, y, CE, [d])[0], gamma(lin, d)) < 1e-10
        _, (u,) = push_forward(model, x, y, CE, [d])
        assert relative_error((lin.logit_gradients * u).sum(1), truth) < 1e-10


# --- what verification lets pass --------------------------------------------------------------------------------------


class Branch(nn.Module):
    """A branch of small gain whose samples influence each other."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.a, self.b, self.large, self.gain = nn.Linear(4, 8), nn.Linear(8, C), nn.Linear(4, C), gain

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(h - h.mean(0))) * self.gain + self.large(10 * x)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("gain", [1.0, 0.05, 0.02])
def test_small_gradients_are_judged_by_their_own_size(half, gain):
    torch.manual_seed(0)
    model = Branch(gain).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=half), pytest.raises(CaptureError, match="'a.weight'"):
        linearize(model, torch.randn(N, 4).float(), torch.arange(N) % C, CE)


def test_gradients_that_vanish_are_no_wrong_capture_in_half_precision():
    attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).float()
    model = Function.of(attention, lambda m, x: m.inner(x).mean(1)[:, :C])
    for dtype in (torch.bfloat16, torch.float16):
        for _ in range(3):
            with torch.autocast("cpu", dtype):
                linearize(model, torch.randn(N, 5, 8).float(), torch.arange(N) % C, CE, verify=None)


def test_a_gate_that_opens_after_many_batches_is_noticed_soon():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = F.linear(x, m.w)
        return F.linear(x, m.v) + m.gate * (h - h.mean(0))

    model = Function(forward, w=(C, D), v=(C, D), gate=torch.zeros(()))
    for _ in range(30):
        lin = linearize(model, *batch(), CE)
        assert_jacobian(lin, jacobian_of_graph(lin))
    with torch.no_grad():
        model.gate.fill_(1.0)

    def many() -> None:
        for _ in range(15):  # twice as many batches as at the last check
            linearize(model, *batch(), CE)

    with pytest.raises(CaptureError, match="do not add up"):
        many()


class Doubled(torch.autograd.Function):
    """Writes into the gradient that it is given."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mul_(2)


class EndsDoubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return Doubled.apply(self.net(x))


def test_a_backward_pass_that_writes_to_what_it_is_given_does_not_reach_the_logit_gradients():
    model, x = EndsDoubled(), torch.randn(N, D)
    y = model(x).argmin(1)
    found = linearize(model, x, y, CE, verify=False)
    assert bool((found.logit_gradients.abs().amax(1) > 0.5).all())  # they need no scaling, and no copy
    assert relative_error(found.jacobian.to_dense(), per_sample_jacobian(model, x, y, CE)) < 1e-12
    torch.testing.assert_close(found.logit_gradients, CE.gradient(model(x).detach(), y))
