"""K-FAC in use: in Lightning, by YAML, in the table of γ."""

import csv
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_ief
from lightning_ief import IEF, KFAC, GammaIndicators, directions, gamma, linearize, objectives
from lightning_ief.callbacks import OwnDirection
from lightning_ief.directions.registry import find
from tests.curvature.layers import OBJECTIVE, mlp
from tests.helpers import Classifier, relative_error, weights

pytestmark = pytest.mark.usefixtures("float64")

N = 10
OPTIONS: dict[str, Any] = {"lr": 0.5, "damping": 0.5, "momentum": 0.5, "max_norm": 0.4, "eigenvalue_correction": True,
                           "every": 2}  # fmt: skip


def data(batches: int) -> TensorDataset:
    torch.manual_seed(3)
    return TensorDataset(torch.randn(batches * N, 4), torch.randint(3, (batches * N,)))


def trainer(folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", precision="64-true", default_root_dir=folder, enable_progress_bar=False,
                     enable_model_summary=False, **{"logger": False, **options})  # fmt: skip


@pytest.mark.parametrize("fisher", ["improved", "sampled"])
def test_training_in_lightning_is_the_loop(fisher: Any, tmp_path: Path) -> None:
    module, model, samples = Classifier(lambda p: KFAC(p, fisher=fisher, **OPTIONS), mlp()), mlp(), data(4)
    trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, DataLoader(samples, N))
    optimizer = KFAC(model.parameters(), fisher=fisher, **OPTIONS)
    for part in range(4):
        x, y = samples[part * N : part * N + N]
        before = weights(model)
        optimizer.step(linearization=linearize(model, x, y, OBJECTIVE, keep_sides=optimizer.sides_of(model)))
        assert 0 < float((weights(model) - before).norm()) < 0.4 + 1e-12
    assert torch.equal(weights(module.net), weights(model))


