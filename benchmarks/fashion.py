"""The paper's findings, measured again on Fashion-MNIST: which optimizer reaches what, and how γ goes along."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.study import NAMES, Study, accuracies, difference, draw, facts, measure
from lightning_ief.experiments.comparison import Outcome

__all__ = ["FULL", "QUICK", "SMOKE", "rank", "report", "study"]

_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "mlp_fashion_mnist.yaml"
_RANKING = ("ief", "adam", "sgd", "sampled_fisher", "ef")  # the paper's, its SGD and F̂(1) about equal
_QUICK_FILES = tuple(str(Path(__file__).parent / "fashion_mnist" / f"{name}.yaml") for name in _RANKING)
_DAMPINGS = (1e-7, 1e-5, 1e-3, 1e-1, 1e1, 1e3)
QUICK = Study("quick", _RECIPE, _QUICK_FILES, 8, 10_000, (0.1, 1.0, 10.0), _DAMPINGS, 5)
FULL = Study("full", _RECIPE, _RANKING, 60, 0, (0.1, 1.0, 10.0), _DAMPINGS, 100)
_TINY = (
    "--model.init_args.net.init_args.widths=[784, 16, 10]",
    "--data.init_args.val_size=64",
    "--trainer.log_every_n_steps=1",
    "--trainer.callbacks.init_args.batch_size=32",  # of GammaIndicators, the recipe's last
)
SMOKE = Study("smoke", _RECIPE, _QUICK_FILES[:2], 2, 192, (1.0,), (1e-3, 1.0), 1, _TINY)


def study(size: Study, seeds: Sequence[int], output: Path, folder: Path, root: Path) -> Path:
    """Measure, draw the figures and write the report.

    Args:
        size: Size of the study.
        seeds: Seeds.
        output: Folder of the report.
        folder: Where the runs go.
        root: Folder of the images.

    Returns:
        The report.
    """
    found = measure(size, seeds, folder, [f"--data.init_args.root={root}"])
    draw(found, output / "findings")
    path = output / "findings.md"
    path.write_text(report(size, found.outcomes, found.stages), encoding="utf-8")
    return path


_TEXT = """\
# The paper's findings, measured again

The paper (arXiv 2406.06420) trains an MLP on CIFAR10 from scratch and finds iEF > Adam > SGD ≈ F̂(1) > EF (validation
accuracy 58.8, 56.3, 54.3, 54.8, 28.2). Here the same MLP, its input width adapted (784-2048-2048-10, 5,824,522
parameters), is trained on Fashion-MNIST by one command:

    python -m benchmarks fashion-mnist{flags}

{size}, {epochs} epochs, batches of 64, validation on 5,000 held-out images. Learning rates were
searched over {factors} times those of the files in
{files} with the first of {seeds} seeds, for every optimizer alike,
by the best validation accuracy. That is also what the table shows, as in the paper, so that all of them are slightly
too good. A learning rate at the border of its grid is marked *. Schedules are the paper's: iEF
constant; Adam and SGD a tenth after a quarter of the epochs; F̂(1) and EF steps of norm lr, which falls to 0. Every run:
[findings/comparison.csv](findings/comparison.csv). Seeds differ in the initial weights and what is drawn, not in the
order of the images.

{table}

The ranking of the paper, two neighbours at a time; "holds" and "is reversed" mean that the means differ by more than
both standard deviations together:

{ranking}

By the final training loss the order is {by_loss}.

![Loss and accuracy](findings/curves.png)

γ of each direction over that of SGD while each optimizer trains (first seed; mean and standard deviation over four
batches of 160 training images; λ = 4.1e-4):

![γ over training](findings/gamma_over_training.png)

γ against λ at {stages} stages of the run of iEF, {batches} batches of 160
([findings/evaluation.csv](findings/evaluation.csv)):

![γ against λ](findings/gamma_against_damping.png)

The projection of each update on each of 160 training images at these stages, λ = {smallest}, against the norm of the
image's gradient: the smaller it is, that is the better an image is learnt, the harder EF pushes on it.

![Projections](findings/projections.png)

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
    return _TEXT.format(
        size=f"{size.train_size:,} training images" if size.train_size else "All 55,000 training images",
        files="recipes/mlp_fashion_mnist/" if size is FULL else "benchmarks/fashion_mnist/",
        ranking="\n".join(rank(accuracies(outcomes))),
        **facts(size, outcomes, stages),
    )


def rank(values: Mapping[str, Sequence[float]]) -> list[str]:
    """Where the paper's ranking holds.

    Args:
        values: Best validation accuracies by optimizer, one for each seed.

    Returns:
        A line for each pair of neighbours.
    """
    lines = []
    for better, worse in pairwise(name for name in _RANKING if name in values):
        gap, noise = difference(values, better, worse)
        expected = "≈" if {better, worse} == {"sgd", "sampled_fisher"} else ">"
        if abs(gap) <= noise:
            verdict = "holds" if expected == "≈" else "is not resolved"
        else:
            verdict = "holds" if expected == ">" and gap > 0 else "is reversed" if expected == ">" else "fails"
        lines.append(f"* {NAMES[better]} {expected} {NAMES[worse]} {verdict}: {gap:+.2f} ± {noise:.2f} points.")
    return lines
