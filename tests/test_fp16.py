"""fp16 with a GradScaler: what it scales, when it skips, on one rank and on several.

Autocast and GradScaler of the CPU do here what those of a GPU do; the last tests need one.
"""

import copy
import math
import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import EF, IEF, NaturalGradient, SampledFisher, linearize, objectives
from lightning_ief.capture.linearization import push_forward
from lightning_ief.capture.types import CaptureError
from lightning_ief.directions import ief
from lightning_ief.indicators import gamma, measure_gammas
from tests.helpers import Classifier, Configure, flatten, relative_error
from tests.ranks import on_ranks

OPTIMIZERS: dict[str, Configure] = {
    "ief": lambda p: IEF(p, lr=0.5, damping=1e-2),
    "ef": lambda p: EF(p, lr=0.05, damping=1e-2),
    "sampled_fisher": lambda p: SampledFisher(p, lr=0.3),
    "natural_gradient": lambda p: NaturalGradient(p, lr=0.1, damping=0.1),
    "natural_gradient, conjugate gradients": lambda p: NaturalGradient(p, lr=0.1, damping=1.0, max_rows=1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))


class Watch(L.Callback):
    """Notes the loss scale and the parameters before the first batch and after every batch."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.scales: list[float] = []

    def note(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.weights.append(nn.utils.parameters_to_vector(module.parameters()).detach().clone())
        self.scales.append(trainer.precision_plugin.scaler.get_scale())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.note(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.note(trainer, pl_module)


def data(samples: int = 24) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(samples, 6), torch.randint(3, (samples,))


def fit(
    configure: Configure,
    inputs: Tensor | None = None,
    ranks: int = 1,
    rank: int = 0,
    callbacks: Any = (),
    ckpt_path: Any = None,
    batches: Any = None,
    **scaler: Any,
) -> tuple[Watch, list[str]]:
    """Train for one epoch of 6 batches of 4 samples, shared among the ranks."""
    watch = Watch()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **scaler))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[plugin],
        callbacks=[watch, *callbacks],
    )
    x, y = data()
    own = TensorDataset((x if inputs is None else inputs)[rank::ranks], y[rank::ranks])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = DataLoader(batches, None) if batches else DataLoader(own, 4 // ranks)
        trainer.fit(Classifier(configure, network()), loader, ckpt_path=ckpt_path)
    return watch, [str(w.message) for w in caught if "kipped a step" in str(w.message)]


# --------------------------------------------------------------------------- scaled backward passes


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


# --------------------------------------------------------------------------- refusals


def test_a_scaler_that_is_switched_off_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="precision='16-mixed'.*with a GradScaler"):
        fit(OPTIMIZERS["ief"], enabled=False)


def test_parameters_in_fp16_are_refused() -> None:
    def configure(parameters: Any) -> torch.optim.Optimizer:
        held = list(parameters)
        for parameter in held:
            parameter.data = parameter.data.half()
        return IEF(held, lr=0.5, damping=1e-2)

    with pytest.raises(MisconfigurationException, match="Parameter 'net.0.weight' is fp16.*model.float"):
        fit(configure, init_scale=256.0)


def test_a_model_with_an_autocast_of_its_own_is_refused() -> None:
    class Own(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.float16):
                return self.net(x)

    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match="Own computes in fp16 under an autocast of its own"):
        trainer.fit(Own(OPTIMIZERS["ief"], network()), DataLoader(TensorDataset(*data()), 4))


def test_an_optimizer_whose_step_calls_that_of_its_base_class() -> None:
    class Counting(IEF):
        def step(self, closure: Any = None, **options: Any) -> Any:
            return super().step(closure, **options)

    IEF([nn.Parameter(torch.ones(1))])  # torch wraps the step of each class of which there is an optimizer
    watch, _ = fit(lambda p: Counting(p, lr=0.5, damping=1e-2), init_scale=16.0, growth_interval=2)
    assert watch.scales == [16.0, 16.0, 32.0, 32.0, 64.0, 64.0, 128.0]


# --------------------------------------------------------------------------- overflow


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_overflow_skips_the_step_and_lowers_the_scale(name: str) -> None:
    watch, messages = fit(OPTIMIZERS[name], init_scale=2.0**20)
    skipped = [torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:], strict=False)]
    lowered = [b == a / 2 for a, b in zip(watch.scales, watch.scales[1:], strict=False)]
    assert skipped == lowered
    assert skipped[0] and not all(skipped)
    assert watch.weights[-1].isfinite().all()
    if name != "adamw":
        assert len(messages) == sum(skipped)
        assert "not finite at a loss scale of 1.04858e+06, which is lowered now" in messages[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_scale_grows_while_steps_are_finite(name: str) -> None:
    watch, messages = fit(OPTIMIZERS[name], init_scale=16.0, growth_interval=2)
    assert watch.scales == [16.0, 16.0, 32.0, 32.0, 64.0, 64.0, 128.0]
    assert not messages
    assert all(not torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:], strict=False))


def poisoned() -> Tensor:
    """An Inf in sample 2 of the second batch: of rank 0, where there are two."""
    inputs = data()[0]
    inputs[6, 0] = math.inf
    return inputs


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])
def test_losses_that_are_not_finite_leave_the_scale(name: str) -> None:
    """They come from the forward pass. A bad sample in each epoch would bring the scale down to nothing."""
    watch, messages = fit(OPTIMIZERS[name], poisoned(), init_scale=256.0)
    assert set(watch.scales) == {256.0}
    assert torch.equal(watch.weights[1], watch.weights[2])
    assert len(messages) == 1 and "samples [2] of the batch" in messages[0]


def test_a_batch_without_any_gradient_leaves_the_scale() -> None:
    def configure(parameters: Any) -> torch.optim.Optimizer:
        weight = list(parameters)[0]  # whose inputs are zero
        return IEF([weight], lr=0.5, damping=1e-2)

    watch, messages = fit(configure, torch.zeros(24, 6), init_scale=256.0)
    assert set(watch.scales) == {256.0}
    assert len(messages) == 6 and "gradients of all 4 samples of the batch are zero" in messages[0]


def test_a_window_of_micro_batches_is_skipped_as_a_whole() -> None:
    watch, messages = fit(lambda p: IEF(p, lr=0.5, damping=1e-2, accumulate=3), poisoned(), init_scale=256.0)
    assert torch.equal(watch.weights[0], watch.weights[3])
    assert not torch.equal(watch.weights[3], watch.weights[6])
    assert len(messages) == 1
    watch, messages = fit(lambda p: IEF(p, lr=0.5, damping=1e-2, accumulate=3), init_scale=2.0**20)
    assert watch.scales == [2.0**20] * 3 + [2.0**19] * 3 + [2.0**18]
    assert all(torch.equal(watch.weights[0], weights) for weights in watch.weights)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_micro_batches_are_one_batch(accumulate: int) -> None:
    """The same samples, in one batch of 12 or in three of 4, up to the rounding of fp16."""
    start = nn.utils.parameters_to_vector(network().double().parameters())
    net, (x, y) = network().double(), data()
    step = IEF(net.parameters(), lr=0.5, damping=1e-2)
    for at in (0, 4 * accumulate) if accumulate == 3 else range(0, 24, 4):
        part = slice(at, at + 4 * accumulate)
        step.step(linearization=linearize(net, x[part].double(), y[part], objectives.CrossEntropy()))
    truth = nn.utils.parameters_to_vector(net.parameters()) - start
    watch, _ = fit(lambda p: IEF(p, lr=0.5, damping=1e-2, accumulate=accumulate), init_scale=256.0)
    assert relative_error(watch.weights[-1].double() - start, truth) < 0.02


class Steep(torch.autograd.Function):
    """The identity, whose gradient is infinite for samples that begin with a large number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mark: Tensor) -> Tensor:
        ctx.save_for_backward(mark)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mark,) = ctx.saved_tensors
        return gradient * torch.where(mark > 50, 2.0**12, 1.0).to(gradient.dtype)[:, None], None


