"""The damped solve in sample space, (K + λI) v = b, where only Jᵀv matters afterwards.

Two difficulties meet in one batch, and each defeats the obvious remedy of the other:

* Gradient norms range over many decades (nearly fitted samples beside misclassified ones). A truncated
  eigendecomposition of K drops the small ones; scaling K to unit diagonal keeps them.
* Samples are repeated or nearly so, or there are more samples than parameters. Then K is singular, and what is left
  of it once the damping is tiny must be solved in the least-squares sense of the *unscaled* problem.

So the matrix is scaled to unit diagonal and factored by Cholesky; when that is too ill-conditioned, a Cholesky
factorisation with pivoting names a maximal set of independent samples, and a small least-squares problem in their
span, in the original scale, gives the coefficients.

Where parameters are fewer than rows, d itself is solved for, in their space.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_ief.linalg.gram import InnerProducts, add_products, mirror

__all__ = ["damped_inverse_times", "damped_least_squares", "damped_solve", "solve"]

# Smallest squared pivot of the unit-diagonal Gram for which its error is harmless: 1e-7 from float32 rows, else 1e-16.
_HARMLESS, _HARMLESS_DOUBLE = 1e-2, 1e-8

# Below this squared pivot of the unit-diagonal matrix, Cholesky's error could reach 1e-6 of the result.
_SMALLEST_PIVOT = 1e-10

# Below this part of a column's norm that the columns before it leave, QR's error could reach 1e-6 of the result.
_SMALLEST_REST = 1e-9

# Rows this small against the largest may span what JᵀJ has lost.
_SMALL_ROWS = 1e-4

# Norms whose squares are numbers, with some room.
_IN_RANGE = 1e-140, 1e140

# Stands for the norm of a row of zeros; no other one is as small.
_SMALLEST_NORM = 1e-150

# So many samples are looked at together for independent ones, and taken while what is left of them is so large a part
# of the largest.
_BLOCK, _LARGE_ENOUGH = 64, 0.1

# Error of Jᵀv by cancellation, in units of its length, from which another v is looked for.
_CANCELLATION = 1e-5


Found = TypeVar("Found")


def solve(
    gram: Tensor,
    better: Callable[[], Tensor] | None,
    rhs: Tensor,
    damping: float,
    rounding: float,
    look: Callable[[Tensor, Tensor, Tensor], tuple[Found, bool]],
) -> tuple[Found, bool]:
    """Solve for v with Jᵀv = Jᵀ(JJᵀ + λI)⁻¹ b, by as good a Gram matrix as it takes.

    The fast one is used where it is well-conditioned; where it is not, its error would be amplified. With a
    well-conditioned one, nothing but `look` waits for the device, a single time.

    Args:
        gram: K = JJᵀ, shape [RN, RN], symmetric.
        better: Computes K anew in float64; None if it has all the digits of float64 already, so that one more step wins
            back what the conditioning takes.
        rhs: b, shape [RN].
        damping: λ ≥ 0, in the units of K.
        rounding: Relative rounding of the entries of J.
        look: Makes something of v, shape [RN], K, and whether v can be trusted, a boolean scalar of the device; says
            whether it can.

    Returns:
        What was made of v, see `damped_solve`; and whether that took the fast way.

    Raises:
        ValueError: If the shapes do not fit, λ is negative or not finite.

    """
    harmless = _HARMLESS_DOUBLE if rounding < 2.0**-50 else _HARMLESS
    v, trusted = _cholesky(_scaled(gram, rhs, damping), harmless, refine=better is None)
    found, certain = look(v, gram, trusted)
    if certain:
        return found, True
    gram = gram if better is None else better()
    return look(damped_solve(gram, rhs, damping, rounding), gram, trusted)[0], False


def damped_solve(gram: Tensor, rhs: Tensor, damping: float, rounding: float = 2.0**-53) -> Tensor:
    """Coefficients v for which Jᵀv = Jᵀ(JJᵀ + λI)⁻¹ b.

    Where K + λI is well-conditioned this is its solution. Where it is not, v is one of the many vectors with the same
    Jᵀv (samples that depend on others get 0), which is also the limit λ → 0: of all least-squares solutions of
    J d = b, the d of least norm. What is not finite in K or b makes all of v NaN.

    Args:
        gram: K = JJᵀ, shape [N, N], symmetric.
        rhs: b, shape [N].
        damping: λ ≥ 0, in the units of K.
        rounding: Relative rounding with which Jᵀv will be formed. What lies outside the rows' span is divided by λ in
            (K + λI)⁻¹b; where it would not cancel in Jᵀv to that many digits, v is another solution, without it.

    Returns:
        v, shape [N], float64.

    Raises:
        ValueError: If the shapes do not fit, λ is negative or not finite.

    Example:
        >>> damped_solve(torch.tensor([[2.0, 0.0], [0.0, 8.0]]), torch.tensor([1.0, 1.0]), damping=0.0)
        tensor([0.5000, 0.1250], dtype=torch.float64)

    """
    problem = _scaled(gram, rhs, damping)
    solution, trusted = _cholesky(problem, _SMALLEST_PIVOT, refine=True)
    squared = (solution @ gram.double() @ solution).clamp(min=0)
    terms = (solution.abs() * gram.double().diagonal().clamp(min=0).sqrt()).sum()
    if bool(trusted & (rounding * terms <= _CANCELLATION * squared.sqrt())):
        return solution
    if not bool(torch.isfinite(problem.gram).all() & torch.isfinite(problem.rhs).all()):
        return torch.full_like(solution, float("nan"))
    return _solve_independent(problem, damping)


def damped_inverse_times(gram: Tensor, rhs: Tensor, damping: float) -> Tensor:
    """(K + λI)⁻¹B, where each coefficient matters: that of a sample without a gradient is 0.

    Args:
        gram: K, shape [N, N], symmetric.
        rhs: B, shape [N, Q].
        damping: λ ≥ 0, in the units of K.

    Returns:
        Shape [N, Q], float64.

    Raises:
        ValueError: If the shapes do not fit, λ is negative or not finite, something in K or B is not finite, or K + λI
            is singular up to rounding.

    Example:
        >>> damped_inverse_times(torch.tensor([[2.0, 0.0], [0.0, 8.0]]), torch.eye(2), damping=0.0)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.1250]], dtype=torch.float64)

    """
    problem = _scaled(gram, rhs, damping, columns=True)
    if not bool(torch.isfinite(problem.gram).all() & torch.isfinite(problem.rhs).all()):
        raise ValueError("Rows are not finite: look for NaN or Inf in inputs, targets or parameters.")
    found, trusted = _cholesky(problem, _SMALLEST_PIVOT, refine=True)
    if not bool(trusted):
        raise ValueError(
            f"K + λI of {len(gram)} rows is singular up to rounding for damping={damping:g} (λ): rows depend on each "
            f"other. The mean diagonal of K is {float(gram.diagonal().mean()):.3g}; take a larger λ."
        )
    return found


class _Scaled(NamedTuple):
    """K = diag(norms) gram diag(norms), and b; with λI added to K, the diagonal of such a gram is 1."""

    gram: Tensor
    norms: Tensor
    rhs: Tensor


def _scaled(gram: Tensor, rhs: Tensor, damping: float, columns: bool = False) -> _Scaled:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or rhs.shape[:1] != gram.shape[:1] or rhs.ndim != 1 + columns:
        kind = "right-hand sides [N, Q]" if columns else "a right-hand side [N]"
        raise ValueError(f"Expected a Gram matrix [N, N] and {kind}, got {tuple(gram.shape)} and {tuple(rhs.shape)}.")
    _require_damping(damping)
    gram, rhs = gram.double(), rhs.double()
    # A sample without a gradient takes no part, whatever is asked of it, if only that is a number.
    takes_part = gram.diagonal() > 0
    rhs = torch.where(takes_part[:, None] if columns else takes_part, rhs, 0.0 * rhs)
    norms = (gram.diagonal() + damping).sqrt().clamp(min=_SMALLEST_NORM)
    return _Scaled((gram / norms).div_(norms[:, None]), norms, rhs)


def _require_damping(damping: float) -> None:
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping (λ) must be a finite number ≥ 0, got {damping}.")


def _cholesky(problem: _Scaled, smallest_pivot: float, refine: bool) -> tuple[Tensor, Tensor]:
    damped = problem.gram.clone() if refine else problem.gram  # which nobody reads again
    damped.diagonal().fill_(1.0)
    factor, failed = torch.linalg.cholesky_ex(damped)
    trusted = (factor.diagonal().amin().square() > smallest_pivot) & (failed == 0)
    columns = problem.rhs.ndim == 2
    norms = problem.norms[:, None] if columns else problem.norms
    target = problem.rhs / norms
    target = target if columns else target[:, None]
    solution = torch.cholesky_solve(target, factor)
    if refine:  # one step wins back what the conditioning took
        solution = solution + torch.cholesky_solve(target - damped @ solution, factor)
    return (solution if columns else solution[:, 0]) / norms, trusted


def _solve_independent(problem: _Scaled, damping: float) -> Tensor:
    """Solve when K is (nearly) singular: K = M Mᵀ with M = diag(norms) L and L from a pivoted Cholesky.

    With orthonormal rows Q, J = M Q, so d = Jᵀ(K + λI)⁻¹ b = Qᵀ w where w minimises |M w − b|² + λ|w|². The pivot
    rows of L form a lower triangle T, and Qᵀ = J_pivotsᵀ diag(norms)⁻¹ T⁻ᵀ turns w into coefficients of samples.

    Returns:
        v, shape [N].

    """
    scaled, norms, rhs = problem
    lower, pivots = _pivoted_cholesky(scaled)
    solution = torch.zeros_like(rhs)
    rank = len(pivots)
    if rank == 0:
        return solution
    weights, _ = _least_squares(norms[:, None] * lower, rhs, damping)
    coefficients = torch.linalg.solve_triangular(lower[pivots].T, weights[:, None], upper=True)[:, 0]
    solution[pivots] = coefficients / norms[pivots]
    return solution


def _least_squares(matrix: Tensor, rhs: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Minimise |M w − b|² + λ|w|² by QR; also what of each column's norm the columns before it leave."""
    width = matrix.shape[1]
    stacked = torch.cat([matrix, damping**0.5 * torch.eye(width, dtype=rhs.dtype, device=rhs.device)])
    target = torch.cat([rhs, rhs.new_zeros(width)])
    # Householder's method is stable row by row only when the large rows come first.
    order = stacked.norm(dim=1).argsort(descending=True)
    reflectors, tau = torch.geqrf(stacked[order])
    target = torch.ormqr(reflectors, tau, target[order][:, None], transpose=True)[:width]
    upper = reflectors[:width].triu()
    rest = upper.diagonal().abs() / upper.norm(dim=0)
    return torch.linalg.solve_triangular(upper, target, upper=True)[:, 0], rest


