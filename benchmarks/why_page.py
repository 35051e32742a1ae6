"""The page of the study `why`: its tables, and what of the expectations the numbers bear out."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.loop import BATCH
from benchmarks.report import machine, markdown_table
from benchmarks.why_measure import CONTESTANTS, FACTORS, PAPER, Measured, Size
from lightning_ief.experiments.comparison import spread

__all__ = ["Values", "mean_of", "report", "values_of"]

Values = dict[float, dict[str, dict[str, list[float]]]]

# Each of a row and of SGD's at the same stage of the same run, whose decrease on other data is the unit.
_MEASURES: dict[str, Callable[[Measured, Measured], float]] = {
    "share": lambda row, sgd: row.share,
    "cosine": lambda row, sgd: row.cosine,
    "share_fisher": lambda row, sgd: row.share_fisher,
    "own": lambda row, sgd: row.own / sgd.other,
    "other": lambda row, sgd: row.other / sgd.other,
    "one_length": lambda row, sgd: row.one_length / sgd.other,
    "loss_over_model": lambda row, sgd: row.loss_over_model,
    "kept": lambda row, sgd: row.other / row.own,
}


def values_of(rows: Sequence[Measured]) -> Values:
    """Each measure of each direction at each stage, a number for each seed.

    Args:
        rows: All rows.

    Returns:
        By epochs, direction and measure.
    """
    sgd = {(row.seed, row.epochs): row for row in rows if row.direction == "sgd"}
    found: Values = {}
    for row in sorted(rows, key=lambda row: (row.epochs, [*CONTESTANTS].index(row.direction), row.seed)):
        measures = found.setdefault(row.epochs, {}).setdefault(row.direction, {name: [] for name in _MEASURES})
        for name, of in _MEASURES.items():
            measures[name].append(of(row, sgd[row.seed, row.epochs]))
    return found


def mean_of(measures: Mapping[str, Sequence[float]], name: str) -> float:
    """The mean of a measure over the seeds."""
    return statistics.fmean(measures[name])


class _Expectation(NamedTuple):
    """What was expected before anything was measured.

    Attributes:
        text: The sentence.
        measure: Of what.
        pairs: Directions, of which the first has more than the second.
    """

    text: str
    measure: str
    pairs: Sequence[tuple[str, str]]


_METRIC = "metric-1"

_DAMPED = ("ief-0.03", "ief-0.3", "ief-3", "ief-30")

_EXPECTATIONS = (
    _Expectation(
        "The more iEF is damped, the more its directions have in common: c rises with each ρ from 0.03 to 30.",
        "share",
        [*zip(_DAMPED[1:], _DAMPED, strict=False)],
    ),
    _Expectation(
        "EF and F̂(1) with the paper's λ have less in common than SGD, by c.",
        "share",
        [("sgd", "ef"), ("sgd", "sampled")],
    ),
    _Expectation(
        "Of the decrease on its own batch, iEF with the paper's λ keeps less on other images than at each ρ.",
        "kept",
        [(name, "ief") for name in _DAMPED],
    ),
    _Expectation(
        "iEF in the metric, ρ = 1, lowers L on other images more than SGD and than iEF without it at each ρ.",
        "other",
        [("metric-1", name) for name in ("sgd", "ief", *_DAMPED)],
    ),
    _Expectation(
        "It does so since its directions have more in common, by c in F, than SGD's and those of iEF with ρ = 0.3.",
        "share_fisher",
        [("metric-1", name) for name in ("sgd", "ief-0.3")],
    ),
    _Expectation(
        "The batch's own curvature adds to the metric: ρ = 1 in it lowers L on other images more than M⁻¹∇L.",
        "other",
        [("metric-1", "metric")],
    ),
    _Expectation(
        "With one length, the order is that of the training losses [from scratch](scratch.md): iEF in the metric "
        "(ρ = 1), iEF with ρ = 0.3, SGD, iEF with the paper's λ.",
        "one_length",
        [("metric-1", "ief-0.3"), ("ief-0.3", "sgd"), ("sgd", "ief")],
    ),
)


def _verdict(expectation: _Expectation, values: Values) -> str:
    """Where it holds, and in how many runs each pair does that does not hold in all."""
    lines = [f"* {expectation.text}"]
    for epochs, measured in values.items():
        runs, counts, missed = 0, [], dict[str, list[str]]()
        for more, less in expectation.pairs:
            pairs = zip(measured[more][expectation.measure], measured[less][expectation.measure], strict=True)
            found = [a > b for a, b in pairs]
            runs = len(found)
            counts.append(sum(found))
            if not all(found):
                missed.setdefault(more, []).append(f"{CONTESTANTS[less].title} in {sum(found)}")
        word = "holds" if min(counts) == runs else "fails" if min(counts) <= runs / 2 else "holds in most runs"
        exceptions = "; ".join(f"{CONTESTANTS[more].title} above {', '.join(less)}" for more, less in missed.items())
        lines.append(f"  * {epochs:g} epochs: {word}" + (f" ({exceptions} of {runs} runs)" if missed else ""))
    return "\n".join(lines)


_TEXT = """\
# Why, measured

