"""The comparison of optimizers: one recipe, several optimizers, learning rates and seeds, as a table."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_ief.callbacks._rendering import numbers_table
from lightning_ief.experiments.runner import Outcome, Run, Runner

__all__ = ["Outcome", "chosen", "compare", "spread", "summarize"]

_LR = ("model", "init_args", "optimizer", "init_args", "lr")


def compare(
    config: Path,
    optimizers: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    lr_factors: Sequence[float] = (1.0,),
    directory: Path = Path("runs/comparison"),
    metric: str = "val/accuracy",
    minimize: bool = False,
    devices: Sequence[int | str] = (),
    options: Sequence[str] = (),
) -> list[Outcome]:
    """Train a recipe with several optimizers and seeds; prints and saves the table of the best validation metric.

    Each run is a process of its own, `lightning-ief fit`, that logs to a folder of its own in `directory`, its output
    in output.log there. With several factors, each optimizer's learning rate is searched first: the same factors for
    all, with the first seed; the best by the metric is repeated with the other seeds. Finished runs are not done again,
    one that was interrupted goes on from its checkpoint last.ckpt if the recipe writes one. A run that fails leaves the
    others alone, and is tried anew next time. Several comparisons may share a directory, even at the same time.

    Args:
        config: The recipe.
        optimizers: What differs: YAML files, or names of such in the folder that is called as the recipe is, without
            suffix; each gives at least the model's optimizer. A name without file is the recipe as it is.
        seeds: Seeds of the run (`seed_everything`): weights, dropout. A data module with a seed of its own, as those
            of this package, has the same order of the data in all runs.
        lr_factors: The learning rates to search, as multiples of that in each file.
        directory: Folder of the runs; comparison.csv there holds a row for each.
        metric: The validation metric that is compared.
        minimize: Whether smaller is better.
        devices: Names of GPUs, as CUDA_VISIBLE_DEVICES takes them: so many runs at once, one on each. One after the
            other if there are none.
        options: Further options of fit, such as --trainer.max_epochs=3: for all runs alike.

    Returns:
        A row for each finished run, those of the search included.

    Raises:
        MisconfigurationException: If an option is wrong, or a run failed.

    """
    if not optimizers or not seeds or not lr_factors or min(lr_factors) <= 0:
        raise MisconfigurationException("compare needs an optimizer, a seed, and factors above 0.")
    for name, given in (("optimizers", optimizers), ("seeds", seeds), ("lr_factors", lr_factors)):
        if len({*given}) < len(given):
            raise MisconfigurationException(f"compare(--{name}={[*given]}): one stands there twice.")
    variants = {Path(name).stem: _variant(config, name) for name in optimizers}
    if len(variants) < len(optimizers):
        raise MisconfigurationException(f"compare: several of {[*optimizers]} have the same name.")

    def planned(name: str, lr: float, seed: int) -> Run:
        # Factors are round numbers, their products with a learning rate often are not.
        return _run(config, variants[name], name, float(f"{lr:.12g}"), seed, directory, options)

    base = {name: _learning_rate(config, variants[name]) for name in variants}
    search = [planned(name, base[name] * factor, seeds[0]) for name in variants for factor in lr_factors]
    total = len(search) + len(variants) * (len(seeds) - 1)
    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        runner = Runner(progress, task, directory, metric, minimize, devices)
        found = runner.do(search)
        best = {name: _best([o for o in found if o.optimizer == name], minimize) for name in variants}
        found += runner.do([planned(name, o.lr, seed) for name, o in best.items() if o for seed in seeds[1:]])
    Console().print(summarize(found, minimize))
    if runner.failed:
        raise MisconfigurationException(
            f"{len(runner.failed)} of {total} runs failed; what they printed: "
            f"{', '.join(str(run.folder / 'output.log') for run in runner.failed)}. The others are kept."
        )
    return found


def summarize(outcomes: Iterable[Outcome], minimize: bool = False) -> Table:
    """The table of the comparison: each optimizer at its best learning rate.

    Args:
        outcomes: Rows of finished runs.
        minimize: Whether a smaller metric is better.

    Returns:
        Best validation metric and final training loss, mean ± standard deviation over seeds.

    """
    outcomes = list(outcomes)
    metric = outcomes[0].metric if outcomes else "metric"
    columns = ("optimizer", "lr", "searched", f"best {metric}", "final train/loss", "runs")
    lines = []
    for name, rows in chosen(outcomes, minimize).items():
        tried = ", ".join(f"{lr:g}" for lr in sorted({o.lr for o in outcomes if o.optimizer == name}))
        values = spread([o.best for o in rows]), spread([o.train_loss for o in rows])
        lines.append((name, f"{rows[0].lr:g}", tried, *values, str(len(rows))))
    return numbers_table(columns, lines, title="Mean ± standard deviation over the seeds")


def chosen(outcomes: Iterable[Outcome], minimize: bool = False) -> dict[str, list[Outcome]]:
    """The rows of each optimizer at the learning rate that the first seed found best, as `compare` goes about it.

    Args:
        outcomes: Rows of finished runs, in the order of `compare`.
        minimize: Whether a smaller metric is better.

    Returns:
        Rows by optimizer.

    """
    found: dict[str, list[Outcome]] = {}
    outcomes = list(outcomes)
    for name in dict.fromkeys(o.optimizer for o in outcomes):
        mine = [o for o in outcomes if o.optimizer == name]
        best = _best([o for o in mine if o.seed == mine[0].seed], minimize)
        assert best is not None
        found[name] = [o for o in mine if o.lr == best.lr]
    return found


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation, with so many digits behind the point; the mean alone where there is no deviation."""
    mean = fmean(values)
    if len(values) < 2 or not math.isfinite(mean):  # as of runs that diverged
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {stdev(values):.{digits}f}"


