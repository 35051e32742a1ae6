"""The per-sample Jacobian as an operator over factors: it is never formed."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_ief.capture.factors import Factor, factors_gram, summed_rows, summed_weights
from lightning_ief.linalg.vectors import check_same_space

__all__ = ["Jacobian"]


class Jacobian:
    """J, the matrix whose rows are gradients of samples, held by parameter as a sum of factors.

    With one cotangent per sample (the gradient of its loss) row n is ∇l_n; with R cotangents there are R·N rows, and
    row r·N + n belongs to cotangent r of sample n.

    Args:
        factors: For each parameter by name, its factors; none for a parameter that was not used (zero rows).
        like: The parameters by name: shapes, dtypes and devices of their entries.
        samples: N.
        cotangents: R.

    """

    def __init__(
        self, factors: Mapping[str, Sequence[Factor]], like: Mapping[str, Tensor], samples: int, cotangents: int = 1
    ) -> None:
        self.factors = factors
        self.like = like
        self.samples = samples
        self.cotangents = cotangents

    @property
    def num_rows(self) -> int:
        """Number of rows, R·N."""
        return self.samples * self.cotangents

    def gram(self) -> Tensor:
        """The Gram matrix K = JJᵀ; computed once.

        Returns:
            Shape [RN, RN], float64, symmetric.

        """
        return self._gram

    @cached_property
    def _gram(self) -> Tensor:
        device = next(iter(self.like.values())).device
        total = torch.zeros((self.cotangents, self.samples) * 2, dtype=torch.float64, device=device)
        for factors in self.factors.values():
            if factors:
                total += factors_gram(factors).to(device)
        flat = total.reshape(self.num_rows, self.num_rows)
        return (flat + flat.T) / 2

    def row_norms(self) -> Tensor:
        """Norms of the rows, |∇l_n|.

        Returns:
            Shape [RN], float64.

        """
        return self.gram().diagonal().clamp(min=0).sqrt()

    def rmatvec(self, v: Tensor) -> dict[str, Tensor]:
        """Jᵀv.

        Args:
            v: Shape [RN].

        Returns:
            {parameter name: tensor of its shape and dtype}.

        Raises:
            ValueError: If v has another shape.

        """
        if v.shape != (self.num_rows,):
            raise ValueError(f"Expected a vector of {self.num_rows} rows, got shape {tuple(v.shape)}.")
        # v may reach beyond float32 where gradients are tiny: its scale is taken out and put back at the end.
        scale = v.abs().amax()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        weights = (v / scale).view(self.cotangents, self.samples)
        root = scale.sqrt()  # put back in two halves: the whole may be infinite in float32
        result = {}
        for name, parameter in self.like.items():
            factors = self.factors.get(name, ())
            if factors:
                total = summed_weights(factors, weights)
                result[name] = total.mul_(root).mul_(root).to(parameter.dtype)
            else:
                result[name] = torch.zeros_like(parameter.detach())
        return result

    def matvec(self, d: Mapping[str, Tensor]) -> Tensor:
        """J d, the first-order change of each sample's loss along d.

        Args:
            d: {parameter name: tensor}, an entry for every parameter.

        Returns:
            Shape [RN], float64.

        Raises:
            ValueError: If names or shapes of d do not fit.

        """
        check_same_space(d, self.like)
        total = torch.zeros(self.cotangents, self.samples, dtype=torch.float64, device=next(iter(d.values())).device)
        for name, factors in self.factors.items():
            for factor in factors:
                total += factor.dot(d[name]).double()
        return total.flatten()

    def to_dense(self) -> Tensor:
        """J itself, for tests and tiny models: N·P numbers.

        Returns:
            Shape [RN, P], parameters in the order of their names in the model.

        """
        columns = []
        for name, parameter in self.like.items():
            factors = self.factors.get(name, ())
            if factors:
                rows = summed_rows(factors, slice(0, self.samples)).reshape(self.num_rows, -1)
            else:
                rows = torch.zeros(self.num_rows, parameter.numel(), dtype=parameter.dtype, device=parameter.device)
            columns.append(rows)
        return torch.cat(columns, dim=1)
