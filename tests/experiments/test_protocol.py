"""The comparison whose search has seeds of its own: what is searched and shown, its tests and its times."""

import csv
import math
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks

from lightning_ief.experiments import runner, summary
from lightning_ief.experiments.cli import main
from lightning_ief.experiments.comparison import Outcome, chosen, compare
from lightning_ief.experiments.outcomes import RESULT, SEARCH, elapsed, steps_to
from lightning_ief.experiments.search import best_lr, further, tried
from lightning_ief.experiments.summary import paired_p, summarize, summarize_times
from lightning_ief.experiments.tables import read_table
from lightning_ief.tasks import classifier, vision
from lightning_ief.tasks.schedules import configured
from tests.experiments.test_cli import RECIPE
from tests.experiments.test_comparison import LR, Ended
from tests.tasks.stand_ins import write_fashion_mnist

ROOT = Path(__file__).parents[2]
TABLE = Path("runs/comparison/comparison.csv")


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch):
    """A recipe with variants, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ief"])
    Path("recipe.yaml").write_text(RECIPE)
    Path("recipe").mkdir()
    for name, lr in (("SGD", 0.1), ("AdamW", 0.01)):
        optimizer = {"class_path": f"torch.optim.{name}", "init_args": {"lr": lr}}
        Path(f"recipe/{name.lower()}.yaml").write_text(
            yaml.safe_dump({"model": {"init_args": {"optimizer": optimizer}}})
        )
    return Path("recipe.yaml")


class Trainings:
    """In place of processes: notes the arguments, and writes a validation after each 10 steps, and a test."""

    def __init__(self) -> None:
        self.done: list[dict[str, str]] = []
        self.commands: list[list[str]] = []
        self.curve: Callable[[str, float, int], list[float]] = lambda name, lr, seed: [0.4, 0.5]
        self.milliseconds: Callable[[str], float] = lambda name: 20.0
        self.test: Callable[[str, float, int], float | None] = lambda name, lr, seed: None

    def __call__(self, command, **_):
        options = dict(argument[2:].split("=", 1) for argument in command[4:] if "=" in argument)
        self.done.append(options)
        self.commands.append(command)
        name, lr, seed = options["trainer.logger.name"], float(options[LR]), int(options["seed_everything"])
        folder = Path(options["trainer.logger.save_dir"], name, options["trainer.logger.version"])
        test = self.test(name, lr, seed)
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "epoch", "train/loss", "val/accuracy", "timing/step_ms", "test/accuracy"))
            for epoch, value in enumerate(self.curve(name, lr, seed)):
                step = 10 * epoch + 9
                writer.writerows([(step, epoch, 0.5, "", "", ""), (step, epoch, "", value, "", "")])
                writer.writerow((step, epoch, "", "", self.milliseconds(name), ""))
            if test is not None:
                writer.writerow((step + 1, epoch + 1, "", "", "", test))
        return Ended(0)

    @property
    def order(self) -> list[tuple[str, float, int]]:
        return [(o["trainer.logger.name"], float(o[LR]), int(o["seed_everything"])) for o in self.done]


@pytest.fixture
def trainings(monkeypatch):
    found = Trainings()
    monkeypatch.setattr(runner.subprocess, "Popen", found)
    return found


def cells(table) -> dict[str, list[str]]:
    """A table's columns by their heads."""
    return {str(column.header): [*column.cells] for column in table.columns}


