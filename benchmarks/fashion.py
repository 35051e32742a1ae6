"""The paper's findings, measured again on Fashion-MNIST: which optimizer reaches what, and how γ goes along."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import torch

from benchmarks.report import machine, markdown_table
from lightning_ief.comparison import Outcome, chosen, compare, spread
from lightning_ief.figures import draw_runs

__all__ = ["FULL", "QUICK", "SMOKE", "Study", "measure", "rank", "report", "study"]

_ROOT = Path(__file__).resolve().parents[1]
_RECIPE = _ROOT / "recipes" / "mlp_fashion_mnist.yaml"
_RANKING = ("ief", "adam", "sgd", "sampled_fisher", "ef")  # the paper's, its SGD and F̂(1) about equal
_NAMES = {"ief": "iEF", "adam": "Adam", "sgd": "SGD", "sampled_fisher": "F̂(1)", "ef": "EF"}


@dataclass(frozen=True)
class Study:
    """The size of the study.

    Attributes:
        name: Its name.
        optimizers: Files or names for `compare`.
        epochs: Epochs of each run.
        train_size: Training images; 0 for all but the 5,000 of the validation set.
        lr_factors: The learning rates that are searched, as multiples of the paper's.
        dampings: λ at which γ is evaluated.
        num_batches: Batches of such an evaluation.
        more: Further options of `lightning-ief fit`.
    """

    name: str
    optimizers: tuple[str, ...]
    epochs: int
    train_size: int
    lr_factors: tuple[float, ...]
    dampings: tuple[float, ...]
    num_batches: int
    more: tuple[str, ...] = ()

    def options(self, root: Path) -> list[str]:
        """Options of `lightning-ief fit`."""
        size = [f"--data.init_args.train_size={self.train_size}"] if self.train_size else []
        return [f"--trainer.max_epochs={self.epochs}", f"--data.init_args.root={root}", *size, *self.more]


_QUICK_FILES = tuple(str(Path(__file__).parent / "fashion_mnist" / f"{name}.yaml") for name in _RANKING)
_DAMPINGS = (1e-7, 1e-5, 1e-3, 1e-1, 1e1, 1e3)
QUICK = Study("quick", _QUICK_FILES, 8, 10_000, (0.1, 1.0, 10.0), _DAMPINGS, 5)
FULL = Study("full", _RANKING, 60, 0, (0.1, 1.0, 10.0), _DAMPINGS, 100)
_TINY = ("--model.init_args.net.init_args.widths=[784, 16, 10]", "--trainer.log_every_n_steps=1")
SMOKE = Study("smoke", _QUICK_FILES[:2], 2, 192, (1.0,), (1e-3, 1.0), 1, _TINY)


def measure(
    study: Study, seeds: Sequence[int], folder: Path, root: Path
) -> tuple[list[Outcome], list[Path], list[Path]]:
    """Train and evaluate; what was done before is not done again.

    Args:
        study: Its size.
        seeds: Seeds.
        folder: Where the runs go.
        root: Folder of the images.

    Returns:
        Rows of all runs, checkpoints of iEF at the stages that were evaluated, the CSV files of γ against λ and of
        projections.
    """
    options = study.options(root)
    outcomes = compare(_RECIPE, study.optimizers, seeds, study.lr_factors, folder, options=options)
    # Once more the first run of iEF, with checkpoints in between: those of all runs would fill gigabytes.
    best = chosen(outcomes)["ief"][0]
    base = next(o.lr for o in outcomes if o.optimizer == "ief") / study.lr_factors[0]
    keep = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.filename=after_{epoch}",
        "--trainer.callbacks.monitor=epoch",  # Lightning tells the recipe's and this one apart by what they monitor
        "--trainer.callbacks.save_top_k=-1",
    ]
    (run,) = compare(
        _RECIPE, study.optimizers[:1], [best.seed], [best.lr / base], folder / "stages", options=[*options, *keep]
    )
    stages = sorted({0, study.epochs // 2 - 1, study.epochs - 1})
    checkpoints = [Path(run.run, "checkpoints", f"after_epoch={epoch}.ckpt") for epoch in stages]
    tables = [folder / "evaluation.csv", folder / "projections.csv"]
    arguments = {
        "config": Path(run.run, "config.yaml"),
        "checkpoints": json.dumps([str(path) for path in checkpoints]),
        "directions": "[sgd, ef, ief, sampled_fisher]",
        "dampings": json.dumps(study.dampings),
        "num_batches": study.num_batches,
        "output": tables[0],
        "projections": tables[1],
    }
    command = [sys.executable, "-m", "lightning_ief", "evaluate", *(f"--{k}={v}" for k, v in arguments.items())]
    subprocess.run(command, check=True)
    return outcomes, checkpoints, tables


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
    outcomes, checkpoints, (evaluation, projections) = measure(size, seeds, folder, root)
    best = chosen(outcomes)
    figures = output / "findings"
    draw_runs([Path(o.run) for rows in best.values() for o in rows], figures, figures=["curves"])
    firsts = [Path(rows[0].run) for rows in best.values()]
    draw_runs(firsts, figures, [evaluation], figures=["gamma_over_training", "gamma_against_damping"])
    draw_runs([], figures, projections=[projections], figures=["projections"])
    for pdf in figures.glob("*.pdf"):  # the page shows the others
        pdf.unlink()
    for table in (folder / "comparison.csv", evaluation):
        shutil.copy(table, figures)
    path = output / "findings.md"
    path.write_text(report(size, outcomes, len(seeds), len(checkpoints)), encoding="utf-8")
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

The projection of each update on each of 160 training images at these stages, λ = {smallest:g}, against the norm of the
image's gradient: the smaller it is, that is the better an image is learnt, the harder EF pushes on it.

![Projections](findings/projections.png)

Measured on {machine}.
"""


