"""What is known of a model must not outlive what it was found for: modes, autocast, dtypes, uses that come later."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ief import gamma, linearize, objectives
from lightning_ief.capture import Linearization, push_forward
from lightning_ief.capture.types import CaptureError
from lightning_ief.indicators import measure_gammas
from tests.capture.test_jvp import Straight
from tests.helpers import Function, assert_jacobian, flatten, jacobian_of_graph, per_sample_jacobian, relative_error

N, D, C = 6, 4, 3
SQUARES = objectives.LeastSquares()

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*escapes the capture:RuntimeWarning"),
]


class Unannounced(torch.autograd.Function):
    """x Wᵀ, out of the sight of whoever follows W."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient @ w, gradient.T @ x


def apply_unannounced(x: Tensor, w: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return Unannounced.apply(x, w)


def switched(late: Callable[[nn.Module, Tensor], Tensor], **parameters) -> Function:
    """A model that does something more when its attribute `on` is set, which no module's mode tells."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        output = F.linear(x, m.w).tanh()
        return late(m, output if m.linked else x) if m.on else output

    model = Function(forward, **parameters)
    model.on, model.linked = False, True
    return model


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D), torch.randn(N, C)


# --- uses that come later ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [None, False])
@pytest.mark.parametrize("first", ["on", "off"])
def test_a_further_use_that_is_not_announced_is_refused_whenever_it_comes(verify, first):
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, m.w) + (apply_unannounced(x, m.w) if m.on else 0.0)

    model = Function(forward, w=(C, D))
    model.on = False
    if first == "off":
        linearize(model, *batch(), SQUARES, verify=verify)
    model.on = True
    with pytest.raises(CaptureError, match=r"'w' was used once more.*requires_grad_\(False\)"):
        linearize(model, *batch(), SQUARES, verify=verify, strict=True)
    lin = linearize(model, *batch(), SQUARES, verify=verify)
    assert_jacobian(lin, jacobian_of_graph(lin))
    model.on = False
    lin = linearize(model, *batch(), SQUARES, verify=verify)
    assert_jacobian(lin, jacobian_of_graph(lin))


def test_an_unannounced_use_in_front_of_announced_ones_is_refused():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        hidden = apply_unannounced(x, m.w) if m.on else F.linear(x, m.v)
        return F.linear(F.linear(hidden.tanh(), m.w.T), m.w)

    model = Function(forward, w=(C, D), v=(C, D))
    model.on = True
    with pytest.raises(CaptureError, match="'w' was used once more"):
        linearize(model, *batch(), SQUARES, verify=False, strict=True)
    assert_jacobian(lin := linearize(model, *batch(), SQUARES, verify=False), jacobian_of_graph(lin))
    model.on = False
    lin = linearize(model, *batch(), SQUARES)
    assert_jacobian(lin, jacobian_of_graph(lin))


def test_an_unannounced_use_of_a_derived_tensors_parameter_is_refused():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, m.w * 2) + (apply_unannounced(x, m.w) if m.on else 0.0)

    model = Function(forward, w=(C, D))
    model.on = False
    assert_jacobian(lin := linearize(model, *batch(), SQUARES), jacobian_of_graph(lin))
    model.on = True
    with pytest.raises(CaptureError, match="'w' was used once more"):
        linearize(model, *batch(), SQUARES, strict=True)
    assert_jacobian(lin := linearize(model, *batch(), SQUARES), jacobian_of_graph(lin))


def test_an_unannounced_use_of_a_derived_tensor_is_refused():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        w = m.w * m.g
        return F.linear(x, w) + (apply_unannounced(x, w) if m.on else 0.0)

    model = Function(forward, w=(C, D), g=())
    model.on = False
    assert_jacobian(lin := linearize(model, *batch(), SQUARES, strict=True), jacobian_of_graph(lin))
    model.on = True
    with pytest.raises(CaptureError, match="'w' was used once more"):
        linearize(model, *batch(), SQUARES, verify=False, strict=True)
    assert_jacobian(lin := linearize(model, *batch(), SQUARES, verify=False), jacobian_of_graph(lin))
    assert lin.escaping == ["w", "g"]


ANNOUNCED = {
    "tied": lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.T) + x * m.p,
    "in place on the input": lambda m, x: F.linear(x, m.w).mul_(m.p[:C]).add_(m.p[:C]),
    "through views of a parameter": lambda m, x: F.linear(x, m.w.view(-1).view(C, D)) * m.p[0],
    "stacked": lambda m, x: torch.stack([F.linear(x, m.w), x[:, :C] * m.p[:C]], 1).flatten(1),
}


@pytest.mark.parametrize("body", ANNOUNCED.values(), ids=ANNOUNCED)
def test_announced_uses_are_told_from_others(body):
    model = Function(body, w=(C, D), p=(D,))
    for _ in range(2):
        x = torch.randn(N, D)
        lin = linearize(model, x, torch.randn_like(model(x)), SQUARES, strict=True)
        assert_jacobian(lin, jacobian_of_graph(lin))


def test_announced_uses_are_told_from_others_under_autocast():
    model = Function(ANNOUNCED["tied"], w=(C, D), p=(D,)).float()
    for _ in range(2):  # the cast of a tied weight is made once and shared
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lin = linearize(model, torch.randn(N, D).float(), torch.randn(N, D).float(), SQUARES, strict=True)
        assert relative_error(lin.jacobian.to_dense(), jacobian_of_graph(lin)) < 0.1


@pytest.mark.parametrize("how", ["a flag", "a mode of a module"])
def test_samples_that_begin_to_influence_each_other_are_noticed(how):
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        output = F.linear(x, m.w).tanh()
        mixed = m.inner.training if how == "a mode of a module" else m.on
        return output - output.mean(0) if mixed else output

    model = Function.of(nn.Identity(), forward, w=(C, D))
    model.on = False
    model.inner.eval()
    for _ in range(3):
        linearize(model, *batch(), SQUARES)
    model.on = True
    model.inner.train()
    for _ in range(2):  # also for whoever goes on after the error
        with pytest.raises(CaptureError, match="do not add up"):
            linearize(model, *batch(), SQUARES)


class HiddenMixing(torch.autograd.Function):
    """Nothing at first; later it mixes samples, in the same graph."""

    mixes = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(0) if HiddenMixing.mixes else gradient


def test_what_changes_without_a_trace_is_noticed_from_time_to_time(monkeypatch):
    model = Function(lambda m, x: HiddenMixing.apply(F.linear(x, m.w)), w=(C, D))

    def noticed(mixes: bool) -> bool:
        monkeypatch.setattr(HiddenMixing, "mixes", mixes)
        try:
            linearize(model, *batch(), SQUARES)
        except CaptureError as error:
            return "do not add up" in str(error)
        return False

    for first, due in ((1, 10), (13, 100)):
        for number in range(first, due):
            assert not noticed(number in (7, 50))
        assert noticed(True), f"batch {due}"
        assert noticed(True), "it is looked for until it is gone"
        assert not noticed(False)


def test_a_batch_of_one_sample_proves_nothing_of_those_that_follow():
    model = Function(lambda m, x: (y := F.linear(x, m.w)) - y.mean(0) + y, w=(C, D))
    x, y = batch()
    for _ in range(20):
        lin = linearize(model, x[:1], y[:1], SQUARES)
        assert_jacobian(lin, jacobian_of_graph(lin))
    with pytest.raises(CaptureError, match="do not add up"):
        linearize(model, x, y, SQUARES)


def count_verifications(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each backward pass that verifies."""
    from lightning_ief.capture import linearization

    seen: list[int] = []
    original = linearization.verify_rows

    def counting(*args, **kwargs):
        seen.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(linearization, "verify_rows", counting)
    return seen


def test_verification_is_rare(monkeypatch):
    seen = count_verifications(monkeypatch)
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Dropout(0.5), nn.Linear(D, C))
    for _ in range(1000):
        linearize(model, *batch(), SQUARES)
    assert len(seen) == 4  # the first, the 10th, the 100th, the 1,000th
    model.eval()
    linearize(model, *batch(), SQUARES)
    linearize(model, *batch(), SQUARES)
    assert len(seen) == 5


