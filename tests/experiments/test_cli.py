"""The command: recipes run, wrong recipes and checkpoints are refused by name."""

import csv
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from lightning_ief.experiments import cli
from lightning_ief.experiments.cli import main
from lightning_ief.experiments.parser import OWN_SUBCOMMANDS, SUBCOMMANDS

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


def test_the_last_weights_are_tested_if_asked_though_others_are_the_best(recipe):
    recipe.write_text(RECIPE.replace("mode: max", "mode: min"))  # the "best" is that of the first epoch
    main(["fit", "--config", str(recipe), "--test_after_fit=last"])
    fitted = Path("runs/small/version_0")
    for name in ("last", "best"):
        main(["test", "--config", str(recipe), "--ckpt_path", str(fitted / f"checkpoints/{name}.ckpt")])
    last, best = (column(Path(f"runs/small/version_{number}"), "test/accuracy") for number in (1, 2))
    assert column(fitted, "test/accuracy") == last != best


def test_test_after_fit_takes_the_last_weights_without_checkpoints(recipe):
    config = yaml.safe_load(RECIPE)
    config["trainer"] |= {"callbacks": None, "enable_checkpointing": False}
    recipe.write_text(yaml.safe_dump({**config, "test_after_fit": True}))
    main(["fit", "--config", str(recipe)])
    assert len(column(Path("runs/small/version_0"), "test/accuracy")) == 1


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        (
            "damping: 1.0e-4",
            "dampling: 1.0e-4",
            "error: model.optimizer: Option 'dampling' is not accepted. Did you mean damping?\n",
        ),
        ("damping: 1.0e-4", "damping: lots", "- Expected a <class 'float'>\n            Given value: lots"),
        ("batch_size: 512", "batch_size: many", "\"batch_size\":\n          Expected a <class 'int'>. Got value: many"),
        (
            "batch_size: 512",
            "batchsize: 512",
            "error: data: Option 'batchsize' is not accepted. Did you mean batch_size?\n",
        ),
        ("{filename: last}", "{filname: last}", "Option 'filname' is not accepted. Did you mean filename?\n"),
        ("max_epochs:", "max_epoch:", "'trainer.max_epoch'. Did you mean trainer.max_epochs?\n"),
        ("data:\n", "dta:\n", "option 'dta.init_args.batch_size'. Did you mean data?\n"),
        ("model:\n", "optimizer: {lr: 1.0}\nmodel:\n", "does not accept option 'optimizer.lr'"),
        ("widths: [64, 16, 10]", "widths: [64, 16, 10", "Problems parsing config"),
    ],
)
def test_wrong_recipe_is_refused_by_name(recipe, capsys, right, wrong, named):
    assert right in RECIPE
    recipe.write_text(RECIPE.replace(right, wrong))
    assert named in refused(["fit", "--config", str(recipe)], capsys)


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("lightning_ief.IEF", "lightning_ief.IFE", "model.optimizer: there is no {wrong}. Did you mean {right}?"),
        ("lightning_ief.IEF", "torch.optim.SDG", "model.optimizer: there is no {wrong}. Did you mean torch.optim.SGD?"),
        ("tasks.MLP", "tasks.MPL", "model.net: there is no lightning_ief.{wrong}. Did you mean lightning_ief.{right}?"),
        ("tasks.Classifier", "tasks.Clasifier",
         "model: there is no lightning_ief.{wrong}. Did you mean lightning_ief.{right}?"),
        ("lightning_ief.tasks.Digits", "lightning_ief.task.Digits",
         "data: there is no lightning_ief.task. Did you mean lightning_ief.tasks?"),
        ("lightning_ief.tasks.Digits", "lightningief.tasks.Digits",
         "data: there is no lightningief. Did you mean lightning_ief?"),
        ("loggers.CSVLogger", "loggers.CVSLogger",
         "trainer.logger: there is no lightning.pytorch.{wrong}. Did you mean lightning.pytorch.{right}?"),
        ("lightning_ief.IEF", "lightning_ief.Xyzzy", "model.optimizer: there is no lightning_ief.Xyzzy."),
    ],
)  # fmt: skip
def test_a_misspelt_class_path_is_suggested_and_nothing_else_is_said(recipe, capsys, right, wrong, said):
    assert right in RECIPE
    recipe.write_text(RECIPE.replace(right, wrong))
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(recipe)])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {said.format(right=right, wrong=wrong)}\n"


def test_what_a_users_module_fails_to_import_is_no_misspelt_class(recipe, capsys):
    Path("of_the_user.py").write_text("import torch\nclass Net: size = torch.no_such_name\n")
    recipe.write_text(RECIPE.replace("lightning_ief.tasks.MLP", "of_the_user.Net"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(".")
        message = refused(["fit", "--config", str(recipe)], capsys)
    assert "has no attribute 'no_such_name'" in message and "Did you mean" not in message


LR = "--model.init_args.optimizer.init_args.lr=1"


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["compar"], "compare"),
        (["figure"], "figures"),
        (["reprot"], "report"),
        (["evalute"], "evaluate"),
        (["compare", "--seed", "[0]"], "--seeds"),
        (["figures", "--metrc", "x"], "--metric"),
        (["report", "--evaluation", "a.csv"], "--evaluations"),
        (["evaluate", "--dampngs", "3"], "--dampings"),
        (["fit", "--confg", "a.yaml"], "--config"),
        (["fit", "--ckpt", "a.ckpt"], "--ckpt_path"),
        (["fit", "--trainr.max_epochs=1"], "--trainer.max_epochs"),
        (["fit", "--max_epochs=1"], "--trainer.max_epochs"),
        (["fit", "--config=recipe.yaml", "--trainer.max_epoch=1"], "--trainer.max_epochs"),
        (["fit", "--config=recipe.yaml", "--data.batch_siz=4"], "batch_size"),
        (["fit", "--config=recipe.yaml", LR.replace("model", "modl")], "--model"),
        (["fit", "--config=recipe.yaml", LR.replace("init_args", "init_arg")], "--init_args"),
        (["fit", "--config=recipe.yaml", LR.replace("optimizer", "optimzer")], "--optimizer"),
        (["fit", "--config=recipe.yaml", LR.replace(".lr=", ".l=")], "lr"),
    ],
)
def test_what_is_misspelt_is_suggested(recipe, capsys, arguments, meant):
    assert refused(arguments, capsys).endswith(f". Did you mean {meant}?\n")


