"""The per-sample Jacobian as an operator over factors, which is never formed, and directions made from its rows."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, reduce
from itertools import accumulate
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lightning_ief.capture.factors import (
    MOST_FLAT,
    Dense,
    Factor,
    Outer,
    factors_gram,
    flat_rows,
    is_cheapest_dense,
    joined,
    pairwise_sides,
    summed_rows,
    summed_squares,
    summed_weights,
)
from lightning_ief.capture.types import CaptureError
from lightning_ief.linalg.gram import InnerProducts, add_pairwise, add_products, full_precision, mirror
from lightning_ief.linalg.scaling import wide
from lightning_ief.linalg.solve import damped_least_squares, solve
from lightning_ief.linalg.vectors import address, check_same_space, restricted

__all__ = ["Addition", "Block", "Blocks", "Direction", "Jacobian", "LocalJacobian", "Sides", "memory_of"]

# So many products take no time worth mentioning in float64.
_FEW_PRODUCTS = 2**22

# Weights beyond these bounds are not left to a float32 factor of a matrix product.
_SMALLEST, _LARGEST = 1e-12, 1e12


class Sides(NamedTuple):
    """What a use of a weight has left of it, see `Jacobian.sides`; `came_back` is the index of the gradient."""

    left: Tensor
    right: Tensor
    came_back: int

    @property
    def inputs(self) -> Tensor:
        """The side that went in."""
        return self.left if self.came_back else self.right

    @property
    def gradients(self) -> Tensor:
        """The side that came back."""
        return self.right if self.came_back else self.left


class Block(NamedTuple):
    """Some consecutive samples, and their factors by parameter.

    Attributes:
        samples: Which ones, of all.
        factors: For each parameter by name, its factors; none for one that was not used (zero rows).

    """

    samples: slice
    factors: Mapping[str, Sequence[Factor]]

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.samples.stop - self.samples.start


class Addition(NamedTuple):
    """x ← β x + α y in place, for tensors by name.

    Attributes:
        into: x.
        alpha: α.
        beta: β.

    """

    into: Mapping[str, Tensor]
    alpha: Mapping[str, float]
    beta: Mapping[str, float]

    def of(self, entries: Mapping[str, Tensor]) -> None:
        """Set x for all y by name."""
        for name, y in entries.items():
            self.into[name].mul_(self.beta[name]).add_(y, alpha=self.alpha[name])

    def of_together(self, entries: Mapping[str, Tensor]) -> None:
        """The same with all at once; y may be overwritten."""
        if not entries:
            return
        xs, ys = [self.into[name] for name in entries], [*entries.values()]
        if any(self.beta[name] != 1 for name in entries):
            torch._foreach_mul_(xs, [self.beta[name] for name in entries])
        if len(steps := {self.alpha[name] for name in entries}) > 1:
            torch._foreach_mul_(ys, [self.alpha[name] for name in entries])
            steps = {1.0}
        torch._foreach_add_(xs, ys, alpha=steps.pop())


class Blocks(NamedTuple):
    """Factors of samples, one block after the other; just one unless batches were stacked, or gathered from ranks.

    Attributes:
        each: The blocks.
        like: The parameters by name: shapes, dtypes and devices of their entries.
        versions: Their version counters when they were linearised.

    """

    each: Sequence[Block]
    like: Mapping[str, Tensor]
    versions: Sequence[int]

    def restrict(self, names: Iterable[str]) -> "Blocks":
        """Those of some parameters; ValueError if there is no parameter of a name, or no name."""
        like, versions = restricted(self.like, names), dict(zip(self.like, self.versions, strict=True))
        blocks = [
            Block(block.samples, {name: block.factors[name] for name in like if name in block.factors})
            for block in self.each
        ]
        return Blocks(blocks, like, [versions[name] for name in like])

    def of(self, name: str) -> Sequence[Factor]:
        """Factors of one parameter for the samples of all blocks."""
        blocks = [block for block in self.each if block.size] or self.each[:1]  # a rank may have no sample
        parts = [(block.size, block.factors.get(name, ())) for block in blocks]
        return parts[0][1] if len(parts) == 1 else joined(parts, self.like[name].shape)

    def require_unmoved(self) -> None:
        """Raise CaptureError if the parameters have been changed since their gradients were captured."""
        if [parameter._version for parameter in self.like.values()] != [*self.versions]:
            raise CaptureError(
                "A direction was read or applied after the parameters had been changed. Read it before: form() or "
                "dict(direction) keeps what it is."
            )

    def require_same_parameters(self, other: "Blocks") -> None:
        """Require rows of the same parameters at the same values.

        Args:
            other: Those of other samples.

        Raises:
            ValueError: If they are not.

        """
        check_same_space(self.like, other.like)
        if others := [name for name, p in self.like.items() if other.like[name] is not p]:
            raise ValueError(
                f"Rows of two batches of which {others} are not the same parameters have no inner products: linearize "
                "the same model, with the same parameters under each name."
            )
        ours, theirs = (dict(zip(each.like, each.versions, strict=True)) for each in (self, other))
        if ours != theirs:
            raise ValueError(
                "The parameters have been changed between the linearizations of two batches, so that their rows are "
                "at different values: linearize both before the next step."
            )

    def require_unwritten(self) -> None:
        """Raise CaptureError if something that the rows are made of has been written to."""
        for block in self.each:
            for factors in block.factors.values():
                for factor in factors:
                    factor.require_unwritten()

    def entry(self, name: str, weights: Tensor) -> Tensor:
        """One parameter's entry of Jᵀv for weights v σ of shape [R, N]; in the dtype of the factors, one's own."""
        parts = [
            summed_weights(factors, weights[:, block.samples])
            for block in self.each
            if (factors := block.factors.get(name, ()))
        ]
        # Gradients of sums are expanded scalars, which can't be written to.
        return reduce(torch.add, parts).contiguous() if parts else torch.zeros_like(self.like[name].detach())

    def apart(self, names: Iterable[str], into: Mapping[str, Tensor], scale: float) -> list[str]:
        """Parameters whose part of Jᵀv / scale may be added to x as it is computed.

        Args:
            names: Parameters.
            into: x of all parameters.
            scale: What the weights were divided by.

        Returns:
            Those whose factors share no memory with any x, and read no parameter; none if the scale is extreme.

        """
        storages = {x.untyped_storage().data_ptr() for x in into.values()}

        def is_apart(name: str) -> bool:
            read = [f.tensors() for block in self.each for f in block.factors.get(name, ())]
            return all(x is not None and storages.isdisjoint(y.untyped_storage().data_ptr() for y in x) for x in read)

        return [name for name in names if is_apart(name)] if _SMALLEST < scale < _LARGEST else []

    def add(self, names: Iterable[str], weights: Tensor, scale: float, to: Addition) -> None:
        """Set x ← β x + α Jᵀv in place, as Jᵀv is computed.

        Args:
            names: Parameters, see `apart`.
            weights: v σ / scale, shape [R, N].
            scale: What the weights were divided by.
            to: x, α and β.

        """
        for name in names:
            rest = to.beta[name]
            for block in self.each:
                for factor in block.factors.get(name, ()):
                    own = weights[:, block.samples]
                    factor.add_weighted_sum(own, to.into[name], alpha=to.alpha[name] * scale, beta=rest)
                    rest = 1.0
            if rest != 1:
                to.into[name].mul_(rest)


class Jacobian(ABC):
    """J, the matrix whose rows are gradients of samples, held by parameter as a sum of factors.

    With one cotangent per sample (the gradient of its loss) row n is ∇l_n; with R cotangents there are R·N rows, and
    row r·N + n belongs to cotangent r of sample n. The samples are those of this process, or of many ranks: then all
    of them call the same methods, and get the same.

    Args:
        blocks: Factors that are at hand.
        scales: σ, shape [R, N], float64: the rows of the factors are those of J over σ, so that a sample with a tiny
            gradient is as far from the ends of float32 as any other.

    Attributes:
        like: The parameters by name: shapes, dtypes and devices of their entries.
        num_rows: Number of rows, R·N.

    """

    is_collective = False
    """Whether products with it exchange with other ranks, so that all of them have to ask for the same."""

    is_euclidean = True
    """Whether vᵀKv is ‖Jᵀv‖²; in another metric M ≥ I it is the norm of that one, which is no smaller."""

    def __init__(self, blocks: Blocks, scales: Tensor) -> None:
        self.blocks = blocks
        self.like = blocks.like
        self.scales = scales
        self.cotangents, self.samples = scales.shape
        self.num_rows = self.cotangents * self.samples
        # Relative rounding of the entries of J, whatever they are held in.
        self._rounding = 2.0**-53 if all(p.dtype == torch.float64 for p in self.like.values()) else 2.0**-24

    @abstractmethod
    def restrict(self, names: Iterable[str]) -> "Jacobian":
        """The columns of some parameters only; rows are shared, not copied.

        On many ranks, all of them have to call it with the same names.

        Args:
            names: Parameters, in any order; columns keep theirs.

        Returns:
            A Jacobian of as many rows.

        Raises:
            ValueError: If there is no parameter of a name, or no name.

        """

    def scaled(self, factors: Tensor) -> "Jacobian":
        """Each row times a number of its own; what the rows are made of is shared, not copied.

        Args:
            factors: One for each row, shape [RN].

        Returns:
            A Jacobian of as many rows.

        """
        found, factors = copy.copy(self), factors.double()
        found.scales = self.scales * factors.view_as(self.scales)
        for name in ("_gram", "_precise_gram"):
            if name in self.__dict__:
                found.__dict__[name] = self.__dict__[name] * factors * factors[:, None]
        return found

    def sides(self, name: str) -> list["Sides"]:
        """What the rows of a layer's weight are made of: what went in, and what came back, for each of its uses.

        Seen as a matrix [d_out, d_in], a weight's row is Σ_t leftᵀ right, added up over the uses. Linear layers and
        convolutions have what came back on the left; where the matrix stands on the right of a product, x W, it is on
        the right. Both are to be read only. On many ranks, those of the samples of all ranks are gathered.

        Args:
            name: A weight, named in `linearize(..., keep_sides=...)`.

        Returns:
            For each use left [R or 1, N, T, d_out] and right [R or 1, N, T, d_in], T positions, and which of them came
            back, 0 or 1; of an embedding, left is int64 [1, N, T], the indices of one-hot rows.

        Raises:
            ValueError: If there is no parameter of this name, or its rows are not held by their sides.

        """
        restricted(self.like, [name])
        self.require_unwritten()
        found = []
        for factor in self.blocks.of(name):
            if not isinstance(factor, Outer):
                raise ValueError(
                    f"The rows of '{name}' are not held by what went in and what came back. Name it in "
                    f"linearize(..., keep_sides=['{name}']); there are none of biases, norms, factors, of weights that "
                    "are computed from parameters, and of operations without a rule (rows: Jacobian.restrict). Several "
                    "batches must use it alike."
                )
            sides = [*factor.term[:2]]
            came_back = sides[factor.came_back]
            scales = self.scales[..., None, None]
            sides[factor.came_back] = (came_back * scales).to(came_back.dtype)
            found.append(Sides(sides[0], sides[1], factor.came_back))
        return found

    def require_unmoved(self) -> None:
        """Raise CaptureError if the parameters have been changed since their gradients were captured."""
        self.blocks.require_unmoved()

    def require_unwritten(self) -> None:
        """Raise CaptureError if something that the rows are made of has been written to."""
        self.blocks.require_unwritten()

    def gram(self, precise: bool = False) -> Tensor:
        """The Gram matrix K = JJᵀ, one's own copy; computed once.

        Args:
            precise: Accumulate in float64 throughout. Otherwise products of float32 rows are added up in float32 over
                at most 4096 columns, which is faster: the error of K_nm is about 1e-7 of √(K_nn K_mm).

        Returns:
            Shape [RN, RN], float64, symmetric.

        """
        return (self._precise_gram if precise else self._gram).clone()

    def cross_gram(self, other: "Jacobian", precise: bool = False) -> Tensor:
        """The cross-Gram matrix K_ab = J_a J_bᵀ with the rows of another batch; neither J is formed.

        Entry (n, m) is ⟨∇l_n, ∇l_m⟩ of sample n here and sample m there. Each parameter's part is computed in the form
        that is cheapest, by pairs of positions, from a few rows of the parameter at a time, or from rows that are held
        as they are; memory is bounded by a constant beyond the result.

        Args:
            other: J_b, of the same model at the same parameters; its cotangents may be others, and more or fewer.
            precise: As that of `gram`.

        Returns:
            Shape [R_a N_a, R_b N_b], float64; with itself that is K = `gram()`, up to rounding.

        Raises:
            ValueError: If J_b is of other parameters or of other values of them, or if one of the two is of samples of
                many ranks, or in a metric.

        Example:
            >>> from lightning_ief import linearize, objectives
            >>> net, objective = torch.nn.Linear(3, 2), objectives.CrossEntropy()
            >>> a, b = (linearize(net, torch.randn(n, 3), torch.arange(n) % 2, objective).jacobian for n in (4, 5))
            >>> torch.allclose(a.cross_gram(b), (a.to_dense() @ b.to_dense().T).double(), atol=1e-6)
            True

        """
        for rows in (self, other):
            if not isinstance(rows, LocalJacobian):
                raise ValueError(
                    f"cross_gram takes rows of this process alone, got a {type(rows).__name__}: linearize both batches "
                    "on one rank, before across(), and before in_metric()."
                )
        assert isinstance(self, LocalJacobian)
        assert isinstance(other, LocalJacobian)
        self.blocks.require_same_parameters(other.blocks)
        self.require_unwritten()
        other.require_unwritten()
        with full_precision(self.scales.device):
            found = self._unscaled_cross_gram(other, InnerProducts(precise))
        return found.mul_(self.scales.flatten()[:, None]).mul_(other.scales.flatten().to(found.device))

    # Read only: what is written to it would be in all later solves.
    @cached_property
    def _gram(self) -> Tensor:
        return self._compute_gram(InnerProducts())

    @cached_property
    def _precise_gram(self) -> Tensor:
        return self._compute_gram(InnerProducts(precise=True))

    def _compute_gram(self, products: InnerProducts) -> Tensor:
        """K, symmetric to the last bit."""
        self.require_unwritten()
        with full_precision(self.scales.device):
            gram = self._unscaled_gram(products)
        mirror(gram)
        scales = self.scales.flatten()
        return gram.mul_(scales).mul_(scales[:, None])

    @abstractmethod
    def _unscaled_gram(self, products: InnerProducts) -> Tensor:
        """K over σσᵀ, of which the lower triangle counts; shape [RN, RN], one's own."""

    @abstractmethod
    def unscaled_products(self, other: Any, products: InnerProducts) -> Tensor:
        """Inner products with the rows that a symmetric map of the parameters' space has made of these, over σσᵀ.

        Args:
            other: The other rows, of the same kind.
            products: How to take them.

        Returns:
            Shape [RN, RN], float64, of which the lower triangle counts.

        """

    def row_norms(self) -> Tensor:
        """Norms of the rows, |∇l_n|; shape [RN], float64."""
        return self._gram.diagonal().clamp(min=0).sqrt()

    def column_squares(self) -> dict[str, Tensor]:
        """The diagonal of JᵀJ: squares of all rows added up.

        Rows exist a few samples at a time where a sample has several positions, and not at all elsewhere.

        Returns:
            {parameter name: tensor of its shape}, float32 at least.

        """
        self.require_unwritten()
        largest = self.scales.amax()
        largest = torch.where(largest > 0, largest, 1.0)
        with full_precision(self.scales.device):
            found = self._column_squares((self.scales / largest).square())
        return {name: x.mul_(largest).mul_(largest) for name, x in found.items()}

    @abstractmethod
    def _column_squares(self, weights: Tensor) -> dict[str, Tensor]:
        """Squares of the rows over σ, added up with weights [R, N]; one's own."""

    def solve(self, rhs: Tensor, damping: float) -> "Direction":
        """The direction d = Jᵀ(JJᵀ + λI)⁻¹ b, not yet formed; see `linalg.solve.solve`.

        Args:
            rhs: b, shape [RN].
            damping: λ ≥ 0, in the units of K.

        Returns:
            d; all of it NaN if a row or b is not finite. See `damped_solve` for its coefficients.

        Raises:
            ValueError: If the shapes do not fit, λ is negative or not finite.

        """
        found, direct = solve(self._gram, self._better_gram, rhs, damping, self._rounding, self._combination)
        found.fell_back = not direct
        return found

    @property
    def _better_gram(self) -> Callable[[], Tensor] | None:
        """How to compute K where the fast one is not good enough; None if there is no better one."""
        return None if self._rounding < 2.0**-50 else lambda: self._precise_gram

    def combine(self, v: Tensor) -> "Direction":
        """The direction d = Jᵀv for v of shape [RN], not yet formed; NaN if v or a row is not finite."""
        v = v.double()
        return self._combination(v, self._gram, torch.ones((), dtype=torch.bool, device=v.device))[0]

    def _combination(self, v: Tensor, gram: Tensor, trusted: Tensor) -> tuple["Direction", bool]:
        """The direction Jᵀv, and whether v can be trusted; the host waits for the device once, for all its numbers."""
        squared = torch.dot(v, gram.mv(v)).clamp(min=0)
        largest = (v.view(self.scales.shape) * self.scales).abs().amax()
        numbers, v = self._same(torch.stack([squared.sqrt(), largest, trusted.double()]), v)
        norm, size, certain = numbers.tolist()
        if math.isnan(norm):
            v = torch.full_like(v, torch.nan)
        return Direction.of_rows(self, v, norm, size), bool(certain)

    def _same(self, numbers: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers that each rank has computed, to the last bit the same on all of them; here there is one rank."""
        return numbers, v

    def rmatvec(self, v: Tensor) -> dict[str, Tensor]:
        """Jᵀv for v of shape [RN]: {parameter name: tensor of its shape and dtype}; one's own."""
        weights, scale = self._weights(v)
        with full_precision(self.scales.device):
            return self._entries([*self.like], weights, scale)

    def add_rmatvec(
        self,
        v: Tensor,
        into: Mapping[str, Tensor],
        alpha: Mapping[str, float],
        beta: Mapping[str, float],
        largest: float | None = None,
    ) -> None:
        """Set x ← β x + α Jᵀv in place, see `Direction.add_to`; the host waits if it does not know max |v_rn σ_rn|."""
        weights, scale = self._weights(v, largest)
        with full_precision(self.scales.device):
            self._add(weights, scale, Addition(into, alpha, beta))

    def _weights(self, v: Tensor, largest: float | None = None) -> tuple[Tensor, Tensor | float]:
        """Weights [R, N] of the factors' rows, at most 1, and what they were divided by: max |v_rn σ_rn|."""
        if v.shape != (self.num_rows,):
            raise ValueError(f"Expected a vector of {self.num_rows} rows, got shape {tuple(v.shape)}.")
        self.require_unwritten()
        weights = v.double().view(self.scales.shape) * self.scales
        if largest is not None:
            return weights / (largest or 1.0), largest or 1.0
        found = weights.abs().amax()
        found = torch.where(found > 0, found, 1.0)
        return weights / found, found

    @abstractmethod
    def _entries(self, names: Sequence[str], weights: Tensor, scale: Tensor | float) -> dict[str, Tensor]:
        """Entries of Jᵀv; one's own."""

    @abstractmethod
    def _add(self, weights: Tensor, scale: Tensor | float, to: Addition) -> None:
        """Add Jᵀv in place."""

    def matvec(self, d: Mapping[str, Tensor]) -> Tensor:
        """J d, the change of each sample's loss along d, shape [RN], float64; ValueError if d lacks a parameter."""
        check_same_space(d, self.like)
        self.require_unwritten()
        with full_precision(self.scales.device):
            return self._unscaled_matvec(d) * self.scales.flatten()

    @abstractmethod
    def _unscaled_matvec(self, d: Mapping[str, Tensor]) -> Tensor:
        """J d over σ, shape [RN], float64."""

    def of_all_samples(self, x: Tensor) -> Tensor:
        """What belongs to the rows, from what belongs to those of this rank: [R, n, ...] → [RN, ...]."""
        return x.flatten(0, 1)

    def to_dense(self) -> Tensor:
        """J itself, shape [RN, P], parameters in the order of the model: for tests and tiny models."""
        self.require_unwritten()
        dense = self._unscaled_dense()
        return (dense * self.scales.view(-1, 1)).to(dense.dtype)

    @abstractmethod
    def _unscaled_dense(self) -> Tensor:
        """J over σ, shape [RN, P]."""


@final
class LocalJacobian(Jacobian):
    """J of the samples of this process.

    Args:
        blocks: The samples' factors.
        scales: σ, shape [R, N], float64.

    """

    @classmethod
    def stack(cls, parts: Sequence["LocalJacobian"]) -> "LocalJacobian":
        """Rows of several batches as those of one, r·N + n for sample n of all; ValueError if they do not fit."""
        for part in parts:
            check_same_space(part.like, parts[0].like)
        if len({part.cotangents for part in parts}) > 1:
            raise ValueError(
                f"Jacobians with {[part.cotangents for part in parts]} cotangents can't be stacked: their logits "
                "differ in shape. Pad the batches to one length."
            )
        versions = [min(each) for each in zip(*(part.blocks.versions for part in parts), strict=True)]
        starts = accumulate((part.samples for part in parts), initial=0)
        blocks = [
            Block(slice(start + block.samples.start, start + block.samples.stop), block.factors)
            for start, part in zip(starts, parts, strict=False)
            for block in part.blocks.each
        ]
        scales = torch.cat([part.scales for part in parts], dim=1)
        return cls(Blocks(blocks, parts[0].like, versions), scales)

    def restrict(self, names: Iterable[str]) -> "LocalJacobian":  # noqa: D102
        return LocalJacobian(self.blocks.restrict(names), self.scales)

    def _unscaled_gram(self, products: InnerProducts) -> Tensor:
        total = torch.zeros((self.cotangents, self.samples) * 2, dtype=torch.float64, device=self.scales.device)
        lower = total.view(self.num_rows, self.num_rows)
        flat, biases = self._flat, self._biases
        done = {*flat.sizes} if flat is not None else set()
        done |= {bias for name, bias in biases.items() if name not in done}
        if flat is not None:
            add_products(lower, flat.rows, products)
        for name in self.like:
            if name in done or not (factors := self.blocks.of(name)):
                continue
            sides = pairwise_sides(factors)
            if sides is None or sides[0].device != total.device:
                total += factors_gram(factors, products).to(total.device)
                continue
            left, right = (x.double() for x in sides) if products.precise else sides
            add_pairwise(lower, left, right, with_bias=name in biases)
        return lower

    def unscaled_products(self, other: "LocalJacobian", products: InnerProducts) -> Tensor:  # noqa: D102
        return self._products(self.like, other, products)

    def _products(self, names: Iterable[str], other: "LocalJacobian", products: InnerProducts) -> Tensor:
        """Inner products of some parameters' rows over σ with those of other samples, [R_a N_a, R_b N_b]."""
        shape = (self.cotangents, self.samples, other.cotangents, other.samples)
        total = torch.zeros(shape, dtype=torch.float64, device=self.scales.device)
        for name in names:
            if (ours := self.blocks.of(name)) and (theirs := other.blocks.of(name)):
                total += factors_gram(ours, products, theirs).to(total.device)
        return total.view(self.num_rows, other.num_rows)

    def _unscaled_cross_gram(self, other: "LocalJacobian", products: InnerProducts) -> Tensor:
        """J_a J_bᵀ over σ_a σ_bᵀ, shape [R_a N_a, R_b N_b], one's own."""
        ours, theirs = self._flat, other._flat
        if ours is None or theirs is None or [*ours.sizes] != [*theirs.sizes]:  # of unequal numbers of samples
            return self._products(self.like, other, products)
        a, b = ours.rows, theirs.rows.to(ours.rows.device)
        dtype = torch.promote_types(a.dtype, b.dtype)
        return products(a.to(dtype), b.to(dtype)).double() + self._products(
            [name for name in self.like if name not in ours.sizes], other, products
        )

    @cached_property
    def _flat(self) -> "_Flat | None":
        """Rows of the parameters for which they are cheapest as they are, and of all where these are few."""
        left = MOST_FLAT // max(1, self.num_rows)
        elements = {name: parameter.numel() for name, parameter in self.like.items()}
        everything = sum(elements.values()) <= min(left, 4 * self.num_rows)
        biases = () if everything else self._biases.values()
        blocks = [block for block in self.blocks.each if block.size]
        names: list[str] = []
        for name in sorted(elements, key=elements.__getitem__):
            used = [factors for block in blocks if (factors := block.factors.get(name, ()))]
            left -= elements[name] if used else 0
            if left < 0:
                break
            if not used or name in biases:
                continue
            if everything or all(is_cheapest_dense(factors, self.samples) for factors in used):
                names.append(name)
        if not names:
            return None
        device = self.like[names[0]].device
        sizes = {name: elements[name] for name in names if self.like[name].device == device}
        parts = []
        for block in blocks:
            none = (self.cotangents, block.size)
            parts.append(
                flat_rows(
                    [
                        block.factors.get(name) or [Dense(torch.zeros(*none, *self.like[name].shape, device=device))]
                        for name in sizes
                    ]
                )
            )
        whole = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(0, 1)
        whole = whole.to(self.scales.device)
        few = self.num_rows * whole.numel() <= _FEW_PRODUCTS
        # Hardly more parameters than rows: these depend on each other nearly, so that float32 would not do anyway.
        return _Flat(sizes, whole.double() if few or everything else whole)

    @cached_property
    def _biases(self) -> dict[str, str]:
        """Weights whose K is cheapest by pairs of samples → the bias whose rows are the weight's left side."""
        factors = self.blocks.each[0].factors
        if len(self.blocks.each) > 1 or self.cotangents > 1:
            return {}
        rows = {memory_of(each[0].flat): name for name, each in factors.items() if each and isinstance(each[0], Dense)}
        found: dict[str, str] = {}
        for name, each in factors.items():
            if len(each) == 1 and isinstance(each[0], Outer):
                left = each[0].term.left
                # Two layers whose outputs are added have one gradient, of which a bias takes part once.
                bias = rows.get(memory_of(left)) if left.shape[2] == 1 and left.device == self.scales.device else None
                if bias in found.values():
                    bias = None
                if bias is None or len(factors[bias]) > 1 or is_cheapest_dense(each, self.samples):
                    continue
                if pairwise_sides(each) is not None:
                    found[name] = bias
        return found

    def row_norms(self) -> Tensor:  # noqa: D102
        rows = self._all_rows_at_hand if "_gram" not in self.__dict__ else None
        if rows is None:
            return super().row_norms()
        self.require_unwritten()
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) * self.scales.flatten()

    def solve(self, rhs: Tensor, damping: float) -> "Direction":  # noqa: D102
        found = self._solved_by_columns(rhs, damping)
        return super().solve(rhs, damping) if found is None else found

    @property
    def _better_gram(self) -> Callable[[], Tensor] | None:
        if (rows := self._all_rows_at_hand) is None or self._rounding < 2.0**-50:
            return super()._better_gram
        return None if rows.dtype == torch.float64 else self._gram_of_wide_rows

    def _gram_of_wide_rows(self) -> Tensor:
        """K of rows in float64, which are kept for Jᵀv."""
        assert self._flat is not None
        self._flat = self._flat._replace(rows=self._flat.rows.double())
        self._all_rows_at_hand, self._gram = self._flat.rows, self._compute_gram(InnerProducts())
        return self._gram

    def _solved_by_columns(self, rhs: Tensor, damping: float) -> "Direction | None":
        """The direction, formed, from (JᵀJ + λI) d = Jᵀb; None where there is no use in it, or no certainty."""
        rows = self._all_rows_at_hand
        if rows is None or rows.shape[1] >= self.num_rows:
            return None
        self.require_unwritten()
        with full_precision(rows.device):
            d, by_cholesky = damped_least_squares(rows.double() * self.scales.view(-1, 1), rhs, damping, self._rounding)
        if d is None:
            return None
        assert self._flat is not None
        entries = dict(zip(self._flat.sizes, d.split([*self._flat.sizes.values()]), strict=True))
        found = Direction.of(
            {
                name: entries[name].view(p.shape).to(p.detach(), copy=True) if name in entries else torch.zeros_like(p)
                for name, p in self.like.items()
            }
        )
        found.fell_back = not by_cholesky
        return found

    @cached_property
    def _all_rows_at_hand(self) -> Tensor | None:
        """Rows over σ of all parameters that have any, [RN, P]; None if they are not all there as they are."""
        flat = self._flat
        used = {name for block in self.blocks.each for name, factors in block.factors.items() if factors}
        return flat.rows if flat is not None and flat.sizes.keys() == used else None

    def _entries(self, names: Sequence[str], weights: Tensor, scale: Tensor | float) -> dict[str, Tensor]:
        together = self._flat.sizes if self._flat is not None else ()
        return {name: x.clone() if name in together else x for name, x in self._views(names, weights, scale).items()}

    def _views(self, names: Sequence[str], weights: Tensor, scale: Tensor | float) -> dict[str, Tensor]:
        """Entries of Jᵀv; those of flat rows are views of one tensor."""
        root = scale**0.5  # put back in two halves: the whole may be infinite in float32
        found = self._flat_entries(weights, root) if self._flat is not None else {}
        for name in names:
            if name not in found:
                found[name] = self.blocks.entry(name, weights).mul_(root).mul_(root)
        return {name: found[name].to(self.like[name].device, self.like[name].dtype) for name in names}

    def _flat_entries(self, weights: Tensor, root: Tensor | float) -> dict[str, Tensor]:
        """Entries of Jᵀv for all flat rows, in the dtype of their parameters if they have one in common."""
        assert self._flat is not None
        sizes, rows = self._flat
        whole = (weights.flatten().to(rows.dtype) @ rows).mul_(root).mul_(root)
        dtypes = {self.like[name].dtype for name in sizes}
        entries = (whole.to(dtypes.pop()) if len(dtypes) == 1 else whole).split([*sizes.values()])
        return {name: x.view(self.like[name].shape) for name, x in zip(sizes, entries, strict=True)}

    def _add(self, weights: Tensor, scale: Tensor | float, to: Addition) -> None:
        together = [name for name in to.into if self._flat is not None and name in self._flat.sizes]
        factor = float(scale)
        direct = self.blocks.apart([name for name in to.into if name not in together], to.into, factor)
        # What reads the parameters comes first, while they are as they were.
        formed = self._views([name for name in to.into if name not in direct], weights, scale)
        to.of_together({name: formed.pop(name) for name in together})
        to.of(formed)
        self.blocks.add(direct, weights, factor, to)

    def _unscaled_matvec(self, d: Mapping[str, Tensor]) -> Tensor:
        total, flat = torch.zeros_like(self.scales), self._flat
        if flat is not None:
            part = torch.cat([d[name].flatten() for name in flat.sizes]).to(flat.rows)
            total += flat.rows.mv(part).view_as(total)
        for block in self.blocks.each:
            for name, factors in block.factors.items():
                for factor in factors if flat is None or name not in flat.sizes else ():
                    total[:, block.samples] += factor.dot(d[name]).double()
        return total.flatten()

    def _column_squares(self, weights: Tensor) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(p.detach(), dtype=wide(p.dtype)) for name, p in self.like.items()}
        for block in self.blocks.each:
            for name, factors in block.factors.items():
                if factors and name in found:
                    found[name] += summed_squares(factors, weights[:, block.samples])
        return found

    def _unscaled_dense(self) -> Tensor:
        columns = []
        for name, p in self.like.items():
            rows = torch.zeros(self.cotangents, self.samples, p.numel(), dtype=p.dtype, device=p.device)
            for block in self.blocks.each:
                if factors := block.factors.get(name, ()):
                    found = summed_rows(factors, slice(0, block.size))
                    rows[:, block.samples] = found.reshape(self.cotangents, block.size, -1).to(rows.dtype)
            columns.append(rows.flatten(0, 1))
        return torch.cat(columns, dim=1)


