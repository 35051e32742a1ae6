"""The study of networks from scratch runs, is resumed, and says what it found."""

import pytest

pytest.importorskip("psutil")

from benchmarks import report, scratch
from benchmarks.scratch import SMOKE, Run
from lightning_ief.tasks import vision
from tests.tasks.stand_ins import write_fashion_mnist


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "_DEBIAN", tmp_path / "no_such_package")
    write_fashion_mnist(tmp_path, 5_000 + 256)
    return tmp_path


def test_the_best_learning_rate_is_measured_with_other_seeds(root, tmp_path):
    told = []
    page = scratch.study(SMOKE, tmp_path / "docs", root, told.append)
    runs = report.read(tmp_path / "docs" / "scratch" / "runs.csv", Run)
    assert len(told) == len(runs) == 2 * (2 + 2)
    for name in SMOKE.contestants:
        searched = [r for r in runs if r.contestant == name and r.part == "search"]
        results = [r for r in runs if r.contestant == name and r.part == "result"]
        assert {r.seed for r in searched} == {100} and {r.seed for r in results} == {0, 1}
        best = max(searched, key=lambda r: r.val_accuracy)
        assert {r.lr for r in results} == {best.lr}
    text = page.read_text()
    assert "| SGD, Nesterov 0.9 | " in text and "* |" in text and " from SGD" in text
    # What is there is not done again.
    scratch.study(SMOKE, tmp_path / "docs", root, told.append)
    assert len(told) == len(runs)
    assert page.read_text() == text


def test_gaps_are_of_test_accuracies():
    rows = [
        Run(name, 0.1, seed, part, 0.5, 0.5, accuracy + seed / 100, 10.0 * (1 + (name == "improved")))
        for name, accuracy in {"sgd": 0.80, "improved": 0.83}.items()
        for seed, part in ((0, "result"), (1, "result"), (100, "search"))
    ]
    text = scratch.report(SMOKE, rows)
    assert "| iEF, metric, improved Ĝ | 0.1* | 83.50 ± 0.71 | 0.500 ± 0.000 | 2.0 |" in text
    assert "* +3.00 from SGD, Nesterov 0.9\n" in text
