"""What the studies by recipes share: the protocol of `compare` in several regimes, their tables and figures, and γ."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report import machine, rich_markdown
from lightning_ief.experiments.arguments import learning_rate, variant
from lightning_ief.experiments.comparison import Outcome, chosen, compare, summarize
from lightning_ief.experiments.figures import draw_runs
from lightning_ief.experiments.outcomes import SEARCH
from lightning_ief.experiments.summary import summarize_times
from lightning_ief.experiments.tables import read_table

__all__ = [
    "GAMMA_FIGURES", "Evaluated", "Regime", "Study", "Wanted", "evaluate", "filled", "keep_stages", "measure",
    "protocol", "sections", "where",
]  # fmt: skip

GAMMA_FIGURES = ("gamma_over_training", "gamma_against_damping", "projections")
"""What is drawn of γ."""

_RUN_FIGURES = ("curves_over_time", "metric_over_lr")  # of each regime
# lr falls, after a warm-up, for all; nothing runs beside the steps that is not needed.
_OPTIONS = ("--model.init_args.lr_scheduler=linear", "--model.init_args.warmup=0.05", "--test_after_fit=last")
_BARE = (
    "--trainer.callbacks=[]",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)
_GAMMA = "gamma"  # folder of the runs beside which γ is evaluated


@dataclass(frozen=True)
class Regime:
    """How long is trained, and on what.

    Attributes:
        name: Of its folders.
        title: Of its section.
        options: Options of `lightning-ief fit`.
    """

    name: str
    title: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A study at one of its sizes; all optimizers are searched alike.

    Attributes:
        name: Name of the size.
        recipe: What is trained.
        optimizers: Files or names for `compare`; one of them is called ief.
        regimes: How long is trained, and on what; γ is evaluated in the first one, of `epochs` epochs.
        epochs: Of that.
        gamma: Those of the optimizers, by name, beside which γ is evaluated.
        baselines: Names of those of which the best sets the target.
        untuned: Names of those that have a row without search, too.
        reference: Name of the one that the others are tested against.
        lr_factors: The learning rates that are searched, as multiples of those of the files.
        widen: How often the search goes on beyond the border of these.
        search_seeds: Seeds that choose.
        dampings: λ at which γ is evaluated.
        num_batches: Batches of such an evaluation.
        metric: The validation metric that chooses and is compared; that of the test has the same name.
        minimize: Whether smaller is better.
        drawn: Whose initial weights are drawn.
        more: Further options of `lightning-ief fit`.
    """

    name: str
    recipe: Path
    optimizers: tuple[str, ...]
    regimes: tuple[Regime, ...]
    epochs: int
    gamma: tuple[str, ...]
    baselines: tuple[str, ...]
    untuned: tuple[str, ...] = ("ief_preset",)
    reference: str = "ief_preset"
    lr_factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    widen: int = 4
    search_seeds: tuple[int, ...] = (100, 101)
    dampings: tuple[float, ...] = (1e-7, 1e-5, 1e-3, 1e-1, 1e1, 1e3)
    num_batches: int = 5
    metric: str = "val/accuracy"
    minimize: bool = False
    drawn: str = "adapter and classifier"
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What of a study is to be done now; all of it by default.

    Attributes:
        seeds: Seeds of the results.
        regimes: Names of regimes, and "gamma" for γ; all if empty.
        optimizers: Names of optimizers; all if empty. A search that is done in parts goes on for all alike once it is
            done as a whole.
        jobs: How many runs at once.
    """

    seeds: Sequence[int]
    regimes: Sequence[str] = ()
    optimizers: Sequence[str] = ()
    jobs: int = 1


@dataclass(frozen=True)
class Evaluated:
    """γ at some checkpoints of a run.

    Attributes:
        stages: Number of checkpoints.
        evaluation: γ against λ at these, a CSV file.
        projections: Projections of the updates on samples at these, a CSV file.
    """

    stages: int
    evaluation: Path
    projections: Path


def measure(study: Study, wanted: Wanted, folder: Path, options: Sequence[str]) -> None:
    """Train and evaluate what is asked for; what was done before is not done again.

    Args:
        study: The study.
        wanted: What is asked for.
        folder: Where the runs go, for each regime into a folder of its own.
        options: Options of `lightning-ief fit` that say where data and weights are.
    """
    files = {Path(name).stem: name for name in study.optimizers}
    names = [name for name in files if not wanted.optimizers or name in wanted.optimizers]
    untuned = [name for name in study.untuned if name in names]
    for regime in study.regimes:
        if not wanted.regimes or regime.name in wanted.regimes:
            compare(
                study.recipe, [files[name] for name in names], wanted.seeds, study.lr_factors, folder / regime.name,
                study.metric, study.minimize,
                devices=[""] * wanted.jobs,  # none, and so many at once
                options=[*_OPTIONS, *_BARE, *options, *study.more, *regime.options],
                search_seeds=study.search_seeds, widen=study.widen, untuned=[files[name] for name in untuned],
                baselines=[name for name in study.baselines if name in names],
                reference=study.reference if study.reference in names else None, order_by_seed=True,
            )  # fmt: skip
    if not wanted.regimes or _GAMMA in wanted.regimes:
        _measure_gamma(study, [name for name in study.gamma if name in names], files, folder, options)


def _measure_gamma(
    study: Study, names: Sequence[str], files: dict[str, str], folder: Path, options: Sequence[str]
) -> None:
    """Once more the first run of each optimizer in the first regime, with the recipe's callbacks."""
    regime = study.regimes[0]
    best = chosen(read_table(folder / regime.name / "comparison.csv", Outcome), study.minimize)
    for name in (name for name in names if name in best):
        run = keep_stages(
            study.recipe, files[name], best[name][0], folder / _GAMMA,
            [*_OPTIONS, *options, *study.more, *regime.options],
        )  # fmt: skip
        if name == "ief":
            evaluate(Path(run.run), study.epochs, study.dampings, study.num_batches, folder)


