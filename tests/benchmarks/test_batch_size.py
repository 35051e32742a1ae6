"""The study of batch sizes runs, is resumed, and gives all optimizers the same time."""

import pytest

pytest.importorskip("psutil")

from benchmarks import batch_size, report
from benchmarks.batch_size import SMOKE
from benchmarks.loop import Run, StepTime
from lightning_ief.tasks import vision
from tests.tasks.stand_ins import write_fashion_mnist


def test_equal_samples_and_equal_time(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "_DEBIAN", tmp_path / "no_such_package")
    write_fashion_mnist(tmp_path, 5_000 + 256)
    told = []
    page = batch_size.study(SMOKE, tmp_path / "docs", tmp_path, told.append)
    runs = report.read(tmp_path / "docs" / "batch_size" / "runs.csv", Run)
    equal = [r for r in runs if r.part == "result" and r.steps * int(r.regime[2:]) == SMOKE.train_size]
    assert {(r.contestant, r.regime, r.seed) for r in equal} == {
        (name, f"n_{n}", seed) for name in SMOKE.contestants for n in SMOKE.samples for seed in (0, 1)
    }
    times = {(t.contestant, t.regime): t.milliseconds
             for t in report.read(tmp_path / "docs" / "batch_size" / "runs_times.csv", StepTime)}  # fmt: skip
    for r in runs:
        if r.part == "result" and r not in equal:
            assert r.steps == max(1, round(4 * times["metric", "n_64"] / times[r.contestant, r.regime]))
    text = page.read_text()
    assert "| SGD, Nesterov 0.9 | " in text and "Best N by held-out accuracy: " in text and "noise scale" in text
    assert (tmp_path / "docs" / "batch_size" / "accuracy.png").stat().st_size > 10_000
    batch_size.study(SMOKE, tmp_path / "docs", tmp_path / "nothing", told.append)
    assert len(told) == len(runs) and page.read_text() == text
