"""How close the family of curvature methods comes to the natural gradient along runs: figure and page."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.family_measure import STAGES, Cost, Measured, Task, costs, measure, paper_damping
from benchmarks.loop import CONTESTANTS
from benchmarks.report import machine, markdown_table, read, write
from lightning_ief.experiments.figures.drawing import (
    REFERENCE_LABEL,
    canvas,
    direction_label,
    direction_styles,
    logarithmic,
    mark_one,
    plain,
    save,
)

__all__ = ["draw", "report", "study"]

_PAIRS = (("ief", "ef"), ("layerwise_ief", "layerwise_ef"), ("kfac_improved", "kfac_empirical"))


def study(tasks: Sequence[Task], output: Path, roots: Mapping[str, Path], tell: Callable[[str], None]) -> Path:
    """Train, measure, draw and write the page; a task that is in the CSV files is not measured again.

    Args:
        tasks: The tasks.
        output: Folder of the page; CSV files and figure go to curvature_family/ in it.
        roots: Folder of the data of each task that is not measured yet, by its name.
        tell: Is told what is done.

    Returns:
        The page.
    """
    folder = output / "curvature_family"
    rows, times = read(folder / "gamma.csv", Measured), read(folder / "costs.csv", Cost)
    for task in tasks:
        if any(row.task == task.name for row in rows) and any(row.task == task.name for row in times):
            continue
        source = task.source(roots[task.name])
        if not any(row.task == task.name for row in rows):
            rows += measure(task, source)
            write(rows, folder / "gamma.csv", Measured)
            tell(f"{task.name}: γ at {len(STAGES)} stages")
        if not any(row.task == task.name for row in times):
            times += costs(task, source)
            write(times, folder / "costs.csv", Cost)
            tell(f"{task.name}: times of steps")
    rows, times = read(folder / "gamma.csv", Measured), read(folder / "costs.csv", Cost)  # with the digits of the file
    draw(tasks, rows, folder / "gamma.png")
    page = output / "curvature_family.md"
    page.write_text(report(tasks, rows, times), encoding="utf-8")
    return page


def _plain(name: str) -> str:
    """The label of a direction, without mathematics."""
    return direction_label(name).replace(r"$\hat{F}$", "F̂")


def _rounded(damping: float) -> str:
    return f"{float(f'{damping:.2g}'):g}"


def _mean(rows: Sequence[Measured]) -> float:
    """Geometric mean of the ratios of the stages."""
    return math.exp(sum(math.log(row.ratio) for row in rows) / len(rows))


def _by_damping(task: Task, rows: Sequence[Measured], name: str) -> dict[float, list[Measured]]:
    """The stages of a direction, by λ."""
    found: dict[float, list[Measured]] = {}
    for row in rows:
        if (row.task, row.direction) == (task.name, name):
            found.setdefault(row.damping, []).append(row)
    return found


def _best(by_damping: Mapping[float, Sequence[Measured]]) -> float:
    return min(by_damping, key=lambda damping: _mean(by_damping[damping]))


def _least(by_damping: Mapping[float, Sequence[Measured]]) -> float:
    """The paper's λ, with the digits of the file."""
    return min(by_damping)


def draw(tasks: Sequence[Task], rows: Sequence[Measured], path: Path) -> Path:
    """Draw γ over that of SGD along the runs, a row of panels for each task: with the paper's λ, and each at its best.

    Args:
        tasks: The tasks.
        rows: All rows.
        path: The file.

    Returns:
        The file.
    """
    figure = canvas(12.0, 1.0 + 4.2 * len(tasks))
    styles = direction_styles(dict.fromkeys(row.direction for row in rows))
    panels = figure.subplots(len(tasks), 2, squeeze=False, sharex=True, sharey="row")
    for (left, right), task in zip(panels, tasks, strict=True):
        for name, style in styles.items():
            by_damping = _by_damping(task, rows, name)
            for axes, chosen in ((left, _least), (right, _best)):
                mine = by_damping[chosen(by_damping)]
                points = [row.stage for row in mine], [row.ratio for row in mine], [row.spread for row in mine]
                axes.errorbar(*points, label=direction_label(name), markersize=5, linewidth=1.4, **style)
        left.set(title=f"{task.title}\nλ = {_rounded(paper_damping(task))}", ylabel=f"γ / γ({REFERENCE_LABEL})")
        right.set(title=f"{task.title}\neach at its best λ")
        for axes in (left, right):
            mark_one(axes)
            plain(axes)
            logarithmic(axes)
    for axes in panels[-1]:
        axes.set_xlabel("training stage")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return save(figure, path)


