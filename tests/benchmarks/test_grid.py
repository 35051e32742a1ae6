"""The grid's points, its count of operations, and that a wrong direction stops it."""

import pytest
import torch

pytest.importorskip("psutil")

from benchmarks import __main__ as command
from benchmarks import grid, report
from benchmarks.grid import Measured, Point

CPU = torch.device("cpu")
POINT = Point(6, 16, 2, 3, 4, "float64")


def test_points_are_a_fixed_sample_of_the_whole_grid():
    found = grid.points()
    assert found == grid.points() and len({*found}) == len(found) >= 60
    assert sum(point.dtype == "float32" for point in found) == len(found) / 2
    assert {point.samples for point in found} == {2**k for k in range(4, 13)}
    for field, values in {"width": 5, "depth": 4, "uses": 4, "positions": 5}.items():
        assert len({getattr(point, field) for point in found}) == values
    assert all(point.bytes_of_rows <= 2**30 for point in found)
    assert any(point.parameters < point.samples for point in found)


def test_parameters_are_those_of_the_network():
    net = grid._problem(POINT, CPU).net
    assert sum(p.numel() for p in net.parameters()) == POINT.parameters == 2 * (16 * 16 + 16) + 10 * 17


def test_the_dense_way_is_a_loop_over_samples():
    problem = grid._problem(POINT, CPU)
    rows, rates = [], []
    for x, y in zip(problem.inputs, problem.targets, strict=True):
        logits = problem.net(x[None])
        loss = torch.nn.functional.cross_entropy(logits, y[None])
        (slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*problem.net.parameters()])]))
        rates.append(slope.square().sum())
    jacobian, s = torch.stack(rows), torch.stack(rates)
    expected = jacobian.T @ torch.linalg.solve(jacobian @ jacobian.T + 0.1 * torch.eye(6, dtype=torch.float64), s)
    torch.testing.assert_close(grid._dense(problem, 0.1), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("point", [POINT, POINT._replace(dtype="float32"), Point(200, 16, 1, 1, 1, "float64")])
def test_both_ways_agree(point):
    assert grid._agree(point, grid._problem(point, CPU))[1] <= grid._TOLERANCE[point.dtype]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wrong_direction_stops_the_command(dtype, monkeypatch, tmp_path):
    dense, off = grid._dense, 1 + 2 * grid._TOLERANCE[dtype]
    monkeypatch.setattr(grid, "_dense", lambda *args: off * dense(*args))
    monkeypatch.setattr(grid, "_in_turn", lambda *_: pytest.fail("timed in spite of a wrong direction"))
    monkeypatch.setattr(grid, "points", lambda number: [POINT._replace(dtype=dtype)])
    with pytest.raises(SystemExit, match=r"Point\(samples=6.*differ by"):
        command.main(["grid", "--output", str(tmp_path)])
    assert [*tmp_path.iterdir()] == []


def test_operations_are_counted_on_the_smaller_side():
    """Forward 1, backward 2 products for each use, but the input's gradient in the first one."""
    product = 2 * 6 * 4 * 16 * 16
    last = 2 * 6 * 16 * 10
    passes = 6 * 3 * product - product + 3 * last
    n, p = 6, POINT.parameters
    products, solve = grid._counted(POINT, grid._problem(POINT, CPU))
    assert (products, solve) == (passes + 2 * n * n * p + 2 * n * p, n**3 / 3)
    many = Point(600, 16, 1, 1, 1, "float64")
    products, solve = grid._counted(many, grid._problem(many, CPU))
    n, p = 600, many.parameters
    assert products == 2 * 2 * n * 256 + 3 * 2 * n * 160 + 2 * n * p * p + 2 * n * p and solve == p**3 / 3


def test_the_report(tmp_path):
    rows = [
        Measured(*point, point.parameters, 1e-9, 3, 2.0, 1.0, 1.9, ratio, 2.1, 0.1, 0.5, 3 * ratio, 30.0, "CPU")
        for point, ratio in zip(grid.SMOKE, (2.0, 0.5), strict=True)
    ]
    report.write(rows, tmp_path / grid.FILE, Measured)
    text = grid.section(tmp_path)
    assert "median **1.25**, at worst **2.00**; beyond 1 at 1 of 2 points" in text
    assert "at 2 points whose dense J fits in 64 MiB: median 3.75, at worst\n  6.00; beyond 2.5 at 1." in text
    assert "| 8 | 16 | 1 | 2 | 1 | float64 | 442 | 2.00 | 1.00 | **2.00** | 6.00 |" in text
    assert grid.draw(rows, tmp_path / "grid.png").stat().st_size > 10_000
    assert grid.section(tmp_path / "elsewhere") == ""