class _Flat(NamedTuple):
    """Rows of some parameters side by side, [R N, elements of all of them], and the elements of each."""

    sizes: dict[str, int]
    rows: Tensor


def memory_of(x: Tensor) -> tuple[Any, ...]:
    """What two tensors [1, N, (1,) elements] have in common that show the same numbers."""
    return (x.data_ptr(), x.shape[1], x.shape[-1], x.dtype, x.device) if x.is_contiguous() else (id(x),)


class _Rows(NamedTuple):
    """What a direction is formed from, Jᵀv; `largest` is max |v_rn σ_rn|, None if the host does not know it."""

    jacobian: Jacobian
    coefficients: Tensor
    norm: float | None
    largest: float | None


@final
class Direction(Mapping[str, Tensor]):
    """d, a mapping {parameter name: tensor} that is formed when it is first read; a step is θ ← θ − lr · d.

    An optimizer applies it in place without forming it (`add_to`). Either lets the Jacobian go, from whose rows it is
    made. On many ranks, where forming is a collective, call `form` on all of them before reading.

    Args:
        names: The parameters.
        entries: The tensors, where they are there already.
        rows: What they are formed from otherwise.

    """

    fell_back: bool | None = None
    """Whether the fast solve was too ill-conditioned and a slower one made d; None if it was not solved for by rows."""

    def __init__(self, names: Mapping[str, Any], entries: dict[str, Tensor] | None, rows: _Rows | None) -> None:
        self._names = dict.fromkeys(names)
        self._entries = entries
        self._rows = rows

    @classmethod
    def of(cls, entries: Mapping[str, Tensor]) -> "Direction":
        """Make a direction of tensors by name; one that is a direction already stays as it is."""
        return entries if isinstance(entries, Direction) else cls(entries, dict(entries), None)

    @classmethod
    def of_rows(
        cls, jacobian: Jacobian, coefficients: Tensor, norm: float | None = None, largest: float | None = None
    ) -> "Direction":
        """Make d = Jᵀv for v of shape [RN], not formed; with ‖d‖ and max |v_rn σ_rn| as far as they are known."""
        return cls(jacobian.like, None, _Rows(jacobian, coefficients, norm, largest))

    @property
    def known_norm(self) -> float | None:
        """‖d‖ where it is known without its entries; None once they are there."""
        return None if self._rows is None or not self._rows.jacobian.is_euclidean else self._rows.norm

    @property
    def norm_bound(self) -> float | None:
        """‖d‖ or more, 0 only with it, where that is known without the entries; None once they are there."""
        return None if self._rows is None else self._rows.norm

    @property
    def coefficients(self) -> Tensor | None:
        """Weights v of the rows, d = Jᵀv, shape [RN], one's own; None once the entries are there."""
        return None if self._rows is None else self._rows.coefficients.clone()

    def form(self) -> "Direction":
        """Form the entries, if they are not there yet; on many ranks all of them have to call it.

        Returns:
            The direction itself.

        Raises:
            CaptureError: If the parameters have been changed since, if it was applied, or if parameters are sharded.

        """
        if self._entries is None:
            with torch.inference_mode(False):  # tensors as all others, wherever they are first read
                jacobian, coefficients, *_ = self._unmoved_rows()
                self._entries = jacobian.rmatvec(coefficients)
            self._rows = None
        return self

    def add_to(self, into: Mapping[str, Tensor], alpha: Mapping[str, float], beta: Mapping[str, float]) -> None:
        """Add the direction in place, x ← β x + α d, without forming it; on many ranks all of them have to call it.

        Args:
            into: x, {parameter name: tensor}; names that are missing are left out.
            alpha: α by name.
            beta: β by name.

        Raises:
            CaptureError: If the parameters have been changed since, or if it was applied already.

        """
        if self._entries is not None:
            storages = {address(x) for x in into.values()}
            for name in into:
                if address(self._entries[name]) in storages:  # it would change on the way
                    self._entries[name] = self._entries[name].clone()
            Addition(into, alpha, beta).of({name: self._entries[name] for name in into})
            return
        jacobian, coefficients, _, largest = self._unmoved_rows()
        self._rows = None
        jacobian.add_rmatvec(coefficients, into, alpha, beta, largest)

    def _unmoved_rows(self) -> _Rows:
        if self._rows is None:
            raise CaptureError("A direction was read after it had been applied in place. Call form() on it before.")
        self._rows.jacobian.require_unmoved()
        return self._rows

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._entries is None:
            if self._rows is not None and self._rows.jacobian.is_collective:
                raise CaptureError("A direction of many ranks was read before all of them had called form() on it.")
            self.form()
        assert self._entries is not None
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __reduce__(self) -> tuple[Any, ...]:
        return Direction.of, (dict(self),)

    def __repr__(self) -> str:
        state = "formed" if self._entries is not None else "not formed" if self._rows is not None else "applied"
        return f"<Direction of {len(self)} parameters, {state}>"
