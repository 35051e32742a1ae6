"""Conjugate gradients for operators on dictionaries of tensors."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lightning_ief.linalg.vectors import dot

__all__ = ["conjugate_gradients"]


def conjugate_gradients(
    matvec: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], rhs: Mapping[str, Tensor]
) -> Iterator[tuple[dict[str, Tensor], float]]:
    """Solve A x = b for a symmetric positive semi-definite A that is given by its product with vectors.

    Hestenes and Stiefel 1952. Iterate k minimises ½ xᵀAx − bᵀx over the span of b, Ab, …, Aᵏ⁻¹b. Inner products are
    taken in float64.

    Args:
        matvec: v ↦ A v.
        rhs: b, {name: tensor}.

    Yields:
        x, a new dictionary whose tensors are overwritten by the next iteration, and ‖b − A x‖ / ‖b‖, beginning with
        x = 0 and without end unless the residual vanishes or no direction of positive curvature is left. NaN for the
        latter, and the end, once a product is not a number.

    Example:
        >>> iterates = conjugate_gradients(lambda v: {"w": 2 * v["w"]}, {"w": torch.ones(2)})
        >>> [(x["w"].tolist(), residual) for x, residual in iterates]
        [([0.0, 0.0], 1.0), ([0.5, 0.5], 0.0)]

    """
    solution = {name: torch.zeros_like(b) for name, b in rhs.items()}
    residual = {name: b.clone() for name, b in rhs.items()}
    direction = {name: b.clone() for name, b in rhs.items()}
    squared = first = float(dot(residual, residual))
    while True:
        yield dict(solution), (squared / first) ** 0.5 if first else 0.0
        if squared == 0:
            return
        product = matvec(direction)
        curvature = float(dot(direction, product))
        if not math.isfinite(curvature):
            yield dict(solution), math.nan
        if not curvature > 0:
            return
        step = squared / curvature
        for name, x in solution.items():
            x.add_(direction[name], alpha=step)
            residual[name].sub_(product[name], alpha=step)
        before, squared = squared, float(dot(residual, residual))
        for name, v in direction.items():
            v.mul_(squared / before).add_(residual[name])