def damped_least_squares(
    rows: Tensor, rhs: Tensor, damping: float, rounding: float = 2.0**-53
) -> tuple[Tensor | None, bool]:
    """Solve (JᵀJ + λI) d = Jᵀb, the same d as Jᵀ(JJᵀ + λI)⁻¹ b, where parameters are fewer than rows.

    By Cholesky of JᵀJ + λI, scaled to unit diagonal, with one step of refinement on J itself. Where that is too
    ill-conditioned, by QR of J; or, if J was rounded before, in the span of columns that are independent beyond that:
    where J has a null space, rounding would be divided by λ.

    Args:
        rows: J, shape [N, P], float64.
        rhs: b, shape [N].
        damping: λ ≥ 0, in the units of JJᵀ.
        rounding: Relative rounding of the entries of J.

    Returns:
        d, shape [P], and whether it is Cholesky's. None where columns of J depend on each other and λ does not tell
        them apart, where rounding hides what small rows span, or where something is not finite.

    Raises:
        ValueError: If the shapes do not fit, λ is negative or not finite.

    Example:
        >>> damped_least_squares(torch.tensor([[2.0], [4.0]]).double(), torch.tensor([1.0, 1.0]), damping=0.0)
        (tensor([0.3000], dtype=torch.float64), True)

    """
    if rows.ndim != 2 or rhs.shape != rows.shape[:1]:
        raise ValueError(f"Expected rows [N, P] and a right-hand side [N], got {rows.shape} and {rhs.shape}.")
    _require_damping(damping)
    rhs, width = rhs.double(), rows.shape[1]
    normal = rows.new_zeros(width, width)
    add_products(normal, rows.T, InnerProducts(precise=True))
    rounded = rounding > 2.0**-50
    undamped = normal.clone() if rounded else normal
    norms = (normal.diagonal() + damping).sqrt()
    used = norms > 0  # a parameter without a gradient stays where it is
    norms = torch.where(used, norms, 1.0)
    normal.div_(norms).div_(norms[:, None]).diagonal().add_(torch.where(used, damping / norms.square(), 1.0))
    factor, failed = torch.linalg.cholesky_ex(normal)  # which reads the lower triangle only

    def solved(residual: Tensor) -> Tensor:
        return torch.cholesky_solve((residual / norms)[:, None], factor)[:, 0] / norms

    gradient = rows.T @ rhs
    d = solved(gradient)
    d = d + solved(rows.T @ (rhs - rows @ d) - damping * d)
    pivots = factor.diagonal().square()
    trusted = (pivots.amin() > _SMALLEST_PIVOT) & (failed == 0) & d.isfinite().all()
    # What is left of a column beside the others divides the rounding of its entry of Jᵀb.
    lost = rounding * rhs.norm() * (1 / (pivots * norms)).where(used, 0.0).amax()
    in_range = ((norms > _IN_RANGE[0]) & (norms < _IN_RANGE[1])).all()
    if bool(trusted & in_range & (lost <= _CANCELLATION * d.norm())):
        return d, True
    if not bool(in_range & rows.isfinite().all() & rhs.isfinite().all()):
        return None, False
    if rounded:
        sizes = rows.norm(dim=1)
        if bool(torch.where(sizes > 0, sizes, torch.inf).amin() < _SMALL_ROWS * sizes.amax()):
            return None, False  # what only small rows span has all its digits, but not in JᵀJ
        return _solve_in_span(undamped, gradient, damping, rounding), False
    d, rest = _least_squares(rows, rhs, damping)
    return (d if bool((rest > _SMALLEST_REST).all() & d.isfinite().all()) else None), False


