"""Parameters whose use escapes the capture: rows by one backward pass for each sample, equal to the slow truth."""

import gc
import warnings
import weakref
from collections.abc import Callable

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import IEF, directions, gamma, linearize, objectives
from lightning_ief.capture import Linearization
from lightning_ief.capture.types import CaptureError
from tests.helpers import (
    Classifier,
    Custom,
    Function,
    assert_exact,
    assert_jacobian,
    flatten,
    gradient_row,
    jacobian_of_graph,
    per_sample_jacobian,
    random_direction,
    relative_error,
    trainable,
)

N, D, C = 6, 4, 3
SQUARES, ENTROPY = objectives.LeastSquares(), objectives.CrossEntropy()
ESCAPES = "escapes the capture"

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings(f"ignore:.*{ESCAPES}:RuntimeWarning")]


def written(m: nn.Module, x: Tensor) -> Tensor:
    padded = torch.zeros(len(x), D + 1)
    padded[:, :D] = F.linear(x, m.v)
    padded[:, D] = m.p[0]
    return F.linear(padded.tanh(), m.u)


def normalised(m: nn.Module, x: Tensor) -> Tensor:
    return Custom.apply(F.linear(x, m.v).tanh(), m.g * m.w / m.w.norm())


# name: (body, shapes of parameters, those that escape)
MODELS = {
    "last": (lambda m, x: Custom.apply(F.linear(x, m.v).tanh(), m.w), {"w": (C, D), "v": (D, D)}, ["w"]),
    "first": (
        lambda m, x: F.linear(Custom.apply(x, m.w).tanh(), m.v, m.b),
        {"w": (D, D), "v": (C, D), "b": (C,)},
        ["w"],
    ),
    "all": (lambda m, x: Custom.apply(Custom.apply(x, m.v).tanh(), m.w), {"w": (C, D), "v": (D, D)}, ["w", "v"]),
    "beside an announced use": (
        lambda m, x: Custom.apply(F.linear(F.linear(x, m.w), m.v), m.w) + F.linear(x, m.w),
        {"w": (C, D), "v": (D, C)},
        ["w"],
    ),
    "beside a use of a derived tensor": (
        lambda m, x: Custom.apply(F.linear(x, m.v), m.w) + F.linear(x, m.w * m.g),
        {"w": (C, D), "v": (D, D), "g": ()},
        ["w"],
    ),
    "through a derived tensor": (normalised, {"w": (C, D), "v": (D, D), "g": ()}, ["w", "g"]),
    "makes a weight": (
        lambda m, x: F.linear(F.linear(x, m.v).tanh(), m.u + Custom.apply(m.w, m.t), m.b),
        {"w": (C, 2), "t": (D, 2), "u": (C, D), "v": (D, D), "b": (C,)},
        ["w", "t"],
    ),
    "written into a slice": (written, {"p": (2,), "v": (D, D), "u": (C, D + 1)}, ["p"]),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, list[str]]:
    body, shapes, escaping = MODELS[name]
    return Function(body, **shapes), escaping


def batch(samples: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, D), torch.randn(samples, C)


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_exact(name):
    model, escaping = made(name)
    for samples in (N, N + 3, 1):
        lin = assert_exact(model, *batch(samples))
        assert lin.escaping == [each for each in lin.parameters if each in escaping]
    with pytest.raises(CaptureError, match=rf"'{lin.escaping[0]}'.*requires_grad_\(False\)"):
        linearize(model, *batch(), SQUARES, strict=True)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_several_cotangents_are_exact(name):
    model, _ = made(name)
    x, y = batch()
    others = [torch.randn(N, C) for _ in range(2)]
    lin = linearize(model, x, y, SQUARES)
    truth = torch.cat([per_sample_jacobian(model, x, other, SQUARES) for other in others])
    assert relative_error(lin.target_rows(others).to_dense(), truth) < 1e-10
    classes = torch.arange(N) % C
    lin = linearize(model, x, classes, ENTROPY)
    rows, c = lin.hessian_rows()
    fisher = torch.zeros(rows.to_dense().shape[1], rows.to_dense().shape[1])
    for n in range(N):
        z = model(x[n : n + 1])[0]
        of_logits = torch.stack([gradient_row(each, trainable(model), retain_graph=True) for each in z])
        p = z.detach().softmax(0)
        fisher += of_logits.T @ (p.diag() - torch.outer(p, p)) @ of_logits
    assert relative_error(rows.to_dense().T @ rows.to_dense(), fisher) < 1e-10
    gradient = per_sample_jacobian(model, x, classes, ENTROPY).sum(0)
    assert relative_error(flatten(rows.rmatvec(c)), gradient) < 1e-10
    v = random_direction(lin.parameters)
    assert relative_error(flatten(lin.fisher_product(v)), fisher @ flatten(v)) < 1e-10


