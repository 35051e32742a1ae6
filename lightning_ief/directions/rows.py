"""Directions in the span of per-sample gradients, before they are formed."""

from typing import NamedTuple

from torch import Tensor

from lightning_ief.capture import Jacobian

__all__ = ["RowCombination"]


class RowCombination(NamedTuple):
    """d = Jᵀv, a combination of rows: N numbers, from which the P entries can be formed or applied in place.

    Attributes:
        jacobian: J.
        coefficients: v, shape [RN].

    """

    jacobian: Jacobian
    coefficients: Tensor

    def form(self) -> dict[str, Tensor]:
        """Form the direction.

        Returns:
            d, {parameter name: tensor}.

        """
        return self.jacobian.rmatvec(self.coefficients)

    def norm(self) -> Tensor:
        """Norm of the direction, from the Gram: ‖d‖² = vᵀKv.

        Returns:
            float64 scalar.

        """
        v = self.coefficients.double()
        return (v @ self.jacobian.gram() @ v).clamp(min=0).sqrt()