def test_some_seeds_choose_by_their_mean_at_the_end_and_others_give_the_results(trainings, recipe):
    # The best single run, the best epoch, and the better mean over epochs are all of the lr that is not chosen.
    ends = {(0.1, 100): 0.9, (0.1, 101): 0.5, (1.0, 100): 0.75, (1.0, 101): 0.75}
    trainings.curve = lambda name, lr, seed: [0.99 if lr == 0.1 else 0.2, ends.get((lr, seed), 0.6 + seed / 100)]
    found = compare(recipe, ["sgd"], [0, 1, 2], [1.0, 10.0], search_seeds=[100, 101])
    searched = [("sgd", lr, seed) for seed in (100, 101) for lr in (0.1, 1.0)]
    assert trainings.order == [*searched, *(("sgd", 1.0, seed) for seed in (0, 1, 2))]
    assert [o.part for o in found] == [SEARCH] * 4 + [RESULT] * 3
    (rows,) = chosen(found).values()
    assert [(o.seed, o.last, o.best, o.steps) for o in rows] == [
        (s, 0.6 + s / 100, 0.6 + s / 100, 20) for s in range(3)
    ]
    assert read_table(TABLE, Outcome) == found and list(chosen(read_table(TABLE, Outcome)).values()) == [rows]
    table = cells(summarize(found))
    assert table["val/accuracy"] == ["0.6100 ± 0.0100"] and table["lr"] == ["1*"] and table["settings"] == ["2"]
    assert table["runs"] == ["3"] and table["test/accuracy"] == ["-"] and "p" not in table

    compare(recipe, ["sgd"], [0, 1, 2, 3], [1.0, 10.0], search_seeds=[100, 101])
    assert trainings.order[7:] == [("sgd", 1.0, 3)]  # nothing is done twice
    # What has searched gives no results.
    before = len(trainings.done)
    with pytest.raises(MisconfigurationException, match=r"seed 100 was one of the search for sgd"):
        compare(recipe, ["sgd"], [0, 100], [3.0, 30.0], search_seeds=[102])  # at whatever learning rate
    with pytest.raises(MisconfigurationException, match=r"seed 0 was one of the result for sgd"):
        compare(recipe, ["sgd"], [5], [1.0, 10.0], search_seeds=[100, 0])
    assert len(trainings.done) == before


def test_a_grid_goes_on_beyond_its_border_and_all_get_as_many_settings(trainings, recipe):
    best = {"sgd": 2.7, "ief": 0.3, "adamw": 0.01}  # twice above the grid, below it, in it
    trainings.curve = lambda name, lr, seed: [1 - abs(math.log(lr / best[name])) / 10]
    found = compare(recipe, ["sgd", "ief", "adamw"], [0], [1 / 3, 1.0, 3.0], search_seeds=[100, 101], widen=5)
    grids = {name: [f"{lr:.3g}" for lr in tried(found, name)] for name in best}
    # sgd: 0.9, 2.7 and, as that is the border, 8.1; the others go on, too, now on one side and now on the other.
    assert grids["sgd"] == ["0.0333", "0.1", "0.3", "0.9", "2.7", "8.1"]
    assert grids["ief"] == ["0.037", "0.111", "0.333", "1", "3", "9"]
    assert grids["adamw"] == ["0.00111", "0.00333", "0.01", "0.03", "0.09", "0.27"]
    assert {name: f"{rows[0].lr:.3g}" for name, rows in chosen(found).items()} == {
        "sgd": "2.7",
        "ief": "0.333",
        "adamw": "0.01",
    }
    # The first seed has tried six of each; the better half goes on to the second one.
    seconds = {name: sorted(lr for n, lr, seed in trainings.order if (n, seed) == (name, 101)) for name in best}
    assert {name: [f"{lr:.3g}" for lr in lrs] for name, lrs in seconds.items()} == {
        "sgd": ["0.9", "2.7", "8.1"],
        "ief": ["0.111", "0.333", "1"],
        "adamw": ["0.00333", "0.01", "0.03"],
    }
    assert len(trainings.done) == len({*trainings.order}) == 3 * 6 + 3 * 3 + 3
    assert cells(summarize(found))["lr"] == ["2.7", "0.3333", "0.01"]
    assert cells(summarize(found))["settings"] == ["6", "6", "6"]


def test_it_goes_on_so_often_at_most_and_says_where_the_best_is_still_at_the_border(trainings, recipe):
    trainings.curve = lambda name, lr, seed: [lr if name == "sgd" else 1 - abs(lr - 1)]
    found = compare(recipe, ["sgd", "ief"], [0], [0.1, 1.0, 10.0], search_seeds=[100], widen=2)
    assert tried(found, "sgd") == [0.01, 0.1, 1.0, 10.0, 100.0]
    assert cells(summarize(found))["lr"] == ["100*", "1"]


def test_a_grid_that_has_its_best_within_stays(trainings, recipe):
    trainings.curve = lambda name, lr, seed: [1 - abs(lr - 0.1)]
    found = compare(recipe, ["sgd"], [0], [0.1, 1.0, 10.0], search_seeds=[100], widen=3)
    assert tried(found, "sgd") == [0.01, 0.1, 1.0]
    # The search of the first seed goes on alike.
    found = compare(recipe, ["sgd"], [0, 1], [1.0, 10.0], widen=1, directory=Path("first"))
    assert tried(found, "sgd") == [0.01, 0.1, 1.0] and [o.lr for o in found if o.seed == 1] == [0.1]