@pytest.mark.parametrize("name", ["first", "all", "beside an announced use"])
def test_the_graph_is_let_go(name, monkeypatch):
    """Also where the backward pass to the recorded uses does not come by."""

    class Held:
        pass

    held, hide = list[weakref.ref](), Custom.forward

    class Holding(Custom):
        @staticmethod
        def forward(ctx, x, w):
            ctx.held = Held()
            held.append(weakref.ref(ctx.held))
            return hide(ctx, x, w)

    model, _ = made(name)
    monkeypatch.setitem(globals(), "Custom", Holding)
    x, y = batch()
    linearize(model, x, y, SQUARES)
    held.clear()
    lin = linearize(model, x, y, SQUARES)
    lin.backward()
    gc.collect()
    assert held and all(each() is None for each in held)
    assert_jacobian(lin, per_sample_jacobian(model, x, y, SQUARES))
    with pytest.raises(CaptureError, match="let go"):
        lin.target_rows([y])
    kept = linearize(model, x, y, SQUARES)
    kept.backward(retain_graph=True)
    assert relative_error(kept.target_rows([y]).to_dense(), per_sample_jacobian(model, x, y, SQUARES)) < 1e-10


def dense_ief(truth: Tensor, s: Tensor, damping: float) -> Tensor:
    return truth.T @ torch.linalg.solve(truth @ truth.T + damping * torch.eye(len(truth)), s)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_ief_is_the_dense_formula(name, accumulate):
    model, _ = made(name)
    x, y = batch()
    truth, residuals = per_sample_jacobian(model, x, y, SQUARES), model(x).detach() - y
    before = flatten({n: p.detach().clone() for n, p in model.named_parameters()})
    optimizer = IEF(model.parameters(), lr=0.5, damping=1e-3, accumulate=accumulate)
    for part in torch.arange(N).chunk(accumulate):
        lin = linearize(model, x[part], y[part], SQUARES)
        if optimizer.collect(lin):
            optimizer.step()
    d = dense_ief(truth, residuals.square().sum(1), 1e-3)
    assert relative_error(flatten({n: p.detach() for n, p in model.named_parameters()}), before - 0.5 * d) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_gamma_is_the_dense_formula(name):
    model, _ = made(name)
    x, y = batch()
    truth = per_sample_jacobian(model, x, y, SQUARES)
    d = random_direction(trainable(model))
    for _ in range(2):
        lin = linearize(model, x, y, SQUARES)
        u = torch.stack(
            [
                torch.stack([gradient_row(z, trainable(model), retain_graph=True) for z in model(x[n : n + 1])[0]])
                @ flatten(d)
                for n in range(N)
            ]
        )
        assert relative_error(lin.jvp(d), u) < 1e-10
        expected = u.square().sum().sqrt() / (truth.sum(0) @ flatten(d)).abs()
        assert relative_error(gamma(lin, d), expected) < 1e-10


