"""The mixin and the optimizers under the Trainer."""

import warnings
from itertools import count

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import (
    EF,
    IEF,
    GammaIndicators,
    NaturalGradient,
    NaturalGradientMixin,
    SampledFisher,
    StepTiming,
    directions,
    gamma,
    linearize,
    objectives,
)
from tests.helpers import flatten, relative_error


class Classifier(NaturalGradientMixin, L.LightningModule):
    def __init__(self, optimizer, scheduler=None, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()
        self.objective = objectives.CrossEntropy()
        self.make = optimizer, scheduler

    def forward(self, x):
        return self.net(x)

    def configure_optimizers(self):
        optimizer = self.make[0](self.parameters())
        if self.make[1] is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make[1](optimizer)}


def batches(samples=16, size=4):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(inputs, torch.arange(samples) % 3), batch_size=size)


def trainer(**options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    return L.Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options)


@pytest.mark.parametrize(
    ("optimizer", "direction"),
    [
        (lambda p: IEF(p, lr=0.5, damping=1e-3), lambda lin: directions.ief(lin, 1e-3)),
        (lambda p: EF(p, lr=0.5, damping=1e-3), lambda lin: directions.ef(lin, 1e-3)),
        (lambda p: NaturalGradient(p, lr=0.5, damping=1e-1), lambda lin: directions.natural_gradient(lin, 1e-1)),
        (
            lambda p: SampledFisher(p, lr=0.5, damping=1e-1, num_samples=2),
            lambda lin: directions.sampled_fisher(lin, 1e-1, 2, torch.Generator().manual_seed(0)),
        ),
        (lambda p: torch.optim.SGD(p, lr=2.0), directions.sgd),  # 0.5 × 4: the mean gradient of 4 samples
    ],
)
def test_step_is_along_the_direction(optimizer, direction):
    model, loader = Classifier(optimizer), batches(samples=4)
    before = flatten({n: p.detach().clone() for n, p in model.named_parameters()})
    d = flatten(direction(linearize(model, *next(iter(loader)), model.objective)))
    fit = trainer()
    fit.fit(model, loader)
    after = flatten({n: p.detach() for n, p in model.named_parameters()})
    assert relative_error(after, before - 0.5 * d) < 1e-10
    assert fit.global_step == 1


def test_step_in_mixed_precision():
    """The step of bf16-mixed is that of full precision, up to bf16's three digits."""
    model, loader = Classifier(lambda p: IEF(p, lr=0.5, damping=1e-1)), batches(samples=4)
    model, loader.dataset.tensors = model.float(), (loader.dataset.tensors[0].float(), loader.dataset.tensors[1])
    before = flatten({n: p.detach().clone() for n, p in model.named_parameters()})
    d = flatten(directions.ief(linearize(model, *next(iter(loader)), model.objective), 1e-1))
    trainer(precision="bf16-mixed").fit(model, loader)
    step = before - flatten({n: p.detach() for n, p in model.named_parameters()})
    assert 1e-6 < relative_error(step, 0.5 * d) < 0.02


@pytest.mark.parametrize("optimizer", [IEF, lambda p: torch.optim.SGD(p, lr=0.1)])
def test_non_finite_inputs_skip_the_step(optimizer):
    model, loader = Classifier(optimizer), batches(samples=4)
    loader.dataset.tensors[0][2, 1] = float("nan")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.warns(RuntimeWarning, match=r"samples \[2\]"):
        trainer().fit(model, loader)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ({"gradient_clip_val": 1.0}, "max_norm="),
        ({"accumulate_grad_batches": 2}, "accumulate=2"),
    ],
)
def test_trainer_options_with_another_place_are_refused(option, hint):
    with pytest.raises(MisconfigurationException, match=hint):
        trainer(**option).fit(Classifier(IEF), batches())


def test_python_refuses_a_mixin_behind_lightning_module():
    with pytest.raises(TypeError, match="consistent method resolution"):
        type("Wrong", (L.LightningModule, NaturalGradientMixin), {})


def test_the_mixin_is_a_lightning_module():
    class Alone(NaturalGradientMixin):
        def __init__(self):
            super().__init__()
            self.inner = Classifier(None).net
            self.objective = objectives.CrossEntropy()

        def forward(self, x):
            return self.inner(x)

        def configure_optimizers(self):
            return IEF(self.parameters())

    models = Classifier(IEF), Alone()
    for model in models:
        trainer().fit(model, batches())
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_callbacks_that_a_subclass_drops_are_called():
    class Dropping(Classifier):
        def configure_callbacks(self):
            return []

    def scheduler(optimizer):
        return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}

    fit = trainer()
    fit.fit(Dropping(IEF, scheduler), batches())
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.5**4
    with pytest.raises(MisconfigurationException, match="accumulate=2"):
        trainer(accumulate_grad_batches=2).fit(Dropping(IEF), batches())


