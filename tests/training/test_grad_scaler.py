"""fp16 with a GradScaler: what it scales, when it skips, on one rank and on several.

Autocast and GradScaler of the CPU do here what those of a GPU do; the last tests need one.
"""

import math
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import EF, IEF, NaturalGradient, SampledFisher, linearize, objectives
from tests.capture.test_fp16 import data, network
from tests.helpers import Classifier, Configure, relative_error
from tests.ranks import on_ranks

OPTIMIZERS: dict[str, Configure] = {
    "ief": lambda p: IEF(p, lr=0.5, damping=1e-2),
    "ef": lambda p: EF(p, lr=0.05, damping=1e-2),
    "sampled_fisher": lambda p: SampledFisher(p, lr=0.3),
    "natural_gradient": lambda p: NaturalGradient(p, lr=0.1, damping=0.1),
    "natural_gradient, conjugate gradients": lambda p: NaturalGradient(p, lr=0.1, damping=1.0, max_rows=1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


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
