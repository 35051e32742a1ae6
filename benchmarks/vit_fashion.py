"""A small vision transformer on Fashion-MNIST: trained in full on five classes, adapted by LoRA to the other five."""

from dataclasses import replace
from pathlib import Path

from benchmarks.study import Regime, Study, Wanted, filled, measure, sections
from lightning_ief.experiments.comparison import Outcome, compare

__all__ = ["FULL", "QUICK", "SMOKE", "first_stage", "report", "study"]

_RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_FIRST = _RECIPES / "vit_fashion_mnist.yaml"
_RECIPE = _RECIPES / "vit_lora_fashion_mnist.yaml"
_BASELINES = ("sgd_nesterov", "adamw", "lora_plus", "muon", "adafactor")
_MORE = ("ief_damped", "ief_metric", "sampled_fisher")  # in full
_SIZE = "--data.init_args.train_size"
_EVALUATED = "--data.init_args.eval_batch_size=500"
QUICK = Study(
    "quick", _RECIPE, ("ief", "ief_preset", "ef", *_BASELINES),
    (
        Regime(
            "few", "Few images: 2,560 for 10 epochs, 800 steps",
            (f"{_SIZE}=2560", _EVALUATED, "--trainer.max_epochs=10", "--trainer.check_val_every_n_epoch=2"),
        ),
        Regime(
            "once", "Every image once: 24,000, 750 steps",
            (f"{_SIZE}=24000", _EVALUATED, "--trainer.max_epochs=1", "--trainer.val_check_interval=150"),
        ),
    ),
    epochs=10, gamma=("ief", "ief_preset", "adamw", "sgd_nesterov", "ef"), baselines=_BASELINES,
)  # fmt: skip
FULL = replace(
    QUICK, name="full", num_batches=100, optimizers=(*QUICK.optimizers, *_MORE),
    regimes=(
        *QUICK.regimes,
        Regime("all", "All images: 27,000 for 10 epochs", (_EVALUATED, "--trainer.max_epochs=10")),
    ),
)  # fmt: skip
_TINY = (
    "--model.init_args.net.init_args.model_kwargs={patch_size: 14, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2}",
    "--data.init_args.val_size=32",
    "--trainer.log_every_n_steps=1",
)
SMOKE = replace(
    QUICK, name="smoke", optimizers=("ief", "adamw"), gamma=("ief",), baselines=("adamw",), untuned=("ief",),
    reference="adamw", regimes=(Regime("few", "Few", (f"{_SIZE}=64", "--trainer.max_epochs=2")),), epochs=2,
    lr_factors=(1.0, 3.0), widen=0, search_seeds=(100,), dampings=(1e-3, 1.0), num_batches=1, more=_TINY,
)  # fmt: skip


def first_stage(size: Study, folder: Path, root: Path) -> Outcome:
    """Train the transformer in full, on all images of the first five classes whatever the size of the study.

    Args:
        size: Size of the study.
        folder: Where the run goes.
        root: Folder of the images.

    Returns:
        Its row; the checkpoint is best.ckpt in its folder.
    """
    options = [f"--data.init_args.root={root}", *size.more]
    (outcome,) = compare(_FIRST, ["adamw"], [0], directory=folder, options=options)
    return outcome


def study(size: Study, wanted: Wanted, output: Path, folder: Path, root: Path, note: str = "") -> Path:
    """Measure both stages, draw the figures and write the report.

    Args:
        size: Size of the study.
        wanted: What is to be done now; the report has all that is done.
        output: Folder of the report.
        folder: Where the runs go.
        root: Folder of the images.
        note: What else is to be known of the measurement, a sentence.

    Returns:
        The report.
    """
    first = first_stage(size, folder / "first_stage", root)
    weights = Path(first.run, "checkpoints", "best.ckpt")
    options = [f"--data.init_args.root={root}", f"--model.init_args.net.init_args.checkpoint_path={weights}"]
    measure(size, wanted, folder, options)
    path = output / "fashion_vit.md"
    text = report(size, wanted, first, sections(size, folder, output / "fashion_vit"), note)
    path.write_text(text, encoding="utf-8")
    return path


_TEXT = """\
# A vision transformer with LoRA on Fashion-MNIST

Two stages, by one command; no pretrained weights are fetched:

    python -m benchmarks fashion-vit{flags}

1. A small vision transformer of timm (28 × 28 pixels in patches of 7, width 64, 4 layers, 204,741 parameters) is
   trained in full with AdamW on the 27,000 images of trousers, sandals, sneakers, bags and boots, by
   `recipes/vit_fashion_mnist.yaml`. Its validation accuracy is {first} %.
2. That network is frozen and adapted to the five classes that it never saw: T-shirts, pullovers, dresses, coats and
   shirts, which look more alike. Trained are LoRA of rank 8 on queries and values, their biases and a new classifier,
   9,029 parameters, by `recipes/vit_lora_fashion_mnist.yaml`.

All that follows is about the second stage: batches of 32, validation on 3,000 held-out images, test on the 5,000 test
images of the five classes, no dropout. The optimizers are files in `recipes/vit_lora_fashion_mnist/`: iEF as in the
paper (`ief`) and by the [preset](tuning.md) for adapters (`ief_preset`: damped in its own matrix, with SPRING); EF with
steps of length lr; SGD with Nesterov momentum; AdamW; LoRA+, that is AdamW with 16 times the lr for the factors B; Muon
for B, AdamW for the rest; Adafactor. In full (`--full true`) also iEF damped in its own matrix alone (`ief_damped`) and
in the Kronecker metric, which is meant for networks from scratch (`ief_metric`), and F̂(1).

{protocol}

{sections}

Measured on {where}.{note}
"""


def report(size: Study, wanted: Wanted, first: Outcome, found: str, note: str = "") -> str:
    """The page.

    Args:
        size: Size of the study.
        wanted: What was asked for.
        first: Row of the first stage.
        found: The sections of its regimes.
        note: What else is to be known of the measurement.

    Returns:
        Markdown.
    """
    return filled(_TEXT, size, wanted, found, note, first=f"{100 * first.best:.2f}")