@pytest.mark.parametrize("optimizer", [IEF, lambda p: torch.optim.SGD(p, lr=0.1)])
@pytest.mark.parametrize("body", ["returns a loss", "optimizes", "steps by hand", "comes first among the bases"])
def test_a_training_step_that_trains_nothing_is_announced(body, optimizer):
    """With an optimizer of this package, whose users expect no loss to train by itself, after the first batch."""

    class Own(Classifier):
        def training_step(self, batch, batch_idx):
            if body == "optimizes":
                return self.optimize(*batch).mean()
            loss = self.objective.losses(self(batch[0]), batch[1]).mean()
            if body == "steps by hand":
                inner = self.optimizers()
                if optimizer is IEF:
                    inner.step(linearization=linearize(self, *batch, self.objective))
                else:
                    self.manual_backward(loss)
                    inner.step()
            return loss

    model = Own(optimizer)
    if body == "comes first among the bases":
        own = {"configure_optimizers": lambda self: optimizer(self.parameters())}
        model = type("Own", (Automatic, NaturalGradientMixin), own)()
    trains_nothing = body in ("returns a loss", "comes first among the bases")
    message = "Own.training_step has taken no step"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if trains_nothing and optimizer is IEF:
            with pytest.raises(MisconfigurationException, match=message):
                trainer(max_epochs=1).fit(model, batches())
            return
        trainer().fit(model, batches())
    assert len([w for w in caught if message in str(w.message)]) == trains_nothing


def test_callbacks_of_a_subclass_are_kept():
    class Adding(Classifier):
        def configure_callbacks(self):
            return [*super().configure_callbacks(), hooks]

    hooks = Hooks()
    trainer().fit(Adding(IEF), batches(samples=4))
    assert hooks.seen == ["before backward", "after backward", "step"]


def test_batches_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="unpack_batch"):
        trainer().fit(Classifier(IEF), DataLoader(torch.randn(4, 6)))


class Hooks(L.Callback):
    def __init__(self):
        self.seen = []

    def on_before_backward(self, *_):
        self.seen.append("before backward")

    def on_after_backward(self, *_):
        self.seen.append("after backward")

    def on_before_optimizer_step(self, *_):
        self.seen.append("step")


def test_hooks_fire():
    hooks = Hooks()
    trainer(callbacks=[hooks]).fit(Classifier(IEF), batches(samples=4))
    assert hooks.seen == ["before backward", "after backward", "step"]


@pytest.mark.parametrize("optimizer", [IEF, lambda p: SampledFisher(p, lr=0.1, damping=1e-1)])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, optimizer):
    straight = Classifier(optimizer, dropout=0.0)
    trainer(max_epochs=3).fit(straight, batches())
    first = trainer(max_epochs=1)
    first.fit(Classifier(optimizer), batches())
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Classifier(optimizer)
    trainer(max_epochs=3).fit(resumed, batches(), ckpt_path=tmp_path / "one.ckpt")
    for (_, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b)


def test_callbacks_leave_the_run_as_it_is_and_log_gamma():
    plain = Classifier(IEF, dropout=0.3)
    trainer(max_epochs=2).fit(plain, batches())
    watched = Classifier(IEF, dropout=0.3)
    indicators = GammaIndicators(["sgd", "ief"], damping=1e-3, batch_size=16)
    fit = trainer(max_epochs=2, callbacks=[indicators, StepTiming()])
    fit.fit(watched, batches())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    # All 16 samples are one batch, in whatever order: γ can be computed by hand.
    lin = linearize(watched.eval(), *batches().dataset.tensors, watched.objective)
    for name, d in {"sgd": directions.sgd(lin), "ief": directions.ief(lin, 1e-3)}.items():
        assert fit.callback_metrics[f"gamma/{name}"].item() == pytest.approx(float(gamma(lin, d)), rel=1e-5)
    ratio = fit.callback_metrics["gamma/ief"] / fit.callback_metrics["gamma/sgd"]
    assert fit.callback_metrics["gamma_relative/ief"].item() == pytest.approx(ratio.item(), rel=1e-5)
    phases = [fit.callback_metrics[f"timing/{phase}_ms"].item() for phase in ("forward", "backward", "update")]
    assert sum(phases) == pytest.approx(fit.callback_metrics["timing/step_ms"].item(), rel=1e-5)
    assert min(phases) > 0


class Automatic(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 3).double()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_indicators_of_an_ordinary_module():
    adapted = GammaIndicators(["ief"], objective=objectives.CrossEntropy(), unpack_batch=tuple)
    fit = trainer(callbacks=[adapted])
    fit.fit(Automatic(), batches())
    assert fit.callback_metrics["gamma/ief"] > 0
    alone = trainer(callbacks=[GammaIndicators(["ief"])])  # pairs with classes
    alone.fit(Automatic(), batches())
    assert alone.callback_metrics["gamma/ief"] > 0


def test_timing_phases_are_the_spans_between_hooks(monkeypatch):
    ticks = (n**2 for n in count())  # readings 0, 1, 4, 9, …
    monkeypatch.setattr("lightning_ief.callbacks.step_timing.perf_counter", lambda: next(ticks))
    timing, module = StepTiming(skip_first=0, print_table=False), L.LightningModule()
    module.capture_seconds = 0.25
    timing.on_train_batch_start(None, module, None, 0)
    timing.on_before_backward(None, module, None)
    timing.on_after_backward(None, module)
    timing.on_train_batch_end(None, module, None, None, 0)
    assert timing.compute() == {"forward": [750.0], "backward": [3000.0], "update": [5250.0], "step": [9000.0]}
