"""Every recipe runs; the quickstart keeps what it promises."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from lightning_ief.cli import main

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
QUICKSTART = str(Path(__file__).parents[1] / "recipes" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def empty_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ief"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe):
    main(["fit", "--config", str(recipe), "--trainer.fast_dev_run", "true"])


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def last(run: Path, name: str) -> float:
    return [float(row[name]) for row in rows(run) if row.get(name)][-1]


def test_quickstart_leaves_a_complete_run_that_resumes():
    main(["fit", "--config", QUICKSTART, "--trainer.max_epochs", "2"])
    run = Path("runs/quickstart/version_0")
    for pattern in (
        "metrics.csv",
        "events.out.tfevents.*",
        "config.yaml",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "figures/gamma_ratios.png",
        "figures/loss.png",
    ):
        assert list(run.glob(pattern)), pattern
    logged = set(rows(run)[0])
    for direction in ("sgd", "ef", "ief", "sampled_fisher"):
        assert {f"gamma/{direction}", f"gamma_relative/{direction}"} <= logged
    assert {f"timing/{part}_ms" for part in ("forward", "backward", "update", "step")} <= logged
    assert {"train/loss", "val/loss", "val/accuracy", "test/loss", "gradient_norm_imbalance"} <= logged
    assert last(run, "test/accuracy") > 0.9  # 0.96 takes all epochs

    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 1  # the last one, not the best one
    assert sum(weights.numel() for name, weights in checkpoint["state_dict"].items() if "net." in name) == 167_178

    main(
        ["fit", "--config", QUICKSTART, "--trainer.max_epochs", "3", "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    )
    resumed = run.with_name("version_1")
    assert {row["epoch"] for row in rows(resumed) if row["train/loss"]} == {"2"}
