"""Lightning's Tuner, which trains without the callbacks of the run, and compiled modules."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import IEF
from tests.helpers import Classifier, weights


class Tuned(Classifier):
    """Has what the Tuner sets."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__(lambda p: IEF(p, lr=self.lr, damping=1e-2, accumulate=accumulate))
        self.lr, self.batch_size = 0.5, 16

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        torch.manual_seed(1)
        inputs = torch.randn(1600, 6)
        return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), self.batch_size)

    val_dataloader = train_dataloader


def trainer(folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=folder,
                     enable_progress_bar=False, enable_model_summary=False, **options)  # fmt: skip


def trained(folder: Path, module: Tuned, **options: Any) -> Tensor:
    trainer(folder, **options).fit(module)
    return weights(module)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_learning_rate_is_found(accumulate: int, tmp_path: Path) -> None:
    module = Tuned(accumulate)
    found = Tuner(trainer(tmp_path)).lr_find(module, min_lr=1e-4, max_lr=1e3, num_training=40)
    assert found is not None
    tried = [*dict.fromkeys(found.results["lr"])]  # an update each
    assert tried[10:30] == pytest.approx([1e-4 * 1e7 ** (k / 40) for k in range(10, 30)], rel=0.6)
    assert 1e-3 < module.lr < 30  # 1 is the natural scale
    expected = Tuned(accumulate)
    expected.lr = module.lr
    assert torch.equal(trained(tmp_path, module), trained(tmp_path, expected))


def test_the_finder_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    """But for the learning rate; the hooks of the run are called as before."""
    module, finder = Tuned(), LearningRateFinder(1e-4, 1e3, 40)
    found = trained(tmp_path, module, callbacks=[finder])
    expected = Tuned()
    expected.lr = module.lr
    assert module.lr != 0.5
    assert torch.equal(found, trained(tmp_path, expected))


def test_the_batch_size_is_scaled(tmp_path: Path) -> None:
    module = Tuned()
    assert Tuner(trainer(tmp_path)).scale_batch_size(module, init_val=2, steps_per_trial=2, max_trials=3) == 8


def test_accumulation_of_gradients_has_another_place(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="give the optimizer accumulate=k"):
        trainer(tmp_path, callbacks=[GradientAccumulationScheduler({0: 2})]).fit(Tuned())


def test_compiled_modules(tmp_path: Path) -> None:
    """What a module calls may be compiled; not the module itself."""
    compiled, plain = Tuned(), Tuned()
    compiled.net = torch.compile(compiled.net, backend="eager")
    assert torch.allclose(trained(tmp_path, compiled), trained(tmp_path, plain))
    with pytest.raises(MisconfigurationException, match=r"self.net = torch.compile\(self.net\)"):
        trainer(tmp_path).fit(torch.compile(Tuned()))