class OnceDifferentiable(Custom):
    """Without a second derivative."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return Custom.backward(ctx, gradient)


def test_without_a_second_derivative_there_are_rows_but_no_gamma():
    model, x, y = Function(lambda m, x: OnceDifferentiable.apply(x, m.w).tanh(), w=(C, D)), *batch()
    lin = linearize(model, x, y, SQUARES)
    assert_jacobian(lin, per_sample_jacobian(model, x, y, SQUARES))
    with pytest.raises(CaptureError, match="no derivative along a direction"):
        lin.jvp({"w": torch.randn(C, D)})


def test_gradients_that_are_written_to_by_a_backward_pass():
    class Writing(Custom):
        @staticmethod
        def backward(ctx, gradient):
            found = Custom.backward(ctx, gradient)
            gradient.zero_()
            return found

    model, x, y = Function(lambda m, x: Writing.apply(x, m.w), w=(C, D)), *batch()
    truth = per_sample_jacobian(model, x, y, SQUARES)
    assert relative_error(linearize(model, x, y, SQUARES).jacobian.to_dense(), truth) < 1e-10


# --- precision and scales ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["first", "beside an announced use"])
def test_a_loss_scale_and_tiny_gradients_change_no_digit(name):
    model, _ = made(name)
    x, y = batch()
    y = model(x).detach() + y * torch.logspace(0, -60, N)[:, None]
    truth = linearize(model, x, y, SQUARES).jacobian.to_dense()
    scaled = linearize(model, x, y, SQUARES, loss_scale=torch.tensor(1024.0)).jacobian.to_dense()
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(scaled, truth, strict=True))
    x, y = x.float(), (model.float()(x.float()).detach() * 0).float()
    lin = linearize(model, x, y, SQUARES)
    assert lin.jacobian.to_dense().dtype == torch.float32
    exact = per_sample_jacobian(model.double(), x.double(), y.double(), SQUARES)
    assert relative_error(lin.jacobian.to_dense(), exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The only parameter escapes, so that no recorded use tells the dtype."""

    class Cast(Custom):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return F.linear(x, w).float()

        @staticmethod
        def backward(ctx, gradient):
            x, w = ctx.saved_tensors
            return gradient @ w, gradient.T @ x

    model, x, y = Function(lambda m, x: Cast.apply(x, m.w), w=(C, D)).float(), *(t.float() for t in batch())
    with torch.autocast("cpu", dtype=dtype):
        lin = linearize(model, x, y, SQUARES, loss_scale=torch.tensor(64.0))
    assert lin.in_fp16 == (dtype == torch.float16)
    assert lin.autocasts == {dtype}
    assert relative_error(lin.jacobian.to_dense(), per_sample_jacobian(model, x, y, SQUARES)) < 0.05


# --- what is said -----------------------------------------------------------------------------------------------------


def said(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in found if ESCAPES in str(each.message)]


def test_one_warning_names_the_parameters_and_the_cost():
    model, _ = made("makes a weight")
    (message,) = said(lambda: [linearize(model, *batch(), SQUARES) for _ in range(3)])
    for part in ("Function", "'w', 't' ", "custom autograd function", "one backward pass for each sample", f"N = {N}"):
        assert part in message
    for part in (f"N · {2 * (C + D)} numbers", "MiB", "requires_grad_(False)", "strict=True", "strict_capture"):
        assert part in message
    model.eval()  # another kind of batch
    assert said(lambda: linearize(model, *batch(), SQUARES)) == []
    assert len(said(lambda: linearize(made("makes a weight")[0], *batch(), SQUARES))) == 1
    assert said(lambda: linearize(nn.Linear(D, C), *batch(), SQUARES)) == []


def test_a_parameter_that_escapes_later_is_named_then():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return Custom.apply(x, m.w) + (Custom.apply if m.on else F.linear)(x, m.v)

    model = Function(forward, w=(C, D), v=(C, D))
    model.on = False
    assert "'w' " in said(lambda: assert_exact(model, *batch()))[0]
    model.on = True
    (message,) = said(lambda: [assert_exact(model, *batch()) for _ in range(2)])
    assert "'v' " in message and "'w'" not in message
    model.on = False
    assert linearize(model, *batch(), SQUARES).escaping == ["w"]


def test_frozen_parameters_and_those_not_asked_for_cost_nothing():
    model, _ = made("beside an announced use")
    lin = linearize(model, *batch(), SQUARES, parameters={"v": model.v}, strict=True)
    assert lin.escaping == []
    model.w.requires_grad_(False)
    assert linearize(model, *batch(), SQUARES, strict=True).escaping == []
    assert_exact(model, *batch())


