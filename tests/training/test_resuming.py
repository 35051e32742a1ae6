"""Runs that are killed, and go on: on as many ranks as before, or on others."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ief import IEF, SampledFisher
from tests.helpers import Configure
from tests.ranks import on_ranks
from tests.training.runs import data, first, fit, ief

pytestmark = pytest.mark.usefixtures("float64")


def killed(at: int) -> Callable[[L.Trainer, Any, int], None]:
    def kill(trainer: L.Trainer, batch: Any, number: int) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def sampled_fisher(p: Any) -> torch.optim.Optimizer:
    return SampledFisher(p, lr=0.3, num_samples=2)


def in_windows(p: Any) -> torch.optim.Optimizer:
    return IEF(p, lr=0.5, damping=1e-3, accumulate=3)


EVERY_STEP: dict[str, Any] = {"every_n_train_steps": 1}
AFTER_VALIDATION: dict[str, Any] = {"every_n_epochs": 1, "save_on_train_epoch_end": False}


@pytest.mark.parametrize(
    ("configure", "before", "after", "at", "save", "options"),
    [
        (ief, 1, 1, 6, EVERY_STEP, {"workers": 1}),
        (ief, 1, 1, 8, EVERY_STEP, {"workers": 1}),
        (ief, 2, 2, 6, EVERY_STEP, {}),
        (ief, 2, 3, 6, EVERY_STEP, {}),
        (ief, 1, 1, 6, EVERY_STEP, {"max_steps": 12, "max_epochs": -1}),
        (ief, 1, 1, 8, {"every_n_epochs": 1}, {}),
        (sampled_fisher, 1, 2, 6, EVERY_STEP, {}),
        (sampled_fisher, 2, 2, 6, EVERY_STEP, {}),
        (in_windows, 2, 1, 21, EVERY_STEP, {"size": 3}),
        (in_windows, 1, 1, 21, AFTER_VALIDATION, {"size": 3, "val_check_interval": 4}),
        (in_windows, 2, 2, 21, AFTER_VALIDATION, {"size": 3, "val_check_interval": 4}),
        (ief, 1, 1, 7, AFTER_VALIDATION, {"val_check_interval": 2}),
    ],
)
def test_a_killed_run_resumes(
    configure: Configure,
    before: int,
    after: int,
    at: int,
    save: dict[str, Any],
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # seeds Lightning's samplers
    whole = options.pop("size", 6) * 2  # 4 batches in an epoch, or 8

    def run(ranks: int, fault: Any = None, folder: str | None = None, ckpt_path: Path | None = None) -> Any:
        saves = [ModelCheckpoint(tmp_path / folder, save_last="link", **save)] if folder else []
        seen: list[tuple[int, float]] = []

        def watch(trainer: L.Trainer, batch: Any, number: int) -> None:
            seen.append((number, float(batch[0].sum())))
            if fault:
                fault(trainer, batch, number)

        def work(rank: int) -> Any:
            found = fit(configure, whole // ranks, watch, ranks, ckpt_path=ckpt_path, callbacks=saves, **options)
            assert not [message for message in found[1] if "has taken no step" in message]
            return found[0], seen

        return on_ranks(ranks, work)

    straight, numbers = run(before, folder="a")[0]
    with pytest.raises(AssertionError, match="nothing"):
        run(before, killed(at), "b")
    for weights, seen in run(after, ckpt_path=tmp_path / "b" / "last.ckpt"):
        assert seen[-1][0] == numbers[-1][0]
        if before == after:
            assert torch.equal(weights[-1], straight[-1])
            assert before > 1 or seen == numbers[-len(seen) :]
        for ours, truth in zip(weights, straight[-len(weights) :], strict=True):
            assert (ours - truth).norm() < 1e-12 * truth.norm()


class Restoring(DataLoader):
    """A data loader that restores its position itself."""

    seen = 0

    def __iter__(self) -> Any:
        start, self.seen = self.seen, 0
        for number, batch in enumerate(super().__iter__()):
            self.seen = (number + 1) % len(self)
            if number >= start:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def test_data_loaders_may_restore_their_position(tmp_path: Path) -> None:
    def run(configure: Configure, before: Any = None, **options: Any) -> tuple[list[Tensor], list[str]]:
        return fit(configure, 0, before, loader=Restoring(data(), 12), **options)

    def save(trainer: L.Trainer, batch: Any, number: int) -> None:
        if number == 6:
            trainer.save_checkpoint(tmp_path / "between.ckpt")

    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    straight, _ = run(ief, callbacks=[saves])
    resumed, _ = run(ief, ckpt_path=tmp_path / "step=6.ckpt")
    assert len(resumed) == 6 and all(torch.equal(a, b) for a, b in zip(resumed, straight[6:], strict=True))
    _, messages = run(in_windows, save)
    assert any("the 2 micro-batches since the last one will be missing" in message for message in messages)


def test_an_epoch_that_has_become_shorter(tmp_path: Path) -> None:
    fit(ief, 12, callbacks=[ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)], max_steps=3)
    with pytest.raises(MisconfigurationException, match="after 3 batches of an epoch, the data loader has 2 only"):
        fit(ief, 0, loader=DataLoader(first(24), 12), ckpt_path=tmp_path / "last.ckpt")
