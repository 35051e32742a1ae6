"""The command `evaluate`: the same numbers as by hand, tidy, resumed where it was interrupted."""

import math
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_ief import directions, gamma, linearize
from lightning_ief.callbacks import OwnDirection
from lightning_ief.callbacks.gamma_evaluation import GammaEvaluation
from lightning_ief.experiments.cli import main
from lightning_ief.experiments.evaluation import EvaluatingTrainer, Result, SampleProjection
from lightning_ief.experiments.tables import read_table
from lightning_ief.linalg.vectors import cosine
from lightning_ief.tasks import MLP, Classifier, DigitsDataModule
from tests.experiments.test_cli import recipe, refused, run  # noqa: F401  # fixtures

ALL = 1_258  # training samples of the recipe: one batch holds all, in whatever order


def evaluate(run: Path, *options: str, checkpoints: str = "last") -> None:  # noqa: F811
    paths = [str(run / f"checkpoints/{name}.ckpt") for name in checkpoints.split()]
    given = ["--checkpoints", f"[{', '.join(paths)}]"] if len(paths) > 1 else ["--ckpt_path", paths[0]]
    main(["evaluate", "--config", str(run / "config.yaml"), *given, *options])


@pytest.fixture(autouse=True)
def _somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_values_are_those_by_hand(run, capsys):  # noqa: F811
    evaluate(
        run, "--num_batches", "1", "--batch_size", "2000", "--directions", "[sgd, ief, ef]", "--dampings", "[0.1, 10]"
    )
    rows = {(row.direction, row.damping): row for row in read_table(Path("evaluation.csv"), Result)}
    assert [*rows] == [("sgd", 0.0), ("ief", 0.1), ("ief", 10.0), ("ef", 0.1), ("ef", 10.0)]

    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    module = Classifier(MLP([64, 16, 10]), optimizer=None, num_classes=10)
    module.load_state_dict(checkpoint["state_dict"])
    data = DigitsDataModule(batch_size=512, val_fraction=0.1, test_fraction=0.2)
    data.setup("fit")
    x, y = map(torch.stack, zip(*[(x, torch.as_tensor(y)) for x, y in data.train_dataloader().dataset], strict=True))
    lin = linearize(module.eval(), x, y, module.objective)
    sgd = directions.sgd(lin)
    for (name, damping), row in rows.items():
        d = sgd if name == "sgd" else getattr(directions, name)(lin, damping)
        assert row.gamma == pytest.approx(float(gamma(lin, d)), rel=1e-4)
        assert row.gamma_relative == pytest.approx(float(gamma(lin, d) / gamma(lin, sgd)), rel=1e-4)
        assert row.cosine == pytest.approx(float(cosine(d, sgd)), rel=1e-4)
        assert row.step == checkpoint["global_step"] > 0
        assert math.isnan(row.gamma_std)
    table = capsys.readouterr().out
    assert "last.ckpt" in table and "γ / γ(sgd)" in table


def test_what_is_there_is_not_evaluated_again(run, monkeypatch):  # noqa: F811
    options = ("--num_batches", "2", "--batch_size", "32", "--directions", "[sgd, ief]")
    evaluate(run, *options)
    first = read_table(Path("evaluation.csv"), Result)
    assert all(row.gamma_std > 0 and 0 < row.gamma_share < 1.01 for row in first)

    evaluated = []
    original = GammaEvaluation.evaluate

    def spy(self, *args):
        evaluated.append([(each.direction.name, each.damping) for each in self.directions])
        return original(self, *args)

    monkeypatch.setattr(GammaEvaluation, "evaluate", spy)
    evaluate(run, *options, "--dampings", "[1.0e-7, 1.0]", checkpoints="last best")
    assert evaluated == [[("ief", 1.0)], [("sgd", 0.0), ("ief", 1e-7), ("ief", 1.0)]]
    rows = read_table(Path("evaluation.csv"), Result)
    assert list(map(astuple, rows[:2])) == list(map(astuple, first)) and len(rows) == 6

    # A row cut off when the command was killed, and other settings.
    whole = Path("evaluation.csv").read_text().splitlines()
    Path("evaluation.csv").write_text("\n".join([*whole[:-1], whole[-1][:40]]))
    evaluate(run, *options, "--dampings", "[1.0e-7, 1.0]", checkpoints="last best")
    assert evaluated[2:] == [[("ief", 1.0)]]
    assert read_table(Path("evaluation.csv"), Result) == rows
    evaluate(run, *options, "--seed", "1")
    assert evaluated[3:] == [[("sgd", 0.0), ("ief", 1e-7)]]
    other = read_table(Path("evaluation.csv"), Result)[-2:]
    assert all(replace(a, seed=0).gamma != b.gamma for a, b in zip(other, first, strict=True))


