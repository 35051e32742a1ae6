"""The comparison of optimizers: one recipe, several optimizers, learning rates and seeds, as a table."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_ief.experiments.arguments import Arguments, learning_rate, rounded, variant
from lightning_ief.experiments.outcomes import RESULT, SEARCH, Outcome, Run
from lightning_ief.experiments.runner import Runner
from lightning_ief.experiments.search import at_border, best_lr, better_half, chosen, further
from lightning_ief.experiments.summary import scipy_stats, spread, summarize, summarize_times

__all__ = ["Outcome", "chosen", "compare", "spread", "summarize"]

_UNTUNED = "_untuned"  # what the names of optimizers that are not searched end in


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
    search_seeds: Sequence[int] = (),
    widen: int = 0,
    untuned: Sequence[str] = (),
    baselines: Sequence[str] = (),
    reference: str | None = None,
    order_by_seed: bool = False,
) -> list[Outcome]:
    """Train a recipe with several optimizers and seeds; prints and saves the table of the best validation metric.

    Each run is a process of its own, `lightning-ief fit`, that logs to a folder of its own in `directory`, its output
    in output.log there. With several factors, each optimizer's learning rate is searched first: the same factors for
    all, with the first seed; the best by the metric is repeated with the other seeds. Finished runs are not done again,
    one that was interrupted goes on from its checkpoint last.ckpt if the recipe writes one. A run that fails leaves the
    others alone, and is tried anew next time. Several comparisons may share a directory, even at the same time.

    With `search_seeds`, these choose and `seeds` give the results: nothing is chosen by what is shown. What counts is
    then the end of training, not the best epoch; steps are timed, and a test after training is one of the last weights.

    Args:
        config: The recipe.
        optimizers: What differs: YAML files, or names of such in the folder that is called as the recipe is, without
            suffix; each gives at least the model's optimizer. A name without file is the recipe as it is.
        seeds: Seeds of the run (`seed_everything`): weights, dropout. A data module with a seed of its own, as those
            of this package, has the same order of the data in all runs, but for `order_by_seed`.
        lr_factors: The learning rates to search, as multiples of that in each file.
        directory: Folder of the runs; comparison.csv there holds a row for each.
        metric: The validation metric that is compared.
        minimize: Whether smaller is better.
        devices: Names of GPUs, as CUDA_VISIBLE_DEVICES takes them: so many runs at once, one on each. One after the
            other if there are none.
        options: Further options of fit, such as --trainer.max_epochs=3: for all runs alike.
        search_seeds: Seeds that choose each optimizer's learning rate, by the metric at the end of training: the first
            one tries all, each further one the better half of what the ones before have tried, two at least. If there
            are none, the first of `seeds` chooses, by its best epoch.
        widen: How often the search may go on: while the best of an optimizer is at the border of its learning rates,
            each optimizer gets one more, beyond the border nearer to its best, so that all have equally many.
        untuned: Further rows, given as the optimizers are: with the learning rate of their files, not searched.
        baselines: Names of rows, of which the best by the median metric at the end sets a target: a second table has
            the steps and seconds until each optimizer's validation first reaches it.
        reference: The row that the others are tested against, by a paired test over the seeds; with `search_seeds`.
        order_by_seed: Whether the order of the samples depends on the seed, too: it is the data's `order_seed`, which
            leaves the split as it is.

    Returns:
        A row for each finished run, those of the search included.

    Raises:
        MisconfigurationException: If an option is wrong, or a run failed.

    """
    if not optimizers or not seeds or not lr_factors or min(lr_factors) <= 0:
        raise MisconfigurationException("compare needs an optimizer, a seed, and factors above 0.")
    given = {"optimizers": optimizers, "seeds": seeds, "lr_factors": lr_factors, "search_seeds": search_seeds}
    for name, items in {**given, "untuned": untuned, "baselines": baselines}.items():
        if len({*items}) < len(items):
            raise MisconfigurationException(f"compare(--{name}={[*items]}): one stands there twice.")
    searched = {Path(name).stem: variant(config, name) for name in optimizers}
    variants = {**searched, **{f"{Path(name).stem}{_UNTUNED}": variant(config, name) for name in untuned}}
    if len(variants) < len(optimizers) + len(untuned):
        raise MisconfigurationException(f"compare: several of {[*optimizers, *untuned]} have the same name.")
    _require_parts(seeds, lr_factors, search_seeds, widen)
    _require_rows([*variants], baselines, reference, search_seeds)

    arguments = Arguments(config, variants, directory, options, bool(search_seeds), bool(baselines), order_by_seed)
    base = {name: learning_rate(config, file) for name, file in variants.items()}
    grids = {name: [rounded(base[name] * factor) for factor in lr_factors] for name in searched}
    first, others = (search_seeds, seeds) if search_seeds else (seeds[:1], seeds[1:])
    result = RESULT if search_seeds else ""
    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        runner = Runner(progress, directory, metric, minimize, devices)
        runner.require_apart([*searched], search_seeds, seeds)
        runner.expect(len(searched) * len(others) + len(untuned) * len(seeds))
        found = _search(runner, arguments, grids, first, widen)
        best = _best(found, grids, minimize)
        runs = [arguments.run(name, lr, seed, result) for name, lr in best.items() for seed in others]
        runs += [
            arguments.run(name, base[name], seed, result) for name in variants if name not in searched for seed in seeds
        ]
        found += runner.do(runs)
    Console().print(summarize(found, minimize, reference))
    if search_seeds or baselines:
        Console().print(summarize_times(found, baselines, minimize))
    if runner.failed:
        raise MisconfigurationException(
            f"{len(runner.failed)} of {runner.expected} runs failed; what they printed: "
            f"{', '.join(str(run.folder / 'output.log') for run in runner.failed)}. The others are kept."
        )
    return found


def _search(
    runner: Runner, arguments: Arguments, grids: Mapping[str, list[float]], seeds: Sequence[int], widen: int
) -> list[Outcome]:
    """Do the runs of the search, by successive halving; grids grow by what is tried beyond them."""
    part = SEARCH if arguments.by_parts else ""
    asked: set[Run] = set()
    found: list[Outcome] = []

    def ask(kept: Mapping[str, Sequence[float]], seed: int) -> None:
        new = [run for name in kept for lr in kept[name] if (run := arguments.run(name, lr, seed, part)) not in asked]
        asked.update(new)
        runner.expect(len(new))
        found.extend(runner.do(new))

    for left in reversed(range(widen + 1)):
        kept: Mapping[str, Sequence[float]] = grids
        for number, seed in enumerate(seeds, 1):
            ask(kept, seed)
            so_far = [o for o in found if o.seed in seeds[:number]]
            if left and _grow(grids, _best(so_far, grids, runner.minimize)):
                break
            kept = {name: better_half((o for o in so_far if o.optimizer == name), runner.minimize) for name in grids}
        else:
            break
    return found


def _grow(grids: Mapping[str, list[float]], best: Mapping[str, float]) -> bool:
    """Let all grids go on by one learning rate if the best of any is at its border; whether it is."""
    if not any(at_border(grids[name], lr) for name, lr in best.items()):
        return False
    for name, lr in best.items():
        grids[name].append(rounded(further(grids[name], lr)))
    return True


def _best(found: Sequence[Outcome], names: Iterable[str], minimize: bool) -> dict[str, float]:
    """The best learning rate of each optimizer that has a finished run."""
    best = {name: best_lr((o for o in found if o.optimizer == name), minimize) for name in names}
    return {name: lr for name, lr in best.items() if lr is not None}


def _require_parts(seeds: Sequence[int], lr_factors: Sequence[float], search_seeds: Sequence[int], widen: int) -> None:
    if both := sorted({*seeds} & {*search_seeds}):
        raise MisconfigurationException(
            f"compare(--search_seeds={[*search_seeds]}, --seeds={[*seeds]}): {both} would choose the learning rate and "
            "give the results, too. Give other seeds."
        )
    if widen < 0 or (widen and len(lr_factors) < 2):
        raise MisconfigurationException(
            f"compare(--widen={widen}): must be at least 0, and goes on by the factor between two of --lr_factors."
        )


def _require_rows(
    names: Sequence[str], baselines: Sequence[str], reference: str | None, search_seeds: Sequence[int]
) -> None:
    for option, given in (("baselines", baselines), ("reference", [reference] if reference else [])):
        if unknown := [name for name in given if name not in names]:
            raise MisconfigurationException(f"compare(--{option}): '{unknown[0]}' is none of the rows {[*names]}.")
    if reference is None:
        return
    if not search_seeds:
        raise MisconfigurationException(
            f"compare(--reference={reference}): a test over seeds one of which has chosen the learning rate says "
            "nothing. Give --search_seeds."
        )
    scipy_stats()  # now, not after hours