def keep_stages(recipe: Path, optimizer: str, best: Outcome, folder: Path, options: Sequence[str]) -> Outcome:
    """Repeat a run with its checkpoints in between: those of all runs may fill gigabytes.

    Args:
        recipe: The recipe.
        optimizer: File or name.
        best: Row of the run.
        folder: Where it goes.
        options: Options of `lightning-ief fit`.

    Returns:
        Its row.
    """
    keep = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.filename=after_{epoch}",
        "--trainer.callbacks.monitor=epoch",  # Lightning tells the recipe's and this one apart by what they monitor
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.save_on_train_epoch_end=true",  # also after epochs without validation
    ]
    factor = best.lr / learning_rate(recipe, variant(recipe, optimizer))
    (run,) = compare(recipe, [optimizer], [best.seed], [factor], folder, options=[*options, *keep])
    return run


def evaluate(run: Path, epochs: int, dampings: Sequence[float], num_batches: int, folder: Path) -> Evaluated:
    """Evaluate γ after the first, the middle and the last epoch of a run.

    Args:
        run: Its folder, with the checkpoints of `keep_stages`.
        epochs: Its epochs.
        dampings: λ.
        num_batches: Batches.
        folder: Where evaluation.csv and projections.csv go.

    Returns:
        What was found.
    """
    stages = _stages(epochs)
    found = Evaluated(len(stages), folder / "evaluation.csv", folder / "projections.csv")
    arguments = {
        "config": run / "config.yaml",
        "checkpoints": json.dumps([str(run / "checkpoints" / f"after_epoch={epoch}.ckpt") for epoch in stages]),
        "directions": "[sgd, ef, ief, sampled_fisher]",
        "dampings": json.dumps(dampings),
        "num_batches": num_batches,
        "output": found.evaluation,
        "projections": found.projections,
    }
    command = [sys.executable, "-m", "lightning_ief", "evaluate", *(f"--{k}={v}" for k, v in arguments.items())]
    subprocess.run(command, check=True)
    return found


