"""The empirical Fisher (EF) and the improved empirical Fisher (iEF).

Wu, Yu, Zhang, Woodland, "An Improved Empirical Fisher Approximation for Natural Gradient Descent", NeurIPS 2024,
arXiv 2406.06420. Both are solved in sample space, where the matrix is N × N.
"""

import torch
from torch import Tensor

from lightning_ief.capture import Linearization
from lightning_ief.linalg.solve import damped_solve

__all__ = ["ef", "ief"]


def ef(linearization: Linearization, damping: float) -> dict[str, Tensor]:
    """Empirical Fisher: d = Jᵀ(JJᵀ + λI)⁻¹ 1 = (JᵀJ + λI)⁻¹ ∇L.

    With λ → 0 every sample's loss falls at the same rate, J d = 1, however small its gradient: the inversely-scaled
    projection issue of the paper.

    Args:
        linearization: Model and batch.
        damping: λ ≥ 0, in the units of JJᵀ: squared norms of per-sample gradients.

    Returns:
        d, {parameter name: tensor}.

    """
    return projected(linearization, torch.ones_like(linearization.losses, dtype=torch.float64), damping)


def ief(linearization: Linearization, damping: float) -> dict[str, Tensor]:
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
    return projected(linearization, linearization.logit_gradient_norms, damping)


def projected(linearization: Linearization, rates: Tensor, damping: float) -> dict[str, Tensor]:
    """The shortest direction along which each sample's loss falls at a given rate: d = Jᵀ(JJᵀ + λI)⁻¹ b.

    Args:
        linearization: Model and batch.
        rates: b, shape [N]; J d = b as λ → 0.
        damping: λ ≥ 0.

    Returns:
        d, {parameter name: tensor}.

    """
    jacobian = linearization.jacobian
    return jacobian.rmatvec(damped_solve(jacobian.gram(), rates, damping))