Does a direction train better because batches agree on it, or because it points to where other data want to go, too? An
MLP 784-{width}-{width}-10 on {train_size:,} images of Fashion-MNIST is trained by SGD as [from scratch](scratch.md)
(Nesterov 0.9, lr 0.1, falling linearly to 0, batches of {batch}). At {stages} epochs its weights are held, and every
direction is made of the same {batches} batches of {batch} training images, by one command:

    python -m benchmarks why

## What is measured

**Share in common.** c = ‖E d‖²/E‖d‖², E being the mean over batches. Put ‖mean of d_b‖² for ‖E d‖², and B batches that
have nothing in common have 1/B; so

    c = [ Σ_b≠b' ⟨d_b, d_b'⟩ / (B (B − 1)) ] / [ Σ_b ‖d_b‖² / B ],

whose numerator has the mean ‖E d‖². It can be below 0. The *cosine* is the same of directions scaled to one length,
the mean cosine between two batches; *c in F* has ⟨d, d'⟩ = dᵀFd', F that of the other images, and does not depend on
how the network is parametrised, as c and the cosine do.

**Decrease.** L and F are of {others:,} other training images; the batches, those and the images of the metric have none
in common. In the local model L(θ − α d) ≈ L − α ∇Lᵀd + ½ α² dᵀFd, F the exact Fisher matrix, the best step lowers L by
(∇Lᵀd)²/(2 dᵀFd) = 1/(2γ²) ([Theory](theory.md), section 2), and by 0 if −d leads uphill; ∇Lᵀd and dᵀFd are exact, by
forward mode.

* *Own* is the decrease of the batch itself, which made d.
* *Other* is that of the other images, each batch with its best step length. It is never below 0, so that where batches
  have little in common some of it is chance.
* *One length* has the same for all batches, as a learning rate has: (E ∇Lᵀd)²/(2 E dᵀFd).
* *Loss / model* is the decrease of the loss of the other images itself, at the best of {factors} times the
  length that is best in the model, over what the model says, with {checked} of the batches; a run in which −d leads
  uphill with all of these is left out.

Decreases are means over the batches, in units of SGD's *other* at the same stage of the same run.

"Metric" is the Kronecker metric with improved Ĝ of {before} batches before, at the same weights
([Theory](theory.md), section 10); "metric alone" its limit of much damping, improved K-FAC's step. "The paper's λ" is
{paper:g}. F̂(1) and the exact F are damped by ρ times the mean diagonal of their own Gram matrix.

## What was found

{tables}

Mean ± standard deviation of {seeds} runs with other weights, orders and batches.

![What batches have in common, and what directions are worth](why/directions.png)

*Symbols are means over the runs, lines reach from the least to the largest.*

{orders}

*One length* is a product, c in F times the decrease along the mean direction E d: what a batch's direction is worth is
what that of infinitely many would be worth, times the share that batches have in common. Both factors over SGD's, of
means over the runs:

{parts}

A dash stands where c in F, of the direction or of SGD, is not told from 0 by twice its standard error over the runs.

## What was expected

Written before anything was measured; batches and runs became more, and the two factors were added, after a first run
in which c in F late in training was lost in its error. "Holds" is said where it does in all {seeds} runs, "fails" where
some pair of directions is in the expected order in half of them or fewer.

{verdicts}

The loss itself falls by {least} (*{least_of}*) to {largest} (*{largest_of}*)
times what its local model says. All numbers: [why/measured.csv](why/measured.csv).

## What this does not say

