"""A small vision transformer on Fashion-MNIST: trained in full on five classes, adapted by LoRA to the other five."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.study import Study, draw, facts, gaps, measure
from lightning_ief.experiments.comparison import Outcome, compare

__all__ = ["FULL", "QUICK", "SMOKE", "first_stage", "report", "study"]

_RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_FIRST = _RECIPES / "vit_fashion_mnist.yaml"
_RECIPE = _RECIPES / "vit_lora_fashion_mnist.yaml"
_OPTIMIZERS = ("ief", "ief_preset", "adamw", "adamw_linear", "sgd", "ef")
_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_DAMPINGS = (1e-7, 1e-5, 1e-3, 1e-1, 1e1, 1e3)
QUICK = Study("quick", _RECIPE, _OPTIMIZERS, 10, 2_560, _FACTORS, _DAMPINGS, 5)
FULL = Study("full", _RECIPE, _OPTIMIZERS, 10, 0, _FACTORS, _DAMPINGS, 100)
_TINY = (
    "--model.init_args.net.init_args.model_kwargs={patch_size: 14, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2}",
    "--data.init_args.val_size=32",
    "--trainer.log_every_n_steps=1",
)
SMOKE = Study("smoke", _RECIPE, _OPTIMIZERS[:3], 2, 64, (1.0,), (1e-3, 1.0), 1, _TINY)


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


def study(size: Study, seeds: Sequence[int], output: Path, folder: Path, root: Path) -> Path:
    """Measure both stages, draw the figures and write the report.

    Args:
        size: Size of the study.
        seeds: Seeds of the second stage.
        output: Folder of the report.
        folder: Where the runs go.
        root: Folder of the images.

    Returns:
        The report.
    """
    first = first_stage(size, folder / "first_stage", root)
    weights = Path(first.run, "checkpoints", "best.ckpt")
    options = [f"--data.init_args.root={root}", f"--model.init_args.net.init_args.checkpoint_path={weights}"]
    found = measure(size, seeds, folder, options)
    draw(found, output / "fashion_vit")
    path = output / "fashion_vit.md"
    path.write_text(report(size, first, found.outcomes, found.stages), encoding="utf-8")
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

All that follows is about the second stage. {size}, {epochs} epochs, batches of 32, validation on 3,000 held-out
images, no dropout. Learning rates were searched over {factors} times those of the files in
`recipes/vit_lora_fashion_mnist/`, for every optimizer alike, with the first of {seeds} seeds, by the best validation
accuracy. That is also what the table shows, as in the paper, so that all of them are slightly too good. A learning rate
at the border of its grid is marked *. Schedules are the paper's: iEF, AdamW and SGD constant; EF steps of norm lr,
which falls to 0. Beside them are iEF by the preset for adapters and many steps ([Tuning](tuning.md)) and AdamW, the lr
of both falling linearly to 0. Every run: [fashion_vit/comparison.csv](fashion_vit/comparison.csv). Seeds differ in the
initial weights of LoRA and classifier, not in the order of the images nor in the first stage.

{table}

iEF beside the others; "above" and "below" mean that the means differ by more than both standard deviations together:

{gaps}

By the final training loss the order is {by_loss}. For comparison, the paper's validation accuracies of
ViT-B/16 with LoRA on CIFAR100: iEF 94.1, AdamW 93.7, SGD 90.6, EF 30.2.

![Loss and accuracy](fashion_vit/curves.png)

γ of each direction over that of SGD while each optimizer trains (first seed; mean and standard deviation over two
batches of 160 training images; λ = 1.024e-4):

![γ over training](fashion_vit/gamma_over_training.png)

γ against λ at {stages} stages of the run of iEF, {batches} batches of 160
([fashion_vit/evaluation.csv](fashion_vit/evaluation.csv)):

![γ against λ](fashion_vit/gamma_against_damping.png)

The projection of each update on each of 160 training images at these stages, λ = {smallest}, against the norm of the
image's gradient:

![Projections](fashion_vit/projections.png)

Measured on {machine}.
"""


def report(size: Study, first: Outcome, outcomes: Sequence[Outcome], stages: int) -> str:
    """The page.

    Args:
        size: Size of the study.
        first: Row of the first stage.
        outcomes: Rows of all runs of the second stage.
        stages: Number of checkpoints evaluated.

    Returns:
        Markdown.
    """
    return _TEXT.format(
        first=f"{100 * first.best:.2f}",
        size=f"{size.train_size:,} training images" if size.train_size else "All 27,000 training images",
        gaps=gaps(outcomes),
        **facts(size, outcomes, stages),
    )
