"""fp16 with a GradScaler: what it scales, when it skips, on one rank and on several.

Autocast and GradScaler of the CPU do here what those of a GPU do; the last tests need one.
"""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import EF, IEF, NaturalGradient, NaturalGradientMixin, SampledFisher, linearize, objectives
from lightning_ief.directions import ief
from lightning_ief.indicators import gamma
from tests.helpers import flatten, relative_error
from tests.ranks import on_ranks

Configure = Callable[[Any], torch.optim.Optimizer]

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


class Classifier(NaturalGradientMixin, L.LightningModule):
    def __init__(self, configure: Configure) -> None:
        super().__init__()
        self.net = network()
        self.objective = objectives.CrossEntropy()
        self.configure = configure

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.configure(self.parameters())


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
        trainer.fit(Classifier(configure), loader, ckpt_path=ckpt_path)
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

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.depth = depth
        self.last = nn.Linear(8, 3)

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
def test_losses_that_are_not_finite_lower_the_scale(name: str) -> None:
    watch, messages = fit(OPTIMIZERS[name], poisoned(), init_scale=256.0)
    assert watch.scales == [256.0, 256.0, *[128.0] * 5]
    assert torch.equal(watch.weights[1], watch.weights[2])
    assert len(messages) == 1 and "samples [2] of the batch" in messages[0]


def test_a_batch_without_any_gradient_leaves_the_scale() -> None:
    watch, messages = fit(lambda p: IEF(p, lr=0.0, damping=1e-2), torch.zeros(24, 6), init_scale=256.0)
    assert set(watch.scales) == {256.0} and not messages


def test_a_window_of_micro_batches_is_skipped_as_a_whole() -> None:
    watch, messages = fit(lambda p: IEF(p, lr=0.5, damping=1e-2, accumulate=3), poisoned(), init_scale=256.0)
    assert watch.scales == [*[256.0] * 3, *[128.0] * 4]
    assert torch.equal(watch.weights[0], watch.weights[3])
    assert not torch.equal(watch.weights[3], watch.weights[6])
    assert len(messages) == 1


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
    trainer.fit(Classifier(OPTIMIZERS[name]), DataLoader(TensorDataset(*data()), 4))
    skipped = [torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:], strict=False)]
    assert skipped == [b == a / 2 for a, b in zip(watch.scales, watch.scales[1:], strict=False)]
    assert not skipped[-1] and watch.weights[-1].isfinite().all()
