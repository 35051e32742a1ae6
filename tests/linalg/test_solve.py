import pytest
import torch

from lightning_ief.linalg.solve import _pivoted_cholesky, damped_least_squares, damped_solve, solve
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


@pytest.mark.parametrize(("damping", "looks"), [(1.0, 1), (1e-9, 2)])
@pytest.mark.parametrize("double", [False, True])
def test_a_better_gram_is_computed_where_it_is_needed(damping, looks, double):
    matrix = torch.cat([rows(4), rows(4) + 1e-5])
    gram, seen = matrix @ matrix.T, []

    def look(v, gram, trusted):
        seen.append(gram)
        return matrix.T @ v, bool(trusted)

    fast = gram if double else gram * (1 + 1e-7 * torch.eye(8))  # rounded as if to float32
    better = None if double else lambda: gram
    rounding = 2.0**-53 if double else 2.0**-24
    d, direct = solve(fast, better, torch.arange(8.0), damping, rounding, look)
    assert relative_error(d, least_squares(matrix, torch.arange(8.0).double(), damping)) < (
        1e-6 if looks == 1 else 1e-3
    )
    assert (
        direct == (looks == 1) and len(seen) == looks and seen[0] is fast and seen[-1] is (gram if looks == 2 else fast)
    )


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


@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-7, 1e-3, 10.0])
@pytest.mark.parametrize("spread", [0, 3])
def test_fewer_parameters_than_rows(damping, spread):
    """In parameter space, at norms of rows and columns over many decades: the same as the slow way."""
    matrix = rows(30, width=7) * torch.logspace(-spread, spread, 7).double() * torch.logspace(-spread, 0, 30)[:, None]
    rates = torch.linspace(0.5, 2.0, 30, dtype=torch.float64)
    d, _ = damped_least_squares(matrix, rates, damping)
    assert d is not None
    assert relative_error(d, least_squares(matrix, rates, damping)) < 1e-7
    if not spread:  # where the formula in the space of rows has as many digits
        assert relative_error(d, matrix.T @ damped_solve(matrix @ matrix.T, rates, damping)) < 1e-6


def test_nearly_dependent_columns_go_by_qr():
    """JᵀJ has lost the difference of two columns, J has not."""
    matrix = rows(30, width=7)
    matrix[:, 6] = matrix[:, 5] + 1e-6 * matrix[:, 6]
    rates = torch.linspace(0.5, 2.0, 30, dtype=torch.float64)
    d, _ = damped_least_squares(matrix, rates, 0.0)
    assert d is not None
    assert relative_error(d, least_squares(matrix, rates, 0.0)) < 1e-6


def test_dependent_columns_and_what_is_not_finite_are_left_to_others():
    matrix, rates = rows(30, width=7), torch.ones(30)
    matrix[:, 6] = matrix[:, 5]
    assert damped_least_squares(matrix, rates, 0.0)[0] is None
    assert damped_least_squares(matrix, rates, 1e-3)[0] is not None
    assert damped_least_squares(matrix, rates * float("nan"), 1e-3)[0] is None
    matrix[:, 6] = 0.0  # a parameter without a gradient
    d, _ = damped_least_squares(matrix, rates, 0.0)
    assert d is not None and d[6] == 0
    assert relative_error(d[:6], least_squares(matrix[:, :6], rates.double(), 0.0)) < 1e-7


@pytest.mark.parametrize("kind", ["low rank", "duplicates", "nearly equal", "decades"])
def test_blocks_of_pivots(kind):
    """More independent samples than one block holds; a factor of the matrix, triangular in its pivots."""
    matrix = rows(300, width=90)
    if kind == "duplicates":
        matrix = matrix[:150].repeat(2, 1)
    if kind == "nearly equal":
        matrix = torch.cat([matrix[:100, :], matrix[:100] + 1e-5 * rows(200, width=90)[100:]])
    if kind == "decades":
        matrix = rows(300, width=400) * torch.logspace(-6, 0, 400).double()
    matrix = matrix / matrix.norm(dim=1, keepdim=True)
    gram = matrix @ matrix.T
    lower, pivots = _pivoted_cholesky(gram)
    assert len(pivots) == (300 if kind == "decades" else 90) == len({*pivots.tolist()})
    assert (lower @ lower.T - gram).abs().max() < 1e-10
    assert torch.equal(lower[pivots], lower[pivots].tril())
    rates = torch.linspace(0.5, 2.0, len(gram), dtype=torch.float64)
    d = matrix.T @ damped_solve(gram, rates, 1e-9)
    assert relative_error(d, least_squares(matrix, rates, 1e-9)) < 1e-5


@pytest.mark.parametrize("damping", [1e-9, 1e-4])
@pytest.mark.parametrize("dead", [False, True])
def test_rounding_in_the_null_space_of_rows_is_not_divided_by_the_damping(damping, dead):
    """As for a softmax, whose logits have gradients that add up to zero, in float32; and a parameter without any."""
    exact = rows(60, width=7)
    exact = torch.cat([exact, -exact.sum(1, keepdim=True)], dim=1)
    if dead:
        exact[:, 2] = 0.0
        exact[:, 7] = -exact[:, :7].sum(1)
    rates = torch.linspace(0.5, 2.0, 60, dtype=torch.float64)
    d, _ = damped_least_squares(exact.float().double(), rates, damping, rounding=2.0**-24)
    assert d is not None
    assert relative_error(d, least_squares(exact, rates, damping)) < 1e-5


@pytest.mark.parametrize("damping", [0.0, 1e-8])
def test_what_only_small_rounded_rows_span_is_left_to_others(damping):
    """They have all their digits; JᵀJ has lost them beside large rows."""
    matrix = (rows(12, width=5) * torch.tensor([1.0] * 3 + [1e-7] * 9)[:, None]).float().double()
    assert damped_least_squares(matrix, torch.ones(12), damping, rounding=2.0**-24)[0] is None
    d = matrix.T @ damped_solve(matrix @ matrix.T, torch.ones(12), damping, rounding=2.0**-24)
    assert relative_error(d, least_squares(matrix, torch.ones(12).double(), damping)) < 1e-5