def test_nothing_is_suggested_where_nothing_is_close(recipe, capsys):
    assert refused(["fit", "--config=recipe.yaml", "--xyz=1"], capsys) == "error: unrecognized arguments: --xyz=1\n"
    assert "there are ['fit', " in refused(["xyz"], capsys)


T5 = str(Path(__file__).parents[2] / "recipes/t5_lora_glue.yaml")


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        ("/nowhere/t5", "there is no such folder"),
        ("nobody/t5", "run `hf download nobody/t5 --local-dir t5`, bring the"),
    ],
)
def test_a_missing_model_is_named_alone(monkeypatch, model, remedy):
    from lightning_ief.tasks import hub

    monkeypatch.setattr(hub, "_answers", lambda url: False)
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", T5, f"--model.init_args.net.init_args.model_name_or_path={model}"])
    message = str(caught.value.code)
    assert message.startswith(f"lightning-ief: error: T5Classifier.model_name_or_path={model}")
    assert remedy in message and "Namespace" not in message and "\n" not in message


def test_a_value_that_a_class_refuses_is_named_alone(recipe):
    with pytest.raises(SystemExit, match=r"^lightning-ief: error: DigitsDataModule\(val_fraction=2.0,.*\.$"):
        main(["fit", "--config", str(recipe), "--data.init_args.val_fraction=2"])
    with pytest.raises(SystemExit, match=r"^lightning-ief: error: IEF\(damping=-1.0\): must be .*\.$"):
        main(["fit", "--config", str(recipe), "--model.init_args.optimizer.init_args.damping=-1"])


class Faulty(Callback):
    """A callback with an error that nobody meant to raise."""

    def on_fit_start(self, trainer, pl_module):
        int("no number")


def test_other_errors_keep_their_traceback(recipe):
    with pytest.raises(ValueError, match="no number"):
        main(["fit", "--config", str(recipe), f"--trainer.callbacks+={__name__}.Faulty"])


@pytest.mark.parametrize(("name", "goes_on"), [("evaluate", True), ("validate", False)])
def test_an_interruption_is_no_traceback(monkeypatch, capsys, name, goes_on):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    with pytest.raises(SystemExit) as caught:
        main([name])
    assert caught.value.code == 130
    assert ("The same command goes on" in capsys.readouterr().err) == goes_on


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
    for name, description in (SUBCOMMANDS | OWN_SUBCOMMANDS).items():
        assert f"    {name} " in text and description in " ".join(text.split())


def test_missing_jsonargparse_names_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "jsonargparse" else found(name))
    with pytest.raises(SystemExit, match=r"pip install 'lightning-ief\[cli\]'"):
        main(["--help"])


@pytest.mark.parametrize("name", OWN_SUBCOMMANDS)
def test_subcommands_without_a_model_are_explained(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: lightning-ief {name} ") and OWN_SUBCOMMANDS[name] in text
    assert "--metric METRIC" in text and "(default: val/accuracy)" in " ".join(text.split())
    assert not any(noise in text for noise in ("class '", "Sequence", "+", "PATH1", "null", "()"))


@pytest.mark.parametrize("name", [*SUBCOMMANDS, *OWN_SUBCOMMANDS])
def test_help_is_a_screen_of_the_commands_own_options_and_the_rest_is_one_word_away(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    texts = []
    for asked in ("--help", "--help=all"):
        with pytest.raises(SystemExit) as caught:
            main([name, asked])
        assert caught.value.code == 0
        texts.append(capsys.readouterr().out)
    short, whole = texts
    assert len(short.splitlines()) <= 40 and max(map(len, short.splitlines()[1:])) <= 80
    assert f"lightning-ief {name} --help=all" in short
    # Every option of the command itself, and none of a recipe, whose keys are pointed to.
    own = {"fit": "--test_after_fit", "evaluate": "--dampings", "compare": "--seeds", "figures": "--fields"}
    options = {line.split()[0] for line in short.splitlines() if line.startswith("  --")}
    assert own.get(name, "--metric" if name == "report" else "--ckpt_path") in options
    assert ("--trainer.KEY" in options) == (name in SUBCOMMANDS)
    assert ("--trainer.max_epochs MAX_EPOCHS" in whole) == (name in SUBCOMMANDS)
    assert options - {"--model.KEY", "--data.KEY", "--trainer.KEY"} <= {*whole.replace(",", "").split()}


def test_help_of_few_options_leaves_none_out(capsys):
    for name in OWN_SUBCOMMANDS:
        for asked in ("--help", "--help=all"):
            with pytest.raises(SystemExit):
                main([name, asked])
        found = [set(re.findall(r"^  (--\w+)", text, re.M)) for text in capsys.readouterr().out.split("usage: ")[1:]]
        assert found[0] == found[1]


def test_subcommands_without_a_model_come_first(recipe, capsys):
    Path("empty.yaml").write_text("{}\n")
    assert "compare takes nothing before it" in refused(["--config", "empty.yaml", "compare"], capsys)
