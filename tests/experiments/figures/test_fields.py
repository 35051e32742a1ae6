"""Fields of the directions for two samples and two parameters: the numbers behind the figures, and the figures."""

from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from matplotlib.quiver import Quiver

from lightning_ief.experiments.figures import fields
from lightning_ief.experiments.figures.fields import DIRECTIONS, LEAST_SQUARES, LOGISTIC, NEAR_OPTIMUM, OPTIMUM, View

PROBLEMS = [pytest.param(LEAST_SQUARES, id="least squares"), pytest.param(LOGISTIC, id="logistic")]
COARSE = 6


def derivatives(problem, points):
    """∂l_n/∂z_n and ∂²l_n/∂z_n² by hand, each [M, 2]."""
    z, y = points @ problem.x.T, torch.tensor(problem.targets, dtype=torch.float64)
    if problem is LOGISTIC:
        p = z.sigmoid()
        return p - y, p * (1 - p)
    return z - y, torch.ones_like(z)


def by_hand(problem, name, points):
    """d in closed form, [M, 2]: SGD adds the samples up, the others solve X d = u."""
    g, h = derivatives(problem, points)
    if name == "sgd":
        return g @ problem.x
    u = {"natural_gradient": g / h, "ief": g, "ef": 1 / g}[name]
    return torch.linalg.solve(problem.x, u.T).T


def paths(problem, name):
    return [
        fields.trajectory(problem, name, torch.tensor(start, dtype=torch.float64), problem.runs[name])
        for start in problem.starts
    ]


def distance(theta):
    return (theta - torch.tensor(OPTIMUM, dtype=torch.float64)).norm(dim=-1)


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_field_is_the_closed_form(problem, name):
    points = problem.view.points(COARSE)
    expected = by_hand(problem, name, points)
    found = fields.update_field(problem, name, points)
    assert ((found - expected).norm(dim=1) <= 1e-8 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("problem", [*PROBLEMS, pytest.param(NEAR_OPTIMUM, id="near the optimum")])
def test_ef_lowers_every_loss_at_unit_rate_at_every_point_drawn(problem):
    points = problem.view.points(fields._GRID)
    g, _ = derivatives(problem, points)
    d = fields.update_field(problem, "ef", points)
    rates = g * (d @ problem.x.T)  # J d, row n of J being g_n x_n
    torch.testing.assert_close(rates, torch.ones_like(rates), rtol=0, atol=1e-8)


def test_ief_is_the_natural_gradient_for_least_squares_alone():
    points = LEAST_SQUARES.view.points(COARSE)
    ief, natural = (fields.update_field(LEAST_SQUARES, name, points) for name in ("ief", "natural_gradient"))
    torch.testing.assert_close(ief, natural, rtol=1e-8, atol=1e-8)
    points = LOGISTIC.view.points(COARSE)
    ief, natural = (fields.update_field(LOGISTIC, name, points) for name in ("ief", "natural_gradient"))
    assert torch.cosine_similarity(ief, natural).min() < 0.95  # or two of the panels would show the same


def test_samples_are_worth_drawing():
    for problem in (LEAST_SQUARES, LOGISTIC):
        norms = problem.x.norm(dim=1)
        assert norms[1] > 1.5 * norms[0]
        assert 0.3 < problem.x[0] @ problem.x[1] / norms.prod() < 0.7
    optimum = torch.tensor([OPTIMUM], dtype=torch.float64)
    assert LEAST_SQUARES.loss(optimum).item() == pytest.approx(0, abs=1e-25)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_loss_of_the_contours_is_that_of_the_model(problem):
    points = problem.view.points(3)
    expected = torch.stack([problem.at(theta).losses.sum() for theta in points])
    torch.testing.assert_close(problem.loss(points), expected)


def test_grid_lies_within_the_view():
    view = View(centre=(1.0, -1.0), reach=3.0)
    assert view.points(3).tolist() == [[x, y] for y in (-3.0, -1.0, 1.0) for x in (-1.0, 1.0, 3.0)]
    assert view.holds(torch.tensor([4.0, -4.0]))
    assert not view.holds(torch.tensor([4.1, -1.0]))
    assert not view.holds(torch.tensor([float("nan"), -1.0]))


@pytest.mark.parametrize("name", DIRECTIONS)
def test_path_takes_explicit_steps(name):
    run = fields.Run(lr=0.01, steps=3)
    path = fields.trajectory(LEAST_SQUARES, name, torch.tensor([-1.0, 2.0], dtype=torch.float64), run)
    assert path.shape == (4, 2) and path[0].tolist() == [-1.0, 2.0]
    torch.testing.assert_close(path[1:] - path[:-1], -0.01 * by_hand(LEAST_SQUARES, name, path[:-1]))


def test_path_ends_with_the_first_point_outside():
    run = fields.Run(lr=100.0, steps=50)
    path = fields.trajectory(LEAST_SQUARES, "sgd", torch.tensor([-1.0, 2.0], dtype=torch.float64), run)
    assert len(path) == 2 and not LEAST_SQUARES.view.holds(path[-1])


def test_ief_goes_straight_to_the_optimum():
    for name in ("ief", "natural_gradient"):
        for path in paths(LEAST_SQUARES, name):
            assert distance(path[-1]) < 0.01 * distance(path[0])
            towards = torch.tensor(OPTIMUM, dtype=torch.float64) - path[0]
            assert (torch.cosine_similarity(path[1:] - path[:-1], towards[None]) > 1 - 1e-6).all()


def test_sgd_comes_nearer_by_a_bend():
    for path in paths(LEAST_SQUARES, "sgd"):
        assert 0.1 * distance(path[0]) < distance(path[-1]) < 0.5 * distance(path[0])
        towards = torch.tensor(OPTIMUM, dtype=torch.float64) - path[0]
        assert torch.cosine_similarity(path[1:] - path[:-1], towards[None]).min() < 0.9


def test_ef_does_not_settle():
    """Each sample's residual changes sign again and again, and no path ends at the optimum."""
    for path in paths(LEAST_SQUARES, "ef"):
        assert distance(path[-1]) > 1
    changes = 0
    for path in paths(NEAR_OPTIMUM, "ef"):
        assert not NEAR_OPTIMUM.view.holds(path[-1])  # thrown out, although it started near
        g, _ = derivatives(NEAR_OPTIMUM, path)
        changes += (g[1:].sign() != g[:-1].sign()).sum()
    assert changes > 10
    for path in paths(NEAR_OPTIMUM, "ief"):
        assert distance(path[-1]) < 0.01
        g, _ = derivatives(NEAR_OPTIMUM, path)
        assert (g.sign() == g[0].sign()).all()


def test_ef_pushes_the_sample_that_is_learnt_and_ief_the_other():
    start = torch.tensor([[2.6, 0.8]], dtype=torch.float64)  # the first sample learnt, the second misclassified
    p = (start @ LOGISTIC.x.T).sigmoid()[0]
    assert p[0] > 0.9 and p[1] > 0.9 and LOGISTIC.targets == (1.0, 0.0)
    change = {name: (fields.update_field(LOGISTIC, name, start) @ LOGISTIC.x.T)[0].abs() for name in ("ef", "ief")}
    assert change["ef"][0] > 10 * change["ef"][1]
    assert change["ief"][1] > 10 * change["ief"][0]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (
                fields.least_squares_figure,
                [(LEAST_SQUARES, ["sgd"]), (LEAST_SQUARES, ["ief"]), (LEAST_SQUARES, ["ef"])]
                + [(NEAR_OPTIMUM, ["ef", "ief"])],
            ),
            id="least squares",
        ),
        pytest.param((fields.logistic_figure, [(LOGISTIC, [name]) for name in DIRECTIONS]), id="logistic"),
    ],
)
def drawn(request):
    """A figure, and the problem and directions of each of its panels."""
    draw, contents = request.param
    return draw(grid=COARSE), contents


