"""The paper's findings, measured again on Fashion-MNIST: which optimizer reaches what, and how γ goes along."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import torch

from benchmarks.report import machine, rich_markdown
from benchmarks.study import GAMMA_FIGURES, evaluate, keep_stages
from lightning_ief.experiments.comparison import Outcome, chosen, compare, summarize
from lightning_ief.experiments.figures import draw_runs

__all__ = ["FULL", "QUICK", "SMOKE", "Study", "rank", "report", "study"]

_NAMES = {"ief": "iEF", "adam": "Adam", "sgd": "SGD", "sampled_fisher": "F̂(1)", "ef": "EF"}


@dataclass(frozen=True)
class Study:
    """The study at one of its sizes, by the paper's protocol: the best epoch counts, and the first seed searches.

    Attributes:
        name: Name of the size.
        recipe: What is trained.
        optimizers: Files or names for `compare`; one of them is called ief.
        epochs: Epochs of each run.
        train_size: Training samples; 0 for all that are not held out.
        lr_factors: The learning rates that are searched, as multiples of those of the files.
        dampings: λ at which γ is evaluated.
        num_batches: Batches of such an evaluation.
        more: Further options of `lightning-ief fit`.
    """

    name: str
    recipe: Path
    optimizers: tuple[str, ...]
    epochs: int
    train_size: int
    lr_factors: tuple[float, ...]
    dampings: tuple[float, ...]
    num_batches: int
    more: tuple[str, ...] = ()


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
    cut = [f"--data.init_args.train_size={size.train_size}"] if size.train_size else []
    options = [f"--trainer.max_epochs={size.epochs}", f"--data.init_args.root={root}", *cut, *size.more]
    outcomes = compare(size.recipe, size.optimizers, seeds, size.lr_factors, folder, options=options)
    best = chosen(outcomes)
    (ief,) = (file for file in size.optimizers if Path(file).stem == "ief")
    run = keep_stages(size.recipe, ief, best["ief"][0], folder / "stages", options)
    found = evaluate(Path(run.run), size.epochs, size.dampings, size.num_batches, folder)
    figures = output / "findings"
    draw_runs([Path(o.run) for rows in best.values() for o in rows], figures, figures=["curves"])
    firsts = [Path(rows[0].run) for rows in best.values()]
    draw_runs(firsts, figures, [found.evaluation], [found.projections], figures=GAMMA_FIGURES)
    for pdf in figures.glob("*.pdf"):  # the page shows the others
        pdf.unlink()
    for csv in (folder / "comparison.csv", found.evaluation):
        shutil.copy(csv, figures)
    path = output / "findings.md"
    path.write_text(report(size, outcomes, found.stages), encoding="utf-8")
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
    best = chosen(outcomes)
    by_loss = sorted(best, key=lambda name: fmean(o.train_loss for o in best[name]))
    _, table, _ = rich_markdown(summarize(outcomes))  # the text says what title and caption do
    return _TEXT.format(
        size=f"{size.train_size:,} training images" if size.train_size else "All 55,000 training images",
        files="recipes/mlp_fashion_mnist/" if size is FULL else "benchmarks/fashion_mnist/",
        ranking="\n".join(rank({name: [100 * o.best for o in rows] for name, rows in best.items()})),
        flags=" --full true" if size.name == "full" else "",
        epochs=size.epochs,
        factors=", ".join(f"{factor:g}" for factor in size.lr_factors),
        seeds=max(len(rows) for rows in best.values()),
        table=table,
        by_loss=" < ".join(_NAMES[name] for name in by_loss),
        stages=stages,
        batches=size.num_batches,
        smallest=f"{min(size.dampings):g}",
        machine=machine(torch.device("cpu")),
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
        gap = fmean(values[better]) - fmean(values[worse])
        noise = sum(stdev(values[name]) if len(values[name]) > 1 else 0.0 for name in (better, worse))
        expected = "≈" if {better, worse} == {"sgd", "sampled_fisher"} else ">"
        if abs(gap) <= noise:
            verdict = "holds" if expected == "≈" else "is not resolved"
        else:
            verdict = "holds" if expected == ">" and gap > 0 else "is reversed" if expected == ">" else "fails"
        lines.append(f"* {_NAMES[better]} {expected} {_NAMES[worse]} {verdict}: {gap:+.2f} ± {noise:.2f} points.")
    return lines
