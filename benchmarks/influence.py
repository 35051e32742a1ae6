"""The study of influence, and its figure: training again on subsets, and wrong labels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.influence_measure import FULL, SMOKE, Measured, Size, labels, lds
from benchmarks.influence_page import TITLES, report, scores_of
from benchmarks.loop import load
from benchmarks.report import read, write
from lightning_ief.experiments.figures.drawing import GREY, canvas, direction_styles, logarithmic, plain, save

__all__ = ["FULL", "SMOKE", "draw", "study"]


def study(size: Size, output: Path, root: Path, tell: Callable[[str], None]) -> Path:
    """Train, score, draw and write the page; seeds that are in the CSV file are not measured again.

    Args:
        size: Size of the study.
        output: Folder of the page; CSV file and figure go to influence/ in it.
        root: Folder of the images.
        tell: Is told of each seed.

    Returns:
        The page.
    """
    path = output / "influence" / "measured.csv"
    rows = read(path, Measured)
    known = {(row.experiment, row.seed) for row in rows}
    wanted = [("lds", seed) for seed in size.seeds]
    wanted += [("labels", seed) for seed in (*size.search_seeds, *size.result_seeds)]
    if missing := [each for each in wanted if each not in known]:
        train = load(0, root).train
        for experiment, seed in missing:
            rows += [*(lds if experiment == "lds" else labels)(size, train, seed)]
            write(rows, path, Measured)
            tell(f"{experiment}, seed {seed}: done")
    rows = read(path, Measured)  # with the digits of the file
    draw(rows, output / "influence" / "scores.png")
    page = output / "influence.md"
    page.write_text(report(size, rows), encoding="utf-8")
    return page


# Those of the directions that are made of the same matrices.
_STYLES = {"improved": "ief", "empirical": "ef", "sampled": "sampled_fisher"}

_PANELS = {
    "lds": ("", "linear datamodelling score", ("products", "repeated")),
    "itself": ("itself, ", "wrong labels: influence on itself", ("loss", "gradient norm")),
    "held-out": ("held-out, ", "wrong labels: on held-out images", ("loss", "held-out, products")),
}


def draw(rows: Sequence[Measured], path: Path) -> Path:
    """Draw the scores against ρ.

    Args:
        rows: All rows.
        path: The file.

    Returns:
        The file.
    """
    figure, styles = canvas(12.0, 4.8), direction_styles(_STYLES.values())
    for axes, (name, (prefix, title, without)) in zip(figure.subplots(1, 3), _PANELS.items(), strict=True):
        scores = scores_of(rows, "lds" if name == "lds" else "labels", "result")
        for method, direction in _STYLES.items():
            rhos = sorted(rho for each, rho in scores if each == prefix + method)
            seeds = [[fmean(own) for own in scores[prefix + method, rho].values()] for rho in rhos]
            errors = [stdev(each) if len(each) > 1 else 0.0 for each in seeds]
            label = TITLES[method]
            axes.errorbar(rhos, [*map(fmean, seeds)], errors, label=label, capsize=2, **styles[direction])
        for number, method in enumerate(without):
            value = fmean(fmean(own) for own in scores[method, 0.0].values())
            axes.axhline(value, color=GREY, linestyle=("-", ":")[number], linewidth=1.2, label=TITLES[method], zorder=1)
        axes.set(title=title, xlabel="ρ, damping over the mean square of rows")
        logarithmic(axes, "x")
        plain(axes)
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return save(figure, path)
