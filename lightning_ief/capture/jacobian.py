"""The per-sample Jacobian as an operator over factors: it is never formed."""

from collections.abc import Mapping, Sequence
from functools import cached_property, reduce
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ief.capture.factors import Factor, factors_gram, joined, summed_rows, summed_weights
from lightning_ief.linalg.gram import InnerProducts, full_precision
from lightning_ief.linalg.solve import damped_solve, tentative_solve
from lightning_ief.linalg.vectors import check_same_space

__all__ = ["Block", "Jacobian", "RowCombination"]

# Smallest squared pivot of the unit-diagonal Gram for which its error is harmless: 1e-7 from float32 rows, else 1e-16.
_HARMLESS, _HARMLESS_DOUBLE = 1e-2, 1e-4

# Weights beyond these bounds are not left to a float32 factor of a matrix product.
_SMALLEST, _LARGEST = 1e-12, 1e12


class Jacobian:
    """J, the matrix whose rows are gradients of samples, held by parameter as a sum of factors.

    With one cotangent per sample (the gradient of its loss) row n is ∇l_n; with R cotangents there are R·N rows, and
    row r·N + n belongs to cotangent r of sample n.

    Args:
        factors: For each parameter by name, its factors; none for a parameter that was not used (zero rows).
        like: The parameters by name: shapes, dtypes and devices of their entries.
        scales: σ, shape [R, N], float64: the rows of the factors are those of J over σ, so that a sample with a tiny
            gradient is as far from the ends of float32 as any other.

    Attributes:
        blocks: The samples' factors, one block of samples after the other; just one unless Jacobians were stacked.

    """

    def __init__(self, factors: Mapping[str, Sequence[Factor]], like: Mapping[str, Tensor], scales: Tensor) -> None:
        self.like = like
        self.scales = scales
        self.cotangents, self.samples = scales.shape
        self.blocks = [Block(slice(0, self.samples), factors)]

    @classmethod
    def stack(cls, parts: Sequence["Jacobian"]) -> "Jacobian":
        """Stack the rows of several batches; nothing is copied.

        Args:
            parts: Jacobians of the same model by the same parameters, with as many cotangents.

        Returns:
            Row r·N + n belongs to cotangent r of sample n, counted through all parts.

        Raises:
            ValueError: If they do not fit together.

        """
        for part in parts:
            check_same_space(part.like, parts[0].like)
        if len({part.cotangents for part in parts}) > 1:
            raise ValueError(
                f"Jacobians with {[part.cotangents for part in parts]} cotangents can't be stacked: their logits "
                "differ in shape. Pad the batches to one length."
            )
        stacked = cls({}, parts[0].like, torch.cat([part.scales for part in parts], dim=1))
        starts = accumulate((part.samples for part in parts), initial=0)
        stacked.blocks = [
            Block(slice(start + block.samples.start, start + block.samples.stop), block.factors)
            for start, part in zip(starts, parts, strict=False)
            for block in part.blocks
        ]
        return stacked

    @property
    def num_rows(self) -> int:
        """Number of rows, R·N."""
        return self.samples * self.cotangents

    def gram(self, precise: bool = False) -> Tensor:
        """The Gram matrix K = JJᵀ; computed once.

        Args:
            precise: Accumulate in float64 throughout. Otherwise products of float32 rows are added up in float32 over
                at most 4096 columns, which is faster: the error of K_nm is about 1e-7 of √(K_nn K_mm).

        Returns:
            Shape [RN, RN], float64, symmetric.

        """
        return self._precise_gram if precise else self._gram

    @cached_property
    def _gram(self) -> Tensor:
        return self._compute_gram(InnerProducts())

    @cached_property
    def _precise_gram(self) -> Tensor:
        return self._compute_gram(InnerProducts(precise=True))

    def _compute_gram(self, products: InnerProducts) -> Tensor:
        total = self._no_gram()
        with full_precision(total.device):
            for name, parameter in self.like.items():
                parts = [(b.samples.stop - b.samples.start, b.factors.get(name, ())) for b in self.blocks]
                factors = parts[0][1] if len(parts) == 1 else joined(parts, parameter.shape, self.cotangents)
                if factors:
                    total += factors_gram(factors, products).to(total.device)
        return self._scaled(total)

    def _no_gram(self) -> Tensor:
        return torch.zeros((self.cotangents, self.samples) * 2, dtype=torch.float64, device=self.scales.device)

    def _scaled(self, gram: Tensor) -> Tensor:
        """K from K over σσᵀ; symmetric to the last bit."""
        flat, scales = gram.view(self.num_rows, self.num_rows), self.scales.flatten()
        return (flat + flat.T).mul_(scales / 2).mul_(scales[:, None])

    def row_norms(self) -> Tensor:
        """Norms of the rows, |∇l_n|.

        Returns:
            Shape [RN], float64.

        """
        return self.gram().diagonal().clamp(min=0).sqrt()

    def solve(self, rhs: Tensor, damping: float) -> "RowCombination":
        """The direction d = Jᵀ(JJᵀ + λI)⁻¹ b, not yet formed.

        The fast Gram is used where it is well-conditioned; where it is not, its error would be amplified, and it is
        computed anew in float64. With a well-conditioned one, the host waits for the device a single time.

        Args:
            rhs: b, shape [RN].
            damping: λ ≥ 0, in the units of K.

        Returns:
            d; all of it NaN if a row or b is not finite. See `damped_solve` for its coefficients.

        Raises:
            ValueError: If the shapes do not fit, λ is negative or not finite.

        """
        double = all(parameter.dtype == torch.float64 for parameter in self.like.values())
        pivot = _HARMLESS_DOUBLE if double else _HARMLESS
        v, trusted = tentative_solve(self.gram(), rhs, damping, pivot)
        found, certain = self._combined(v, self.gram(), trusted)
        if not certain:
            gram = self.gram() if double else self.gram(precise=True)
            rounding = torch.finfo(torch.float64 if double else torch.float32).eps / 2
            found, _ = self._combined(damped_solve(gram, rhs, damping, rounding), gram, trusted)
        return found

    def _combined(self, v: Tensor, gram: Tensor, trusted: Tensor) -> tuple["RowCombination", bool]:
        """Jᵀv with what the host needs to know of it, and whether v can be trusted: all in one reading."""
        squared = (v @ gram @ v).clamp(min=0)
        largest = (v.view(self.scales.shape) * self.scales).abs().amax()
        agreed = self._agreed(torch.cat([torch.stack([squared.sqrt(), largest, trusted.double()]), v]))
        norm, size, certain = agreed[:3].tolist()
        return RowCombination(self, agreed[3:], norm, size), bool(certain)

    def _agreed(self, numbers: Tensor) -> Tensor:
        """What all who hold this Jacobian go on with."""
        return numbers

    def rmatvec(self, v: Tensor) -> dict[str, Tensor]:
        """Jᵀv.

        Args:
            v: Shape [RN].

        Returns:
            {parameter name: tensor of its shape and dtype}.

        Raises:
            ValueError: If v has another shape.

        """
        weights, scale = self._weights(v)
        with full_precision(self.scales.device):
            return self._entries(list(self.like), weights, scale)

    def add_rmatvec(
        self,
        v: Tensor,
        into: Mapping[str, Tensor],
        alpha: Mapping[str, float],
        beta: Mapping[str, float],
        largest: float | None = None,
    ) -> None:
        """Add Jᵀv in place, x ← β x + α Jᵀv, without forming it where that is possible.

        The entries may be the parameters themselves; the Jacobian is of no use afterwards.

        Args:
            v: Shape [RN].
            into: x, {parameter name: tensor}; names that are missing are left out.
            alpha: α by name.
            beta: β by name.
            largest: max |v_rn σ_rn| if it is known; otherwise the host waits for the device.

        Raises:
            ValueError: If v has another shape.

        """
        weights, scale = self._weights(v)
        factor = float(scale) if largest is None else largest or 1.0
        in_range = _SMALLEST < factor < _LARGEST
        storages = {x.untyped_storage().data_ptr() for x in into.values()}
        direct: list[str] = []
        with full_precision(self.scales.device):
            # What reads the parameters comes first, while they are as they were.
            for name in into:
                if in_range and self._is_apart(name, storages):
                    direct.append(name)
            formed = self._entries([name for name in into if name not in direct], weights, scale)
            for name, entry in formed.items():
                into[name].mul_(beta[name]).add_(entry, alpha=alpha[name])
            for name in direct:
                rest = beta[name]
                for block in self.blocks:
                    for each in block.factors.get(name, ()):
                        own = weights[:, block.samples]
                        each.add_weighted_sum(own, into[name], alpha=alpha[name] * factor, beta=rest)
                        rest = 1.0
                if rest != 1:
                    into[name].mul_(rest)

    def _is_apart(self, name: str, storages: set[int]) -> bool:
        """Whether the factors of a parameter share no memory with these storages, and read no parameter."""
        return all(_is_apart(f, storages) for block in self.blocks for f in block.factors.get(name, ()))

    def _weights(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [R, N] of the factors' rows, at most 1, and what they were divided by."""
        if v.shape != (self.num_rows,):
            raise ValueError(f"Expected a vector of {self.num_rows} rows, got shape {tuple(v.shape)}.")
        weights = v.double().view(self.scales.shape) * self.scales
        scale = weights.abs().amax()
        scale = torch.where(scale > 0, scale, 1.0)
        return weights / scale, scale

    def _entries(self, names: Sequence[str], weights: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Entries of Jᵀv."""
        root = scale.sqrt()  # put back in two halves: the whole may be infinite in float32
        found = {name: self.weighted_entry(name, weights) for name in names}
        return {name: x.mul_(root).mul_(root).to(self.like[name].dtype) for name, x in found.items()}

    def weighted_entry(self, name: str, weights: Tensor) -> Tensor:
        """One parameter's entry of Jᵀv.

        Args:
            name: The parameter.
            weights: v σ, shape [R, N].

        Returns:
            A tensor of its shape, in the dtype of the factors; one's own.

        """
        parts = [
            summed_weights(factors, weights[:, block.samples])
            for block in self.blocks
            if (factors := block.factors.get(name, ()))
        ]
        return reduce(torch.add, parts) if parts else torch.zeros_like(self.like[name].detach())

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
        total = torch.zeros_like(self.scales)
        with full_precision(self.scales.device):
            for block in self.blocks:
                for name, factors in block.factors.items():
                    for factor in factors:
                        total[:, block.samples] += factor.dot(d[name]).double()
        return (total * self.scales).flatten()

    def to_dense(self) -> Tensor:
        """J itself, for tests and tiny models: N·P numbers.

        Returns:
            Shape [RN, P], parameters in the order of their names in the model.

        """
        columns = []
        for name, parameter in self.like.items():
            rows = torch.zeros(
                self.cotangents, self.samples, parameter.numel(), dtype=parameter.dtype, device=parameter.device
            )
            for block in self.blocks:
                if factors := block.factors.get(name, ()):
                    length = block.samples.stop - block.samples.start
                    found = summed_rows(factors, slice(0, length))
                    rows[:, block.samples] = found.reshape(self.cotangents, length, -1).to(rows.dtype)
            columns.append(rows.flatten(0, 1))
        dense = torch.cat(columns, dim=1)
        return (dense * self.scales.view(-1, 1)).to(dense.dtype)


class Block(NamedTuple):
    """Factors of some consecutive samples.

    Attributes:
        samples: Which.
        factors: Their factors by parameter.

    """

    samples: slice
    factors: Mapping[str, Sequence[Factor]]


class RowCombination(NamedTuple):
    """d = Jᵀv, a combination of rows: N numbers, from which the P entries can be formed or applied in place.

    Attributes:
        jacobian: J.
        coefficients: v, shape [RN], float64.
        norm: ‖d‖, from the Gram: ‖d‖² = vᵀKv.
        largest: max |v_rn σ_rn|, the largest weight of a factor's row.

    """

    jacobian: Jacobian
    coefficients: Tensor
    norm: float
    largest: float

    def form(self) -> dict[str, Tensor]:
        """Form the direction.

        Returns:
            d, {parameter name: tensor}.

        """
        return self.jacobian.rmatvec(self.coefficients)

    def add_to(self, into: Mapping[str, Tensor], alpha: Mapping[str, float], beta: Mapping[str, float]) -> None:
        """Add the direction in place, x ← β x + α d; see `Jacobian.add_rmatvec`.

        Args:
            into: x, {parameter name: tensor}.
            alpha: α by name.
            beta: β by name.

        """
        self.jacobian.add_rmatvec(self.coefficients, into, alpha, beta, self.largest)


def _is_apart(factor: Factor, storages: set[int]) -> bool:
    """Whether a factor shares no memory with the tensors of these storages, and reads no parameter."""
    tensors = factor.tensors()
    return tensors is not None and not any(x.untyped_storage().data_ptr() in storages for x in tensors)