def test_the_next_learning_rate_follows_the_factor_of_its_side():
    assert further([0.1, 0.2, 1.0], 1.0) == 5.0 and further([1.0, 0.2, 0.1], 0.1) == 0.05
    assert further([1.0, 2.0, 4.0, 8.0], 2.0) == 0.5 and further([1.0, 2.0, 4.0, 8.0], 4.0) == 16.0
    assert further([1.0, 2.0, 4.0], 2.0) == 8.0


@pytest.mark.parametrize("minimize", [False, True])
def test_what_has_diverged_is_the_worst_and_no_failure(trainings, recipe, minimize):
    trainings.curve = lambda name, lr, seed: [0.5, math.nan] if (lr, seed) == (1.0, 101) else [0.1, 0.3 - lr / 10]
    trainings.curve = {
        False: trainings.curve,
        True: lambda name, lr, seed: [math.nan, math.nan] if lr == 0.1 else [2.0, 1.0],
    }[minimize]
    found = compare(recipe, ["sgd"], [0], [1.0, 10.0], search_seeds=[100, 101], minimize=minimize)
    assert chosen(found, minimize)["sgd"][0].lr == (1.0 if minimize else 0.1)
    lost = [o for o in found if math.isnan(o.last)]
    assert [(o.lr, o.seed) for o in lost] == ([(0.1, 100), (0.1, 101)] if minimize else [(1.0, 101)])
    assert all(math.isnan(o.best) for o in lost) == minimize


def row(name: str, lr: float, seed: int, last: float, part: str = RESULT, **more) -> Outcome:
    return Outcome(
        name, lr, seed, "val/accuracy", 0.99, 1, 0.5, **{"run": "", "settings": "", **more}, last=last, part=part
    )


def test_of_several_as_good_the_smallest_lr_is_chosen_in_whatever_order_runs_end():
    def row(lr, seed, part):
        return Outcome("sgd", lr, seed, "val/accuracy", 0.5, 0, 0.1, "", "", last=0.5, part=part)

    rows = [row(1.0, 100, SEARCH), row(0.1, 100, SEARCH), row(0.1, 0, RESULT)]
    assert best_lr(rows[:2]) == best_lr(rows[1::-1]) == 0.1
    assert chosen(rows) == {"sgd": rows[2:]}
    # A table with a further, better one, of which there are no results: these are still those of what was chosen.
    better = Outcome("sgd", 3.0, 100, "val/accuracy", 0.9, 0, 0.1, "", "", last=0.9, part=SEARCH)
    assert chosen([*rows, better]) == {"sgd": rows[2:]}


def test_files_among_the_options_are_part_of_a_run(trainings, recipe):
    """What they ask for is seen, and a run is another one when they change."""
    Path("more.yaml").write_text("test_after_fit: true\ntrainer: {max_epochs: 3}\n")
    options = ["--config", "more.yaml"]
    arguments = {"search_seeds": [100], "options": options}
    compare(recipe, ["sgd"], [0], [1.0, 10.0], **arguments)
    assert all("--test_after_fit=last" in command for command in trainings.commands)
    Path("more.yaml").write_text("test_after_fit: true\ntrainer: {max_epochs: 4}\n")
    with pytest.raises(MisconfigurationException, match="another recipe or with other options"):
        compare(recipe, ["sgd"], [0], [1.0, 10.0], **arguments)
    Path("more.yaml").write_text("trainer: {accumulate_grad_batches: 4}\n")
    for given in (options, ["--trainer.accumulate_grad_batches=2"]):
        with pytest.raises(MisconfigurationException, match="some steps are of several batches"):
            compare(recipe, ["sgd"], [0], [1.0, 10.0], Path("elsewhere"), search_seeds=[100], options=given)


def test_an_lr_of_which_a_seed_is_missing_is_not_chosen():
    rows = [row("a", 1.0, 100, 0.9, SEARCH), row("a", 2.0, 100, 0.5, SEARCH), row("a", 2.0, 101, 0.5, SEARCH)]
    assert best_lr(rows) == 2.0 and best_lr([]) is None
    assert best_lr([row("a", lr, 0, v, SEARCH) for lr, v in ((1.0, math.nan), (2.0, 0.1))], minimize=True) == 2.0