def test_panels_show_the_numbers(drawn):
    figure, contents = drawn
    for axes, (problem, names) in zip(figure.axes[:4], contents, strict=True):
        (quiver,) = (each for each in axes.collections if isinstance(each, Quiver))
        points, u, v, shade = (
            torch.as_tensor(np.ma.getdata(a)) for a in (quiver.get_offsets(), quiver.U, quiver.V, quiver.get_array())
        )
        torch.testing.assert_close(points, problem.view.points(COARSE))
        d = by_hand(problem, names[0], points)
        arrows = torch.stack([u, v], dim=1)
        length = arrows[0].norm()
        assert 0.5 < length / (2 * problem.view.reach / COARSE) < 1  # neither dots nor overlapping
        torch.testing.assert_close(arrows, -d / d.norm(dim=1, keepdim=True) * length)
        torch.testing.assert_close(shade, d.norm(dim=1))

        styles = [fields._STYLES[name]["marker"] for name in names for _ in problem.starts]
        expected = [path for name in names for path in paths(problem, name)]
        found = [line for line in axes.lines if line.get_marker() in styles and line.get_linestyle() != "None"]
        assert [line.get_marker() for line in found] == styles
        for line, path in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(line.get_xydata()), path)


def test_lines_of_the_samples_are_named_where_they_end(drawn):
    figure, contents = drawn
    for axes, (problem, _) in zip(figure.axes[:4], contents, strict=True):
        labels = [text for text in axes.texts if text.get_text()]
        assert len(labels) == 2 and labels[0].get_text() != labels[1].get_text()
        for n, text in enumerate(labels):
            assert f"_{n + 1}" in text.get_text()
            theta = torch.tensor(text.xy, dtype=torch.float64)
            g, h = derivatives(problem, theta[None])
            # On the line: fitted, or p = 1/2, where ∂²l/∂z² is 1/4.
            torch.testing.assert_close(
                *((h[0, n], h.new_tensor(0.25)) if problem is LOGISTIC else (g[0, n], 0 * g[0, n]))
            )
            offset = (theta - torch.tensor(problem.view.centre)).abs()
            assert offset.max().item() == pytest.approx(problem.view.reach)


def test_paths_differ_without_colour(drawn):
    figure, contents = drawn
    assert all(axes.get_title() and axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes[:4])
    (legend,) = figure.legends
    handles = [
        handle
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True)
        if text.get_text().startswith("path of")
    ]
    shown = {name for _, names in contents for name in names}
    assert len({handle.get_linestyle() for handle in handles}) == len(shown)
    assert len({handle.get_marker() for handle in handles}) == len(shown)


def test_draws_png_and_pdf_and_no_random_numbers(tmp_path, monkeypatch):
    for name in ("least_squares_figure", "logistic_figure"):
        monkeypatch.setattr(fields, name, partial(getattr(fields, name), grid=COARSE))
    state = torch.get_rng_state()
    files = fields.draw_fields(tmp_path / "new" / "figures")
    assert torch.equal(torch.get_rng_state(), state)
    names = ["least_squares_fields.png", "least_squares_fields.pdf", "logistic_fields.png", "logistic_fields.pdf"]
    assert [path.relative_to(tmp_path / "new" / "figures").as_posix() for path in files] == names
    for path in files:
        if path.suffix == ".png":
            image = imread(path)
            assert min(image.shape[:2]) > 1000 and image[..., :3].std() > 0.05
        else:
            content = path.read_bytes()
            assert content.startswith(b"%PDF") and len(content) > 10_000
