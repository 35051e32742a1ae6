"""Networks from scratch by the protocol of AlgoPerf: all optimizers searched as hard, at equal samples and time."""

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch

from benchmarks.loop import CONTESTANTS, POINTS, MissingRunError, Regime, Run, Runs, Search
from benchmarks.report import machine, markdown_table
from lightning_ief.experiments.search import at_border
from lightning_ief.experiments.summary import paired_p, spread

__all__ = ["SMOKE", "STUDIES", "Study", "draw", "report", "study"]

_BASELINES = ("sgd", "adamw", "muon", "adafactor")
_LONGER = ("sgd", "adamw")  # that train as long as the metric does, besides
_UNTUNED = ("preset", "metric", "metric_100")


class Study(NamedTuple):
    """One network and its contestants.

    Attributes:
        regime: What is trained.
        contestants: By name; the last one is compared with the others.
        search: How their learning rates are found.
    """

    regime: Regime
    contestants: Sequence[str]
    search: Search = Search()


_FAMILY = ("layerwise", "kfac_sampled", "kfac_empirical", "kfac_improved", "gauss_newton", "natural_gradient")
_WITHOUT_METRIC = ("sgd", "adamw", "muon", "adafactor", "ief", "preset", "spring")

STUDIES = (
    Study(
        Regime("few_256"),
        (*_WITHOUT_METRIC, "ef", "sampled_fisher", *_FAMILY, "empirical", "sampled", "metric_100", "metric"),
    ),
    Study(Regime("all_256", train_size=0, epochs=1), (*_WITHOUT_METRIC, "metric")),
    Study(Regime("few_2048", width=2048), ("sgd", "adamw", "adafactor", "preset", "metric_100")),
    Study(
        Regime("all_2048", 2048, train_size=0, epochs=1),
        ("sgd", "adamw", "preset", "metric_100"),
        Search((1 / 3, 1.0, 3.0), 2, (100,), (0, 1, 2)),
    ),
)

SMOKE = (Study(Regime("few_8", 8, 256, 2), ("sgd", "metric"), Search((1.0, 3.0), 1, (100,), (0, 1))),)


def study(
    studies: Sequence[Study], output: Path, root: Path, tell: Callable[[str], None], names: Sequence[str] = ()
) -> Path:
    """Search, measure and write the page; runs that are in a CSV file are not done again.

    Args:
        studies: The studies.
        output: Folder of the page; the CSV files go to scratch/ in it.
        root: Folder of the images.
        tell: Is told of each run.
        names: Regimes to do, all if empty; the page has all that are done.

    Returns:
        The page.
    """
    parts = []
    for each in studies:
        path = output / "scratch" / f"{each.regime.name}.csv"
        if not names or each.regime.name in names:
            _measure(each, Runs(path, root, each.search, tell))
        with suppress(MissingRunError):  # not all done
            runs = Runs(path, root, each.search)
            parts.append(report(each, runs))
            draw(each, runs, path.with_suffix(".png"))
    page = output / "scratch.md"
    text = _TEXT.format(points=POINTS, parts="\n".join(parts), machine=machine(torch.device("cpu")))
    page.write_text(text, encoding="utf-8")
    return page


def _measure(each: Study, runs: Runs) -> None:
    runs.search_alike(each.regime, each.contestants)
    for name in each.contestants:
        runs.results(each.regime, name)
    for name, steps in _longer(each, runs).items():
        runs.results(each.regime, name, steps)
    for name in _untuned(each):
        for seed in each.search.results:
            runs.done(each.regime, name, _steps(each, runs), CONTESTANTS[name].lr, seed, "result")


def _steps(each: Study, runs: Runs) -> int:
    """Updates of a run, as they are in the file: a page is written without images."""
    own = [row.steps for row in runs.rows if row.contestant == each.contestants[-1]]
    return own[0] if own else runs.steps_of(each.regime)


