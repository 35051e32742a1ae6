"""The study of the vision transformer in small, on a stand-in for the images."""

from pathlib import Path

import pytest

pytest.importorskip("psutil")
pytest.importorskip("timm")
pytest.importorskip("peft")

from benchmarks import vit_fashion
from lightning_ief.experiments.comparison import Outcome
from tests.tasks.stand_ins import write_fashion_mnist


@pytest.mark.usefixtures("unrendered")
def test_study(tmp_path, monkeypatch, in_this_process):
    """Both stages run, the second from the first one's checkpoint, and once more from what is there."""
    monkeypatch.chdir(tmp_path)
    write_fashion_mnist(tmp_path / "data", 192)  # of which half for each stage
    arguments = (vit_fashion.SMOKE, [0, 1], Path("docs"), Path("runs"), Path("data"))
    text = vit_fashion.study(*arguments).read_text(encoding="utf-8")
    # The first stage, three optimizers, their second seeds, and once more iEF with all checkpoints.
    assert in_this_process == ["fit"] * (1 + 3 + 3 + 1) + ["evaluate"]
    assert "64 training images, 2 epochs" in text and "| iEF | 1 | 1 |" in text and "| AdamW | 0.001 | 0.001 |" in text
    assert " AdamW: " in text and "2 stages" in text and "nan" not in text
    drawn = {path.name for path in Path("docs/fashion_vit").iterdir()}
    figures = {f"{name}.png" for name in ("curves", "gamma_over_training", "gamma_against_damping", "projections")}
    assert drawn == {*figures, "comparison.csv", "evaluation.csv"}
    assert all(f"(fashion_vit/{name})" in text for name in drawn)

    in_this_process.clear()
    assert vit_fashion.study(*arguments).read_text(encoding="utf-8") == text
    assert in_this_process == ["evaluate"]  # which finds everything done


def test_report_says_what_the_numbers_say():
    first = Outcome("adamw", 1e-3, 0, "m", 0.9321, 3, 0.1, "", "")
    accuracy = {
        "ief": (0.80, 0.81),
        "ief_preset": (0.82, 0.83),
        "adamw": (0.78, 0.79),
        "sgd": (0.85, 0.85),
        "ef": (0.79, 0.83),
    }
    rows = [
        Outcome(name, 1.0, seed, "m", a, 0, 0.1, "", "") for name, v in accuracy.items() for seed, a in enumerate(v)
    ]
    text = vit_fashion.report(vit_fashion.FULL, first, rows, 3)
    assert "accuracy is 93.21 %" in text and "fashion-vit --full true" in text and "All 27,000 training images" in text
    lines = [line for line in text.splitlines() if line.startswith("* ")]
    assert lines == [
        "* iEF is above AdamW: +2.00 ± 1.41 points.",
        "* iEF is below SGD: -4.50 ± 0.71 points.",
        "* iEF is not told apart from EF: -0.50 ± 3.54 points.",
        "* iEF, preset is above AdamW: +4.00 ± 1.41 points.",
        "* iEF, preset is below SGD: -2.50 ± 0.71 points.",
        "* iEF, preset is not told apart from EF: +1.50 ± 3.54 points.",
    ]