One network, one data set, one batch size, and weights on the way of SGD: those that another optimizer reaches may be of
another kind. A step with the best length is no training run: learning rates are not searched in every step, momentum
averages what batches do not have in common, and what is lowered here is the loss of training images, not the error of
others. Measured on {machine}.
"""

_COLUMNS = {
    "share": ("c", 3),
    "cosine": ("cosine", 3),
    "share_fisher": ("c in F", 3),
    "own": ("own", 1),
    "other": ("other", 2),
    "one_length": ("one length", 2),
    "loss_over_model": ("loss / model", 2),
}


def report(size: Size, rows: Sequence[Measured]) -> str:
    """The page.

    Args:
        size: Size of the study.
        rows: All rows.

    Returns:
        Markdown.
    """
    values, tables = values_of(rows), []
    for epochs, measured in values.items():
        loss = statistics.fmean(row.loss for row in rows if row.epochs == epochs)
        cells = [
            [CONTESTANTS[name].title, *(_spread(each[measure], digits) for measure, (_, digits) in _COLUMNS.items())]
            for name, each in measured.items()
        ]
        header = ("direction", *(title for title, _ in _COLUMNS.values()))
        tables.append(f"After {epochs:g} epochs, L = {loss:.3f}:\n\n{markdown_table(header, cells)}")
    stages = [f"{epochs:g}" for epochs in size.stages]
    ratios = {
        f"{CONTESTANTS[name].title}, {epochs:g} epochs": statistics.fmean(_known(each["loss_over_model"]))
        for epochs, measured in values.items()
        for name, each in measured.items()
        if _known(each["loss_over_model"])
    }
    least, largest = (choose(ratios, key=ratios.__getitem__) for choose in (min, max))
    return _TEXT.format(
        width=size.width,
        train_size=size.train_size,
        batch=BATCH,
        stages=f"{', '.join(stages[:-1])} and {stages[-1]}",
        batches=size.batches,
        checked=size.checked,
        others=size.others,
        factors=", ".join(f"{factor:g}" for factor in FACTORS),
        before=size.before,
        paper=PAPER,
        tables="\n\n".join(tables),
        seeds=len(size.seeds),
        verdicts="\n".join(_verdict(expectation, values) for expectation in _EXPECTATIONS),
        orders=_orders(values),
        parts=_parts(values),
        least=f"{ratios[least]:.2f}",
        least_of=least,
        largest=f"{ratios[largest]:.2f}",
        largest_of=largest,
        machine=machine(torch.device("cpu")),
    )


def _orders(values: Values) -> str:
    """The largest by each of some measures, and whether these order the directions as the decrease does."""
    lines = []
    for epochs, measured in values.items():
        largest, orders = [], []
        decreases = [mean_of(each, "other") for each in measured.values()]
        for name in ("share", "share_fisher", "own", "other"):
            title, means = _COLUMNS[name][0], {direction: mean_of(each, name) for direction, each in measured.items()}
            best = max(means, key=means.__getitem__)
            largest.append(f"*{title}* of {CONTESTANTS[best].title} ({means[best]:.2f})")
            if name != "other":
                orders.append(f"{_rank_correlation([*means.values()], decreases):+.2f} of *{title}*")
        lines.append(
            f"* After {epochs:g} epochs the largest are {', '.join(largest)}; the rank correlation with *other* over "
            f"the directions is {', '.join(orders)}."
        )
    return "\n".join(lines)


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; NaN where all are equal."""
    ranks = [
        [sum(x < value for x in values) + sum(x == value for x in values) / 2 for value in values] for values in (a, b)
    ]
    return math.nan if any(len({*each}) == 1 for each in ranks) else statistics.correlation(*ranks)


def _parts(values: Values) -> str:
    """The table of the two factors of the decrease at one length, over SGD's, and what it says of the metric."""
    factors = {epochs: {name: _factors(measured, name) for name in measured} for epochs, measured in values.items()}
    titles = [f"{epochs:g} epochs: {factor}" for epochs in values for factor in ("c in F", "mean direction")]
    rows = [
        [CONTESTANTS[name].title, *(cell for found in factors.values() for cell in _cells(found[name]))]
        for name in next(iter(values.values()))
    ]
    return f"{markdown_table(('direction', *titles), rows)}\n\n{_on_the_metric(factors)}{_errors(values)}"


def _on_the_metric(factors: Mapping[float, Mapping[str, tuple[float, float] | None]]) -> str:
    """At which stages its factors are below and above SGD's."""
    stages: dict[str, list[str]] = {}
    for epochs, found in factors.items():
        if (factor := found[_METRIC]) is not None:
            share, mean = ("less" if x < 1 else "more" for x in factor)
            words = f"has {share} in common than SGD, by c in F, and a mean direction that is worth {mean}"
            stages.setdefault(words, []).append(f"{epochs:g}")
    sentences = [f"{words} after {', '.join(each)} epochs" for words, each in stages.items()]
    return f"By these means {CONTESTANTS[_METRIC].title}, {'; it '.join(sentences)}. " if sentences else ""


def _errors(values: Values) -> str:
    """How well c in F is known."""
    parts = []
    for epochs, measured in values.items():
        shares = (measured[name]["share_fisher"] for name in ("sgd", _METRIC))
        errors = [statistics.stdev(each) / len(each) ** 0.5 / abs(statistics.fmean(each)) for each in shares]
        parts.append(f"{100 * errors[0]:.0f} and {100 * errors[1]:.0f} % after {epochs:g} epochs")
    title = CONTESTANTS[_METRIC].title
    return f"The standard error of c in F over the runs, of SGD and of {title}, is {', '.join(parts)}."


def _factors(measured: Mapping[str, Mapping[str, Sequence[float]]], name: str) -> tuple[float, float] | None:
    """Over SGD's: c in F, and the decrease along the mean direction; None where c in F is not known."""
    each, sgd = measured[name], measured["sgd"]
    if not (_is_told_from_zero(each["share_fisher"]) and _is_told_from_zero(sgd["share_fisher"])):
        return None
    share, total = (mean_of(each, factor) / mean_of(sgd, factor) for factor in ("share_fisher", "one_length"))
    return share, total / share


def _cells(factors: tuple[float, float] | None) -> list[str]:
    return ["–", "–"] if factors is None else [f"{factor:.2f}" for factor in factors]


def _is_told_from_zero(values: Sequence[float]) -> bool:
    return statistics.fmean(values) > 2 * statistics.stdev(values) / len(values) ** 0.5


def _spread(values: Sequence[float], digits: int) -> str:
    return spread(_known(values), digits) if _known(values) else "–"


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]
