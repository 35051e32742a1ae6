"""Which batch size for which optimizer: from scratch, at equal samples and at equal time, beside the noise scale."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from benchmarks.loop import BATCH, CONTESTANTS, Regime, Run, Runs, Search, batches
from benchmarks.report import machine, markdown_table, read, write
from lightning_ief import linearize
from lightning_ief.experiments.summary import spread
from lightning_ief.indicators import NoiseScale
from lightning_ief.objectives import CrossEntropy
from lightning_ief.tasks import MLP

__all__ = ["FULL", "SMOKE", "Noise", "Size", "report", "study"]

_STAGES = 4  # of a run, at which the noise scale is measured
_MICRO = 256
_BASELINES = ("sgd", "adamw")


class Size(NamedTuple):
    """The study at one of its sizes.

    Attributes:
        contestants: By name.
        samples: The batch sizes.
        reference: The optimizer and the batch size whose runs set the time.
        search: How learning rates are found.
        width: Of the hidden layers.
        train_size: Training images.
        epochs: At equal samples.
        batches: Of a noise scale.
    """

    contestants: Sequence[str] = ("sgd", "adamw", "preset", "metric")
    samples: Sequence[int] = (16, 64, 256, 1024, 4096)
    reference: tuple[str, int] = ("metric", 256)
    search: Search = Search((1 / 9, 1 / 3, 1.0, 3.0, 9.0), 2, (100,), (0, 1, 2))
    width: int = 256
    train_size: int = 10_000
    epochs: int = 8
    batches: int = 50

    def regime(self, samples: int) -> Regime:
        """What is trained with batches of so many."""
        return Regime(f"n_{samples}", self.width, self.train_size, self.epochs, samples, _MICRO)


FULL = Size()
SMOKE = Size(("sgd", "metric"), (64, 128), ("metric", 64), Search((1.0, 3.0), 0, (100,), (0, 1)), 8, 256, 1, 3)


@dataclass(frozen=True)
class Noise:
    """The noise scale at a stage of a run of SGD; the CSV file has these columns.

    Attributes:
        stage: Share of the run.
        scale: tr Σ / ‖∇L‖², in samples.
    """

    stage: float
    scale: float


def study(size: Size, output: Path, root: Path, tell: Callable[[str], None]) -> Path:
    """Search, measure, draw and write the page; runs that are in its CSV file are not done again.

    Args:
        size: Size of the study.
        output: Folder of the page; CSV files and figure go to batch_size/ in it.
        root: Folder of the images.
        tell: Is told of each run.

    Returns:
        The page.
    """
    folder = output / "batch_size"
    runs = Runs(folder / "runs.csv", root, size.search, tell)
    for samples in size.samples:  # in one sitting
        runs.times(size.regime(samples), size.contestants)
    for samples in size.samples:
        runs.search_alike(size.regime(samples), size.contestants)
        for name in size.contestants:
            runs.results(size.regime(samples), name)
    for samples in size.samples:
        for name in size.contestants:
            _at_equal_time(size, runs, name, samples)
    if not (noise := read(folder / "noise.csv", Noise)):
        noise = _noise(size, runs)
        write(noise, folder / "noise.csv", Noise)
    page = output / "batch_size.md"
    page.write_text(report(size, runs, noise), encoding="utf-8")
    _draw(size, runs, folder / "accuracy.png")
    return page


def _at_equal_samples(size: Size, runs: Runs, name: str, samples: int) -> list[Run]:
    runs.search_alike(size.regime(samples), size.contestants)
    return runs.results(size.regime(samples), name)


def _at_equal_time(size: Size, runs: Runs, name: str, samples: int) -> list[Run]:
    """With as many steps as the time allows, at the learning rate found for equal samples."""
    reference, number = size.reference
    regime, other = size.regime(samples), size.regime(number)
    allowed = runs.times(other, size.contestants)[reference].milliseconds * runs.steps_of(other)
    steps = max(1, round(allowed / runs.times(regime, size.contestants)[name].milliseconds))
    lr = _at_equal_samples(size, runs, name, samples)[0].lr
    return [runs.done(regime, name, steps, lr, seed, "result") for seed in size.search.results]


def _noise(size: Size, runs: Runs) -> list[Noise]:
    """The noise scale along a run of SGD in batches of 64, at a constant learning rate."""
    data = runs.data(size.train_size)
    torch.manual_seed(0)
    net = MLP([784, size.width, size.width, 10])
    optimizer = CONTESTANTS["sgd"].make(net.parameters(), lr=CONTESTANTS["sgd"].lr)
    stream, steps = batches(data.train), size.epochs * (len(data.train[1]) // BATCH) // _STAGES
    found = []
    for stage in range(_STAGES + 1):
        metric = NoiseScale()
        for x, y in islice(stream, size.batches):
            metric.update(linearize(net, x, y, CrossEntropy()))
        found.append(Noise(stage / _STAGES, float(metric.compute())))
        for x, y in islice(stream, steps):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return found


_TEXT = """\
# Batch sizes

An MLP 784-{width}-{width}-10 on {train_size:,} images of Fashion-MNIST in batches of N, by one command:

    python -m benchmarks batch-size