def _longer(each: Study, runs: Runs) -> dict[str, int]:
    """Updates of the baselines in the time that the last contestant takes."""
    times, steps = runs.times(each.regime, each.contestants), _steps(each, runs)
    own = times[each.contestants[-1]].ratio
    return {name: round(steps * own / times[name].ratio) for name in _LONGER if name in each.contestants}


def _untuned(each: Study) -> list[str]:
    return [name for name in _UNTUNED if name in each.contestants]


_TEXT = """\
# A network from scratch

MLPs 784-w-w-10 on Fashion-MNIST in batches of 64, by one command; `--regimes` does a part of it:

    python -m benchmarks from-scratch

The protocol is that of AlgoPerf (arXiv 2502.15015): all see the same images, lr falls linearly to 0 over a number of
steps that is fixed in advance, no weight decay, float32, one thread. All of a table are searched as hard: as many
learning rates each, in factors of 3, which go on where the best is at the border; the best by the mean accuracy on
5,000 held-out images at the end, over seeds of the search. The table is of other seeds, which differ in the initial
weights and the order of the images, and of the 10,000 test images, which have chosen nothing, at the end. Of the
options of iEF, ρ and μ were found in earlier trials, and not searched here; the baselines have those that are usual.
λ = 10 of K-FAC is the best of four trials of ieKFAC on another seed: with 1 it diverged at lr 0.3, with 10 at lr 1,
with 100 it was worse at lr 1; the other two kinds took it over. λ = 100 of the natural gradient is of such trials,
too: with 10 it diverged, also with momentum. ρ of Gauss-Newton is the better one of 0.3 and 1, that of iEF by layers is
that of all parameters together. None of them has a bound on the length of a step. 2,048 wide there is no row of Muon:
its 15 products with matrices of that size in each step are, by counting, 130 times the arithmetic of SGD's step.

* **tried**: learning rates; a best one that is still at the border is marked *.
* **p**: of a two-sided paired t-test over the seeds, of test accuracies against iEF in the metric; as many such tests
  are made as there are rows.
* **target**: the median held-out accuracy at the end of the best baseline (SGD, AdamW, Muon, Adafactor); the share of
  its steps after which an optimizer first reaches it, seen at {points} points of the run, median over the seeds; and
  the time of these, in units of SGD's whole run.
* **step / SGD**: time of a step over SGD's, measured apart from the runs, the optimizers taking turns.
* **as long**: SGD and AdamW with as many more steps as fit into the time of iEF in the metric, searched anew from the
  same learning rates.
* **untuned**: the middle one of the learning rates, without a search. As ρ and μ, it comes from earlier trials on these
  images.

{parts}
Measured on {machine}.
"""

_PART = """\
## {title}

{search}

{table}

{verdict}

![Held-out accuracy over time](scratch/{name}.png)

Every run: [scratch/{name}.csv](scratch/{name}.csv).
"""


