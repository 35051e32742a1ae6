"""The empirical Fisher (EF) and the improved empirical Fisher (iEF).

Wu, Yu, Zhang, Woodland, "An Improved Empirical Fisher Approximation for Natural Gradient Descent", NeurIPS 2024,
arXiv 2406.06420. Both are solved in sample space, where the matrix is N × N.
"""

import torch
from torch import Tensor

from lightning_ief.capture import Direction, LinearizedBatch
from lightning_ief.directions.registry import register

__all__ = ["ef", "ief"]


@register(label="EF", color="#D55E00", linestyle="--", marker="^")
def ef(linearization: LinearizedBatch, damping: float) -> Direction:
    """Empirical Fisher: d = Jᵀ(JJᵀ + λI)⁻¹ 1 = (JᵀJ + λI)⁻¹ ∇L.

    With λ → 0 every sample's loss falls at the same rate, J d = 1, however small its gradient: the inversely-scaled
    projection issue of the paper.

    Args:
        linearization: Model and batch.
        damping: λ ≥ 0, in the units of JJᵀ: squared norms of per-sample gradients.

    Returns:
        d, {parameter name: tensor}.

    """
    ones = torch.ones_like(linearization.logit_gradient_norms)
    return linearization.jacobian.solve(_nan_where_not_finite(ones, linearization.losses), damping)


@register(label="iEF", color="#0072B2", linestyle="-", marker="o")
def ief(linearization: LinearizedBatch, damping: float) -> Direction:
    """Improved empirical Fisher: d = Jᵀ(JJᵀ + λI)⁻¹ s with s_n = ‖∂l_n/∂z_n‖².

    With λ → 0 each sample's loss falls at the rate at which gradient descent on its own logits lowers it, J d = s. For
    scalar outputs and least squares it then is the natural gradient, wherever J d = s has a solution (it has with no
    more samples than parameters; without one, the two weigh what is left differently).

    Args:
        linearization: Model and batch.
        damping: λ ≥ 0, in the units of JJᵀ: squared norms of per-sample gradients.

    Returns:
        d, {parameter name: tensor}.

    """
    rates = linearization.logit_gradient_norms
    return linearization.jacobian.solve(_nan_where_not_finite(rates, linearization.losses), damping)


def _nan_where_not_finite(rhs: Tensor, losses: Tensor) -> Tensor:
    """A sample whose loss is not finite makes the direction NaN, even where its gradient is a number."""
    return torch.where(losses.isfinite(), rhs, torch.nan)
