"""The benchmark of many ranks in small, and what was measured against what is derived."""

from pathlib import Path

import pytest

pytest.importorskip("psutil")

from benchmarks import __main__ as command
from benchmarks import ranks_measure, report
from benchmarks.ranks import bytes_per_step, layer, mlp
from tests.ranks import on_ranks

DOCS = Path(__file__).parents[2] / "docs"


def test_two_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # a forked process must not start threads
    path = tmp_path / ranks_measure.FILE
    on_ranks(2, lambda rank: ranks_measure.work(["smoke"], 1, path))
    rows = {row.way: row for row in report.read(path, ranks_measure.Measured)}
    assert set(rows) == {"sgd", "ief", "alone"}
    assert rows["sgd"].ratio == 1 and rows["ief"].ratio > 0 and rows["ief"].speedup > 0
    gradients = 4 * rows["sgd"].parameters  # 2 (W − 1)/W, here 1, for each rank
    assert gradients < rows["sgd"].sent < 1.1 * gradients
    derived = bytes_per_step(
        [p for i, (o, d) in enumerate(((512, 256), (10, 512))) for p in layer(str(i), o, d, 4)], [4, 4]
    )
    assert rows["ief"].counted == sum(derived) / 2
    assert rows["ief"].counted < rows["ief"].sent < 1.3 * rows["ief"].counted
    text = ranks_measure.section(tmp_path)
    assert f"| 136,714 | 2 | **{rows['ief'].ratio:.2f}** (" in text and f"| {rows['sgd'].sent / 1e6:.3g} |" in text


def test_what_was_measured_is_what_is_derived():
    rows = report.read(DOCS / "benchmarks" / ranks_measure.FILE, ranks_measure.Measured)
    found = {row.ranks: row for row in rows if row.workload == "mlp-64" and row.way == "ief"}
    assert set(found) == set(ranks_measure.RANKS)
    for ranks in (2, 4):
        samples = 64 // ranks
        derived = sum(bytes_per_step(mlp(samples), [samples] * ranks)) / ranks
        assert found[ranks].counted == pytest.approx(derived, rel=1e-5)
        assert found[ranks].sent == pytest.approx(derived, rel=0.01)


def test_no_file_no_section(tmp_path):
    assert ranks_measure.section(tmp_path) == ""


def test_unknown_workload():
    with pytest.raises(SystemExit, match="There is no workload 'nonsense'; there are: mlp-64, vit-lora, t5"):
        command.main(["ranks", "--workloads", "[nonsense]"])
