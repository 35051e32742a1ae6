"""Why some directions train better: the study of what batches have in common, and its figure."""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.loop import load
from benchmarks.report import read, write
from benchmarks.why_measure import CONTESTANTS, FULL, SMOKE, Measured, Size, measure, trained
from benchmarks.why_page import mean_of, report, values_of
from lightning_ief.experiments.figures.drawing import GREY, STYLES, canvas, logarithmic, plain, save

__all__ = ["FULL", "SMOKE", "draw", "study"]


def study(size: Size, output: Path, root: Path, tell: Callable[[str], None]) -> Path:
    """Train, measure, draw and write the page; stages that are in its CSV file are not measured again.

    Args:
        size: Size of the study.
        output: Folder of the page; CSV file and figure go to why/ in it.
        root: Folder of the images.
        tell: Is told of each stage.

    Returns:
        The page.
    """
    path = output / "why" / "measured.csv"
    rows = read(path, Measured)
    train = load(size.train_size, root).train
    for seed in size.seeds:
        for epochs, net in trained(size, train, seed):
            known = {row.direction for row in rows if (row.seed, row.epochs) == (seed, epochs)}
            if not known >= CONTESTANTS.keys():
                rows = [row for row in rows if (row.seed, row.epochs) != (seed, epochs)]
                rows += measure(size, train, net, seed, epochs)
                write(rows, path, Measured)
                tell(f"seed {seed}, {epochs:g} epochs: loss {rows[-1].loss:.3f}")
    rows = read(path, Measured)  # with the digits of the file
    draw(rows, output / "why" / "directions.png")
    page = output / "why.md"
    page.write_text(report(size, rows), encoding="utf-8")
    return page


_PANELS = {
    "share": "share in common, c",
    "share_fisher": "share in common in the metric F",
    "other": "decrease over SGD's on other images",
}


def draw(rows: Sequence[Measured], path: Path) -> Path:
    """Draw what batches have in common and what their directions are worth, a line for each direction.

    Args:
        rows: All rows.
        path: The file.

    Returns:
        The file.
    """
    figure, values = canvas(12.0, 6.0), values_of(rows)
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    for number, (epochs, measured) in enumerate(values.items()):
        style = {"color": STYLES[number]["color"], "marker": STYLES[number]["marker"], "markersize": 6}
        places = [place + 0.24 * (number - (len(values) - 1) / 2) for place in range(len(measured))]
        for axes, name in zip(panels, _PANELS, strict=True):
            means = [mean_of(each, name) for each in measured.values()]
            ranges = [(min(each[name]), max(each[name])) for each in measured.values()]
            axes.hlines(places, *zip(*ranges, strict=True), color=style["color"], linewidth=1.2)
            axes.plot(means, places, linestyle="none", label=f"{epochs:g} epochs", **style)
        own = [mean_of(each, "own") for each in measured.values()]
        panels[-1].plot(own, places, linestyle="none", markerfacecolor="none", alpha=0.6, **style)
    names = [*next(iter(values.values()))]
    panels[0].set(yticks=range(len(names)), yticklabels=[CONTESTANTS[name].title for name in names])
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False)
    for axes, label in zip(panels, _PANELS.values(), strict=True):
        axes.set_xlabel(label)
        plain(axes)
    panels[-1].axvline(1.0, color=GREY, linewidth=1.0, zorder=1)
    panels[-1].set_xlabel(f"{_PANELS['other']}\n(hollow: on the batch itself)")
    logarithmic(panels[-1], "x")
    return save(figure, path)