def _solve_in_span(normal: Tensor, gradient: Tensor, damping: float, rounding: float) -> Tensor:
    """Solve (JᵀJ + λI) d = g, g = Jᵀb, in the span of J's rows, as far as rounding leaves any of it.

    With JᵀJ = M Mᵀ, M = diag(norms) L and L from a pivoted Cholesky: g = M y, and d = M (MᵀM + λI)⁻¹ y.

    Returns:
        d, shape [P].

    """
    mirror(normal)  # of which the lower triangle is there
    norms = normal.diagonal().sqrt().clamp(min=_SMALLEST_NORM)
    lower, pivots = _pivoted_cholesky(normal.div_(norms).div_(norms[:, None]), 64 * rounding**2)
    factor = norms[:, None] * lower
    y = torch.linalg.solve_triangular(lower[pivots], (gradient / norms)[pivots, None], upper=False)
    inner = torch.zeros_like(normal[: len(pivots), : len(pivots)])
    add_products(inner, factor.T, InnerProducts(precise=True))
    inner.diagonal().add_(damping)
    # What this loses is far below what rounding has left of the same directions.
    triangle, failed = torch.linalg.cholesky_ex(inner)
    if bool(failed):
        stacked = torch.cat([factor, damping**0.5 * torch.eye(len(pivots), dtype=normal.dtype, device=normal.device)])
        triangle = torch.linalg.qr(stacked, mode="r").R.T
    return (factor @ torch.cholesky_solve(y, triangle))[:, 0]


