"""What modules that were written for other optimizers meet first: plain words that name the line to write."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import IEF, NaturalGradientMixin, objectives
from lightning_ief.capture.types import CaptureError
from tests.helpers import Classifier, weights

X, Y = torch.randn(8, 6), torch.arange(8) % 3


def ief(p: Any) -> IEF:
    return IEF(p, lr=0.5, damping=1e-2)


def fit(module: L.LightningModule, *tensors: Tensor, **options: Any) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                        **{"max_epochs": 1, "enable_checkpointing": False, **options})  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*(tensors or (X, Y))), 4))


class Ported(Classifier):
    """A module with one thing that is not as it is expected."""

    def __init__(self) -> None:
        super().__init__(ief)


def said(module: L.LightningModule, *tensors: Tensor) -> str:
    with pytest.raises((MisconfigurationException, TypeError, ValueError, AttributeError)) as caught:
        fit(module, *tensors)
    return str(caught.value)


def test_no_objective() -> None:
    module = Ported()
    del module.objective
    assert "self.objective = lightning_ief.objectives.CrossEntropy()" in said(module)


def test_no_forward() -> None:
    class Without(NaturalGradientMixin):
        objective = objectives.CrossEntropy()

        def configure_optimizers(self) -> IEF:
            return ief([nn.Parameter(torch.zeros(2))])

    assert "write def forward(self, x)" in said(Without())


def test_the_init_of_another_base() -> None:
    class Direct(Ported):
        def __init__(self) -> None:
            L.LightningModule.__init__(self)

    assert "write super().__init__()" in said(Direct())


def test_several_inputs() -> None:
    class Two(Ported):
        def forward(self, a: Tensor, b: Tensor) -> Any:  # type: ignore[override]
            return self.net(a + b)

    class Unpacked(Two):
        def unpack_batch(self, batch: Any) -> tuple[Any, Tensor]:
            return (batch[0], batch[1]), batch[2]

    assert "list of 3. Override Two.unpack_batch(batch)" in said(Two(), X, X, Y)
    message = said(Two(), X, Y)
    assert "forward(a:" in message and "missing a required argument: 'b'" in message and "unpack_batch" in message
    fit(Unpacked(), X, X, Y)


def test_what_models_return() -> None:
    class Returns(Ported):
        def __init__(self, wrap: Any) -> None:
            super().__init__()
            self.wrap = wrap

        def forward(self, x: Tensor) -> Any:
            return self.wrap(self.net(x))

    expected, module = Ported(), Returns(lambda z: {"loss": None, "logits": z})
    fit(expected)
    fit(module)
    assert torch.equal(weights(module), weights(expected))
    assert "dict with keys ['out']; expected the logits" in said(Returns(lambda z: {"out": z}))
    assert "tuple of ['Tensor', 'Tensor']" in said(Returns(lambda z: (z, z)))


@pytest.mark.parametrize("targets", ["together", "flattened"])
def test_positions_that_were_flattened(targets: str) -> None:
    class Flat(Ported):
        def forward(self, x: Tensor) -> Any:
            return self.net(x.reshape(-1, 6))

        def unpack_batch(self, batch: Any) -> tuple[Any, Tensor]:
            return batch[0], batch[1] if targets == "together" else batch[1].flatten()

    message = said(Flat(), X.reshape(4, 2, 6), Y.reshape(4, 2))
    assert ("logits.reshape(-1, 2, 3)" if targets == "together" else "logits [4, 2, C] and targets [4, 2]") in message


def test_the_state_of_another_optimizer(tmp_path: Path) -> None:
    module = Classifier(lambda p: torch.optim.AdamW(p, lr=1e-3))
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(X, Y), 4))
    trainer.save_checkpoint(tmp_path / "adamw.ckpt")
    with pytest.raises(ValueError, match=r"IEF can't go on from .*'betas'.*load_from_checkpoint"):
        L.Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                  enable_model_summary=False).fit(Ported(), DataLoader(TensorDataset(X, Y), 4),
                                                  ckpt_path=tmp_path / "adamw.ckpt", weights_only=False)  # fmt: skip


class Backbone(NaturalGradientMixin):
    """Batch normalisation in a part that takes no part in training, at first."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)),
                                      nn.Flatten(), nn.LazyLinear(4))  # fmt: skip
        self.head = nn.Linear(4, 3)
        self.backbone(torch.randn(2, 2, 4, 4))
        if fixed:
            self.backbone.eval()
        self.objective = objectives.CrossEntropy()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> IEF:
        return ief([p for p in self.parameters() if p.requires_grad])


@pytest.mark.parametrize("tuned", ["frozen", "no_grad", "callback"])
def test_backbones_with_batch_normalisation(tuned: str) -> None:
    """One line for all of its layers; then it just works, also where Lightning thaws it later."""

    class NoGrad(Backbone):
        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                features = self.backbone(x)
            return self.head(features)

    images = torch.randn(8, 2, 4, 4)
    for fixed in (False, True):
        module = (NoGrad if tuned == "no_grad" else Backbone)(fixed)
        module.backbone.requires_grad_(False)
        callbacks = [BackboneFinetuning(1, train_bn=False)] if tuned == "callback" else []
        statistics, before = module.backbone[1].running_mean, weights(module.backbone)
        if not fixed:
            with pytest.raises(CaptureError, match=r"'backbone.1' .*1 more: 'backbone.2.0'.*self.backbone.eval\(\) in"):
                fit(module, images, Y, callbacks=callbacks)
            continue
        expected = statistics.clone()
        fit(module, images, Y, callbacks=callbacks, max_epochs=2)
        assert torch.equal(module.backbone[1].running_mean, expected)
        assert torch.equal(weights(module.backbone), before) == (tuned != "callback")


@pytest.mark.parametrize("optimizer", [ief, lambda p: torch.optim.SGD(p, lr=0.1)])
def test_logits_for_metrics(optimizer: Any) -> None:
    class Metrics(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            before = self.net(batch[0]).detach()
            losses, logits = self.optimize(*batch, return_logits=True)
            assert losses is not None and logits is not None and not logits.requires_grad
            assert torch.allclose(logits, before, atol=1e-6)
            assert torch.allclose(self.objective.losses(before, batch[1]), losses, atol=1e-6)
            return losses.mean()

    fit(Metrics(optimizer))


def test_logits_of_virtual_tokens() -> None:
    class Prompted(Ported):
        def forward(self, x: Tensor) -> Any:
            return self.net(torch.cat([x[:, :1].expand(-1, 5, -1), x], 1))

    assert "5 positions too many: slice off virtual tokens of a prompt, logits[:, 5:]" in said(
        Prompted(), X.reshape(4, 2, 6), Y.reshape(4, 2)
    )


@pytest.mark.parametrize("wanted", ["penalty", "mean", "dict", "nothing"])
def test_a_loss_that_is_returned_with_a_graph(wanted: str, recwarn: pytest.WarningsRecorder) -> None:
    """A penalty that training_step adds to the losses of `optimize` would be lost without a word."""

    class Own(Ported):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            losses = self.optimize(*batch)
            assert losses is not None
            penalised = losses.mean() + 0.1 * sum(p.square().sum() for p in self.parameters())
            return {"penalty": penalised, "mean": losses.mean(), "dict": {"loss": penalised}, "nothing": None}[wanted]

    fit(Own(), max_epochs=2)
    told = [str(each.message) for each in recwarn if "requires gradients" in str(each.message)]
    assert len(told) == (wanted in ("penalty", "dict"))
    assert all("Own.training_step" in each and "weight_decay" in each for each in told)
