"""The comparison: what is run, what is not run again, and the table."""

import csv
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_ief.experiments import outcomes, runner
from lightning_ief.experiments.cli import main
from lightning_ief.experiments.comparison import Outcome, chosen, compare, spread, summarize
from lightning_ief.experiments.tables import read_table
from tests.experiments.test_cli import RECIPE

LR = "model.init_args.optimizer.init_args.lr"


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch):
    """A recipe with a variant, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    Path("recipe").mkdir()
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    Path("recipe/sgd.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"optimizer": optimizer}}}))
    return Path("recipe.yaml")


class Ended:
    """A process that has ended."""

    pid = 0

    def __init__(self, code: int) -> None:
        self.wait = lambda: code


class Runs:
    """In place of processes: notes the arguments, and writes what a run would log."""

    def __init__(self) -> None:
        self.done: list[dict[str, str]] = []
        self.environments: list[str | None] = []
        self.fails = lambda options: False
        self.accuracy = lambda options: 0.5

    def __call__(self, command, env, **_):
        options = dict(argument[2:].split("=", 1) for argument in command[4:])
        options["config"] = [argument for argument in command if argument.startswith("--config")][-1]
        self.done.append(options)
        self.environments.append(env.get("CUDA_VISIBLE_DEVICES"))
        folder = Path(
            options["trainer.logger.save_dir"], options["trainer.logger.name"], options["trainer.logger.version"]
        )
        if self.fails(options):
            return Ended(1)
        best = self.accuracy(options)
        first = [(0, 0, 2.0, ""), (1, 0, 1.0, ""), (1, 0, "", best)]
        second = [(2, 1, 0.5, ""), (3, 1, 0.25, ""), (3, 1, "", best / 2)]
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "epoch", "train/loss", "val/accuracy"))
            writer.writerows([*first, *second])
        return Ended(0)


@pytest.fixture
def runs(monkeypatch):
    found = Runs()
    monkeypatch.setattr(runner.subprocess, "Popen", found)
    return found


def test_search_with_the_first_seed_then_the_others(runs, recipe, capsys):
    runs.accuracy = lambda o: {"0.01": 0.6, "0.1": 0.9, "1.0": 0.7, "10.0": 0.8}[
        o["model.init_args.optimizer.init_args.lr"]
    ]
    found = compare(recipe, ["ief", "sgd"], [3, 4, 5], [0.1, 1.0, 10.0])
    lrs = [
        (o["trainer.logger.name"], o["model.init_args.optimizer.init_args.lr"], o["seed_everything"]) for o in runs.done
    ]
    assert lrs == [
        *(("ief", lr, "3") for lr in ("0.1", "1.0", "10.0")),
        *(("sgd", lr, "3") for lr in ("0.01", "0.1", "1.0")),
        ("ief", "0.1", "4"), ("ief", "0.1", "5"), ("sgd", "0.1", "4"), ("sgd", "0.1", "5"),
    ]  # fmt: skip
    assert runs.done[0]["config"] == "--config=recipe.yaml" and runs.done[3]["config"] == "--config=recipe/sgd.yaml"
    # Best over epochs with its epoch; the loss is that of the last epoch alone.
    folder, settings = "runs/comparison/ief/lr_0.1_seed_3", found[0].settings
    assert found[0] == Outcome("ief", 0.1, 3, "val/accuracy", 0.9, 0, 0.375, folder, settings, last=0.45, steps=4)
    assert {name: [o.seed for o in rows] for name, rows in chosen(found).items()} == {
        "ief": [3, 4, 5],
        "sgd": [3, 4, 5],
    }
    assert read_table(Path("runs/comparison/comparison.csv"), Outcome) == found
    shown = capsys.readouterr().out
    assert re.search(r"ief\s+│\s+0.1\*\s+│\s+0.1, 1, 10\s+│\s+0.9000 ± 0.0000", shown)

    # Nothing is done twice; a further seed adds its runs alone.
    compare(recipe, ["ief", "sgd"], [3, 4, 5], [0.1, 1.0, 10.0])
    assert len(runs.done) == 10
    compare(recipe, ["ief", "sgd"], [3, 4, 5, 6], [0.1, 1.0, 10.0])
    assert [o["seed_everything"] for o in runs.done[10:]] == ["6", "6"]


def test_smaller_can_be_better(runs, recipe):
    runs.accuracy = lambda o: float(o[LR])
    found = compare(recipe, ["sgd"], [0], [1.0, 0.1], minimize=True)
    assert [o.best for o in found] == [0.05, 0.005] and found[0].epoch == 1
    assert chosen(found, minimize=True)["sgd"][0].lr == 0.01


def test_a_failed_run_leaves_the_others_and_is_tried_again(runs, recipe):
    runs.fails = lambda o: o["seed_everything"] == "1"
    with pytest.raises(MisconfigurationException, match=r"1 of 3 runs failed.*sgd/lr_0.1_seed_1/output.log"):
        compare(recipe, ["sgd"], [0, 1, 2])
    assert [o.seed for o in read_table(Path("runs/comparison/comparison.csv"), Outcome)] == [0, 2]
    runs.fails = lambda o: False
    assert [o.seed for o in compare(recipe, ["sgd"], [0, 1, 2])] == [0, 1, 2]
    assert [o["seed_everything"] for o in runs.done] == ["0", "1", "2", "1"]


def test_a_run_on_each_device(runs, recipe):
    compare(recipe, ["ief", "sgd"], [0, 1], devices=[2, "5"])
    assert set(runs.environments) <= {"2", "5"} and len(runs.environments) == 4


def test_runs_of_other_settings_are_not_mixed(runs, recipe):
    compare(recipe, ["sgd"], [0])
    with pytest.raises(MisconfigurationException, match="is a run of another recipe or with other options"):
        compare(recipe, ["sgd"], [0], options=["--trainer.max_epochs=3"])
    with pytest.raises(MisconfigurationException, match="is a run of another recipe"):
        compare(recipe, ["sgd"], [0], metric="val/loss")
    recipe.write_text(RECIPE + "# other\n")
    with pytest.raises(MisconfigurationException, match="is a run of another recipe"):
        compare(recipe, ["sgd"], [0])


def test_a_directory_is_the_same_under_another_spelling(runs, recipe):
    compare(recipe, ["sgd"], [0])
    Path("link").symlink_to("runs")
    for spelling in (Path("runs/comparison").resolve(), Path("link/comparison"), Path("runs/../runs/comparison")):
        (found,) = compare(recipe, ["sgd"], [0], directory=spelling)
        assert found.run == str(spelling / "sgd/lr_0.1_seed_0")
    assert len(runs.done) == 1


def test_two_comparisons_in_one_directory_keep_each_others_rows(runs, recipe):
    def meanwhile(options: dict[str, str]) -> float:
        if options["seed_everything"] == "0" and options["trainer.logger.name"] == "sgd":
            compare(recipe, ["ief"], [0])  # begun later, done earlier
        return 0.5

    runs.accuracy = meanwhile
    found = compare(recipe, ["sgd", "ief"], [0])
    assert [(o.optimizer, o.seed) for o in found] == [("sgd", 0), ("ief", 0)]
    assert len(runs.done) == 2
    assert {o.optimizer for o in read_table(Path("runs/comparison/comparison.csv"), Outcome)} == {"sgd", "ief"}


# Callbacks of recipes that run in processes: they say where they are, and wait.
WAITING = """
import os, time
from pathlib import Path
from threading import Thread
import lightning as L