def test_p_is_that_of_a_paired_test_by_hand():
    """With three pairs t has two degrees of freedom, and its distribution is elementary: 1 − t / √(t² + 2)."""
    one, other = {0: 0.9, 1: 0.8, 2: 0.85, 7: 0.1}, {2: 0.80, 1: 0.78, 0: 0.84, 8: 0.9}
    differences = [0.06, 0.02, 0.05]
    mean = sum(differences) / 3
    t = mean / math.sqrt(sum((d - mean) ** 2 for d in differences) / 2 / 3)
    assert paired_p(one, other) == pytest.approx(1 - t / math.sqrt(t**2 + 2), rel=1e-6)
    assert paired_p(other, one) == paired_p(one, other)  # two-sided
    assert paired_p(one, one) is None and paired_p({0: 1.0}, {0: 2.0}) is None


def test_the_table_tests_on_what_has_chosen_nothing():
    values = {"ief": (0.90, 0.92, 0.91), "sgd": (0.80, 0.86, 0.83)}
    rows = [
        row(name, 1.0, seed, 0.5, test=v, seconds=1.0, steps=5)
        for name, vs in values.items()
        for seed, v in enumerate(vs)
    ]
    rows += [row("ief", lr, 100, lr, SEARCH) for lr in (0.5, 1.0, 0.2)]
    table = cells(summarize(rows, reference="sgd"))
    p = paired_p(dict(enumerate(values["ief"])), dict(enumerate(values["sgd"])))
    assert table["p"] == [f"{p:.2g}", "-"] and p == pytest.approx(0.03, abs=0.02)
    assert table["test/accuracy"] == ["0.9100 ± 0.0100", "0.8300 ± 0.0300"]
    assert table["lr"] == ["1*", "1"] and table["settings"] == ["3", "1"]
    # Validation alone, if there are no tests.
    bare = [row(o.optimizer, o.lr, o.seed, o.test or o.lr, o.part) for o in rows]
    assert cells(summarize(bare, reference="sgd"))["p"] == [f"{p:.2g}", "-"]
    assert (
        "3 such" not in summarize(rows, reference="sgd").caption
        and "1 such" in summarize(rows, reference="sgd").caption
    )


def test_time_and_steps_to_the_target_of_the_best_baseline(trainings, recipe):
    curves = {
        "sgd": [[0.2, 0.5, 0.6], [0.3, 0.6, 0.8], [0.4, 0.5, 0.72]],  # the median at the end is 0.72
        "adamw": [[0.3, 0.4, 0.5]] * 3,
        "ief": [[0.5, 0.8, 0.1], [0.69, 0.71, 0.9], [0.75, 0.1, 0.1]],  # it counts when it is reached first
    }
    trainings.curve = lambda name, lr, seed: curves[name][seed % 3]
    trainings.milliseconds = lambda name: {"ief": 50.0}.get(name, 20.0)
    found = compare(recipe, ["sgd", "adamw", "ief"], [0, 1, 2], search_seeds=[3], baselines=["sgd", "adamw"])
    table = summarize_times(found, ["sgd", "adamw"])
    assert "0.7200" in table.caption
    table = cells(table)
    assert table["steps to target"] == ["30", "-", "20"] and table["reached"] == ["2 of 3", "0 of 3", "3 of 3"]
    assert table["seconds to target"] == ["0.6", "-", "1"]
    assert table["steps"] == ["30"] * 3 and table["seconds"] == ["0.6", "0.6", "1.5"]
    assert "steps to target" not in cells(summarize_times(found))
    falling = [Outcome(**{**vars(o), "last": -o.last}) for o in found]
    assert summary.target_of(chosen(found), ["adamw"]) == 0.5
    assert summary.target_of(chosen(falling, True), ["sgd", "adamw"], minimize=True) == pytest.approx(-0.72)


def test_seconds_are_of_steps_alone_and_go_on_within_an_epoch():
    timing = [9, 19], [2.0, 4.0]
    assert [elapsed(timing, steps) for steps in (0, 5, 10, 20)] == [0.0, 0.01, 0.02, 0.06]
    falling = [9, 19, 29], [3.0, 2.0, 2.5]
    assert steps_to(2.0, falling, minimize=True) == 20 and steps_to(1.9, falling, minimize=True) is None
    assert elapsed(timing, 25) == pytest.approx(0.08)  # as the last ones


