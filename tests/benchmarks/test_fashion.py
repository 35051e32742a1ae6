"""The study on Fashion-MNIST in small, on a stand-in for the images."""

from pathlib import Path

import pytest

pytest.importorskip("psutil")

from benchmarks import fashion
from lightning_ief.experiments.comparison import Outcome
from tests.tasks.stand_ins import write_fashion_mnist


def test_study(tmp_path, monkeypatch, in_this_process, request):
    monkeypatch.chdir(tmp_path)
    write_fashion_mnist(tmp_path / "data", 64 + 192)
    page = fashion.study(fashion.SMOKE, [0, 1], Path("docs"), Path("runs"), Path("data"))
    text = page.read_text(encoding="utf-8")
    assert "192 training images, 2 epochs" in text and "| ief | 0.78 | 0.78 |" in text
    assert "* iEF > Adam" in text and "2 stages" in text
    drawn = {path.name for path in Path("docs/findings").iterdir()}
    figures = {f"{name}.png" for name in ("curves", "gamma_over_training", "gamma_against_damping", "projections")}
    assert drawn == {*figures, "comparison.csv", "evaluation.csv"}
    assert all(f"(findings/{name})" in text for name in drawn)

    in_this_process.clear()
    request.getfixturevalue("unrendered")
    assert fashion.study(fashion.SMOKE, [0, 1], Path("docs"), Path("runs"), Path("data")).read_text() == text
    assert in_this_process == ["evaluate"]  # which finds everything done


def test_ranking_says_what_the_numbers_say():
    values = {
        "ief": [90.0, 91.0],
        "adam": [80.0, 80.2],
        "sgd": [85.0, 85.0],
        "sampled_fisher": [85.1, 84.9],
        "ef": [84.0, 86.1],
    }
    verdicts = [line.split(":")[0].split(" ", 4)[-1] for line in fashion.rank(values)]
    assert verdicts == ["holds", "is reversed", "holds", "is not resolved"]
    assert fashion.rank({"ief": [90.0], "ef": [80.0]}) == ["* iEF > EF holds: +10.00 ± 0.00 points."]
    assert "fails" in fashion.rank({"sgd": [90.0], "sampled_fisher": [80.0]})[0]


def test_learning_rates_at_the_border_are_marked():
    rows = [Outcome("ief", lr, 0, "m", best, 0, 0.1, "", "") for lr, best in ((0.1, 0.5), (1.0, 0.7), (10.0, 0.6))]
    rows += [Outcome("ef", lr, 0, "m", best, 0, 0.1, "", "") for lr, best in ((0.1, 0.5), (1.0, 0.7))]
    text = fashion.report(fashion.FULL, rows, 3)
    assert "| ief | 1 | 0.1, 1, 10 | 0.7000 |" in text and "| ef | 1* | 0.1, 1 | 0.7000 |" in text
    assert "--full true" in text and "All 55,000" in text