@pytest.mark.parametrize("sync", ["global", "local"])
def test_overflow_on_one_rank_skips_the_step_on_all(sync: Any) -> None:
    """Rank 1's gradients alone leave the range of fp16, in the second batch."""
    inputs = 0.05 * data()[0]
    inputs[7] *= 2000  # the second of rank 1's second batch

    def work(rank: int) -> tuple[list[Tensor], list[float], list[str]]:
        watch, messages = fit(lambda p: IEF(p, lr=0.1, damping=1e-2, sync=sync), inputs, 2, rank, init_scale=2.0**13)
        return watch.weights, watch.scales, messages

    original = Classifier.forward

    def steep(self: Classifier, x: Tensor) -> Tensor:
        return Steep.apply(original(self, x), x.abs().amax(1))

    Classifier.forward = steep
    try:
        results = on_ranks(2, work)
    finally:
        Classifier.forward = original
    for weights, scales, messages in results:
        assert scales == [*[2.0**13] * 2, *[2.0**12] * 5]
        assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3])
        assert len(messages) == 1
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][0], strict=True))


def test_a_rank_without_samples_follows() -> None:
    """From its first batch on, on which its own GradScaler sees no loss at all."""
    x, y = data()

    def work(rank: int) -> tuple[list[Tensor], list[float]]:
        sizes = [(4, 0), (3, 1), (0, 4)]
        batches = [(x[4 * k :][: n[0]], y[4 * k :][: n[0]]) for k, n in enumerate(sizes)]
        if rank == 1:
            batches = [(x[4 * k + n[0] : 4 * k + 4], y[4 * k + n[0] : 4 * k + 4]) for k, n in enumerate(sizes)]
        watch, _ = fit(OPTIMIZERS["ief"], ranks=2, rank=rank, batches=batches, init_scale=16.0, growth_interval=2)
        return watch.weights, watch.scales

    alone, _ = fit(OPTIMIZERS["ief"], batches=[(x[k : k + 4], y[k : k + 4]) for k in (0, 4, 8)], init_scale=16.0)
    for weights, scales in on_ranks(2, work):
        assert scales == [16.0, 16.0, 32.0, 32.0]
        for ours, theirs in zip(weights[1:], alone.weights[1:], strict=True):
            assert relative_error(ours - weights[0], theirs - weights[0]) < 1e-2


def test_a_resumed_run_has_the_scale_of_its_checkpoint(tmp_path: Any) -> None:
    save = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    whole, _ = fit(OPTIMIZERS["ief"], callbacks=[save], init_scale=16.0, growth_interval=2)
    resumed, _ = fit(OPTIMIZERS["ief"], ckpt_path=tmp_path / "step=4.ckpt", init_scale=2.0, growth_interval=2)
    assert resumed.scales == whole.scales[4:] == [64.0, 64.0, 128.0]
    assert all(torch.equal(a, b) for a, b in zip(resumed.weights, whole.weights[4:], strict=True))


# --------------------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_gpu(name: str) -> None:
    watch = Watch()
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        precision="16-mixed",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    trainer.fit(Classifier(OPTIMIZERS[name], network()), DataLoader(TensorDataset(*data()), 4))
    skipped = [torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:], strict=False)]
    assert skipped == [b == a / 2 for a, b in zip(watch.scales, watch.scales[1:], strict=False)]
    assert not skipped[-1] and watch.weights[-1].isfinite().all()