def test_the_untuned_have_a_row_each_with_the_lr_of_their_file(trainings, recipe):
    trainings.test = lambda name, lr, seed: 0.7 + seed / 100
    found = compare(
        recipe, ["sgd", "ief"], [0, 1], [0.1, 1.0], search_seeds=[100], untuned=["ief"], reference="ief_untuned"
    )
    assert [(o.lr, o.seed, o.part) for o in found if o.optimizer == "ief_untuned"] == [
        (1.0, 0, RESULT),
        (1.0, 1, RESULT),
    ]
    assert cells(summarize(found))["settings"] == ["2", "2", "1"] and len(trainings.done) == 4 + 4 + 2
    assert all((o.test, o.steps, o.seconds) == (0.7 + o.seed / 100, 20, 0.4) for o in found)


def test_steps_are_timed_once_and_the_last_weights_are_tested(trainings, recipe):
    def added(directory: str, options: list[str] = (), **more) -> list[str]:  # noqa: RUF013
        compare(recipe, ["sgd"], [0], directory=Path(directory), options=options, **more)
        command = trainings.commands[-1]
        return command[1 + max(n for n, a in enumerate(command) if "logger.version" in a) :]

    timing = ["--trainer.callbacks+=lightning_ief.callbacks.StepTiming", "--trainer.callbacks.print_table=false"]
    parts = {"search_seeds": [100]}
    assert added("a") == [] and added("b", **parts) == timing == added("c", baselines=["sgd"])
    assert added("d", ["--test_after_fit=true"], **parts) == ["--test_after_fit=true", *timing, "--test_after_fit=last"]
    assert added("e", ["--test_after_fit", "false"], **parts)[2:] == timing
    own = "--trainer.callbacks+=lightning_ief.StepTiming"
    assert added("f", [own], **parts) == [own]
    recipe.write_text(RECIPE + "    - class_path: lightning_ief.callbacks.StepTiming\ntest_after_fit: true\n")
    assert added("g", **parts) == ["--test_after_fit=last"]
    assert added("h", ["--test_after_fit=false"], **parts) == ["--test_after_fit=false"]
    assert added("i", ["--trainer.callbacks=[]"], **parts) == [
        "--trainer.callbacks=[]",
        *timing,
        "--test_after_fit=last",
    ]


def test_the_order_follows_the_seed_if_asked_and_such_runs_are_not_mixed_with_others(trainings, recipe):
    compare(recipe, ["sgd"], [0, 7], order_by_seed=True)
    assert [o["data.init_args.order_seed"] for o in trainings.done] == ["0", "7"]
    with pytest.raises(MisconfigurationException, match="is a run of another recipe or with other options"):
        compare(recipe, ["sgd"], [0, 7])
    compare(recipe, ["sgd"], [0, 7], order_by_seed=True)
    assert len(trainings.done) == 2