def report(each: Study, runs: Runs) -> str:
    """The part of a study in the page.

    Args:
        each: The study.
        runs: Its runs.

    Returns:
        Markdown.
    """
    regime, steps = each.regime, _steps(each, runs)
    runs.search_alike(regime, each.contestants, steps)
    rows = {name: runs.results(regime, name, steps) for name in each.contestants}
    last = rows[each.contestants[-1]]
    entries = [(CONTESTANTS[name].title, name, steps, found) for name, found in rows.items()]
    entries += _entries_as_long(each, runs)
    times = runs.times(regime, each.contestants)
    target = max(
        statistics.median(run.val_accuracy for run in rows[name]) for name in _BASELINES if name in each.contestants
    )

    def row(title: str, name: str, lr: float, tried: Sequence[float], found: Sequence[Run]) -> list[str]:
        share = statistics.median(run.share_to(target) for run in found)
        # In units of SGD's whole run.
        time = share * found[0].steps / steps * times[name].ratio
        p = paired_p(*map(_by_seed, (found, last))) if found != last else None
        return [
            title, f"{lr:.3g}{'*' if at_border(tried, lr) else ''}", str(len(tried)),
            spread([100 * run.test_accuracy for run in found], 2), "–" if p is None else f"{p:.2g}",
            spread([run.train_loss for run in found], 3),
            *("–" if math.isinf(x) else f"{x:.2f}" for x in (share, time)), f"{times[name].ratio:.1f}",
        ]  # fmt: skip

    cells = [row(title, name, *runs.searched(regime, name, number), found) for title, name, number, found in entries]
    for name in _untuned(each):
        lr = CONTESTANTS[name].lr
        with suppress(MissingRunError):
            found = [runs.done(regime, name, steps, lr, seed, "result") for seed in each.search.results]
            cells.append(row(f"{CONTESTANTS[name].title}, untuned", name, lr, [], found))
    header = (
        "optimizer",
        "lr",
        "tried",
        "test accuracy, %",
        "p",
        "training loss",
        "target: steps",
        "time",
        "step / SGD",
    )
    images = "all 55,000 images" if regime.train_size == 0 else f"{regime.train_size:,} images"
    epochs = f"{regime.epochs} epoch{'s' if regime.epochs > 1 else ''}"
    return _PART.format(
        title=f"{regime.width} wide, {images}, {epochs}: {steps:,} steps",
        search=f"Seeds that choose the learning rate: {len(each.search.seeds)}; others, of the results: "
        f"{len(each.search.results)}. The target is {100 * target:.2f} %.",
        table=markdown_table(header, cells),
        verdict=_verdict(entries),
        name=regime.name,
    )


def _entries_as_long(each: Study, runs: Runs) -> list[tuple[str, str, int, list[Run]]]:
    """Title, name, updates and results of the baselines in the time that the last contestant takes, where done."""
    found, steps = [], _steps(each, runs)
    for name, more in _longer(each, runs).items():
        title = f"{CONTESTANTS[name].title}, as long: {more / steps:.1f} ×"
        with suppress(MissingRunError):
            found.append((title, name, more, runs.results(each.regime, name, more)))
    return found


def draw(each: Study, runs: Runs, path: Path) -> None:
    """Held-out accuracy over time, of the baselines that train longer, of Muon and of the last contestant.

    Args:
        each: The study.
        runs: Its runs.
        path: The picture.
    """
    steps, times = _steps(each, runs), runs.times(each.regime, each.contestants)
    shown = [name for name in (*_LONGER, "muon", each.contestants[-1]) if name in each.contestants]
    entries = [(CONTESTANTS[name].title, name, steps, runs.results(each.regime, name, steps)) for name in shown]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for title, name, number, rows in entries + _entries_as_long(each, runs):
        whole = number / steps * times[name].ratio  # in units of SGD's whole run
        curves = torch.tensor([[*map(float, run.curve.split())] for run in rows]).mul(100)
        x = [whole * k / POINTS for k in range(1, POINTS + 1)]
        style = {"color": f"C{shown.index(name)}", "linestyle": "-" if number == steps else "--"}
        axes.plot(x, curves.mean(0), label=title, **style)
        axes.fill_between(x, curves.amin(0), curves.amax(0), color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="time, in units of SGD's run of as many steps", ylabel="held-out accuracy, %")
    finals = [100 * run.val_accuracy for *_, rows in entries for run in rows]
    axes.set_ylim(bottom=min(finals) - 6)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _by_seed(rows: Sequence[Run]) -> dict[int, float]:
    return {run.seed: run.test_accuracy for run in rows}


def _verdict(entries: Sequence[tuple[str, str, int, Sequence[Run]]]) -> str:
    """How far the last contestant is from the others."""
    steps = entries[0][2]
    title, _, _, mine = next(entry for entry in reversed(entries) if entry[2] == steps)
    own = statistics.fmean(100 * run.test_accuracy for run in mine)
    lines = [f"{title} is, in points of test accuracy,", ""]
    for other, _, _, rows in entries:
        if rows is not mine:
            gap = own - statistics.fmean(100 * run.test_accuracy for run in rows)
            lines.append(f"* {gap:+.2f} from {other}")
    return "\n".join(lines)