# --- samples that influence each other --------------------------------------------------------------------------------


class Mixing(Custom):
    """In which samples influence each other, as `how` says."""

    how = "mean"

    @staticmethod
    def forward(ctx, x, w):
        y = Custom.forward(ctx, x, w)
        others = {
            "mean": lambda: y.mean(0),
            "largest": lambda: y.amax(0),
            "neighbour": lambda: y.roll(1, 0),
            "neighbour behind": lambda: y.roll(-1, 0),
            "a little": lambda: 1e-3 * y.roll(1, 0),
            "number": lambda: y / len(y),  # of samples
        }
        return y + others[Mixing.how]() if Mixing.how in others else y

    @staticmethod
    def backward(ctx, gradient):
        if Mixing.how == "backwards":
            gradient = gradient - gradient.mean(0)
        return Custom.backward(ctx, gradient)


def mixing(dropout: float) -> nn.Module:
    model = Function.of(
        nn.Dropout(dropout), lambda m, x: Mixing.apply(m.inner(F.linear(x, m.v)), m.w), w=(C, D), v=(D, D)
    )
    return model.train()


HOW = ["mean", "largest", "neighbour", "neighbour behind", "a little", "backwards"]


# With random numbers, batches of another size can't be compared: docs/limits.md.
@pytest.mark.parametrize(("how", "dropout"), [*((how, p) for how in HOW for p in (0.0, 0.5)), ("number", 0.0)])
@pytest.mark.parametrize("samples", [2, 3, N, 20])
def test_samples_that_influence_each_other_are_refused(how, samples, dropout, monkeypatch):
    monkeypatch.setattr(Mixing, "how", how)
    model = mixing(dropout).requires_grad_(False)
    model.w.requires_grad_(True)  # the only one, which autograd's own rows say nothing about
    x, y = batch(samples)
    before = torch.get_rng_state()
    with pytest.raises(CaptureError, match=r"depend on the others of its batch.*'w'|do not add up.*'w'"):
        linearize(model, x, y, SQUARES)
    assert torch.equal(before, torch.get_rng_state())
    assert linearize(model, *batch(samples), SQUARES, verify=False).escaping == ["w"]  # for those who know better
    monkeypatch.setattr(Mixing, "how", "not at all")
    for _ in range(3):
        lin = linearize(model, *batch(samples), SQUARES, verify=True)
        assert_jacobian(lin, jacobian_of_graph(lin))


def test_it_is_looked_for_again(monkeypatch):
    monkeypatch.setattr(Mixing, "how", "not at all")
    model = mixing(0.0)
    for _ in range(9):
        linearize(model, *batch(1), SQUARES)
    monkeypatch.setattr(Mixing, "how", "mean")
    with pytest.raises(CaptureError, match="depend on the others"):  # one sample has proven nothing
        linearize(model, *batch(), SQUARES)
    monkeypatch.setattr(Mixing, "how", "not at all")
    for _ in range(100 - 11):
        linearize(model, *batch(), SQUARES)
    monkeypatch.setattr(Mixing, "how", "mean")
    with pytest.raises(CaptureError, match="depend on the others"):  # the hundredth
        linearize(model, *batch(), SQUARES)


def test_whatever_parameters_are_called_and_under_no_grad():
    model, _ = made("beside an announced use")
    x, y = batch()
    with torch.no_grad():
        lin = linearize(model, x, y, SQUARES, parameters={"a": model.w, "b": model.v})
    assert lin.escaping == ["a"]
    assert relative_error(lin.jacobian.to_dense(), per_sample_jacobian(model, x, y, SQUARES)) < 1e-10


def test_chance_that_can_not_be_repeated_is_refused():
    generator = torch.Generator().manual_seed(0)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return Custom.apply(x + torch.randn(x.shape, generator=generator), m.w)

    with pytest.raises(CaptureError, match="chance that is not torch's"):
        linearize(Function(forward, w=(C, D)), *batch(), SQUARES)


