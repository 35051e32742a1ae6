"""The table of learning rates by momentum, from losses that are known."""

import pytest

pytest.importorskip("psutil")

from benchmarks import momentum, report
from benchmarks.momentum import Measured


def test_the_power_of_one_minus_momentum_is_found(tmp_path):
    """Training comes as far as lr / (1 − μ)² has it; held-out losses are smallest at a rate of 1."""
    rows = [
        Measured(mu, rate, seed, 100, 10, (1 + rate / (1 - mu) ** 2) ** -0.5 + seed, abs(rate - 1) + seed, "a machine")
        for mu in (0.0, 0.5, 0.9)
        for rate in (3 ** (k / 8) for k in range(-64, 24))
        for seed in (0, 1)
    ]
    report.write(rows, tmp_path / momentum.FILE, Measured)
    text = momentum.section(tmp_path)
    assert "(1 − μ) to a power of 2.00 to 2.00, 2.00 in the median" in text
    assert "| 0.5 | 0.75 | 0.250 | 0.500 | 0.866 | 1.00 | 0.500 |" in text
    assert "2 seeds" in text and "a machine" in text


def test_a_loss_that_is_never_reached_has_no_rate():
    assert momentum._rate_at({1.0: 0.9, 3.0: 0.8}, 0.5) is None


def test_there_is_no_section_of_what_was_not_measured(tmp_path):
    assert momentum.section(tmp_path) == ""
