"""Gauss-Newton in the space of rows: all logits are to move as gradient descent on them would.

Of its N·C rows iEF keeps the projections on ∂l_n/∂z_n, one for each sample.
"""

from lightning_ief.capture import Direction, LinearizedBatch
from lightning_ief.directions.empirical import LeastSquaresProblem, require_one_damping
from lightning_ief.directions.registry import register

__all__ = ["gauss_newton", "gauss_newton_problem"]


@register(label="Gauss-Newton", color="#117733", linestyle=(0, (10, 1)), marker="H", needs_graph=True)
def gauss_newton(
    linearization: LinearizedBatch, damping: float | None = None, *, relative_damping: float | None = None
) -> Direction:
    """Gauss-Newton by the Jacobian of the logits alone (arXiv 2605.11316): d = J_zᵀ(J_z J_zᵀ + λI)⁻¹ ∂l/∂z.

    J_z has a row for each logit of each sample, C backward passes. With λ → 0 the logits move as gradient descent on
    them would, J_z d = ∂l/∂z, where they can all be moved at will (no more logits than parameters), and iEF's J d = s
    follows. For least squares it is the natural gradient. Where logits have softmax behind them their common shift is
    asked for, too, as 0.

    Args:
        linearization: Model and batch, with its graph.
        damping: λ ≥ 0, in the units of J_z J_zᵀ: squared derivatives of logits.
        relative_damping: ρ ≥ 0 instead, with λ = ρ · mean diag(J_z J_zᵀ).

    Returns:
        d, {parameter name: tensor}.

    Raises:
        ValueError: If not exactly one damping is given, or it is out of range.

    """
    return gauss_newton_problem(linearization, damping, relative_damping=relative_damping).solve()


def gauss_newton_problem(
    linearization: LinearizedBatch, damping: float | None = None, *, relative_damping: float | None = None
) -> LeastSquaresProblem:
    """What `gauss_newton` solves: A = J_z and b = ∂l/∂z."""
    require_one_damping("gauss_newton", damping=damping, relative_damping=relative_damping)
    rows, gradients = linearization.logit_rows()
    return LeastSquaresProblem.of(rows, gradients, damping, relative_damping)
