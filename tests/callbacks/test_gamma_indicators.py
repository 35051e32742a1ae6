"""GammaIndicators: when it evaluates, where its values go, and how it is written in YAML."""

import csv
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lightning_ief import GammaIndicators, StepTiming, directions, objectives
from lightning_ief.callbacks import OwnDirection
from tests.callbacks.gamma_stand_ins import NAMES, Mixed, Plain, Samples, Unpack, fit, indicators, logged, net, trainer


def test_every_n_epochs():
    unpack = Unpack()
    run = fit(Plain(net()), indicators(every_n_epochs=2, unpack_batch=unpack), max_epochs=5)
    assert len(unpack.seen) == 2
    assert "gamma/ief" not in run.progress_bar_metrics


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ({"val": True, "num_sanity_val_steps": 2}, 1),
        ({"val": True, "val_check_interval": 2}, 1),
        ({"fast_dev_run": True}, 1),
        ({"limit_train_batches": 1}, 1),
        ({"max_steps": 2}, 1),
        ({"limit_train_batches": 0}, 0),
    ],
    ids=str,
)
def test_it_runs_at_the_end_of_training_epochs_only(options, evaluations):
    unpack = Unpack()
    run = fit(Plain(net()), indicators(unpack_batch=unpack), **options)
    assert len(unpack.seen) == evaluations
    assert ("gamma/ief" in run.callback_metrics) == bool(evaluations)


def test_validation_alone_needs_nothing_from_the_module():
    callback = GammaIndicators()
    trainer(callback).validate(Plain(net()), DataLoader(Samples(), 6), verbose=False)


KINDS = ("gamma", "gamma_relative", "gamma_share", "cosine")
KEYS = {f"{kind}/{name}" for kind in KINDS for name in NAMES[:4]} | {"gradient_norm_imbalance"}


