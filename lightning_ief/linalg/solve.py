"""The damped solve in sample space, (K + λI) v = b, where only Jᵀv matters afterwards.

Two difficulties meet in one batch, and each defeats the obvious remedy of the other:

* Gradient norms range over many decades (nearly fitted samples beside misclassified ones). A truncated
  eigendecomposition of K drops the small ones; scaling K to unit diagonal keeps them.
* Samples are repeated or nearly so, or there are more samples than parameters. Then K is singular, and what is left
  of it once the damping is tiny must be solved in the least-squares sense of the *unscaled* problem.

So the matrix is scaled to unit diagonal and factored by Cholesky; when that is too ill-conditioned, a Cholesky
factorisation with pivoting names a maximal set of independent samples, and a small least-squares problem in their
span, in the original scale, gives the coefficients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["damped_solve", "tentative_solve"]

# Below this squared pivot of the unit-diagonal matrix, Cholesky's error could reach 1e-6 of the result.
_SMALLEST_PIVOT = 1e-10

# Error of Jᵀv by cancellation, in units of its length, from which another v is looked for.
_CANCELLATION = 1e-5


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
    solution, trusted = _cholesky(problem, _SMALLEST_PIVOT)
    squared = (solution @ gram.double() @ solution).clamp(min=0)
    terms = (solution.abs() * gram.double().diagonal().clamp(min=0).sqrt()).sum()
    if bool(trusted & (rounding * terms <= _CANCELLATION * squared.sqrt())):
        return solution
    if not bool(torch.isfinite(problem.gram).all() & torch.isfinite(problem.rhs).all()):
        return torch.full_like(solution, float("nan"))
    return _solve_independent(problem, damping)


def tentative_solve(gram: Tensor, rhs: Tensor, damping: float, smallest_pivot: float) -> tuple[Tensor, Tensor]:
    """Solve (K + λI) v = b as if that were well-conditioned, and tell whether it is; the host does not wait for it.

    Args:
        gram: K = JJᵀ, shape [N, N], symmetric.
        rhs: b, shape [N].
        damping: λ ≥ 0, in the units of K.
        smallest_pivot: Smallest squared pivot of the unit-diagonal matrix to accept: about by how much its errors may
            be amplified.

    Returns:
        v, shape [N], float64, of no use if a pivot is smaller; and whether all are large enough, a boolean scalar.

    Raises:
        ValueError: If the shapes do not fit, λ is negative or not finite.

    """
    return _cholesky(_scaled(gram, rhs, damping), smallest_pivot, refine=False)


class _Scaled(NamedTuple):
    """K + λI = diag(norms) (gram + diag(damping)) diag(norms), of unit diagonal."""

    gram: Tensor
    damping: Tensor
    norms: Tensor
    rhs: Tensor


def _scaled(gram: Tensor, rhs: Tensor, damping: float) -> _Scaled:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or rhs.shape != gram.shape[:1]:
        raise ValueError(
            f"Expected a Gram matrix [N, N] and a right-hand side [N], got {tuple(gram.shape)} and {tuple(rhs.shape)}."
        )
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping (λ) must be a finite number ≥ 0, got {damping}.")
    gram, rhs = gram.double(), rhs.double()
    # A sample without a gradient takes no part, whatever is asked of it, if only that is a number.
    rhs = torch.where(gram.diagonal() > 0, rhs, 0.0 * rhs)
    norms = (gram.diagonal() + damping).sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    return _Scaled(gram / norms / norms[:, None], damping / norms.square(), norms, rhs)


def _cholesky(problem: _Scaled, smallest_pivot: float, refine: bool = True) -> tuple[Tensor, Tensor]:
    damped = problem.gram.clone()
    damped.diagonal().add_(problem.damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    trusted = (factor.diagonal().amin().square() > smallest_pivot) & (failed == 0)
    target = (problem.rhs / problem.norms)[:, None]
    solution = torch.cholesky_solve(target, factor)
    if refine:  # one step wins back what the conditioning took
        solution = solution + torch.cholesky_solve(target - damped @ solution, factor)
    return solution[:, 0] / problem.norms, trusted


def _solve_independent(problem: _Scaled, damping: float) -> Tensor:
    """Solve when K is (nearly) singular: K = M Mᵀ with M = diag(norms) L and L from a pivoted Cholesky.

    With orthonormal rows Q, J = M Q, so d = Jᵀ(K + λI)⁻¹ b = Qᵀ w where w minimises |M w − b|² + λ|w|². The pivot
    rows of L form a lower triangle T, and Qᵀ = J_pivotsᵀ diag(norms)⁻¹ T⁻ᵀ turns w into coefficients of samples.

    Returns:
        v, shape [N].

    """
    scaled, _, norms, rhs = problem
    lower, pivots = _pivoted_cholesky(scaled)
    solution = torch.zeros_like(rhs)
    rank = len(pivots)
    if rank == 0:
        return solution
    matrix = torch.cat([norms[:, None] * lower, damping**0.5 * torch.eye(rank, dtype=rhs.dtype, device=rhs.device)])
    target = torch.cat([rhs, rhs.new_zeros(rank)])
    # Householder's method is stable row by row only when the large rows come first.
    order = matrix.norm(dim=1).argsort(descending=True)
    orthonormal, upper = torch.linalg.qr(matrix[order])
    weights = torch.linalg.solve_triangular(upper, (orthonormal.T @ target[order])[:, None], upper=True)
    coefficients = torch.linalg.solve_triangular(lower[pivots].T, weights, upper=True)[:, 0]
    solution[pivots] = coefficients / norms[pivots]
    return solution


def _pivoted_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factor a positive semi-definite matrix of diagonal ≤ 1 as L Lᵀ.

    The row of the k-th pivot is zero behind column k. Ends where what is left is rounding error. (LAPACK's pstrf does
    this, but torch does not offer it; the loop runs only for batches with dependent samples.)

    Returns:
        L [N, rank] and the indices of the pivots.

    """
    size = matrix.shape[0]
    lower = torch.zeros_like(matrix)
    left = matrix.diagonal().clone()
    tolerance = 4 * size * torch.finfo(matrix.dtype).eps
    pivots: list[int] = []
    for k in range(size):
        pivot = int(left.argmax())
        value = float(left[pivot])
        if value <= tolerance:
            break
        column = (matrix[:, pivot] - lower[:, :k] @ lower[pivot, :k]) / value**0.5
        column[pivots] = 0.0
        lower[:, k] = column
        left -= column.square()
        pivots.append(pivot)
        left[pivots] = -1.0
    return lower[:, : len(pivots)], torch.tensor(pivots, dtype=torch.long, device=matrix.device)
