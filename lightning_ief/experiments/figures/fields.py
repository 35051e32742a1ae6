"""Two figures of update fields: where each direction points, for models of two parameters and two samples.

They show on paper what the directions do in a large model. Least squares, where iEF is the natural gradient and leads
straight to the optimum while EF does not; and logistic regression, where iEF and the natural gradient differ. After the
toy example of Wu, Yu, Zhang, Woodland, "An Improved Empirical Fisher Approximation for Natural Gradient Descent",
NeurIPS 2024, arXiv 2406.06420, and the figure of its authors' response, in turn after Kunstner, Hennig, Balles, arXiv
1905.12558. The samples are this package's own.

Units: L = l_1 + l_2, a sum; the damping is λ = 0 throughout; a step is θ ← θ − lr · d.

As there are as many parameters as independent samples, each direction can move each logit as it likes. With
g_n = ∂l_n/∂z_n and h_n = ∂²l_n/∂z_n² they are

    NGD: x_n·d = g_n / h_n        iEF: x_n·d = g_n        EF: x_n·d = 1 / g_n

and SGD is d = Σ g_n x_n. For least squares h_n = 1: NGD and iEF let both residuals shrink alike. EF's step takes each
residual r to r − lr / r. That is Boole's transformation, which preserves Lebesgue measure on the line (Adler and Weiss,
Israel Journal of Mathematics 16, 1973): however small the step, r does not settle, and is thrown far out at times.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_ief import directions
from lightning_ief.capture import Linearization, linearize
from lightning_ief.directions.registry import find
from lightning_ief.experiments.figures.drawing import GREY, canvas, save_both
from lightning_ief.objectives import BinaryCrossEntropy, LeastSquares, Objective

if TYPE_CHECKING:  # an extra, imported where a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_fields"]

DIRECTIONS: dict[str, Callable[[Linearization], Mapping[str, Tensor]]] = {
    "sgd": directions.sgd,
    "natural_gradient": partial(directions.natural_gradient, damping=0.0),
    "ief": partial(directions.ief, damping=0.0),
    "ef": partial(directions.ef, damping=0.0),
}
"""What is drawn, all without damping: with it, EF would turn into SGD where the gradients are small."""

_NAMES = {"sgd": "SGD", "natural_gradient": "NGD", "ief": "iEF", "ef": "EF"}
# Black edges keep markers apart where they crowd, and from the arrows in grey.
_EDGE: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 0.5, "markersize": 4.5, "linewidth": 1.4}
# As in the other figures, but for SGD: black, as in the paper.
_STYLES: dict[str, dict[str, Any]] = {name: {**find(name).style, **_EDGE} for name in DIRECTIONS}
_STYLES["sgd"] |= {"color": "#000000", "linestyle": "-.", "marker": "s"}
_GRID = 17  # arrows a side
_CONTOUR_POINTS = 121  # a side: the loss costs next to nothing
_MAGNITUDES = (0.1, 10.0)  # of ‖d‖, from the lightest to the darkest arrow
_LOSS_STYLE: dict[str, Any] = {"colors": "#C4C4C4", "linewidths": 0.6, "zorder": 1}
_SAMPLE_STYLE: dict[str, Any] = {"color": GREY, "linewidth": 1.3, "linestyle": (0, (8, 3)), "zorder": 3}
_START_STYLE: dict[str, Any] = {"color": "white", "markeredgecolor": "black", "marker": "o", "markersize": 8}
_OPTIMUM_STYLE: dict[str, Any] = {"color": "#F0E442", "markeredgecolor": "black", "marker": "*", "markersize": 15}


@dataclass(frozen=True)
class View:
    """A square of parameter space.

    Args:
        centre: θ in its middle.
        reach: From there to its sides, in units of θ.

    """

    centre: tuple[float, float]
    reach: float

    def points(self, size: int) -> Tensor:
        """A regular grid of θ, shape [size², 2], float64, the first parameter running fastest.

        Args:
            size: Points a side. The outermost lie half a spacing inside.

        Returns:
            The grid.

        """
        offsets = self.reach * (torch.arange(size, dtype=torch.float64) * 2 + 1 - size) / size
        return torch.cartesian_prod(offsets, offsets).flip(1) + torch.tensor(self.centre, dtype=torch.float64)

    def holds(self, theta: Tensor) -> bool:
        """Whether θ, shape [2], lies in it; not if it is not finite."""
        return bool(((theta - torch.tensor(self.centre, dtype=torch.float64)).abs() <= self.reach).all())


@dataclass(frozen=True)
class Run:
    """Explicit steps along one direction.

    Args:
        lr: Step size, in the units of the module.
        steps: How many.

    """

    lr: float
    steps: int


@dataclass(frozen=True)
class Problem:
    """Two samples and a linear model of two parameters without bias, z_n = x_n·θ, in float64.

    Args:
        objective: Turns z and y into losses.
        inputs: x, a row for each sample.
        targets: y, one for each sample.
        levels: Logit of each sample along its line: fitted by least squares, undecided by logistic regression.
        label: What stands beside the line of sample {n}.
        view: What is drawn.
        starts: θ where the trajectories start.
        runs: Step size and number of steps of each direction's trajectories.
        model: The model; its weights are overwritten.

    """

    objective: Objective
    inputs: tuple[tuple[float, float], tuple[float, float]]
    targets: tuple[float, float]
    levels: tuple[float, float]
    label: str
    view: View
    starts: Sequence[tuple[float, float]]
    runs: Mapping[str, Run]
    # skip_init draws no random numbers: importing this module must not change those of a program.
    model: nn.Linear = field(
        default_factory=lambda: nn.utils.skip_init(nn.Linear, 2, 1, bias=False, dtype=torch.float64), repr=False
    )

    @property
    def x(self) -> Tensor:
        """Inputs, shape [2, 2]."""
        return torch.tensor(self.inputs, dtype=torch.float64)

    @property
    def y(self) -> Tensor:
        """Targets, shape [2, 1]."""
        return torch.tensor(self.targets, dtype=torch.float64)[:, None]

    def at(self, theta: Tensor) -> Linearization:
        """The linearization at θ, shape [2]; of use until the next call, which moves the model."""
        with torch.no_grad():
            self.model.weight.copy_(theta)
        return linearize(self.model, self.x, self.y, self.objective, verify=False)

    def loss(self, points: Tensor) -> Tensor:
        """L at many θ, shape [M, 2] → [M]."""
        logits = points @ self.x.T
        # The two samples stand as two logits of one: an objective sums over these.
        return self.objective.losses(logits, self.y.T.expand_as(logits))


LEAST_SQUARES = Problem(
    objective=LeastSquares(),
    inputs=((0.6, 0.15), (0.5, 1.5)),
    targets=(0.675, 1.25),
    levels=(0.675, 1.25),
    label=r"$x_{n}\cdot\theta = y_{n}$",
    view=View(centre=(0.8, 0.6), reach=3.0),
    starts=[(-1.5, 3.0), (3.4, 2.4), (-1.6, -1.3), (3.3, -1.7)],
    runs={"sgd": Run(0.1, 40), "natural_gradient": Run(0.15, 40), "ief": Run(0.15, 40), "ef": Run(0.05, 80)},
)
"""Inputs of norm 0.62 and 1.58 at an angle of 58°. Each sample is fitted along a line, both by θ = (1, 0.5) alone."""

OPTIMUM = (1.0, 0.5)
"""Of LEAST_SQUARES."""

NEAR_OPTIMUM = replace(
    LEAST_SQUARES,
    view=View(centre=(1.02, 0.52), reach=0.8),
    starts=[(0.4, 1.1), (1.6, 0.9)],
    runs={"ief": Run(0.15, 40), "ef": Run(0.005, 80)},
)
"""The same, seen larger; EF with a tenth of the step, so that more than a few stay in view."""

LOGISTIC = Problem(
    objective=BinaryCrossEntropy(),
    inputs=((0.9, 0.2), (0.5, 1.5)),
    targets=(1.0, 0.0),
    levels=(0.0, 0.0),
    label=r"$p_{n} = 1/2$",
    view=View(centre=(0.8, -0.6), reach=4.0),
    starts=[(-2.72, 2.24), (2.6, 0.8), (-2.6, -0.8), (-0.3, 1.5)],
    runs={"sgd": Run(0.4, 40), "natural_gradient": Run(0.04, 40), "ief": Run(0.25, 40), "ef": Run(0.02, 80)},
)
"""Targets 1 and 0 on independent inputs: separable, so that L falls to 0 towards infinity and has no minimum."""


def update_field(problem: Problem, direction: str, points: Tensor) -> Tensor:
    """A direction d of DIRECTIONS at many θ, both of shape [M, 2]. A step goes against it."""
    return torch.stack([DIRECTIONS[direction](problem.at(theta))["weight"][0] for theta in points])


def trajectory(problem: Problem, direction: str, start: Tensor, run: Run) -> Tensor:
    """Explicit steps θ ← θ − lr · d until the problem's view is left.

    Args:
        problem: Model, samples and objective.
        direction: A name in DIRECTIONS.
        start: θ, shape [2].
        run: Step size and number of steps.

    Returns:
        θ from the start to the last, which alone may lie outside; shape [at most steps + 1, 2].

    """
    path = [start]
    while len(path) <= run.steps and problem.view.holds(path[-1]):
        path.append(path[-1] - run.lr * update_field(problem, direction, path[-1][None])[0])
    return torch.stack(path)


def draw_fields(directory: str | Path) -> list[Path]:
    """Draw the fields of SGD, NGD, iEF and EF for two problems of two parameters, each as PNG and PDF.

    `least_squares_fields`: SGD, NGD and iEF in one (they are the same), EF, and the surroundings of the optimum.
    `logistic_fields`: the four for logistic regression. Arrows show −d, all of one length, the darker the larger;
    trajectories are explicit steps, their step size in the panels' titles, and end
    where they leave the view. Takes some seconds.

    Args:
        directory: Where the figures go; made if it does not exist.

    Returns:
        The files drawn.

    """
    figures = {"least_squares_fields": least_squares_figure(), "logistic_fields": logistic_figure()}
    return [path for name, figure in figures.items() for path in save_both(figure, Path(directory), name)]


def least_squares_figure(grid: int = _GRID) -> "Figure":
    """Fields and trajectories for least squares, and near the optimum; so many arrows a side."""
    from matplotlib.patches import Rectangle

    problem = LEAST_SQUARES
    figure, panels = _canvas("Least squares, two samples, two parameters; paths end where they leave the view")
    names = {"sgd": "SGD", "ief": "NGD and iEF, which coincide", "ef": "EF"}
    for axes, (direction, name) in zip(panels[:3], names.items(), strict=True):
        _draw_one(axes, problem, direction, name, grid)
    draw_panel(panels[3], NEAR_OPTIMUM, ["ef", "ief"], grid)
    near = NEAR_OPTIMUM.view
    panels[3].set_title(f"Near the optimum: EF (lr {NEAR_OPTIMUM.runs['ef'].lr:g}, with its field) and iEF", pad=20)
    corner = (near.centre[0] - near.reach, near.centre[1] - near.reach)
    panels[2].add_patch(Rectangle(corner, 2 * near.reach, 2 * near.reach, fill=False, edgecolor="black", zorder=5))
    for axes in panels:
        axes.plot(*OPTIMUM, linestyle="none", zorder=6, **_OPTIMUM_STYLE)
    _finish(figure, panels, ["sgd", "ief", "ef"], r"one sample fitted: $x_n\cdot\theta = y_n$", optimum=True)
    return figure


def logistic_figure(grid: int = _GRID) -> "Figure":
    """Fields and trajectories for logistic regression; so many arrows a side."""
    problem = LOGISTIC
    figure, panels = _canvas(
        "Logistic regression, two samples ($y_1 = 1$, $y_2 = 0$), two parameters; paths end where they leave the view"
    )
    for axes, (direction, name) in zip(panels, _NAMES.items(), strict=True):
        _draw_one(axes, problem, direction, name, grid)
    _finish(figure, panels, list(_NAMES), "one sample undecided: $p_n = 1/2$", optimum=False)
    return figure


def _draw_one(axes: "Axes", problem: Problem, direction: str, name: str, grid: int) -> None:
    """The panel of one direction, with its step size in the title."""
    draw_panel(axes, problem, [direction], grid)
    axes.set_title(f"{name}: lr {problem.runs[direction].lr:g}, {problem.runs[direction].steps} steps", pad=20)


def draw_panel(axes: "Axes", problem: Problem, names: Sequence[str], grid: int) -> None:
    """Draw loss contours, each sample's line, the field of the first direction, and trajectories of all.

    Args:
        axes: Where.
        problem: Model, samples and objective.
        names: Directions, names in DIRECTIONS.
        grid: Arrows a side.

    """
    view = problem.view
    _draw_loss(axes, problem)
    points = view.points(grid)
    d = update_field(problem, names[0], points)
    norms = d.norm(dim=1)
    arrows = -d / norms[:, None] * (1.6 * view.reach / grid)  # 0.8 of the spacing
    axes.quiver(
        *points.T.numpy(), *arrows.T.numpy(), norms.numpy(), **_shades(),
        pivot="middle", angles="xy", scale_units="xy", scale=1.0, width=0.004, headwidth=4.0, zorder=2,
    )  # fmt: skip
    for name in names:
        for start in problem.starts:
            path = trajectory(problem, name, torch.tensor(start, dtype=torch.float64), problem.runs[name])
            axes.plot(*path.T.numpy(), **_STYLES[name], zorder=4)
    axes.plot(*torch.tensor(problem.starts).T.numpy(), linestyle="none", zorder=6, **_START_STYLE)
    (left, right), (bottom, top) = ((c - view.reach, c + view.reach) for c in view.centre)
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")


def _draw_loss(axes: "Axes", problem: Problem) -> None:
    view = problem.view
    points = view.points(_CONTOUR_POINTS)
    x, y, loss = (a.view(_CONTOUR_POINTS, -1).numpy() for a in (*points.T, problem.loss(points)))
    # Doubled from each to the next, so that they show the valley as well as its sides.
    axes.contour(x, y, loss, levels=[2.0**k for k in range(-8, 6)], **_LOSS_STYLE)
    centre = torch.tensor(view.centre, dtype=torch.float64)
    for n, (inputs, level) in enumerate(zip(problem.x, problem.levels, strict=True), start=1):
        foot = centre + inputs * (level - inputs @ centre) / inputs.square().sum()
        along = torch.stack([-inputs[1], inputs[0]]) / inputs.norm()
        steep = bool(along[1].abs() > along[0].abs())
        along = along * along[1 if steep else 0].sign()
        axes.axline(foot.tolist(), (foot + along).tolist(), **_SAMPLE_STYLE)
        # Named where it leaves the view, at the top or on the right, where no path is crossed.
        end = foot + along * ((view.reach * along.sign() - (foot - centre)) / along).min()
        axes.annotate(
            problem.label.format(n=n), end.tolist(), xytext=(0, 4) if steep else (4, 0), textcoords="offset points",
            horizontalalignment="center" if steep else "left", verticalalignment="bottom" if steep else "center",
            color=GREY, fontsize=9, annotation_clip=False,
        )  # fmt: skip


def _shades() -> dict[str, Any]:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    # Colour, and all that is darker, is left to the trajectories.
    greys = LinearSegmentedColormap.from_list("greys", ["#D6D6D6", "#909090"])
    return {"norm": LogNorm(*_MAGNITUDES), "cmap": greys}


def _canvas(title: str) -> "tuple[Figure, list[Axes]]":
    figure = canvas(10.0, 9.2)
    figure.suptitle(title)
    panels = list(figure.subplots(2, 2).flat)
    for axes in panels:
        axes.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")
    return figure, panels


def _finish(figure: "Figure", panels: "list[Axes]", names: Sequence[str], line: str, optimum: bool) -> None:
    """Legend and scale of grey, outside the panels."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_STYLES[name], label=f"path of {_NAMES[name]}") for name in names]
    handles.append(Line2D([], [], linestyle="none", **_START_STYLE, label="start"))
    if optimum:
        handles.append(Line2D([], [], linestyle="none", **_OPTIMUM_STYLE, label="optimum of both samples"))
    handles.append(Line2D([], [], **_SAMPLE_STYLE, label=line))
    handles.append(Line2D([], [], color=_LOSS_STYLE["colors"], linewidth=0.8, label="loss, doubled from line to line"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    bar = figure.colorbar(ScalarMappable(**_shades()), ax=panels, shrink=0.5, aspect=40, extend="both")
    bar.set_label(r"$\Vert d\Vert$ (arrows show the direction of $-d$)")
