"""The operations of a step in the metric, as counted for the table and by torch."""

import pytest

pytest.importorskip("psutil")

from benchmarks import metric, report
from benchmarks.metric import Measured, Point
from benchmarks.timing import flop_counter


def flops(step, warm_up):
    for _ in range(warm_up):
        step()
    with flop_counter() as counter:
        step()
    return counter.get_total_flops()


def test_operations_are_those_that_torch_counts():
    """Step 11 neither takes a batch into the averages nor inverts them; step 15 does the one."""
    point = Point(300, 200, 32, 100)
    step = metric._ways(point)["metric"]
    sgd = flops(metric._ways(point)["sgd"], 0)
    total, floor = metric.counted(point)
    without = flops(step, 11)
    assert without / sgd == pytest.approx(floor, rel=0.04)  # biases take part in K by themselves
    squares = 301**2 + 200**2 + 201**2 + 200**2 + 201**2 + 10**2
    # Narrow averages are computed in full, not one triangle of them; torch counts no inversions.
    assert flops(step, 3) - without == 2 * 32 * squares
    inverted = (301**3 + 2 * 201**3 + 2 * 200**3 + 10**3) / 100
    assert total == pytest.approx(floor + (32 * squares / 5 + inverted) / sgd, rel=1e-3)


def test_the_table(tmp_path):
    report.write([Measured(8, 4, 16, 20, 1.25, 6.5, 4.0, 2.0, 3, "a machine")], tmp_path / metric.FILE, Measured)
    text = metric.section(tmp_path)
    assert "| 8, 4 | 16 | 20 | **6.5** | 1.25 | 4.0 | 2.0 |" in text
    assert "over 3 turns" in text and "a machine" in text
    assert metric.section(tmp_path / "none") == ""