def wait(condition):
    end = time.monotonic() + 300
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.05)

class Meet(L.Callback):
    def on_fit_start(self, trainer, pl_module):
        seed, name = os.environ["PL_GLOBAL_SEED"], trainer.logger.name
        if (name, seed) == ("sgd", "1"):
            raise ValueError("this one fails")
        Path(f"{name}.{seed}.device").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        if seed == "0":
            wait(lambda: len([*Path().glob("*.0.device")]) == 2)

class Hold(L.Callback):
    def on_fit_start(self, trainer, pl_module):
        with Path("started").open("a") as file:
            file.write(f"{os.getpid()}\\n")
        wait(Path("go").exists)
"""


class Forked:
    """A comparison of one epoch as a command: forked, which saves the start of an interpreter. Its runs are not."""

    def __init__(self, log: str, recipe: Path, callback: str, *arguments: str) -> None:
        Path("waiting.py").write_text(WAITING)
        options = ["--trainer.max_epochs=1", f"--trainer.callbacks+=waiting.{callback}"]
        self.arguments = ["compare", "--config", str(recipe), *arguments, "--", *options]
        self.log = Path(log)
        self.log.touch()
        self.process = multiprocessing.get_context("fork").Process(target=self._run)
        self.process.start()

    def _run(self) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as from a terminal
        file = self.log.open("w", buffering=1)
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = file
        sys.argv = ["lightning-ief", *self.arguments]
        main()

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    @property
    def said(self) -> str:
        return " ".join(self.log.read_text().split())


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def begin(recipe: Path) -> tuple[Forked, int]:
    """A comparison whose first run has begun and waits, and the number of that run's process."""
    first = Forked("first.log", recipe, "Hold", "--optimizers", "[ief]", "--seeds", "[0]")
    wait_until(lambda: Path("started").is_file() and Path("started").read_text().endswith("\n"))
    return first, int(Path("started").read_text())


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"