Updates are exact for the whole batch: more than {micro} samples are accumulated in micro-batches (`accumulate=k`). lr
falls linearly to 0; for each N every optimizer has had as many learning rates, in factors of 3 that go on at borders,
the best of them by the accuracy on 5,000 held-out images at the end, with {search} seed; {seeds} others are the
results, on 10,000 test images. Baselines: {baselines}.

![Test accuracy over N](batch_size/accuracy.png)

## At equal samples

{epochs} epochs. Test accuracy in %, mean ± standard deviation; in brackets the training loss.

{samples}

Best N by held-out accuracy: {best_samples}. {lead_samples}

The learning rates that were chosen:

{rates}

## At equal time

As many steps as fit into the time that {reference} takes for {epochs} epochs with N = {reference_samples}, at the
learning rates found above; times of steps are measured apart, the optimizers taking turns. In brackets the number of
epochs.

{time}

Best N by held-out accuracy: {best_time}. {lead_time}

## Noise scale

The batch size at which noise is as large as the gradient, tr Σ / ‖∇L‖² (`indicators.NoiseScale`), along a run of SGD
with N = {batch}, over {batches} batches each:

{noise}

Every run: [batch_size/runs.csv](batch_size/runs.csv). One thread. Measured on {machine}.
"""


def report(size: Size, runs: Runs, noise: Sequence[Noise]) -> str:
    """The page.

    Args:
        size: Size of the study.
        runs: All runs.
        noise: Noise scales.

    Returns:
        Markdown.
    """
    (samples, best_samples, lead_samples), (time, best_time, lead_time) = (
        _table(size, {name: {n: rows(size, runs, name, n) for n in size.samples} for name in size.contestants}, bracket)
        for rows, bracket in (
            (_at_equal_samples, lambda n, found: f"{statistics.fmean(run.train_loss for run in found):.3f}"),
            (_at_equal_time, lambda n, found: f"{found[0].steps * n / size.train_size:.3g}"),
        )
    )
    rates = [
        [CONTESTANTS[name].title, *(f"{_at_equal_samples(size, runs, name, n)[0].lr:.3g}" for n in size.samples)]
        for name in size.contestants
    ]
    return _TEXT.format(
        rates=markdown_table(_header(size), rates),
        width=size.width,
        train_size=size.train_size,
        micro=_MICRO,
        search=len(size.search.seeds),
        seeds=len(size.search.results),
        baselines=" and ".join(CONTESTANTS[name].title for name in size.contestants if name in _BASELINES),
        epochs=size.epochs,
        reference=CONTESTANTS[size.reference[0]].title,
        reference_samples=size.reference[1],
        samples=samples,
        time=time,
        best_samples=best_samples,
        best_time=best_time,
        lead_samples=lead_samples,
        lead_time=lead_time,
        batch=BATCH,
        batches=size.batches,
        noise=markdown_table(
            ("share of the run", *(f"{each.stage:.0%}" for each in noise)),
            [["noise scale", *(f"{each.scale:.3g}" for each in noise)]],
        ),
        machine=machine(torch.device("cpu")),
    )


def _table(
    size: Size, rows: dict[str, dict[int, list[Run]]], bracket: Callable[[int, Sequence[Run]], str]
) -> tuple[str, str, str]:
    """Accuracies by optimizer and N; the best N of each optimizer; and where the curves cross."""
    cells, best = [], []
    for name, by_size in rows.items():
        held_out = {n: statistics.fmean(run.val_accuracy for run in found) for n, found in by_size.items()}
        largest = max(held_out, key=held_out.__getitem__)
        best.append(f"{largest} for {CONTESTANTS[name].title}")
        values = {n: spread([100 * run.test_accuracy for run in found], 2) for n, found in by_size.items()}
        cells.append([CONTESTANTS[name].title, *(f"{values[n]} ({bracket(n, by_size[n])})" for n in by_size)])
    return markdown_table(_header(size), cells), ", ".join(best), _lead(size, rows)


def _header(size: Size) -> tuple[str, ...]:
    return ("optimizer", *(f"N = {n}" for n in size.samples))


def _lead(size: Size, rows: dict[str, dict[int, list[Run]]]) -> str:
    """By how many points the last of the contestants is ahead of the best of the baselines, from N to N."""
    name = size.contestants[-1]
    means = {
        other: [100 * statistics.fmean(run.test_accuracy for run in found) for found in by_size.values()]
        for other, by_size in rows.items()
    }
    best = [max(values) for values in zip(*(means[other] for other in _BASELINES if other in means), strict=True)]
    leads = [f"{own - other:+.2f} (N = {n})" for n, own, other in zip(size.samples, means[name], best, strict=True)]
    return f"{CONTESTANTS[name].title}, beside the best of the baselines: {', '.join(leads)} points."


def _draw(size: Size, runs: Runs, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    ways = {"at equal samples": _at_equal_samples, "at equal time": _at_equal_time}
    for axis, (title, rows) in zip(axes, ways.items(), strict=True):
        for name, marker in zip(size.contestants, "osD^", strict=False):
            found = [[100 * run.test_accuracy for run in rows(size, runs, name, n)] for n in size.samples]
            means, deviations = [statistics.fmean(x) for x in found], [statistics.stdev(x) for x in found]
            axis.errorbar(size.samples, means, deviations, marker=marker, capsize=3, label=CONTESTANTS[name].title)
        axis.set(title=title, xlabel="batch size N", xscale="log")
        axis.set_xticks(size.samples, map(str, size.samples))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    axes[1].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