@pytest.mark.parametrize("fisher", ["improved", "sampled"])
def test_a_checkpoint_resumes_bit_for_bit(fisher: Any, tmp_path: Path) -> None:
    def run(**options: Any) -> Tensor:
        module = Classifier(lambda p: KFAC(p, fisher=fisher, **OPTIONS), mlp())
        path = options.pop("ckpt_path", None)
        trainer(tmp_path, **options).fit(module, DataLoader(data(3), N), ckpt_path=path)
        return weights(module.net)

    expected = run(max_epochs=3, callbacks=[ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)])
    assert torch.equal(run(max_epochs=3, ckpt_path=str(tmp_path / "epoch=0.ckpt")), expected)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (partial(KFAC, fisher="improved"), partial(KFAC, fisher="empirical")),
        (partial(KFAC, positions="expand"), partial(KFAC, positions="reduce")),
        (partial(IEF, metric="kronecker"), partial(IEF, metric="kronecker", fisher="empirical")),
        (partial(KFAC), partial(IEF, metric="kronecker")),
    ],
)
def test_averages_of_another_kind_are_dropped(before: Any, after: Any) -> None:
    """Resuming with other gradients begins the averages anew, and says so; with the same ones it takes them over."""

    def step(optimizer: Any, model: nn.Module, part: int) -> Tensor:
        x, y = data(4)[part * N : part * N + N]
        optimizer.step(linearization=linearize(model, x, y, OBJECTIVE, keep_sides=optimizer.sides_of(model)))
        return weights(model)

    model = mlp()
    first = before(model.parameters(), lr=0.1)
    step(first, model, 0)
    same, fresh, resumed = mlp(), mlp(), mlp()
    for copied in (same, fresh, resumed):
        copied.load_state_dict(model.state_dict())
    as_before = before(same.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        as_before.load_state_dict(first.state_dict())
    expected = step(after(fresh.parameters(), lr=0.1), fresh, 1)
    optimizer = after(resumed.parameters(), lr=0.1)
    with pytest.warns(RuntimeWarning, match="they begin anew"):
        optimizer.load_state_dict(first.state_dict())
    assert torch.equal(step(optimizer, resumed, 1), expected)
    assert not torch.equal(step(as_before, same, 1), expected)


def test_by_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--optimizer", type=OptimizerCallable)
    text = (
        "{class_path: lightning_ief.KFAC, init_args: {lr: 0.5, fisher: empirical, positions: reduce, "
        "eigenvalue_correction: true, decay: 0.9, every: 5, damping: 0.1, momentum: 0.9, max_norm: 1.0}}"
    )
    made = parser.instantiate_classes(parser.parse_args([f"--optimizer={text}"])).optimizer(mlp().parameters())
    assert isinstance(made, KFAC) and made.every == 5 and made.shared("momentum") == 0.9
    assert vars(made.curvature) == {
        "fisher": "empirical", "positions": "reduce", "eigenvalue_correction": True, "decay": 0.9,
    }  # fmt: skip


NAMES = ["kfac_improved", "kfac_empirical", "kfac_sampled"]


@pytest.mark.usefixtures("float64")
def test_the_table_of_gamma(tmp_path: Path) -> None:
    """The linearization keeps sides where a direction asks for them; γ is that of the direction."""
    samples = data(1)
    module = Classifier(lambda p: lightning_ief.IEF(p, lr=0.0), mlp())
    corrected = partial(directions.kfac_improved, eigenvalue_correction=True)
    own = OwnDirection("corrected", corrected, damping=0.5, needs_sides=True)
    callback = GammaIndicators(["sgd", *NAMES, own], damping=0.5, dampings=dict.fromkeys(NAMES, 0.5), batch_size=N)
    trainer(tmp_path, max_epochs=1, logger=CSVLogger(tmp_path), callbacks=[callback], enable_checkpointing=False).fit(
        module, DataLoader(samples, N)
    )
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        logged = next(row for row in csv.DictReader(file) if row["gamma/sgd"])
    model = mlp()
    x, y = samples.tensors
    lin = linearize(model, x, y, objectives.CrossEntropy(), keep_sides=["0.weight", "2.weight"])
    for name in NAMES[:2]:  # the third draws targets in the order of the callback's batch
        expected = gamma(lin, find(name).compute(lin, 0.5))
        assert float(logged[f"gamma/{name}"]) == pytest.approx(float(expected), rel=1e-6)
    assert 0 < float(logged["gamma/kfac_sampled"]) < torch.inf
    assert float(logged["gamma/corrected"]) == pytest.approx(float(gamma(lin, corrected(lin, 0.5))), rel=1e-6)


def test_a_direction_of_ones_own_asks_for_sides_by_itself(tmp_path: Path) -> None:
    own = OwnDirection("own", directions.kfac_improved, damping=0.5, needs_sides=True)
    callback = GammaIndicators([own], batch_size=N)
    module = Classifier(lambda p: lightning_ief.IEF(p, lr=0.0), mlp())
    run = trainer(tmp_path, max_epochs=1, callbacks=[callback], enable_checkpointing=False)
    run.fit(module, DataLoader(data(1), N))
    assert 0 < float(run.callback_metrics["gamma/own"]) < torch.inf


def test_options_that_a_schedule_moves() -> None:
    """Damping stands in the parameter groups."""
    model = mlp()
    x, y = data(1).tensors
    optimizer = KFAC(model.parameters(), lr=0.0, damping=0.5)
    lin = linearize(model, x, y, OBJECTIVE, keep_sides=optimizer.sides_of(model))
    optimizer.param_groups[0]["damping"] = 0.1
    optimizer.step(linearization=lin)
    found = torch.cat([x.flatten() for x in optimizer.direction(lin).values()])
    other = KFAC(model.parameters(), lr=0.0, damping=0.1)
    expected = torch.cat([x.flatten() for x in other.direction(lin).values()])
    assert relative_error(found, expected) < 1e-12


def test_some_parameters_alone() -> None:
    """Frozen ones, and those of other optimizers, take no part."""
    model = mlp()
    x, y = data(1).tensors
    head = KFAC(model[2].parameters(), lr=0.1, damping=0.5)  # type: ignore[index]
    lin = linearize(model, x, y, OBJECTIVE, keep_sides=head.sides_of(model))
    before = [p.detach().clone() for p in model.parameters()]
    head.step(linearization=lin)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [False, False, True, True]
    empty = nn.Sequential(nn.LayerNorm(4), nn.Flatten())
    assert KFAC(empty.parameters()).sides_of(empty) == []
