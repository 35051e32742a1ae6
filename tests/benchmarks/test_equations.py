"""The study of equations in small."""

import csv
from pathlib import Path

import pytest

pytest.importorskip("psutil")

from benchmarks import equations
from benchmarks.equations import Point


def test_study(tmp_path, monkeypatch, in_this_process, request):
    """Every optimizer takes steps, a learning rate is searched, and once more from what is there."""
    monkeypatch.chdir(tmp_path)
    arguments = (equations.SMOKE, [0, 1], Path("docs"), Path("runs"))
    text = equations.study(*arguments).read_text(encoding="utf-8")
    # Of each equation: two learning rates of one optimizer, two other optimizers, and second seeds of all three. Of the
    # table: three optimizers, of which none is searched.
    assert in_this_process == ["fit"] * (7 + 7 + 6)
    assert "| iEF | 1 | 4 |" in text and "| L-BFGS | 1 | 4 |" in text and "2 seeds" in text and "nan" not in text
    drawn = {path.name for path in Path("docs/equations").iterdir()}
    names = ("poisson_2d", "heat", "diabetes")
    assert drawn == {f"{name}{end}" for name in names for end in (".png", ".csv", "_runs.csv")}
    assert all(f"(equations/{name})" in text for name in drawn)
    with Path("docs/equations/heat.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["optimizer"] for row in rows} == {"ief", "adam", "lbfgs"}
    assert all(float(row["seconds"]) > 0 and float(row["error"]) > 0 for row in rows)

    in_this_process.clear()
    request.getfixturevalue("unrendered")
    assert equations.study(*arguments).read_text(encoding="utf-8") == text
    assert in_this_process == []


def curve(name: str, seed: int, *points: tuple[int, float, float]) -> list[Point]:
    return [Point(name, 1.0, seed, steps, seconds, error) for steps, seconds, error in points]


def curves() -> dict[str, list[list[Point]]]:
    return {
        "ief": [curve("ief", 0, (10, 1.0, 1e-3), (20, 2.0, 1e-7)), curve("ief", 1, (10, 1.0, 1e-3), (20, 4.0, 3e-6))],
        "adam": [curve("adam", s, (100, 1.0, 2e-2), (200, 2.9, 1e-2), (300, 9.0, 1e-4)) for s in (0, 1)],
        "lbfgs": [curve("lbfgs", s, (10, 5.0, 1e-5)) for s in (0, 1)],
    }


def test_verdict_compares_at_equal_time():
    """Within the 4 s of iEF's slowest seed, Adam is at 1e-2 and L-BFGS has not been looked at."""
    text = equations._equation("heat", curves())
    assert "6,452 times below that of Adam" in text and "Within the 4.0 s" in text  # 1e-2 over the mean of two seeds
    assert "1 of 2 seeds reach 1e-06, after 20 steps and 2.0 s" in text
    assert "| L-BFGS | 1 | 10 | 5.0 | 1.0e-05 | 1.0e-05 – 1.0e-05 | – |" in text


def test_within_takes_the_smallest_error_until_then():
    (first, *_) = [curve("adam", 0, (1, 1.0, 0.5), (2, 2.0, 0.1), (3, 3.0, 0.4), (4, 4.0, 0.01))]
    assert [equations.within(first, seconds) for seconds in (0.5, 1.0, 3.5, 4.0)] == [None, 0.5, 0.1, 0.01]


def test_verdict_on_noise_says_what_the_numbers_say():
    runs = {
        "small_damping": [curve("small_damping", 0, (1, 0.1, 0.9), (2, 0.2, 2.0))],
        "adamw": [curve("adamw", 0, (1, 0.1, 0.9), (2, 0.2, 0.8))],
    }
    assert equations._noisy_verdict(runs).splitlines() == [
        "* iEF, λ = 1e-12 is best after 1 steps, at 0.900, and then rises to 2.000: it fits the noise.",
        "* AdamW is best after 2 steps, at 0.800, and stays there.",
    ]