def test_loggers_get_all_values(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tensorboard")]
    run = fit(Plain(net()), indicators(), logger=loggers, max_epochs=2, log_every_n_steps=1)
    with (tmp_path / "csv/version_0/metrics.csv").open(newline="") as file:
        table = [row for row in csv.DictReader(file) if row["gamma/ief"]]
    assert len(table) == 2
    assert set(table[0]) >= KEYS
    events = EventAccumulator(str(tmp_path / "tensorboard/version_0"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= KEYS
    for key in KEYS:
        last = run.callback_metrics[key].item()
        assert float(table[1][key]) == pytest.approx(last, rel=1e-6)
        assert [event.value for event in events.Scalars(key)][-1] == pytest.approx(last, rel=1e-6)
    assert table[0]["gamma/ief"] != table[1]["gamma/ief"]


@pytest.mark.parametrize("val", [False, True])
def test_a_checkpoint_can_monitor_it(tmp_path, val):
    checkpoint = ModelCheckpoint(tmp_path, monitor="gamma/ief", mode="min", save_top_k=-1)
    fit(Plain(net()), checkpoint, indicators(), max_epochs=3, val=val, enable_checkpointing=True)
    assert len(checkpoint.best_k_models) == 3
    assert checkpoint.best_model_score == min(checkpoint.best_k_models.values())
    assert len(set(checkpoint.best_k_models.values())) == 3


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path):
    data = Samples()
    module = Plain(nn.Sequential(nn.Linear(4, 3)))
    start = {name: value.clone() for name, value in module.state_dict().items()}

    def run(epochs: int, checkpoint: str | None = None) -> L.Trainer:
        module.load_state_dict(start)
        result = trainer(indicators(), max_epochs=epochs)
        result.fit(module, DataLoader(data, 6), ckpt_path=checkpoint)
        return result

    straight = logged(run(2))
    run(1).save_checkpoint(tmp_path / "some.ckpt")
    assert logged(run(2, str(tmp_path / "some.ckpt"))) == straight


def steps_logged(folder: Path) -> list[tuple[int, int]]:
    """Epoch and step of each evaluation."""
    with next(folder.rglob("metrics.csv")).open(newline="") as file:
        return [(int(row["epoch"]), int(row["step"])) for row in csv.DictReader(file) if row["gamma/ief"]]


@pytest.mark.parametrize("kind", [Plain, Mixed])
def test_it_evaluates_at_the_start_and_at_fractions_of_training(kind, tmp_path):
    # 4 batches in each of 5 epochs; after epochs 1 and 3 too, where the 8th batch (40 %) is evaluated once.
    callback = indicators(at_start=True, fractions=[0.05, 0.4, 0.5, 1.0], every_n_epochs=2, directions=["ief"])
    fit(kind(net()), callback, logger=CSVLogger(tmp_path), max_epochs=5, log_every_n_steps=1)
    assert steps_logged(tmp_path) == [(0, 0), (0, 1), (1, 7), (2, 10), (3, 15), (4, 20)]


def test_fractions_are_of_batches_not_of_steps(tmp_path):
    data = Samples(96)  # 16 batches, 4 steps
    fit(Plain(net()), indicators(fractions=[0.25, 0.55, 1.0], every_n_epochs=0), data=data, accumulate_grad_batches=4,
        logger=CSVLogger(tmp_path), log_every_n_steps=1)  # fmt: skip
    assert steps_logged(tmp_path) == [(0, 1), (0, 2), (0, 4)]  # after 4, 9 and 16 batches


def test_the_end_by_max_steps_is_evaluated_once(tmp_path):
    fit(Plain(net()), indicators(fractions=[1.0], directions=["ief"]), max_epochs=5, max_steps=6,
        logger=CSVLogger(tmp_path), log_every_n_steps=1)  # fmt: skip
    assert steps_logged(tmp_path) == [(0, 3), (1, 5)]


def test_the_start_is_that_of_training_not_of_a_resumed_run(tmp_path):
    first = fit(Mixed(net()), logger=False, enable_checkpointing=False)
    first.save_checkpoint(tmp_path / "one.ckpt")
    run = trainer(
        indicators(at_start=True, every_n_epochs=0), logger=CSVLogger(tmp_path), max_epochs=2, log_every_n_steps=1
    )
    run.fit(Mixed(net()), DataLoader(Samples(), 6), ckpt_path=tmp_path / "one.ckpt")
    assert "gamma" not in next(tmp_path.rglob("metrics.csv")).read_text()


def test_fractions_need_an_end_of_training():
    with pytest.raises(MisconfigurationException, match="set max_epochs or max_steps"):
        fit(Mixed(net()), indicators(fractions=[0.5]), max_epochs=-1)


# Misuse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": ["sgd", "adam"]}, "unknown direction 'adam'; there are .*'ief'"),
        ({"directions": "ief"}, r"must be a list of names, such as \['ef'\]"),
        ({"directions": []}, "must be a list of names"),
        ({"dampings": {"newton": 1.0}}, "unknown direction 'newton'"),
        ({"damping": -1.0}, "damping of 'sgd' must be finite and ≥ 0, got -1.0"),
        ({"dampings": {"ief": math.inf}}, "damping of 'ief' must be finite"),
        ({"dampings": {"sampled_fisher": 0.0}}, "damping of 'sampled_fisher' must be finite and > 0, got 0.0"),
        ({"num_batches": 0}, "GammaIndicators: num_batches must be at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"every_n_epochs": -1}, "every_n_epochs must be at least 0, got -1"),
        ({"natural_iterations": -1}, "natural_iterations must be at least 0, got -1"),
        ({"fractions": [0.5, 1.5]}, "fractions=.0.5, 1.5.*above 0 and at most 1"),
        ({"directions": ["ief", "ief"]}, "several directions are called .'ief'"),
        ({"directions": [OwnDirection("ef", directions.ief)]}, "'ef' is a direction of the package"),
        ({"directions": [OwnDirection("mine", directions.ef, -1.0)]}, "damping of 'mine' must be finite"),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(x),  # no addresses of functions: workers must agree
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GammaIndicators(**options)


def dampings(callback: GammaIndicators) -> dict[str, float]:
    return {each.key: each.damping for each in callback.evaluation.directions}


def test_the_sampled_fisher_has_a_damping_of_its_own():
    callback = GammaIndicators(["ef", "ief", "sampled_fisher"], damping=0.0)
    assert dampings(callback) == {"ef": 0.0, "ief": 0.0, "sampled_fisher": 1.0}
    callback = GammaIndicators(
        ["sampled_fisher", OwnDirection("a", directions.ef), OwnDirection("b", directions.ef, 3)],
        dampings={"sampled_fisher": 2.0, "a": 4.0},
    )
    assert dampings(callback) == {"sampled_fisher": 2.0, "a": 4.0, "b": 3.0}


# On the command line


def inputs_and_targets(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["x"], batch["y"]


def test_it_can_be_written_in_yaml(capsys):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GammaIndicators, "gamma")
    config = {
        "directions": ["ef", "ief", {"name": "mine", "function": "lightning_ief.directions.ef", "damping": 0.5}],
        "dampings": {"ief": 1.0e-3},
        "objective": {"class_path": "lightning_ief.objectives.CrossEntropy"},
        "unpack_batch": f"{__name__}.inputs_and_targets",
    }
    callback = parser.instantiate_classes(parser.parse_object({"gamma": config})).gamma
    assert dampings(callback) == {"ef": 1e-7, "ief": 1e-3, "mine": 0.5}
    assert isinstance(callback.evaluation.objective, objectives.CrossEntropy)
    assert callback.evaluation.unpack_batch is inputs_and_targets
    assert [*dampings(parser.instantiate_classes(parser.parse_args([])).gamma)] == NAMES[:4]
    for wrong in ({"damping": "much"}, {"directions": 3}, {"num_batches": 1.5}, {"epochs": 2}):
        with pytest.raises(ArgumentError):
            parser.parse_object({"gamma": wrong})
    assert "λ of single directions by name, where it differs" in " ".join(parser.format_help().split())


# What is seen


def test_table():
    values = {
        "gamma/ef": 1234.4,
        "gamma_relative/ef": 1.0,
        "gamma/ief": 0.012345,
        "gamma_relative/ief": 0.36521,
        "gamma/sampled_fisher": math.inf,
        "gamma_relative/sampled_fisher": math.nan,
        "gradient_norm_imbalance": 1234.5,
    }
    console = Console(record=True, width=80)
    console.print(GammaIndicators(["ef", "ief", "sampled_fisher"]).render(values, "γ after epoch 3"))
    lines = [line.strip("│┃ ").replace("┃", "│").split("│") for line in console.export_text().splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines]
    for row in (
        ["γ after epoch 3"],
        ["direction", "λ", "γ", "γ / γ(sgd)"],
        ["ef", "1e-07", "1234", "1.00"],
        ["ief", "1e-07", "0.01235", "0.365"],
        ["sampled_fisher", "1", "inf", "nan"],
        ["gradient-norm imbalance: 1.23e+03"],
    ):
        assert row in cells


@pytest.mark.parametrize("bar", [None, RichProgressBar, TQDMProgressBar], ids=str)
def test_one_table_is_printed_each_epoch_whatever_the_progress_bar(bar, capsys):
    bars = [] if bar is None else [bar()]
    callbacks = [*bars, indicators(), StepTiming()]
    fit(Plain(net()), *callbacks, max_epochs=2, enable_progress_bar=bar is not None)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for epoch in (0, 1):
        assert lines.count(f"γ after epoch {epoch}") == 1
        assert lines.count(f"time per batch, epoch {epoch}") == 1
    assert sum(line.startswith("│ ief ") and line.endswith("│") for line in lines) == 2


def test_no_table_is_printed_if_not_wanted_or_elsewhere_than_on_the_first_process(capsys, monkeypatch):
    fit(Plain(net()), indicators(print_table=False))
    monkeypatch.setattr(L.Trainer, "is_global_zero", False)
    fit(Plain(net()), indicators())
    assert "γ after" not in capsys.readouterr().out
