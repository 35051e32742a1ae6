"""The indicators of Wu et al., arXiv 2406.06420, as pure functions of a linearization.

γ(d) is the reciprocal of the loss decrease that a direction achieves per unit of distance in the Fisher metric, to
first order; the natural gradient minimises it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_ief.capture import Linearization
from lightning_ief.linalg.vectors import check_same_space

__all__ = ["gamma", "gradient_norm_imbalance", "projections"]

# Directions whose largest entry lies between these are taken as they are.
_SMALL, _LARGE = 1e-6, 1e6


def gamma(linearization: Linearization, direction: Mapping[str, Tensor]) -> Tensor:
    """γ(d) = √(dᵀFd) / |dᵀ∇L|; smaller is closer to the natural gradient. Does not depend on the length of d.

    F and L are sums over the batch. Fd is never formed: with u_n = (∂z_n/∂θ) d, one forward-mode product,
    dᵀFd = Σ_n u_nᵀ(∇²_z l_n)u_n and dᵀ∇L = Σ_n ⟨∂l_n/∂z_n, u_n⟩.

    Args:
        linearization: Model and batch.
        direction: d, {parameter name: tensor}, an entry for every trainable parameter.

    Returns:
        float64 scalar; inf if dᵀ∇L = 0 (a direction that does not change the loss, the zero direction too).

    Raises:
        ValueError: If names or shapes of d do not fit.

    """
    check_same_space(direction, linearization.parameters)
    # The length of d cancels; taking it out first keeps the squares of tiny and huge directions in range.
    size = max(float(torch.linalg.vector_norm(entry, float("inf"))) for entry in direction.values())
    if not _SMALL < size < _LARGE and 0 < size < float("inf"):
        direction = {name: entry / size for name, entry in direction.items()}
    tangents = linearization.jvp(direction).double()
    logits, targets, objective = linearization.logits.double(), linearization.targets, linearization.objective
    curvature = objective.hessian_form(logits, targets, tangents).sum()
    slope = (linearization.logit_gradients.double() * tangents).sum()
    return torch.where(slope == 0, torch.full_like(slope, float("inf")), curvature.sqrt() / slope.abs())


def gradient_norm_imbalance(linearization: Linearization) -> Tensor:
    """Largest over smallest norm of a sample's gradient, max_n |∇l_n| / min_n |∇l_n|.

    The paper's measure of how strongly EF's inversely-scaled projection distorts: EF pushes a sample with a small
    gradient as hard as one with a large gradient.

    Args:
        linearization: Model and batch.

    Returns:
        float64 scalar ≥ 1; inf if a sample's gradient is zero (and another's is not), NaN if all are.

    """
    norms = linearization.jacobian.row_norms()
    return norms.max() / norms.min()


def projections(linearization: Linearization, direction: Mapping[str, Tensor]) -> Tensor:
    """Projection of an update on each sample, J d: the rate at which it lowers the sample's loss, ⟨∇l_n, d⟩.

    EF has the same for all samples, whatever their loss (the inversely-scaled projection issue); iEF has ‖∂l_n/∂z_n‖².

    Args:
        linearization: Model and batch.
        direction: d, {parameter name: tensor}, an entry for every trainable parameter.

    Returns:
        Shape [N], float64.

    Raises:
        ValueError: If names or shapes of d do not fit.

    """
    return linearization.jacobian.matvec(direction)
