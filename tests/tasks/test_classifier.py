"""The classifier and its network."""

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from lightning_ief import IEF
from lightning_ief.tasks import MLP, Classifier, DigitsDataModule


def test_mlp_has_the_layers_asked_for():
    net = MLP([64, 32, 16, 10], activation=nn.Tanh)
    kinds = [type(layer) for layer in net.layers]
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert net(torch.zeros(3, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize("widths", [[], [64], [64, 0, 10]])
def test_mlp_refuses_impossible_widths(widths):
    with pytest.raises(ValueError, match="widths"):
        MLP(widths)


def test_classifier_logs_what_a_loop_by_hand_finds():
    torch.manual_seed(0)
    model = Classifier(MLP([64, 32, 10]), partial(IEF, lr=1.0, damping=1e-4), num_classes=10)
    data = DigitsDataModule()
    trainer = L.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(model, data)
    assert {"train/loss", "val/loss", "val/accuracy"} <= set(trainer.callback_metrics)
    logged = trainer.test(model, data, verbose=False)[0]
    images, targets = map(torch.cat, zip(*data.test_dataloader(), strict=False))
    logits = model(images)
    assert logged["test/accuracy"] == pytest.approx((logits.argmax(1) == targets).double().mean().item(), rel=1e-6)
    assert logged["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)


def test_checkpoint_loads_in_python(tmp_path):
    arguments = {"optimizer": partial(IEF, lr=1.0), "num_classes": 10}
    model = Classifier(net=MLP([64, 10]), **arguments)
    trainer = L.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(model, DigitsDataModule(batch_size=512))
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "some.ckpt", net=MLP([64, 10]), **arguments)
    for name, weights in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weights), name


def test_scheduler_is_built_on_the_optimizer():
    model = Classifier(MLP([64, 10]), partial(IEF, lr=2.0), 10, lr_scheduler=partial(LinearLR, start_factor=0.5))
    (optimizer,), (scheduler,) = model.configure_optimizers()
    assert isinstance(optimizer, IEF) and scheduler.optimizer is optimizer
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 650
