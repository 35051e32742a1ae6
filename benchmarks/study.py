"""What the studies share: optimizers compared on a recipe, their tables and figures, and how γ goes along."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch

from benchmarks.report import machine, markdown_table
from lightning_ief.experiments.comparison import Outcome, chosen, compare, spread
from lightning_ief.experiments.figures import draw_runs

__all__ = [
    "FIGURES", "NAMES", "Measured", "Study", "accuracies", "difference", "draw", "facts", "gaps", "measure", "table",
]  # fmt: skip

NAMES = {
    "ief": "iEF", "ief_preset": "iEF, preset", "adam": "Adam", "adamw": "AdamW", "adamw_linear": "AdamW, lr to 0",
    "sgd": "SGD", "sampled_fisher": "F̂(1)", "ef": "EF",
}  # fmt: skip
"""Optimizers as the pages call them, by the name of their files."""

FIGURES = ("curves", "gamma_over_training", "gamma_against_damping", "projections")
"""What `draw` draws."""


@dataclass(frozen=True)
class Study:
    """A study at one of its sizes.

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


@dataclass(frozen=True)
class Measured:
    """What a study found.

    Attributes:
        outcomes: Rows of all runs.
        comparison: The same as a CSV file.
        stages: Number of checkpoints of iEF at which γ was evaluated.
        evaluation: γ against λ at these, a CSV file.
        projections: Projections of the updates on samples at these, a CSV file.
    """

    outcomes: list[Outcome]
    comparison: Path
    stages: int
    evaluation: Path
    projections: Path


