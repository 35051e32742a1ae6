"""Callbacks and metrics on several ranks: the values of one process, logged once."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ief import IEF, GammaIndicators, StepTiming
from tests.helpers import Classifier
from tests.module.test_ranks import data
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")


def fit(folder: Path, batch_size: int, **options: Any) -> dict[str, float]:
    model = Classifier(lambda p: IEF(p, lr=0.5, damping=1e-4))
    found = data(40)
    sampler = DistributedSampler(found, shuffle=False) if dist.is_initialized() else None
    callback = GammaIndicators(
        num_batches=5, batch_size=6, fractions=[0.25], directions=["ief", "ef", "sampled_fisher"], print_table=True
    )
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[callback, StepTiming()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(model, DataLoader(found, batch_size, sampler=sampler))
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def logged(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def indicators(values: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in values.items()
        if value not in ("", None) and key.startswith(("gamma", "cosine", "gradient_norm", "train/loss"))
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_values_are_those_of_one_process(ranks: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    alone = fit(tmp_path / "alone", 12)
    tables = capfd.readouterr().out.count("γ after epoch 0")
    assert tables == 1
    found = on_ranks(ranks, lambda rank: fit(tmp_path / "ranks", 12 // ranks, devices=ranks, strategy="ddp"))
    assert capfd.readouterr().out.count("γ after epoch 0") == 1
    for values in found:
        for key, truth in indicators(alone).items():
            assert values[key] == pytest.approx(truth, rel=1e-8), key
    rows, truths = logged(tmp_path / "ranks"), logged(tmp_path / "alone")
    assert len(rows) == len(truths)  # once
    for row, truth in zip(rows, truths, strict=True):
        assert indicators(row) == pytest.approx(indicators(truth), rel=1e-8)
    assert sum("gamma/ief" in indicators(row) for row in rows) == 4  # at the start, a quarter, after both epochs