class Scaled(DigitsDataModule):
    """Its hooks belong to the batch, as in training."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert self.trainer is not None
        return 10 * batch[0], batch[1]


def evaluated(data: DigitsDataModule, **options: Any) -> list[Result]:
    torch.manual_seed(0)
    module = Classifier(MLP([64, 8, 10]), optimizer=None, num_classes=10)
    trainer_options = {"precision": options.pop("precision")} if "precision" in options else {}
    trainer = EvaluatingTrainer(logger=False, accelerator="cpu", **trainer_options)
    torch.manual_seed(options.pop("global_seed", 0))
    return trainer.evaluate(module, data, num_batches=2, batch_size=16, **options)


def test_module_and_data_are_set_up_as_for_training():
    (plain,), (scaled,), (double,) = (
        evaluated(data, directions=["ief"], precision=precision)
        for data, precision in ((DigitsDataModule(), "32-true"), (Scaled(), "32-true"), (DigitsDataModule(), "64-true"))
    )
    assert scaled.gamma != pytest.approx(plain.gamma, rel=1e-2)
    assert double.gamma == pytest.approx(plain.gamma, rel=1e-3) and double.gamma != plain.gamma


def test_sampled_targets_depend_on_the_seed_alone():
    def gamma_of(dampings: list[float], **options: Any) -> float:
        return evaluated(DigitsDataModule(), directions=["sampled_fisher"], dampings=dampings, **options)[-1].gamma

    first = gamma_of([1.0])
    assert gamma_of([0.5, 1.0], global_seed=1, output="other.csv") == first
    assert gamma_of([1.0], num_samples=20) != first  # is not taken from the file
    assert gamma_of([1.0], seed=1) != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": []}, "at least one direction"),
        ({"dampings": []}, "at least one direction and one damping"),
        ({"directions": ["sampled_fisher"], "dampings": [0.0]}, "'sampled_fisher' must be finite and > 0, got 0.0"),
        ({"directions": ["ef"], "dampings": [1.0, -1.0]}, "'ef' must be finite and ≥ 0, got -1.0"),
        ({"directions": [OwnDirection("sgd", directions.ef)]}, "'sgd' is a direction of the package"),
        ({"directions": ["ef", "ef"]}, "several directions are called .'ef@1e-07'"),
        ({"directions": ["ef"], "seed": 0, "num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"checkpoints": ["best"]}, "there is no best"),
    ],
)
def test_what_can_not_be_evaluated_is_refused(options, message):
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        evaluated(DigitsDataModule(), **options)


def test_directions_of_ones_own_have_any_name():
    own = [OwnDirection("a@1.0", directions.ef), OwnDirection("a", directions.ief, damping=2.0)]
    rows = evaluated(DigitsDataModule(), directions=[*own, "ef", "ief"], dampings=[1.0, 2.0])
    expected = [("a@1.0", 1.0), ("a@1.0", 2.0), ("a", 2.0), ("ef", 1.0), ("ef", 2.0), ("ief", 1.0), ("ief", 2.0)]
    assert [(row.direction, row.damping) for row in rows] == expected
    gammas = {(row.direction, row.damping): row.gamma for row in rows}
    assert gammas["a@1.0", 1.0] == pytest.approx(gammas["ef", 1.0])
    assert gammas["a", 2.0] == pytest.approx(gammas["ief", 2.0])
    assert len({round(gamma, 6) for gamma in gammas.values()}) == 4
    assert [(row.direction, row.damping) for row in read_table(Path("evaluation.csv"), Result)] == expected


def test_a_damaged_table_is_refused():
    evaluated(DigitsDataModule(), directions=["ief"])
    text = Path("evaluation.csv").read_text()
    Path("evaluation.csv").write_text(text.replace("ief,1e-07", "ief,1e-o7"))
    with pytest.raises(MisconfigurationException, match=r"evaluation.csv, line 2, is damaged"):
        read_table(Path("evaluation.csv"), Result)


def test_wrong_input_is_refused(run, capsys):  # noqa: F811
    Path("bad.ckpt").write_bytes(b"no checkpoint")
    config = str(run / "config.yaml")
    good = str(run / "checkpoints/last.ckpt")
    message = refused(["evaluate", "--config", config, "--checkpoints", f"[{good}, bad.ckpt]"], capsys)
    assert message.startswith("error: --checkpoints=bad.ckpt: ") and "is no checkpoint" in message
    with pytest.raises(SystemExit, match=r"^lightning-ief: error: unknown direction 'iff'\. Did you mean ief\?$"):
        evaluate(run, "--directions", "[iff]")
    Path("other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="other.csv is no table of this version"):
        evaluate(run, "--output", "other.csv")
    assert Path("other.csv").read_text() == "a,b\n1,2\n"


def test_weights_are_loaded_once_and_only_if_needed(run, monkeypatch):  # noqa: F811
    loaded = []
    original = Classifier.load_state_dict
    monkeypatch.setattr(
        Classifier, "load_state_dict", lambda self, *args, **kwargs: loaded.append(1) or original(self, *args, **kwargs)
    )
    options = ("--num_batches", "1", "--batch_size", "16", "--directions", "[sgd, ief]")
    evaluate(run, *options, "--projections", "projections.csv", checkpoints="last best")
    assert len(loaded) == 2  # one for each checkpoint, though γ and projections are both evaluated
    evaluate(run, *options, "--projections", "projections.csv", checkpoints="last best")
    assert len(loaded) == 2
    Path("projections.csv").unlink()
    evaluate(run, *options, "--projections", "projections.csv", checkpoints="last best")
    assert len(loaded) == 4


def test_two_evaluations_into_one_file_keep_each_others_rows(run, monkeypatch):  # noqa: F811
    options = ("--num_batches", "1", "--batch_size", "16", "--directions", "[sgd, ief]")
    evaluate(run, *options)
    first = read_table(Path("evaluation.csv"), Result)
    Path("evaluation.csv").unlink()
    original = GammaEvaluation.evaluate

    def meanwhile(self, *args):
        if [each.direction.name for each in self.directions] == ["ef"]:
            evaluate(run, *options)  # begun later, done earlier
        return original(self, *args)

    monkeypatch.setattr(GammaEvaluation, "evaluate", meanwhile)
    evaluate(run, *options[:4], "--directions", "[ef]", "--dampings", "[1.0]")
    rows = read_table(Path("evaluation.csv"), Result)
    assert [row.direction for row in rows] == ["sgd", "ief", "ef"]
    assert [row.gamma for row in rows[:2]] == [row.gamma for row in first]


def test_projections_are_those_of_one_batch(run):  # noqa: F811
    options = ("--num_batches", "2", "--batch_size", "16", "--directions", "[sgd, ef, ief]", "--dampings", "[1.0e-9]")
    evaluate(run, *options, "--projections", "projections.csv")
    table = Path("projections.csv")
    rows = read_table(table, SampleProjection)
    assert [(row.direction, row.sample) for row in rows] == [(d, n) for d in ("sgd", "ef", "ief") for n in range(16)]
    by = {
        name: torch.tensor([astuple(row)[8:] for row in rows if row.direction == name]) for name in ("sgd", "ef", "ief")
    }
    for column in (0, 1):  # loss and norm of the gradient belong to the sample
        assert torch.equal(by["sgd"][:, column], by["ef"][:, column])
    # J d_EF = 1 whatever the gradients, J d_iEF = s ≤ 2; Cauchy-Schwarz.
    torch.testing.assert_close(by["ef"][:, 2], torch.ones(16), atol=0.05, rtol=0)
    assert bool((by["ief"][:, 2] < 2).all()) and float(by["ief"][:, 2].max() / by["ief"][:, 2].min()) > 10
    for values in by.values():
        assert bool((values[:, 2].abs() <= values[:, 1] * values[:, 3] * (1 + 1e-5)).all())

    before = table.stat().st_mtime_ns
    evaluate(run, *options, "--projections", "projections.csv")
    assert table.stat().st_mtime_ns == before  # nothing to do
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-5]))  # the last batch is cut off
    evaluate(run, *options, "--projections", "projections.csv")
    assert read_table(table, SampleProjection) == rows
