"""A run and what went on from it are one; what has no values is left out with a line, and ends nothing."""

import csv
import warnings
from pathlib import Path

import pytest

from lightning_ief.experiments.cli import main
from lightning_ief.experiments.evaluation import Result
from lightning_ief.experiments.figures.folders import experiment, named, read_runs
from lightning_ief.experiments.figures.panels import curves_figure, damping_figure, gamma_figure
from lightning_ief.experiments.figures.runs import draw_runs


def write(folder: Path, epochs: range, loss: float = 1.0, resumed_from: str | None = "no config", **columns) -> Path:
    """A run of three steps an epoch, the last with a validation, as CSVLogger writes it."""
    folder.mkdir(parents=True)
    rows = []
    for epoch in epochs:
        for step in range(3 * epoch, 3 * epoch + 3):
            rows.append({"step": step, "epoch": epoch, "train/loss": loss / (1 + step)})
        rows.append({"step": 3 * epoch + 2, "epoch": epoch, "val/accuracy": loss * epoch, **columns})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*dict.fromkeys(key for row in rows for key in row)])
        writer.writeheader()
        writer.writerows(rows)
    if resumed_from != "no config":
        (folder / "config.yaml").write_text(f"ckpt_path: {resumed_from or 'null'}\n")
    return folder


def line(axes) -> dict[str, list[list[float]]]:
    return {each.get_label(): each.get_xydata().tolist() for each in axes.lines}


CHECKPOINT = "runs/a/version_0/checkpoints/last.ckpt"  # from wherever the command was given


@pytest.mark.parametrize("says", ["config", "epochs"])
def test_a_run_and_its_resumed_run_are_one_line(tmp_path, says):
    from_, to = (None, CHECKPOINT) if says == "config" else ("no config", "no config")
    folders = [
        write(tmp_path / "a/version_0", range(3), resumed_from=from_),  # went on behind the checkpoint, as runs do
        write(tmp_path / "a/version_1", range(2, 4), 2.0, resumed_from=to),
    ]
    read = read_runs(named(folders))
    assert [*read] == ["a/version_0 + version_1"] and experiment(*read) == "a"
    assert read["a/version_0 + version_1"]["val/accuracy"] == ([2, 5, 8, 11], [0.0, 1.0, 4.0, 6.0])
    notes = []
    figure = curves_figure(read, "val/accuracy", notes.append)
    loss, accuracy = figure.axes
    assert line(accuracy) == {"a": [[0, 0.0], [1, 1.0], [2, 4.0], [3, 6.0]]}
    assert [x for x, _ in line(loss)["a"]] == [0, 1, 2, 3] and not notes


def test_a_chain_and_branches_of_resumed_runs(tmp_path):
    second = CHECKPOINT.replace("version_0", "version_1")
    folders = [
        write(tmp_path / "a/version_0", range(2), resumed_from=None),
        write(tmp_path / "a/version_1", range(2, 3), resumed_from=CHECKPOINT),
        write(tmp_path / "a/version_2", range(3, 4), resumed_from=second),
        write(tmp_path / "a/version_3", range(3, 5), resumed_from=second),
    ]
    read = read_runs(named(folders))
    assert [*read] == ["a/version_0 + version_1 + version_2", "a/version_0 + version_1 + version_3"]
    assert [max(metrics["epoch"][1]) for metrics in read.values()] == [3, 4]


def test_what_was_not_resumed_is_not_joined(tmp_path):
    repeated = [write(tmp_path / f"a/version_{n}", range(2), resumed_from=None) for n in (0, 1)]
    tested = tmp_path / "a/version_2"  # lightning-ief test --ckpt_path CHECKPOINT: steps of the best checkpoint
    tested.mkdir()
    (tested / "metrics.csv").write_text("step,epoch,test/accuracy\n3,1,0.5\n")
    (tested / "config.yaml").write_text(f"ckpt_path: {CHECKPOINT}\n")
    assert [*read_runs(named([*repeated, tested]))] == ["a/version_0", "a/version_1", "a/version_2"]
    unclear = [write(tmp_path / f"b/version_{n}", epochs) for n, epochs in enumerate((range(2), range(2), range(2, 4)))]
    assert [*read_runs(named(unclear))] == ["b/version_0", "b/version_1", "b/version_2"]  # from which of the two?


def test_runs_without_a_common_epoch_end_no_command(tmp_path, capsys):
    """As today's riddle did: Data cannot be log-scaled."""
    folders = [write(tmp_path / f"b/version_{n}", epochs) for n, epochs in enumerate((range(2), range(2), range(2, 4)))]
    notes = []
    read = read_runs(named(folders))
    assert curves_figure(read, "val/accuracy", notes.append) is None
    assert "curves: b was left out of train/loss: no epoch is in all of its 3 runs" in notes[0]
    assert notes[1] == "curves: the panel train/loss was left out: it has no values."
    with pytest.warns(UserWarning, match="was left out"):
        assert draw_runs(folders, tmp_path / "figures") == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(["figures", *map(str, folders), "--directory", str(tmp_path / "figures")])
    main(["report", *map(str, folders), "--output", str(tmp_path / "report.html")])
    assert "no epoch is in all of its 3 runs" in (tmp_path / "report.html").read_text()
    assert "error" not in capsys.readouterr().err


def test_a_panel_without_values_is_left_out_by_name(tmp_path):
    run = write(tmp_path / "a/version_0", range(2), **{"gamma_relative/ef": 0.0, "gamma_relative/ief": 0.5})
    read = read_runs(named([run]))
    notes = []
    (panel,) = gamma_figure(read, notes.append).axes
    assert panel.get_title() == "γ(iEF) / γ(SGD)"
    assert notes == [
        "gamma_over_training: the panel γ(EF) / γ(SGD) was left out: no value of gamma_relative/ef is above zero."
    ]
    notes.clear()
    (panel,) = curves_figure(read, "val/f1", notes.append).axes
    assert notes == ["curves: the panel val/f1 was left out: it has no values."]

    def result(checkpoint: str, ratio: float) -> Result:
        return Result(f"runs/{checkpoint}/checkpoints/x.ckpt", 1, 20, "ief", 0.1, 2, 8, 0, 1, 0, 1.0, 0.1, ratio, 0.2,
                      0.5, 0.1, 0.3, 0.1, 5.0, 0.0)  # fmt: skip

    notes.clear()
    found = [result("a/version_0", float("nan")), result("b/version_0", 0.5)]
    (panel,) = damping_figure(found, notes.append).axes
    assert "b/version_0" in panel.get_title() and len(notes) == 1 and "the panel a/version_0" in notes[0]
    assert damping_figure(found[:1], notes.append) is None
