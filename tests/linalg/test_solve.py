import pytest
import torch

from lightning_ief.linalg.solve import damped_solve
from tests.helpers import relative_error


def rows(samples, width=40):
    return torch.randn(samples, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def least_squares(matrix, rates, damping):
    """(JᵀJ + λI)⁻¹ Jᵀb, in parameter space, as one stacked least-squares problem."""
    width = matrix.shape[1]
    stacked = torch.cat([matrix, damping**0.5 * torch.eye(width, dtype=matrix.dtype)])
    target = torch.cat([rates, rates.new_zeros(width)])[:, None]
    return torch.linalg.lstsq(stacked, target, driver="gelsd").solution[:, 0]


@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-3, 10.0])
@pytest.mark.parametrize(
    "matrix",
    [
        pytest.param(rows(8), id="independent"),
        pytest.param(rows(1), id="one sample"),
        pytest.param(rows(4).repeat(2, 1), id="duplicates"),
        pytest.param(rows(30, width=7), id="more samples than parameters"),
        pytest.param(torch.cat([rows(4), torch.zeros(2, 40, dtype=torch.float64)]), id="zero rows"),
    ],
)
def test_direction_is_that_of_parameter_space(matrix, damping):
    rates = torch.linspace(0.5, 2.0, 4, dtype=torch.float64).repeat(10)[: len(matrix)]
    d = matrix.T @ damped_solve(matrix @ matrix.T, rates, damping)
    assert relative_error(d, least_squares(matrix, rates, damping)) < 1e-7


def test_gradient_norms_over_ten_decades():
    matrix = rows(8) * torch.logspace(-8, 2, 8, dtype=torch.float64)[:, None]
    d = matrix.T @ damped_solve(matrix @ matrix.T, torch.ones(8), 0.0)
    assert (matrix @ d - 1).abs().max() < 1e-5


def test_duplicates_with_norms_over_ten_decades():
    sizes = torch.logspace(-8, 2, 8, dtype=torch.float64)
    matrix = rows(4).repeat(2, 1) * sizes[:, None]
    d = matrix.T @ damped_solve(matrix @ matrix.T, sizes, 0.0)  # consistent: equal rows are asked for equal rates
    assert ((matrix @ d - sizes) / sizes).abs().max() < 1e-8


def test_near_duplicates():
    matrix = torch.cat([rows(4), rows(4) + 1e-5 * rows(5)[1:]])
    d = matrix.T @ damped_solve(matrix @ matrix.T, torch.ones(8), 0.0)
    assert (matrix @ d - 1).abs().max() < 1e-4


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_refuses_damping(damping):
    with pytest.raises(ValueError, match="damping"):
        damped_solve(torch.eye(2), torch.ones(2), damping)


def test_refuses_shapes():
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(3,\)"):
        damped_solve(torch.eye(2), torch.ones(3), 0.0)


@pytest.mark.parametrize("damping", [0.0, 1e-7, 1e-4])
def test_more_samples_than_parameters_combined_in_float32(damping):
    """What lies outside of the rows' span is b/λ in the solution of (K + λI)v = b, and must not be left to cancel."""
    matrix = rows(30, width=7).float()
    wide, rates = matrix.double(), torch.linspace(0.5, 2.0, 30, dtype=torch.float64)
    v = damped_solve(wide @ wide.T, rates, damping, rounding=2.0**-24)
    assert relative_error(wide.T @ v, least_squares(wide, rates, damping)) < 1e-7
    assert relative_error(matrix.T @ v.float(), least_squares(wide, rates, damping)) < 1e-5