def _stages(epochs: int) -> list[int]:
    return sorted({0, (epochs - 1) // 2, epochs - 1})


# --- the page


def filled(template: str, study: Study, wanted: Wanted, found: str, note: str, **own: str) -> str:
    """The page of a study.

    Args:
        template: With {flags} behind its command, {protocol}, {sections}, {where} and {note}.
        study: The study.
        wanted: What was asked for.
        found: The sections of its regimes.
        note: What else is to be known of the measurement, a sentence; or nothing.
        **own: What else stands in the template.

    Returns:
        Markdown.
    """
    return template.format(
        flags=" --full true" if study.name == "full" else "",
        protocol=protocol(study, wanted),
        sections=found,
        where=where(),
        note=f" {note}" if note else "",
        **own,
    )


def protocol(study: Study, wanted: Wanted) -> str:
    """What is alike in all regimes, as a paragraph of the page."""
    factors = ", ".join(f"{factor:.3g}" for factor in study.lr_factors)
    metric = _metric(study)
    return (
        f"Learning rates were searched over {factors} times those of the files, for every optimizer alike, by the mean "
        f"validation {metric} at the end over {len(study.search_seeds)} seeds: the first one tries all, each further "
        "one the better half of these. Where the best is at a border of its grid the grids of all go on, up to "
        f"{study.widen} times. Results are those of {len(wanted.seeds)} other seeds: test {metric} at the end of "
        f"training, on data that have chosen nothing. Seeds differ in the initial weights of {study.drawn} and in the "
        "order of the samples. For all, lr falls linearly to 0 after a warm-up of 5 %. What is fixed in the files "
        "besides lr (ρ, μ, weight decay) was not searched. Training loss: the mean of the last epoch."
    )


def sections(study: Study, folder: Path, output: Path) -> str:
    """Draw what there is of each regime and of γ, and put the tables beside the figures.

    Args:
        study: The study.
        folder: Folder of its runs.
        output: Folder of the figures, named in links, too; what is there is replaced.

    Returns:
        Markdown: a section for each regime of which there are results, and one for γ.
    """
    shutil.rmtree(output, ignore_errors=True)  # figures of an older version
    output.mkdir(parents=True)
    parts = [_section(study, regime, folder / regime.name, output) for regime in study.regimes]
    parts.append(_gamma_section(study, folder, output))
    return "\n\n".join(part for part in parts if part)


def _metric(study: Study) -> str:
    return study.metric.rpartition("/")[2].replace("_", " ")


def _section(study: Study, regime: Regime, folder: Path, output: Path) -> str:
    outcomes = read_table(folder / "comparison.csv", Outcome)
    best = chosen(outcomes, study.minimize)
    rows = {name: mine for name, mine in best.items() if any(o.part != SEARCH for o in mine)}
    if not rows:
        return f"## {regime.title}\n\nNot measured yet." if len(study.regimes) > 1 else ""
    draw_runs(
        [Path(o.run) for mine in rows.values() for o in mine], output / regime.name, metric=study.metric,
        figures=_RUN_FIGURES, comparison=folder / "comparison.csv", minimize=study.minimize,
    )  # fmt: skip
    _without_pdf(output / regime.name)
    shutil.copy(folder / "comparison.csv", output / regime.name)
    left = [name for name in (Path(each).stem for each in study.optimizers) if name not in rows]
    here = f"{output.name}/{regime.name}"
    return "\n\n".join(
        [
            f"## {regime.title}",
            *rich_markdown(summarize(outcomes, study.minimize, study.reference if study.reference in rows else None)),
            *rich_markdown(summarize_times(outcomes, [n for n in study.baselines if n in rows], study.minimize)),
            *([f"Not measured yet: {', '.join(left)}."] if left else []),
            f"![Loss and {_metric(study)} over steps and time]({here}/curves_over_time.png)",
            f"The mean {_metric(study)} of the seeds that chose, over all learning rates that were tried, as multiples "
            "of the best one:",
            f"![{_metric(study).capitalize()} over lr]({here}/metric_over_lr.png)",
            f"Every run: [{here}/comparison.csv]({here}/comparison.csv).",
        ]
    )


def _gamma_section(study: Study, folder: Path, output: Path) -> str:
    evaluation, projections = folder / "evaluation.csv", folder / "projections.csv"
    runs = [Path(o.run) for o in read_table(folder / _GAMMA / "comparison.csv", Outcome)]
    if not runs or not evaluation.is_file():
        return ""
    draw_runs(runs, output, [evaluation], [projections], figures=GAMMA_FIGURES)
    _without_pdf(output)
    shutil.copy(evaluation, output)
    here = output.name
    return f"""\
## γ

One more run of each of these, in the first regime at the best learning rate.
γ of each direction over that of SGD while each optimizer trains; mean and standard deviation over two batches:

![γ over training]({here}/gamma_over_training.png)

γ against λ at {len(_stages(study.epochs))} stages of the run of iEF, {study.num_batches} batches of 160
([{here}/evaluation.csv]({here}/evaluation.csv)):

![γ against λ]({here}/gamma_against_damping.png)

The projection of each update on each of 160 training samples at these stages, λ = {min(study.dampings):g}, against the
norm of the sample's gradient:

![Projections]({here}/projections.png)"""


def _without_pdf(folder: Path) -> None:
    for pdf in folder.glob("*.pdf"):  # the page shows the others
        pdf.unlink()


def where() -> str:
    """The machine, and how many threads each run has."""
    return f"{machine(torch.device('cpu'))}; {os.environ.get('OMP_NUM_THREADS', 'all')} of the threads for each run"