def measure(study: Study, seeds: Sequence[int], folder: Path, options: Sequence[str]) -> Measured:
    """Train and evaluate; what was done before is not done again.

    Args:
        study: Its size.
        seeds: Seeds.
        folder: Where the runs go.
        options: Options of `lightning-ief fit` that say where data and weights are.

    Returns:
        What was found.
    """
    size = [f"--data.init_args.train_size={study.train_size}"] if study.train_size else []
    options = [f"--trainer.max_epochs={study.epochs}", *options, *size, *study.more]
    outcomes = compare(study.recipe, study.optimizers, seeds, study.lr_factors, folder, options=options)
    # Once more the first run of iEF, with checkpoints in between: those of all runs may fill gigabytes.
    best = chosen(outcomes)["ief"][0]
    base = next(o.lr for o in outcomes if o.optimizer == "ief") / study.lr_factors[0]
    (ief,) = (file for file in study.optimizers if Path(file).stem == "ief")
    keep = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.filename=after_{epoch}",
        "--trainer.callbacks.monitor=epoch",  # Lightning tells the recipe's and this one apart by what they monitor
        "--trainer.callbacks.save_top_k=-1",
    ]
    (run,) = compare(study.recipe, [ief], [best.seed], [best.lr / base], folder / "stages", options=[*options, *keep])
    stages = sorted({0, (study.epochs - 1) // 2, study.epochs - 1})
    checkpoints = [str(Path(run.run, "checkpoints", f"after_epoch={epoch}.ckpt")) for epoch in stages]
    found = Measured(
        outcomes, folder / "comparison.csv", len(stages), folder / "evaluation.csv", folder / "projections.csv"
    )
    arguments = {
        "config": Path(run.run, "config.yaml"),
        "checkpoints": json.dumps(checkpoints),
        "directions": "[sgd, ef, ief, sampled_fisher]",
        "dampings": json.dumps(study.dampings),
        "num_batches": study.num_batches,
        "output": found.evaluation,
        "projections": found.projections,
    }
    command = [sys.executable, "-m", "lightning_ief", "evaluate", *(f"--{k}={v}" for k, v in arguments.items())]
    subprocess.run(command, check=True)
    return found


def draw(measured: Measured, folder: Path) -> None:
    """Draw the figures, and put the tables of runs and of γ beside them.

    Args:
        measured: What was found.
        folder: Where to; figures are named in `FIGURES`.
    """
    best = chosen(measured.outcomes)
    curves, gamma, *evaluated = FIGURES
    draw_runs([Path(o.run) for rows in best.values() for o in rows], folder, figures=[curves])
    firsts = [Path(rows[0].run) for rows in best.values()]
    draw_runs(firsts, folder, [measured.evaluation], [measured.projections], figures=[gamma, *evaluated])
    for pdf in folder.glob("*.pdf"):  # the page shows the others
        pdf.unlink()
    for path in (measured.comparison, measured.evaluation):
        shutil.copy(path, folder)


def table(outcomes: Sequence[Outcome]) -> str:
    """Each optimizer at its best learning rate, marked * where that is at the border of those searched.

    Args:
        outcomes: Rows of all runs.

    Returns:
        Markdown.
    """
    cells = []
    for name, rows in chosen(outcomes).items():
        grid = sorted({o.lr for o in outcomes if o.optimizer == name})
        border = "*" if len(grid) > 1 and rows[0].lr in (grid[0], grid[-1]) else ""
        cells.append(
            [NAMES[name], f"{rows[0].lr:g}{border}", ", ".join(f"{lr:g}" for lr in grid),
             spread([100 * o.best for o in rows], 2), spread([o.train_loss for o in rows], 3), str(len(rows))]
        )  # fmt: skip
    header = ("optimizer", "lr", "searched", "best validation accuracy, %", "final training loss", "runs")
    return markdown_table(header, cells)


def facts(study: Study, outcomes: Sequence[Outcome], stages: int) -> dict[str, str]:
    """What every page says, by the name of its place in the page's text.

    Args:
        study: Its size.
        outcomes: Rows of all runs.
        stages: Number of checkpoints at which γ was evaluated.

    Returns:
        flags (of the command), epochs, factors, seeds (their number), table, by_loss (the optimizers in the order of
        the final training loss), stages, batches, smallest (of the dampings), machine.
    """
    best = chosen(outcomes)
    by_loss = sorted(best, key=lambda name: fmean(o.train_loss for o in best[name]))
    return {
        "flags": " --full true" if study.name == "full" else "",
        "epochs": str(study.epochs),
        "factors": ", ".join(f"{factor:g}" for factor in study.lr_factors),
        "seeds": str(max(len(rows) for rows in best.values())),
        "table": table(outcomes),
        "by_loss": " < ".join(NAMES[name] for name in by_loss),
        "stages": str(stages),
        "batches": str(study.num_batches),
        "smallest": f"{min(study.dampings):g}",
        "machine": machine(torch.device("cpu")),
    }


def gaps(outcomes: Sequence[Outcome]) -> str:
    """How far iEF and its preset are from each of the others, by the best validation accuracy.

    Args:
        outcomes: Rows of all runs.

    Returns:
        A list in Markdown; "above" and "below" where the means differ by more than both standard deviations together.
    """
    values = accuracies(outcomes)
    lines = []
    for one in (name for name in ("ief", "ief_preset") if name in values):
        for other in (name for name in values if not name.startswith("ief")):
            gap, noise = difference(values, one, other)
            verdict = "not told apart from" if abs(gap) <= noise else "above" if gap > 0 else "below"
            lines.append(f"* {NAMES[one]} is {verdict} {NAMES[other]}: {gap:+.2f} ± {noise:.2f} points.")
    return "\n".join(lines)


def accuracies(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Best validation accuracy of each run at the best learning rate.

    Args:
        outcomes: Rows of all runs.

    Returns:
        Percentages by optimizer, one for each seed.
    """
    return {name: [100 * o.best for o in rows] for name, rows in chosen(outcomes).items()}


def difference(values: Mapping[str, Sequence[float]], one: str, other: str) -> tuple[float, float]:
    """How far two optimizers are apart.

    Args:
        values: A value for each seed, by optimizer.
        one: Its name.
        other: That of the other one.

    Returns:
        Mean of the one less that of the other, and both standard deviations together.
    """
    noise = sum(stdev(values[name]) if len(values[name]) > 1 else 0.0 for name in (one, other))
    return fmean(values[one]) - fmean(values[other]), noise
