"""The study of the vision transformer in small, on a stand-in for the images."""

from pathlib import Path

import pytest

pytest.importorskip("psutil")
pytest.importorskip("timm")
pytest.importorskip("peft")

from benchmarks import vit_fashion
from benchmarks.study import GAMMA_FIGURES, Wanted
from lightning_ief.experiments.comparison import Outcome
from tests.tasks.stand_ins import write_fashion_mnist


@pytest.mark.usefixtures("unrendered")
def test_study(tmp_path, monkeypatch, in_this_process):
    """Both stages run, the second from the first one's checkpoint, in parts, and once more from what is there."""
    monkeypatch.chdir(tmp_path)
    write_fashion_mnist(tmp_path / "data", 192)  # of which half for each stage
    stale = Path("docs/fashion_vit/curves.png")
    stale.parent.mkdir(parents=True)
    stale.touch()
    folders = Path("docs"), Path("runs"), Path("data")
    part = vit_fashion.study(
        vit_fashion.SMOKE, Wanted([0, 1], regimes=["few"], optimizers=["adamw"]), *folders, note="Beside others."
    )
    # The first stage; two learning rates with the seed that searches, and one with each of the others.
    assert in_this_process == ["fit"] * (1 + 2 + 2)
    text = part.read_text(encoding="utf-8")
    assert "Not measured yet: ief." in text and "## γ" not in text and text.endswith("Beside others.\n")
    assert not stale.exists()

    in_this_process.clear()
    text = vit_fashion.study(vit_fashion.SMOKE, Wanted([0, 1]), *folders).read_text(encoding="utf-8")
    # iEF: the search, the results, those without a search where its lr is another one, and γ.
    assert in_this_process[-2:] == ["fit", "evaluate"] and len(in_this_process) == 2 + 2 + 2 + 2
    rows = {line.split(" | ")[0].lstrip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert {"ief", "adamw", "ief_untuned"} <= rows.keys() and "Not measured" not in text and "nan" not in text
    assert "paired t-test against adamw" in text and "1, 3 times" in text and "2 stages" in text
    drawn = {path.relative_to("docs/fashion_vit").as_posix() for path in Path("docs/fashion_vit").rglob("*.*")}
    figures = {f"{name}.png" for name in (*GAMMA_FIGURES, "few/curves_over_time", "few/metric_over_lr")}
    assert drawn == {*figures, "few/comparison.csv", "evaluation.csv"}
    assert all(f"(fashion_vit/{name})" in text for name in drawn)

    in_this_process.clear()
    assert vit_fashion.study(vit_fashion.SMOKE, Wanted([0, 1]), *folders).read_text(encoding="utf-8") == text
    assert in_this_process == ["evaluate"]  # which finds everything done


def test_the_report_says_what_was_done():
    first = Outcome("adamw", 1e-3, 0, "m", 0.9321, 3, 0.1, "", "")
    text = vit_fashion.report(vit_fashion.FULL, Wanted([0, 1, 2]), first, "## All")
    assert "accuracy is 93.21 %" in text and "fashion-vit --full true" in text and "\n\n## All\n\n" in text
    assert "over 2 seeds" in text and "those of 3 other seeds" in text and "0.333, 1, 3 times" in text


def test_files_of_the_optimizers_are_there():
    folder = vit_fashion.QUICK.recipe.with_suffix("")
    assert all((folder / f"{name}.yaml").is_file() for name in vit_fashion.QUICK.optimizers)
    assert {*vit_fashion.QUICK.gamma, *vit_fashion.QUICK.baselines, "ief_preset"} <= {*vit_fashion.QUICK.optimizers}