def test_two_runs_at_once_each_on_its_device(recipe):
    devices = ("--devices", '["0", "1"]')
    both = Forked("both.log", recipe, "Meet", "--optimizers", "[ief, sgd]", "--seeds", "[0, 1]", *devices)
    assert both.wait() == 2 and "1 of 4 runs failed" in both.said
    assert "this one fails" in Path("runs/comparison/sgd/lr_0.1_seed_1/output.log").read_text()
    # Those of seed 0 have waited for one another: they ran at the same time.
    assert {Path(f"{name}.0.device").read_text() for name in ("ief", "sgd")} == {"0", "1"}
    rows = read_table(Path("runs/comparison/comparison.csv"), Outcome)
    assert {(o.optimizer, o.seed) for o in rows} == {("ief", 0), ("sgd", 0), ("ief", 1)}
    assert all(0 < o.best <= 1 and o.train_loss > 0 for o in rows)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_what_a_killed_comparison_left_running_is_waited_for(recipe):
    first, run = begin(recipe)
    first.process.kill()
    first.wait()
    assert alive(run)
    Path("link").symlink_to("runs")
    spelling = str(Path("link/comparison").absolute())
    second = Forked("second.log", recipe, "Hold", "--optimizers", "[ief]", "--seeds", "[0]", "--directory", spelling)
    wait_until(lambda: f"waiting for process {run}" in second.said)
    assert Path("started").read_text() == f"{run}\n"  # the second has begun none
    Path("go").touch()
    assert second.wait() == 0
    (row,) = read_table(Path("runs/comparison/comparison.csv"), Outcome)
    with Path(row.run, "metrics.csv").open() as file:
        losses = [line["step"] for line in csv.DictReader(file) if line["train/loss"]]
    assert len(losses) == len(set(losses)) == 3  # 1,437 images of digits for training, 512 each


def test_an_interruption_ends_the_runs_and_is_no_error(recipe):
    first, run = begin(recipe)
    os.kill(first.process.pid, signal.SIGINT)
    assert first.wait() == 130
    assert not alive(run)
    assert "Traceback" not in first.said and "failed" not in first.said
    assert "The same command goes on" in first.said
    assert not Path("runs/comparison/comparison.csv").exists()


