"""Learning rates over a run: what each step sees, whatever trains."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import IEF
from lightning_ief.tasks import MLP, Classifier

LR = 0.8


class Rates(L.Callback):
    """Keeps the lr of each batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(model: Classifier, ckpt_path: Any = None, **options: Any) -> tuple[list[float], L.Trainer]:
    """Three epochs of four batches, or what the options say."""
    rates, quiet = Rates(), {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(**{"max_epochs": 3, "accelerator": "cpu", "enable_checkpointing": False, **quiet, **options,
                           "callbacks": [rates]})  # fmt: skip
    x, y = torch.randn(16, 6), torch.arange(16) % 3
    trainer.fit(model, DataLoader(TensorDataset(x, y), 4), ckpt_path=ckpt_path)
    return rates.seen, trainer


def classifier(accumulate: int = 1, **options: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(MLP([6, 5, 3]), lambda p: IEF(p, LR, damping=1.0, accumulate=accumulate), 3, **options)


def test_warm_up_then_cosine_to_zero() -> None:
    seen, trainer = fit(classifier(lr_scheduler="cosine", warmup=0.25))
    assert seen == pytest.approx(
        [LR * (step + 1) / 4 for step in range(3)] + [LR * (1 + math.cos(math.pi * k / 9)) / 2 for k in range(9)]
    )
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_warm_up_alone() -> None:
    seen, _ = fit(classifier(warmup=0.5), max_epochs=1)
    assert seen == pytest.approx([LR / 3, 2 * LR / 3, LR, LR])


@pytest.mark.parametrize(("options", "steps"), [({}, 6), ({"max_steps": 4, "max_epochs": -1}, 4)])
def test_lr_falls_by_updates_of_several_batches(options: dict[str, int], steps: int) -> None:
    """Four batches an epoch are two updates of three: the last one of an epoch is of what is left."""
    seen, trainer = fit(classifier(accumulate=3, lr_scheduler="linear"), **options)
    assert trainer.global_step == steps
    by_update = [LR * (1 - step / steps) for step in range(steps)]
    assert seen == pytest.approx([rate for step, rate in enumerate(by_update) for _ in range((3, 1)[step % 2])])


def test_a_run_that_goes_on_for_longer_falls_to_zero_at_its_new_end(tmp_path: Any) -> None:
    _, trainer = fit(classifier(lr_scheduler="linear"), enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    seen, _ = fit(classifier(lr_scheduler="linear"), ckpt_path=tmp_path / "three.ckpt", max_epochs=4)
    # The first step was asked for by the run before, at its own end.
    assert seen[1:] == pytest.approx([LR * (1 - step / 16) for step in (13, 14, 15)])


def test_refused() -> None:
    for options, problem in (
        ({"lr_scheduler": "step"}, "lr_scheduler='step': must be 'linear', 'cosine'"),
        ({"warmup": 1.0}, r"warmup=1.0: must be at least 0 and less than 1"),
        ({"warmup": 0.1, "lr_scheduler": lambda o: o}, "has to warm up by itself"),
    ):
        with pytest.raises(ValueError, match=problem):
            classifier(**options)
    with pytest.raises(MisconfigurationException, match="warmup=0.1 need to know when training ends"):
        fit(classifier(warmup=0.1), max_epochs=-1)
