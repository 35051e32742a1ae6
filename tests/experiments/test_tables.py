"""Tables in CSV files: what was written is read, and what is cut off, damaged or another table is noticed."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_ief.experiments.tables import join_metrics, read_metrics, read_table, update_table, write_table


@dataclass(frozen=True)
class Score:
    name: str
    count: int
    value: float | None
    note: str


ROWS = [Score("a, b", 2, 1 / 3, 'says "c"\nd'), Score("é", -1, None, ""), Score("", 0, math.inf, "x")]


def test_rows_survive_their_file(tmp_path):
    path = tmp_path / "deep" / "scores.csv"
    assert read_table(path, Score) == []
    write_table(path, ROWS, Score)
    assert read_table(path, Score) == ROWS
    assert path.read_text(encoding="utf-8").splitlines()[0] == "name,count,value,note"
    assert [file.name for file in path.parent.iterdir()] == ["scores.csv"]


def test_numbers_are_rounded_if_wanted(tmp_path):
    path = tmp_path / "scores.csv"
    write_table(path, ROWS, Score, digits=3)
    assert [row.value for row in read_table(path, Score)] == [0.333, None, math.inf]
    assert [row.count for row in read_table(path, Score)] == [2, -1, 0]


def test_rows_with_the_same_key_are_replaced(tmp_path):
    path = tmp_path / "scores.csv"
    write_table(path, ROWS, Score)
    update_table(path, [Score("é", 5, 2.0, "new"), Score("f", 6, 3.0, "")], Score, lambda row: row.name)
    assert read_table(path, Score) == [ROWS[0], ROWS[2], Score("é", 5, 2.0, "new"), Score("f", 6, 3.0, "")]


def test_what_is_interrupted_leaves_the_old_rows(tmp_path):
    path = tmp_path / "scores.csv"
    write_table(path, ROWS, Score)

    def rows():
        yield Score("g", 1, 1.0, "")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(path, rows(), Score)
    assert read_table(path, Score) == ROWS


def written(folder: Path, *lines: str) -> Path:
    path = folder / "scores.csv"
    path.write_text("\n".join(["name,count,value,note", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("line", ["a", "a,1", "a,1,2.0"])
def test_a_row_that_was_cut_off_is_left_out(tmp_path, line):
    assert read_table(written(tmp_path, "b,2,3.0,c", line), Score) == [Score("b", 2, 3.0, "c")]


@pytest.mark.parametrize("line", ["a,one,2.0,c", "a,1,2.o,c", "a,,2.0,c", "a,1,2.0,c,d"])
def test_a_damaged_row_is_named(tmp_path, line):
    with pytest.raises(MisconfigurationException, match=r"scores.csv, line 3, is damaged. Remove the line."):
        read_table(written(tmp_path, "b,2,3.0,c", line), Score)


@pytest.mark.parametrize("header", ["name,count,value", "name,count,note,value", "name,count,value,note,more", ""])
def test_another_table_is_refused(tmp_path, header):
    path = tmp_path / "scores.csv"
    path.write_text(f"{header}\n", encoding="utf-8")
    with pytest.raises(MisconfigurationException, match=r"is no table of this version with rows of .*Score"):
        read_table(path, Score)


def test_metrics_of_a_logger(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,loss,never,bad\n0,1,2.5,,nan\n0,3,,,inf\n1,5,0.5,,1.0\n")
    assert read_metrics(path) == {
        "epoch": ([1, 3, 5], [0.0, 0.0, 1.0]), "loss": ([1, 5], [2.5, 0.5]), "bad": ([5], [1.0]),
    }  # fmt: skip


def test_parts_are_joined_where_they_meet(tmp_path):
    (tmp_path / "metrics.0.csv").write_text("step,epoch,train/loss,gamma/ief\n1,0,2.0,\n2,1,,0.5\n2,1,1.5,\n3,1,1.0,\n")
    (tmp_path / "metrics.csv").write_text("step,epoch,train/loss,val/loss\n2,1,1.25,\n3,1,1.0,0.7\n")
    join_metrics(tmp_path)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(r["step"], r["train/loss"], r["gamma/ief"]) for r in rows] == [
        ("1", "2.0", ""), ("2", "", "0.5"), ("2", "1.25", ""), ("3", "1.0", ""),
    ]  # fmt: skip
    assert not list(tmp_path.glob("metrics.*.csv"))