def test_a_termination_is_an_interruption(recipe, monkeypatch, capfd):
    """As of a job whose time is up."""
    begun = Path("begun").absolute()
    endless = Path("endless").absolute()
    endless.write_text(f"#!/bin/sh\necho $$ > {begun}\nexec sleep 1000\n")
    endless.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(endless))  # instead of a training run

    def terminate() -> None:
        wait_until(lambda: begun.is_file() and begun.read_text().endswith("\n"))
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=terminate).start()
    with pytest.raises(SystemExit) as caught:
        main(["compare", "--config", str(recipe), "--optimizers", "[ief]", "--seeds", "[0]"])
    assert caught.value.code == 128 + signal.SIGTERM
    assert not alive(int(begun.read_text()))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "interrupted. The same command goes on" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizers": []}, "needs an optimizer"),
        ({"seeds": [1, 1]}, r"--seeds=\[1, 1\].*twice"),
        ({"lr_factors": [0.0]}, "factors above 0"),
        ({"optimizers": ["sgd", "recipe/sgd.yaml"]}, "have the same name"),
        ({"optimizers": ["adam"]}, r"'adam' is neither the recipe's own optimizer .*\['sgd'\]"),
        ({"optimizers": ["other.yaml"]}, "there is no other.yaml"),
        ({"config": Path("other.yaml")}, "there is no recipe other.yaml"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(runs, recipe, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        compare(**{"config": recipe, "optimizers": ["sgd"], "seeds": [0], **options})
    assert not runs.done


@pytest.mark.usefixtures("in_this_process")
def test_real_runs_end_and_an_interrupted_one_goes_on(recipe):
    arguments = ["compare", "--config", str(recipe), "--optimizers", "[ief]", "--seeds", "[0]"]
    main([*arguments, "--", "--trainer.max_epochs=2"])
    folder = Path("runs/comparison/ief/lr_1_seed_0")
    whole = (folder / "metrics.csv").read_text().splitlines()
    assert (folder / "config.yaml").is_file() and "seed_everything: 0" in (folder / "config.yaml").read_text()

    # As if it had been killed in the second epoch: no row in the table, the checkpoint of the first.
    Path("runs/comparison/comparison.csv").unlink()
    short = Path("short")
    main([*arguments, "--directory", str(short), "--", "--trainer.max_epochs=1"])
    (folder / "checkpoints/last.ckpt").write_bytes((short / "ief/lr_1_seed_0/checkpoints/last.ckpt").read_bytes())
    main([*arguments, "--", "--trainer.max_epochs=2"])
    again = (folder / "metrics.csv").read_text().splitlines()
    columns = [whole[0].split(",").index(name) for name in ("step", "train/loss", "val/accuracy")]
    values = [[[row.split(",")[c] for c in columns] for row in rows[1:]] for rows in (whole, again)]
    assert values[0] == values[1] and not list(folder.glob("metrics.*.csv"))


@pytest.mark.usefixtures("in_this_process")
def test_a_run_with_nothing_left_to_do_is_taken_as_it_is(recipe):
    arguments = ["compare", "--config", str(recipe), "--optimizers", "[ief]", "--seeds", "[0]"]
    main([*arguments, "--", "--trainer.max_epochs=1"])
    table = Path("runs/comparison/comparison.csv")
    before = read_table(table, Outcome)
    table.unlink()  # as if it had been killed between the end of the run and the row
    main([*arguments, "--", "--trainer.max_epochs=1"])
    assert read_table(table, Outcome) == before


def test_a_diverged_run_has_no_final_loss():
    assert math.isnan(outcomes._of_last_epoch(([0], [2.0]), ([0, 1], [0.0, 1.0]))[0])
    assert outcomes._of_last_epoch(([0, 1], [2.0, 1.0]), ([0, 1], [0.0, 1.0])) == [1.0]


def test_an_attempt_that_got_nowhere_does_not_block_the_folder(runs, recipe):
    runs.fails = lambda options: True
    with pytest.raises(MisconfigurationException, match="1 of 1 runs failed"):
        compare(recipe, ["sgd"], [0], options=["--trainer.max_epoch=1"])
    runs.fails = lambda options: False
    assert len(compare(recipe, ["sgd"], [0], options=["--trainer.max_epochs=1"])) == 1


def test_a_command_line_that_is_wrong(recipe, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(recipe), "--optimizers", "[adam]"])
    assert "'adam' is neither" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(recipe), "--optimizer", "[ief]"])
    assert "optimizer" in capsys.readouterr().err


def test_table_and_spread():
    rows = [Outcome("ief", lr, seed, "m", best, 1, 0.5, "", "") for lr, seed, best in
            ((1.0, 0, 0.8), (2.0, 0, 0.9), (2.0, 1, 0.7))]  # fmt: skip
    assert spread([0.9, 0.7]) == "0.8000 ± 0.1414" and spread([0.5]) == "0.5000"
    assert spread([0.5, math.nan]) == "nan"
    table = summarize(rows)
    assert [list(column.cells) for column in table.columns] == [
        ["ief"], ["2*"], ["1, 2"], ["0.8000 ± 0.1414"], ["0.5000 ± 0.0000"], ["2"],
    ]  # fmt: skip
    assert summarize([]).row_count == 0