def test_models_whose_graph_never_repeats_are_not_verified_for_ever(monkeypatch):
    seen = count_verifications(monkeypatch)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = F.linear(x, m.w)
        for _ in range(m.length):
            y = y.tanh()
        return y

    model = Function(forward, w=(C, D))
    for length in range(1, 31):
        model.length = length
        linearize(model, *batch(), SQUARES)
    assert len(seen) <= 11


def test_verification_can_be_asked_for_and_switched_off(monkeypatch):
    seen = count_verifications(monkeypatch)
    model = nn.Linear(D, C)
    for verify, expected in ((False, 0), (None, 1), (None, 1), (True, 2), (False, 2)):
        linearize(model, *batch(), SQUARES, verify=verify)
        assert len(seen) == expected


# --- autocast and dtypes ----------------------------------------------------------------------------------------------


def small() -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    """Entries of the direction are below what fp16 can hold."""
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C)).float()
    d = {name: 3e-8 * torch.randn_like(p.detach()) for name, p in model.named_parameters()}
    return model, torch.randn(N, D).float(), torch.arange(N) % C, d


def fp16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.float16)


@pytest.mark.parametrize("seen_before", [False, True])
def test_gamma_under_autocast_does_not_depend_on_what_was_seen_before(seen_before):
    model, x, y, d = small()
    objective = objectives.CrossEntropy()
    truth = gamma(linearize(model.double(), x.double(), y, objective), {name: t.double() for name, t in d.items()})
    model.float()
    if seen_before:
        for _ in range(2):
            measure_gammas(model, x, y, objective, [d])
    for _ in range(3):
        with fp16():
            assert relative_error(measure_gammas(model, x, y, objective, [d])[0], truth) < 0.02
            assert relative_error(gamma(linearize(model, x, y, objective), d), truth) < 0.02


def test_models_of_another_dtype_are_known_anew():
    model, x, y, d = small()
    objective = objectives.CrossEntropy()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        lin = linearize(model, x.to(dtype), y, objective)
        truth = per_sample_jacobian(model, x.to(dtype), y, objective)
        assert relative_error(lin.jacobian.to_dense(), truth) < {torch.bfloat16: 0.05}.get(dtype, 1e-5)


# --- forward mode -----------------------------------------------------------------------------------------------------


def test_another_forward_mode_that_comes_later_is_noticed():
    model = switched(lambda m, y: Straight.apply(y), w=(C, D))
    x, y = batch()
    d = {"w": torch.randn(C, D)}

    def change(lin: Linearization, u: Tensor) -> float:
        return relative_error((lin.logit_gradients * u).sum(1), lin.jacobian.to_dense() @ flatten(d))

    for _ in range(2):
        lin = linearize(model, x, y, SQUARES)
        assert change(lin, lin.jvp(d)) < 1e-10
        assert change(lin, push_forward(model, x, y, SQUARES, [d])[1][0]) < 1e-10
    model.on = True
    errors = []
    for _ in range(10):
        lin = linearize(model, x, y, SQUARES)
        assert change(lin, lin.jvp(d)) < 1e-10
        errors.append(change(lin, push_forward(model, x, y, SQUARES, [d])[1][0]))
    assert errors[-1] < 1e-10  # without a graph, from time to time