def report(size: Study, outcomes: Sequence[Outcome], seeds: int, stages: int) -> str:
    """The page.

    Args:
        size: Size of the study.
        outcomes: Rows of all runs.
        seeds: Number of seeds.
        stages: Number of checkpoints evaluated.

    Returns:
        Markdown.
    """
    best = chosen(outcomes)
    cells = []
    for name, rows in best.items():
        grid = sorted({o.lr for o in outcomes if o.optimizer == name})
        border = "*" if len(grid) > 1 and rows[0].lr in (grid[0], grid[-1]) else ""
        cells.append(
            [_NAMES[name], f"{rows[0].lr:g}{border}", ", ".join(f"{lr:g}" for lr in grid),
             spread([100 * o.best for o in rows], 2), spread([o.train_loss for o in rows], 3), str(len(rows))]
        )  # fmt: skip
    header = ("optimizer", "lr", "searched", "best validation accuracy, %", "final training loss", "runs")
    return _TEXT.format(
        flags=" --full true" if size is FULL else "",
        size=f"{size.train_size:,} training images" if size.train_size else "All 55,000 training images",
        epochs=size.epochs,
        factors=", ".join(f"{factor:g}" for factor in size.lr_factors),
        files="recipes/mlp_fashion_mnist/" if size is FULL else "benchmarks/fashion_mnist/",
        seeds=seeds,
        table=markdown_table(header, cells),
        ranking="\n".join(rank({name: [100 * o.best for o in rows] for name, rows in best.items()})),
        by_loss=" < ".join(
            _NAMES[name] for name, rows in sorted(best.items(), key=lambda item: fmean(o.train_loss for o in item[1]))
        ),
        stages=stages,
        batches=size.num_batches,
        smallest=min(size.dampings),
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
        difference = fmean(values[better]) - fmean(values[worse])
        noise = sum(stdev(values[name]) if len(values[name]) > 1 else 0.0 for name in (better, worse))
        expected = "≈" if {better, worse} == {"sgd", "sampled_fisher"} else ">"
        if abs(difference) <= noise:
            verdict = "holds" if expected == "≈" else "is not resolved"
        else:
            verdict = "holds" if expected == ">" and difference > 0 else "is reversed" if expected == ">" else "fails"
        lines.append(
            f"* {_NAMES[better]} {expected} {_NAMES[worse]} {verdict}: {difference:+.2f} ± {noise:.2f} points."
        )
    return lines
