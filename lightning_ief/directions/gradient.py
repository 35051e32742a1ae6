"""The gradient itself."""

import torch

from lightning_ief.capture import Direction, LinearizedBatch
from lightning_ief.directions.registry import register

__all__ = ["sgd"]


@register(label="SGD", color="#E69F00", linestyle=(0, (6, 1, 1, 1, 1, 1)), marker="v", damping="none")
def sgd(linearization: LinearizedBatch) -> Direction:
    """The gradient ∇L = Jᵀ1 = Σ_n ∇l_n, a sum over samples.

    Args:
        linearization: Model and batch.

    Returns:
        d, {parameter name: tensor}.

    Example:
        >>> from lightning_ief import linearize, objectives
        >>> lin = linearize(torch.nn.Linear(3, 1), torch.ones(2, 3), torch.zeros(2, 1), objectives.LeastSquares())
        >>> sorted(sgd(lin))
        ['bias', 'weight']

    """
    ones = torch.ones_like(linearization.losses, dtype=torch.float64)
    return Direction.of_rows(linearization.jacobian, ones)