def _pivoted_cholesky(matrix: Tensor, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Factor a positive semi-definite matrix of diagonal ≤ 1 as L Lᵀ, with a block of pivots at a time.

    The row of the k-th pivot is zero behind column k. Ends where what is left is rounding error. (LAPACK's pstrf does
    this, but torch does not offer it; it runs only for batches with dependent samples.)

    Returns:
        L [N, rank] and the indices of the pivots.

    """
    size = matrix.shape[0]
    lower = torch.zeros_like(matrix)
    left = matrix.diagonal().clone()
    tolerance = max(least, 4 * size * torch.finfo(matrix.dtype).eps)
    pivots = torch.zeros(0, dtype=torch.long, device=matrix.device)
    while len(pivots) < size and (largest := float(left.amax())) > tolerance:
        rank = len(pivots)
        block = left.topk(min(_BLOCK, size - rank)).indices
        known = lower[:, :rank]
        rest = matrix[block][:, block] - known[block] @ known[block].T
        triangle, chosen = _pivot_by_pivot(rest, max(tolerance, _LARGE_ENOUGH * largest))
        new = block[chosen]
        columns = matrix[:, new] - known @ known[new].T
        columns = torch.linalg.solve_triangular(triangle[chosen], columns.T, upper=False).T
        columns[pivots] = 0.0
        columns[new] = triangle[chosen]
        lower[:, rank : rank + len(new)] = columns
        left -= columns.square().sum(1)
        pivots = torch.cat([pivots, new])
        left[pivots] = -1.0
    return lower[:, : len(pivots)], pivots


def _pivot_by_pivot(matrix: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """The same for a small matrix, one pivot after the other while what is left of one is more than the least."""
    left = matrix.diagonal().clone()
    lower = torch.zeros_like(matrix)
    pivots: list[int] = []
    for k in range(len(matrix)):
        value, pivot = (x.item() for x in left.max(dim=0))
        if value <= least and pivots:  # the first is the largest of all
            break
        column = (matrix[:, int(pivot)] - lower[:, :k] @ lower[int(pivot), :k]) / value**0.5
        column[pivots] = 0.0
        lower[:, k] = column
        left -= column.square()
        pivots.append(int(pivot))
        left[pivots] = -1.0
    return lower[:, : len(pivots)], torch.tensor(pivots, dtype=torch.long, device=matrix.device)