_TEXT = """\
# How close each method comes to the natural gradient

γ of K-FAC in its three kinds, iEF and EF of all parameters together and by layers, F̂(1) and Gauss-Newton over that of
SGD, in the course of training: the paper's Figure 5 (arXiv 2406.06420) in form, on networks that train on a CPU. One
command:

    python -m benchmarks curvature-family

γ = √(dᵀFd) / |dᵀ∇L| is the reciprocal of the decrease of the loss that d achieves for each unit of distance in the
Fisher metric ([Theory](theory.md), section 2): 1 is as good as SGD, less is better, and the natural gradient has the
least there is. It says how good d is on the batch that d is made of, not on other data ([Why, measured](why.md)).

AdamW trains the networks, its lr falling linearly to 0. After {stages} of the run all
directions are made of the same batches; the figure has mean and standard deviation over these.

{trained}

K-FAC's factors are of the batch itself, not averages over a run, positions by "expand"; those of its sampled kind and
F̂(1) draw one target for each sample. λ is in the units of sums over the batch, that of EF and iEF the paper's, which
damps JJᵀ. On the left it is that at which the paper trains with EF and iEF, 1e-7 of a mean loss, N² · 1e-7 here; on the
right, for each direction, the one of those tried that has the least geometric mean over the stages.

![γ over that of SGD along the runs](curvature_family/gamma.png)

{parts}
All numbers: [curvature_family/gamma.csv](curvature_family/gamma.csv),
[curvature_family/costs.csv](curvature_family/costs.csv).

Measured on {machine}.
"""

_PART = """\
## {title}

γ over that of SGD, geometric means over the {stages} stages; and at the start and at the end with the best λ, which is
marked * if it is the largest one tried:

{table}

The improved kind over the empirical one, by λ: the geometric mean of the quotient of the two γ, and at how many stages
it is below 1.

{pairs}

A step of each optimizer in batches of {samples} over that of SGD, in time of the processor, the optimizers taking
turns: median and quartiles over {turns} turns; and how many numbers it keeps from step to step for each trainable
parameter. K-FAC decomposes its factors every 20 steps, as in [From scratch](scratch.md).

{costs}
"""


def report(tasks: Sequence[Task], rows: Sequence[Measured], times: Sequence[Cost]) -> str:
    """The page.

    Args:
        tasks: The tasks.
        rows: All rows of γ.
        times: All rows of costs.

    Returns:
        Markdown.
    """
    *stages, last = (f"{stage:g}" for stage in STAGES)
    return _TEXT.format(
        trained="\n".join(map(_trained, tasks)),
        stages=f"{', '.join(stages)} and {last}",
        parts="\n".join(_part(task, rows, [each for each in times if each.task == task.name]) for task in tasks),
        machine=machine(torch.device("cpu")),
    )


def _trained(task: Task) -> str:
    """What is trained, and how directions are compared on it."""
    dampings = ", ".join(map(_rounded, (paper_damping(task), *task.dampings)))
    return (
        f"* {task.title}: {task.steps} steps in batches of {task.samples}; directions of {task.batches} batches of "
        f"{task.evaluated}; λ of {dampings}."
    )


def _part(task: Task, rows: Sequence[Measured], times: Sequence[Cost]) -> str:
    names = dict.fromkeys(row.direction for row in rows if row.task == task.name)
    found = {name: _by_damping(task, rows, name) for name in names}
    cells = []
    for name, by_damping in sorted(found.items(), key=lambda each: _mean(each[1][_best(each[1])])):
        best, least = _best(by_damping), _least(by_damping)
        border = "*" if best == max(by_damping) else ""
        at_ends = (by_damping[best][0].ratio, by_damping[best][-1].ratio)
        cells.append(
            [_plain(name), f"{_mean(by_damping[least]):.2f}", f"{_mean(by_damping[best]):.2f}",
             f"{_rounded(best)}{border}", *(f"{ratio:.2f}" for ratio in at_ends)]
        )  # fmt: skip
    header = ("direction", "the paper's λ", "best λ", "which", "at the start", "at the end")
    return _PART.format(
        title=task.title,
        stages=len(STAGES),
        table=markdown_table(header, cells),
        pairs=_pairs(found),
        samples=task.samples,
        turns=task.turns,
        costs=markdown_table(
            ("optimizer", "step / SGD", "quartiles", "kept"),
            [
                [CONTESTANTS[each.optimizer].title, f"{each.ratio:.1f}", f"{each.low:.1f} – {each.high:.1f}",
                 f"{each.state:.1f}"]
                for each in times
            ],
        ),
    )  # fmt: skip


def _pairs(found: Mapping[str, Mapping[float, Sequence[Measured]]]) -> str:
    """The table of improved kinds beside empirical ones."""
    dampings = [*next(iter(found.values()))]
    cells = []
    for improved, empirical in _PAIRS:
        cells.append([f"{_plain(improved)} / {_plain(empirical)}"])
        for damping in dampings:
            pair = [*zip(found[improved][damping], found[empirical][damping], strict=True)]
            quotient = _mean([one for one, _ in pair]) / _mean([other for _, other in pair])
            closer = sum(one.ratio < other.ratio for one, other in pair)
            cells[-1].append(f"{quotient:.2f}, {closer} of {len(pair)}")
    return markdown_table(("γ", *(f"λ = {_rounded(damping)}" for damping in dampings)), cells)