def test_buffers_and_random_numbers_are_those_of_one_forward_pass():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        m.passes += 1
        return Custom.apply(m.inner(x), m.w)

    model = Function.of(nn.Dropout(0.5), forward, w=(C, D))
    model.register_buffer("passes", torch.zeros(()))
    x, y = batch()
    state = torch.get_rng_state()
    lin = linearize(model, x, y, SQUARES)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    assert model.passes == 1
    assert torch.equal(lin.logits, model(x))
    assert torch.equal(after, torch.get_rng_state())


# --- adapters of PEFT -------------------------------------------------------------------------------------------------


def adapter(name: str) -> nn.Module:
    import peft

    options = {
        "LoHa": {"r": 2},
        "OFT": {"r": 0, "oft_block_size": 2},
        "FourierFT": {"n_frequency": 5},
    }[name]
    net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C))
    config = getattr(peft, f"{name}Config")(target_modules=["0", "2"], modules_to_save=None, **options)
    model = peft.get_peft_model(net, config).double()
    for p in trainable(model).values():
        p.data.add_(torch.randn_like(p), alpha=0.05)
    return model


def in_its_own_dtype(self: nn.Module, adapter: str) -> Tensor:
    """FourierFT computes in float32 whatever the model's precision; the truth needs float64."""
    spectrum, (rows, columns) = self.fourierft_spectrum[adapter], self.indices[adapter]
    dense = torch.zeros(self.out_features, self.in_features, dtype=spectrum.dtype)
    dense[rows, columns] = spectrum
    return torch.fft.ifft2(dense).real * self.fourierft_scaling[adapter]


@pytest.mark.parametrize("name", ["LoHa", "OFT", "FourierFT"])
def test_adapters_of_peft_are_exact(name, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.fourierft.layer.FourierFTLayer.get_delta_weight", in_its_own_dtype)
    model = adapter(name).train()
    lin = assert_exact(model, torch.randn(N, D), torch.arange(N) % C, ENTROPY)
    assert lin.escaping
    x, y = torch.randn(N, D), torch.arange(N) % C
    truth = per_sample_jacobian(model, x, y, ENTROPY)
    lin = linearize(model, x, y, ENTROPY)
    expected = dense_ief(truth, lin.logit_gradient_norms, 1e-3)
    assert relative_error(flatten(directions.ief(lin, 1e-3)), expected) < 1e-8
    with pytest.raises(CaptureError, match="announced no use"):
        linearize(model, x, y, ENTROPY, strict=True)


# --- the Trainer ------------------------------------------------------------------------------------------------------


def fitted(strict: bool) -> Linearization:
    torch.manual_seed(0)
    net = Function(lambda m, x: Custom.apply(F.linear(x, m.v).tanh(), m.w), w=(3, 9), v=(9, 6))
    model = Classifier(lambda p: IEF(p, lr=0.5, damping=1e-3), net)
    model.strict_capture = strict
    x, y = torch.randn(16, 6), torch.arange(16) % 3
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    trainer = L.Trainer(accelerator="cpu", enable_model_summary=False, **options)
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=8))
    truth = Classifier(lambda p: torch.optim.SGD(p, lr=1.0), net)
    truth.load_state_dict(theta)
    for part in torch.arange(16).chunk(2):
        rows = per_sample_jacobian(truth, x[part], y[part], ENTROPY)
        s = ENTROPY.gradient(truth(x[part]).detach(), y[part]).square().sum(1)
        d = 0.5 * dense_ief(rows, s, 1e-3)
        for p, entry in zip(truth.parameters(), d.split([p.numel() for p in truth.parameters()]), strict=True):
            p.data -= entry.view_as(p)
    assert relative_error(flatten(dict(model.named_parameters())), flatten(dict(truth.named_parameters()))) < 1e-10


def test_the_mixin_trains_and_says_so_once():
    assert len(said(lambda: fitted(strict=False))) == 1


def test_the_mixin_refuses_if_it_is_told_to():
    with pytest.raises(CaptureError, match=r"'net.w' gets a gradient, but announced no use"):
        fitted(strict=True)
