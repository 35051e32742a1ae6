"""Lightning's weight averaging: what is validated, tested and saved is the average, however a module is optimized."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ief import EF, IEF
from lightning_ief.tasks import MLP, Classifier, DigitsDataModule

callbacks = pytest.importorskip("lightning.pytorch.callbacks")
EMAWeightAveraging = getattr(callbacks, "EMAWeightAveraging", None)
pytestmark = pytest.mark.skipif(EMAWeightAveraging is None, reason="came with lightning 2.6")

DECAY = 0.8


class Automatic(L.LightningModule):
    """A classifier by Lightning's own optimization."""

    def __init__(self, net, optimizer):
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Watch(L.Callback):
    """Notes weights after each step, and those that validation and test see."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []
        self.validated: list[tuple[int, Tensor]] = []
        self.tested: list[Tensor] = []
        self.before: list[Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append(weights(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained.append(weights(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validated.append((len(self.trained), weights(pl_module)))

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.tested.append(weights(pl_module))


def weights(module: L.LightningModule) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def averages(trained: list[Tensor]) -> list[Tensor]:
    """The exponential averages after each step, the first of which is what was trained."""
    found = trained[:1]
    for each in trained[1:]:
        found.append(DECAY * found[-1] + (1 - DECAY) * each)
    return found


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        (Classifier, partial(IEF, lr=0.5, relative_damping=0.3)),
        (Classifier, partial(IEF, lr=0.3, relative_damping=1.0, momentum=0.5, metric="kronecker")),
        (Classifier, partial(EF, lr=0.1, damping=1e-4, normalize=True, accumulate=2)),
        (Classifier, partial(torch.optim.AdamW, lr=1e-2)),
        (Automatic, partial(torch.optim.AdamW, lr=1e-2)),
    ],
    ids=["ief", "metric", "accumulate", "adamw", "automatic"],
)
def test_what_is_evaluated_and_saved_is_the_average_and_training_goes_on_from_its_own_weights(
    kind, optimizer, tmp_path
):
    options = {"num_classes": 10} if kind is Classifier else {}
    module, watch = kind(MLP([64, 16, 10]), optimizer, **options), Watch()
    data = DigitsDataModule(batch_size=256)
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[EMAWeightAveraging(decay=DECAY), watch],
    )  # fmt: skip
    trainer.fit(module, data)
    assert len(watch.trained) == 15 and len(watch.validated) == 3
    updates, taken = watch.trained, [number for number, _ in watch.validated]
    if getattr(trainer.optimizers[0], "accumulate", 1) == 2:  # pairs of batches, and the fifth of an epoch alone
        updates = [w for number, w in enumerate(watch.trained) if number % 5 in (1, 3, 4)]
        taken = [3, 6, 9]
    expected = averages(updates)
    for (_, seen), count in zip(watch.validated, taken, strict=True):
        torch.testing.assert_close(seen, expected[count - 1], rtol=1e-5, atol=1e-6)
        assert (seen - updates[count - 1]).abs().max() > 1e-4  # it is another one than the present weights
    for after, before in zip(watch.trained, watch.before[1:], strict=False):
        assert torch.equal(after, before)
    torch.testing.assert_close(weights(module), expected[-1], rtol=1e-5, atol=1e-6)
    (saved,) = tmp_path.rglob("*.ckpt")
    state = torch.load(saved, weights_only=True)["state_dict"]
    kept = torch.cat([state[name].flatten() for name, _ in module.named_parameters()])
    torch.testing.assert_close(kept, expected[-1], rtol=1e-5, atol=1e-6)
    trainer.test(module, data, verbose=False)
    torch.testing.assert_close(watch.tested[0], expected[-1], rtol=1e-5, atol=1e-6)


def test_a_resumed_run_has_the_averages_of_the_uninterrupted_one(tmp_path):
    def trained(epochs: int, ckpt_path: str | None = None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        module, watch = Classifier(MLP([64, 16, 10]), partial(IEF, lr=0.5, relative_damping=0.3), 10), Watch()
        trainer = L.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=tmp_path / str(epochs),
            enable_progress_bar=False, enable_model_summary=False, callbacks=[EMAWeightAveraging(decay=DECAY), watch],
        )  # fmt: skip
        trainer.fit(module, DigitsDataModule(batch_size=256), ckpt_path=ckpt_path)
        return weights(module), watch.trained[-1]

    trained(1)
    (saved,) = (tmp_path / "1").rglob("*.ckpt")
    resumed, whole = trained(2, str(saved)), trained(2)
    assert torch.equal(resumed[0], whole[0]) and torch.equal(resumed[1], whole[1])
    assert not torch.equal(*whole)
