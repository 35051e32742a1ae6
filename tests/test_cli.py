"""The command: recipes run, wrong recipes and checkpoints are refused by name."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_ief import cli
from lightning_ief.cli import main

RECIPE = """
model:
  class_path: lightning_ief.tasks.Classifier
  init_args:
    num_classes: 10
    net: {class_path: lightning_ief.tasks.MLP, init_args: {widths: [64, 16, 10]}}
    optimizer: {class_path: lightning_ief.IEF, init_args: {lr: 1.0, damping: 1.0e-4}}
data:
  class_path: lightning_ief.tasks.DigitsDataModule
  init_args: {batch_size: 512}
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    - {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: runs, name: small}}
    - {class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: runs, name: small}}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {monitor: val/accuracy, mode: max, filename: best}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: last}
"""


@pytest.fixture(autouse=True)
def plain_command_line(monkeypatch):
    """Without pytest's own arguments, at which LightningCLI would wonder."""
    monkeypatch.setattr(sys, "argv", ["lightning-ief"])


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The recipe as a file in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run of the recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-ief"])
        patch.chdir(tmp_path_factory.mktemp("run"))
        Path("recipe.yaml").write_text(RECIPE)
        main(["fit", "--config", "recipe.yaml"])
        return Path("runs/small/version_0").resolve()


def column(run_directory: Path, name: str) -> list[float]:
    with (run_directory / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def refused(arguments: list[str], capsys) -> str:
    """The last line or lines of standard error, where the command ends with status 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message[message.index("error: ") :]


def test_run_directory_holds_everything(run):
    names = {path.name for path in run.iterdir()}
    assert {"metrics.csv", "config.yaml", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_saved_config_runs_again_in_a_new_version(run, monkeypatch):
    monkeypatch.chdir(run.parents[2])
    main(["fit", "--config", str(run / "config.yaml"), "--trainer.max_epochs", "1"])
    again = run.with_name("version_1")
    assert column(again, "train/loss") == column(run, "train/loss")[: len(column(again, "train/loss"))]
    assert yaml.safe_load((again / "config.yaml").read_text())["trainer"]["max_epochs"] == 1


def test_resumed_run_is_the_uninterrupted_one(run, recipe):
    main(["fit", "--config", str(recipe), "--trainer.max_epochs", "1"])
    first = "runs/small/version_0/checkpoints/last.ckpt"
    main(["fit", "--config", str(recipe), "--ckpt_path", first])
    resumed = torch.load("runs/small/version_1/checkpoints/last.ckpt", weights_only=True)
    straight = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert resumed["epoch"] == straight["epoch"] and resumed["global_step"] == straight["global_step"]
    for name, weights in straight["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weights), name


@pytest.mark.parametrize("asked", [True, False])
def test_fit_ends_with_a_test_if_asked(recipe, asked):
    main(["fit", "--config", str(recipe), f"--test_after_fit={asked}".lower()])
    fitted = Path("runs/small/version_0")
    after_fit = column(fitted, "test/accuracy")
    assert len(after_fit) == asked
    if asked:  # it was the best checkpoint that was tested
        main(["test", "--config", str(recipe), "--ckpt_path", str(fitted / "checkpoints/best.ckpt")])
        assert column(Path("runs/small/version_1"), "test/accuracy") == after_fit


def test_test_after_fit_takes_the_last_weights_without_checkpoints(recipe):
    config = yaml.safe_load(RECIPE)
    config["trainer"] |= {"callbacks": None, "enable_checkpointing": False}
    recipe.write_text(yaml.safe_dump({**config, "test_after_fit": True}))
    main(["fit", "--config", str(recipe)])
    assert len(column(Path("runs/small/version_0"), "test/accuracy")) == 1


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("damping: 1.0e-4", "dampling: 1.0e-4", "Option 'dampling' is not accepted"),
        ("damping: 1.0e-4", "damping: lots", "\"damping\":\n            Expected a <class 'float'>. Got value: lots"),
        ("batch_size: 512", "batch_size: many", "\"batch_size\":\n          Expected a <class 'int'>. Got value: many"),
        ("batch_size: 512", "batchsize: 512", "'batchsize' is not accepted"),
        ("lightning_ief.IEF", "lightning_ief.IFE", "has no attribute 'IFE'"),
        ("max_epochs:", "max_epoch:", "'trainer.max_epoch'"),
        ("data:\n", "dta:\n", "does not accept option 'dta"),
        ("model:\n", "optimizer: {lr: 1.0}\nmodel:\n", "does not accept option 'optimizer.lr'"),
        ("widths: [64, 16, 10]", "widths: [64, 16, 10", "Problems parsing config"),
    ],
)
def test_wrong_recipe_is_refused_by_name(recipe, capsys, right, wrong, named):
    assert right in RECIPE
    recipe.write_text(RECIPE.replace(right, wrong))
    assert named in refused(["fit", "--config", str(recipe)], capsys)


def test_missing_recipe_is_refused_by_name(recipe, capsys):
    assert "nothing.yaml" in refused(["fit", "--config", "nothing.yaml"], capsys)


def truncated(good: bytes) -> bytes:
    return good[: len(good) // 2]


def one_bit_off(good: bytes) -> bytes:
    middle = len(good) // 2
    return good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "is damaged"),
        (one_bit_off, "checksum"),
        (lambda good: b"no checkpoint at all", "is no checkpoint"),
        (lambda good: b"", "is no checkpoint"),
    ],
)
def test_unreadable_checkpoint_is_refused_in_one_line(run, recipe, capsys, damage, reason):
    Path("bad.ckpt").write_bytes(damage((run / "checkpoints/last.ckpt").read_bytes()))
    message = refused(["fit", "--config", str(recipe), "--ckpt_path", "bad.ckpt"], capsys)
    assert message.startswith("error: --ckpt_path=bad.ckpt: ") and message.count("\n") == 1
    assert reason in message
    assert not Path("runs").exists()


def test_file_without_weights_and_missing_file_are_refused(recipe, capsys):
    torch.save({"weight": torch.zeros(2)}, "other.pt")
    assert "no state_dict" in refused(["test", "--config", str(recipe), "--ckpt_path", "other.pt"], capsys)
    assert "no such file" in refused(["test", "--config", str(recipe), "--ckpt_path", "gone.ckpt"], capsys)


def test_what_the_trainer_may_not_do_is_said_without_traceback(recipe):
    with pytest.raises(SystemExit, match="lightning-ief: error: .*gradient_clip_val"):
        main(["fit", "--config", str(recipe), "--trainer.gradient_clip_val", "1.0"])


def test_help_describes_the_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: lightning-ief ") and "recipes/quickstart.yaml" in text
    for name, description in cli._SUBCOMMANDS.items():
        assert f"{name} " in text and description.split()[0] in text


def test_missing_jsonargparse_names_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "jsonargparse" else found(name))
    with pytest.raises(SystemExit, match=r"pip install 'lightning-ief\[cli\]'"):
        main(["--help"])


@pytest.mark.parametrize("name", ["figures", "report", "compare"])
def test_subcommands_without_a_model_are_found_and_explained(name, capsys):
    for arguments in (["--help"], [name, "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    overview, _, own = capsys.readouterr().out.partition(f"usage: lightning-ief {name}")
    assert f"{name} (" in " ".join(overview.split())
    assert "show this help message" in own.lower()
