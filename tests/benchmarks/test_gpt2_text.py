"""The study of a small GPT-2 in small."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("psutil")

from benchmarks import gpt2_text  # noqa: E402
from benchmarks.study import Wanted  # noqa: E402


@pytest.mark.usefixtures("unrendered")
def test_study(monkeypatch, tmp_path, in_this_process):
    monkeypatch.chdir(tmp_path)
    texts = Path("texts")
    texts.mkdir()
    (texts / "a.txt").write_text("So it goes, and goes on. " * 400)
    page = gpt2_text.study(gpt2_text.SMOKE, Wanted([0, 1]), Path("docs"), Path("runs"), texts)
    text = page.read_text(encoding="utf-8")
    assert "| ief_preset | " in text and "| ief_preset_untuned | 0.3 |" in text and "test/loss_per_token" in text
    assert "initial weights of the model" in text and "accuracy" not in text
    drawn = {path.relative_to("docs/gpt2_text").as_posix() for path in Path("docs/gpt2_text").rglob("*.*")}
    assert drawn == {f"three/{name}" for name in ("curves_over_time.png", "metric_over_lr.png", "comparison.csv")}
    assert all(f"(gpt2_text/{name})" in text for name in drawn)
    # Two optimizers at two learning rates, two seeds of the results of each and of the preset untuned.
    assert in_this_process == ["fit"] * (2 * 2 + 2 * 2 + 2)


def test_the_report_says_what_was_trained():
    assert "gpt2-text\n" in gpt2_text.report(gpt2_text.QUICK, Wanted([0]), "")
    text = gpt2_text.report(gpt2_text.FULL, Wanted([0]), "## All")
    assert "gpt2-text --full true" in text and "`ief_metric`" in text
