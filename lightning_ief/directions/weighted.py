"""Directions of one's own in the space of rows: d = Jᵀv for any weights v of the samples."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_ief.capture import Direction, LinearizedBatch

__all__ = ["Weights", "weighted"]

Weights: TypeAlias = Callable[[Tensor, Tensor], Any]
"""Makes v, a tensor of shape [N], from K = JJᵀ, shape [N, N], and s, shape [N]; both float64, and one's own.

By YAML, the path of a function, or of a class with `__call__` (were it annotated as a tensor, jsonargparse would take
the path of a class for that of a class of tensors).
"""


def weighted(linearization: LinearizedBatch, weights: Weights) -> Direction:
    """A weighted sum of the gradients of samples, d = Jᵀv = Σ_n v_n ∇l_n.

    EF and iEF are of this kind, v = (K + λI)⁻¹ 1 and v = (K + λI)⁻¹ s. Whatever else is made of inner products of
    gradients is exact on many ranks and with several batches, too: K and s are those of all samples, and all ranks take
    the weights that the first one has found.

    Args:
        linearization: Model and batch.
        weights: Makes v of K = JJᵀ and s, s_n = ‖∂l_n/∂z_n‖².

    Returns:
        d, {parameter name: tensor}; NaN if a loss or a weight is not finite.

    Raises:
        ValueError: If the weights are not one number for each sample.

    Example:
        >>> from lightning_ief import linearize, objectives
        >>> lin = linearize(torch.nn.Linear(3, 2), torch.randn(4, 3), torch.arange(4) % 2, objectives.CrossEntropy())
        >>> d = weighted(lin, lambda gram, s: s.clamp(max=0.5) / (gram.diagonal() + 1e-3))
        >>> sorted(d)
        ['bias', 'weight']

    """
    jacobian, s = linearization.jacobian, linearization.logit_gradient_norms
    v = weights(jacobian.gram(), s.clone())
    if getattr(v, "shape", None) != s.shape:
        found = getattr(v, "shape", type(v).__name__)
        raise ValueError(
            f"weights(gram, s) must return a tensor of {len(s)} entries, one for each sample, got {found}."
        )
    return jacobian.combine(torch.where(linearization.losses.isfinite(), v, torch.nan))