def _best(outcomes: Sequence[Outcome], minimize: bool) -> Outcome | None:
    pick: Callable[..., Outcome] = min if minimize else max
    return pick(outcomes, key=lambda o: o.best) if outcomes else None


# --- a run's arguments


def _variant(config: Path, name: str) -> Path | None:
    """The file that says what an optimizer changes in the recipe; None for the recipe as it is."""
    if not config.is_file():
        raise MisconfigurationException(f"compare: there is no recipe {config}.")
    folder = config.with_suffix("")
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise MisconfigurationException(f"compare: there is no {name}.")
        return Path(name)
    if (file := folder / f"{name}.yaml").is_file():
        return file
    optimizer = _read(config, ("model", "init_args", "optimizer", "class_path"))
    if str(optimizer).rpartition(".")[2].lower() == name.lower():
        return None
    known = [path.stem for path in sorted(folder.glob("*.yaml"))]
    raise MisconfigurationException(
        f"compare: '{name}' is neither the recipe's own optimizer ({optimizer}) nor one of {folder}/: {known}."
    )


def _learning_rate(config: Path, variant: Path | None) -> float:
    found = _read(variant or config, _LR)
    if found is None:
        raise MisconfigurationException(f"compare: {variant or config} gives no {'.'.join(_LR)}.")
    return float(found)


def _read(path: Path, keys: Sequence[str]) -> Any:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _run(
    config: Path, variant: Path | None, name: str, lr: float, seed: int, directory: Path, options: Sequence[str]
) -> Run:
    files = [config] if variant is None else [config, variant]
    digest = hashlib.sha256(b"\0".join([*(file.read_bytes() for file in files), *map(str.encode, options)]))
    version = f"lr_{lr:.12g}_seed_{seed}"
    logger = "lightning.pytorch.loggers.CSVLogger"
    return Run(
        name, lr, seed,
        ("fit", *(f"--config={file}" for file in files), f"--seed_everything={seed}", f"--{'.'.join(_LR)}={lr!r}",
         f"--trainer.logger={logger}", f"--trainer.logger.save_dir={directory}", f"--trainer.logger.name={name}",
         f"--trainer.logger.version={version}", *options),
        directory / name / version, digest.hexdigest()[:16],
    )  # fmt: skip