def test_a_table_of_an_older_version_is_read_and_its_runs_are_not_done_again(trainings, recipe):
    (new,) = compare(recipe, ["sgd"], [0])
    lines = [",".join(line.split(",")[:9]) for line in TABLE.read_text().splitlines()]
    TABLE.write_text("\n".join(lines) + "\n")
    (old,) = compare(recipe, ["sgd"], [0])
    assert len(trainings.done) == 1 and (old.best, old.last, old.part) == (new.best, None, "")
    compare(recipe, ["sgd"], [0, 1])
    assert [o.last for o in read_table(TABLE, Outcome)] == [None, 0.5]
    TABLE.write_text(",".join(lines[0].split(",")[:8]) + "\n")
    with pytest.raises(MisconfigurationException, match="is no table of this version"):
        compare(recipe, ["sgd"], [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search_seeds": [0, 1]}, r"\[0\] would choose the learning rate and give the results, too"),
        ({"search_seeds": [1, 1]}, "twice"),
        ({"widen": -1}, "at least 0"),
        ({"widen": 1}, "factor between two"),
        ({"baselines": ["adam"]}, r"--baselines\): 'adam' is none of the rows \['sgd'\]"),
        ({"reference": "adam", "search_seeds": [1]}, "'adam' is none of the rows"),
        ({"reference": "sgd"}, "Give --search_seeds"),
        ({"untuned": ["sgd", "sgd"]}, "twice"),
        ({"untuned": ["adam"]}, "'adam' is neither"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(trainings, recipe, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        compare(**{"config": recipe, "optimizers": ["sgd"], "seeds": [0], **options})
    assert not trainings.done


def test_a_missing_scipy_is_noticed_before_anything_runs(trainings, recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ief\[recipes\]'"):
        compare(recipe, ["sgd"], [0], search_seeds=[1], reference="sgd")
    assert not trainings.done


def test_the_command_of_the_page_runs_with_one_schedule_for_all(tmp_path, trainings, monkeypatch):
    """The command as it stands, its runs noted; then a step of each contestant, on noise."""
    text = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^(lightning-ief compare .*?)\n```", text, re.MULTILINE | re.DOTALL)
    trainings.curve = lambda name, lr, seed: [lr]  # the best is always at the border
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    main(shlex.split(command.replace("\\\n", " "))[1:])
    firsts = {options["trainer.logger.name"]: n for n, options in reversed([*enumerate(trainings.done)])}
    # Nine settings of each by the first seed, the better five of them by the second one, and the results.
    assert len(firsts) == 11 and len(trainings.done) == 10 * (9 + 5) + 11 * 5

    write_fashion_mnist(tmp_path / "data", 5_000 + 200)
    monkeypatch.setattr(vision, "_DEBIAN", tmp_path / "no_such_package")
    seen = []
    monkeypatch.setattr(classifier, "configured", lambda *args: seen.append(args) or configured(*args))
    for name, number in firsts.items():
        if name == "muon" and not hasattr(torch.optim, "Muon"):
            continue
        small = ["--trainer.fast_dev_run=true", "--model.init_args.net.init_args.widths=[784, 8, 10]"]
        main([*trainings.commands[number][3:], *small])
        module, _, *schedule = seen.pop()
        assert schedule == ["linear", 0.05], name
        assert [type(c).__name__ for c in module.trainer.callbacks].count("StepTiming") == 1
        kinds = [type(c.scheduler).__name__ for c in module.trainer.lr_scheduler_configs]
        assert kinds == ["LambdaLR"], name
    main([*trainings.commands[firsts["ef"]][3:], *small, "--model.init_args.lr_scheduler=null"])
    assert seen.pop()[2:] == (None, 0.05)


@pytest.mark.usefixtures("in_this_process")
def test_the_whole_protocol_runs(recipe, capsys):
    """Real runs: schedule, warm-up, averaged weights, order and test alike for all."""
    arguments = [
        "compare", "--config", str(recipe), "--optimizers", "[ief, adamw]", "--untuned", "[ief]", "--seeds", "[0, 1]",
        "--search_seeds", "[100]", "--lr_factors", "[0.3, 1]", "--widen", "1", "--baselines", "[adamw]",
        "--reference", "ief", "--order_by_seed", "true", "--",
        "--test_after_fit=true", "--model.init_args.lr_scheduler=linear", "--model.init_args.warmup=.2",
    ]  # fmt: skip
    if hasattr(callbacks, "EMAWeightAveraging"):  # since lightning 2.6
        averaged = "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging"
        arguments += [averaged, "--trainer.callbacks.decay=0.5"]
    main(arguments)
    rows = read_table(TABLE, Outcome)
    assert len(rows) == 2 * 3 + 3 * 2 and {o.part for o in rows} == {SEARCH, RESULT}
    assert all(o.steps == 6 and o.seconds > 0 and 0 < o.test <= 1 for o in rows)
    losses = []
    for outcome in rows:
        config = yaml.safe_load(Path(outcome.run, "config.yaml").read_text())
        assert config["data"]["init_args"]["order_seed"] == outcome.seed == config["seed_everything"]
        assert config["data"]["init_args"]["seed"] == 0 and config["model"]["init_args"]["warmup"] == 0.2
        with Path(outcome.run, "metrics.csv").open() as file:
            losses.append(next(float(line["train/loss"]) for line in csv.DictReader(file) if line["train/loss"]))
    # The first batch before the first step: seeds differ in weights and order, optimizers of a seed in neither.
    assert len({f"{loss:.5f}" for loss in losses}) == 3
    shown = capsys.readouterr().out
    assert re.search(r"ief_untuned", shown) and "Target: val/accuracy" in shown
    main(arguments)
    assert read_table(TABLE, Outcome) == rows
