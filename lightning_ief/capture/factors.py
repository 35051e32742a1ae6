"""Factors: how the per-sample gradient of one parameter through one use is held.

A factor answers for the rows G_rn (cotangent r, sample n) of one parameter, in the layout of `linalg.gram`: arrays
start with [R, N]. It can always produce a few samples' rows densely; what it can do better than that, it overrides.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_ief.capture.recorder import version_of
from lightning_ief.capture.types import CaptureError
from lightning_ief.linalg.gram import (
    SINGLE,
    Form,
    InnerProducts,
    OuterProducts,
    cheapest_form,
    columns_gram,
    dense_gram,
    num_cotangents,
    pairwise_gram,
    sizes_of,
)
from lightning_ief.linalg.scaling import normalised, upcast, wide

__all__ = [
    "MOST_FLAT",
    "Dense",
    "Factor",
    "Outer",
    "PerOperation",
    "PulledBack",
    "factors_gram",
    "flat_rows",
    "is_cheapest_dense",
    "outer",
    "pairwise_sides",
    "random_state",
    "summed_squares",
]

# Elements of per-sample gradients that may exist at once: 2²⁵ float32 are 128 MiB.
_CHUNK = 2**25

# Elements of rows of all parameters that are laid side by side: 2²³ doubles are 64 MiB.
MOST_FLAT = 2**23

# Elements of rows of one parameter beyond which a copy costs more than an operation: 2¹⁸ float32 are 1 MiB.
_LARGE = 2**18


class Factor(ABC):
    """Per-sample gradients of one parameter through one use.

    Attributes:
        shape: Shape of the parameter.
        cotangents: R.
        samples: N.

    """

    shape: torch.Size
    cotangents: int
    samples: int
    _made_from: Sequence[tuple[Tensor, int]] = ()

    def require_unwritten(self) -> None:
        """Raise CaptureError if a tensor that the rows are made of, such as an input of the model, was written to."""
        for x, version in self._made_from:
            if version_of(x) != version:
                raise CaptureError(
                    f"A tensor of shape {tuple(x.shape)} that per-sample gradients are computed from, such as an input "
                    "of the model, was changed in place after the batch had been linearised. Put the next batch into "
                    "another tensor, or read what you need before."
                )

    @abstractmethod
    def rows(self, chunk: slice) -> Tensor:
        """The rows of some samples.

        Args:
            chunk: Which samples.

        Returns:
            Shape [R, n, *shape].

        """

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Jᵀv, the part of this use.

        Args:
            weights: v, shape [R, N].

        Returns:
            Σ_rn v_rn G_rn, of the parameter's shape.

        """
        return sum(  # type: ignore[return-value]  # there is at least one chunk
            torch.einsum("rn...,rn->...", rows, weights[:, chunk].to(rows.dtype))
            for chunk in self.chunks()
            for rows in [self.rows(chunk)]
        )

    def add_weighted_sum(self, weights: Tensor, into: Tensor, alpha: float, beta: float) -> None:
        """Add this use's part of Jᵀv to a tensor in place, into ← β into + α Jᵀv.

        Args:
            weights: v, shape [R, N].
            into: A tensor of the parameter's shape.
            alpha: α.
            beta: β.

        """
        into.mul_(beta).add_(self.weighted_sum(weights), alpha=alpha)

    def tensors(self) -> Sequence[Tensor] | None:
        """What Jᵀv is computed from.

        Returns:
            Tensors; None if parameters themselves are read, too.

        """
        return None

    def dot(self, direction: Tensor) -> Tensor:
        """J d, the part of this use.

        Args:
            direction: d, of the parameter's shape.

        Returns:
            ⟨G_rn, d⟩, shape [R, N].

        """
        rows = (_flat(self.rows(chunk)) for chunk in self.chunks())
        return torch.cat([each @ direction.flatten().to(each.dtype) for each in rows], dim=1)

    def chunks(self) -> list[slice]:
        """Samples, a few at a time, so that their rows stay within bounds.

        Returns:
            Consecutive slices that cover all samples.

        """
        step = max(1, _CHUNK // (self.cotangents * max(1, self._row_elements())))
        return [slice(start, min(start + step, self.samples)) for start in range(0, self.samples, step)]

    def _row_elements(self) -> int:
        """Elements of the largest array that one row needs."""
        return self.shape.numel()


class Dense(Factor):
    """Rows as they are: for parameters no larger than one sample's activations.

    Args:
        values: Shape [R, N, *shape], or [R, N, elements] if the shape is given.
        shape: Shape of the parameter.

    Attributes:
        flat: The rows, shape [R, N, elements].

    """

    def __init__(self, values: Tensor, shape: torch.Size | None = None) -> None:
        self.flat = values if values.ndim == 3 else values.reshape(*values.shape[:2], -1)
        self.shape = values.shape[2:] if shape is None else shape
        self.cotangents, self.samples = values.shape[0], values.shape[1]
        self._made_from = ((self.flat, version_of(self.flat)),)

    @property
    def values(self) -> Tensor:
        """The rows, shape [R, N, *shape]."""
        return self.rows(slice(0, self.samples))

    def rows(self, chunk: slice) -> Tensor:  # noqa: D102
        rows = self.flat if chunk == slice(0, self.samples) else self.flat[:, chunk]
        return rows.view(*rows.shape[:2], *self.shape)

    def chunks(self) -> list[slice]:
        """Samples, all at once: the rows are there already.

        Returns:
            One slice.

        """
        return [slice(0, self.samples)]

    def weighted_sum(self, weights: Tensor) -> Tensor:  # noqa: D102
        flat = self.flat.flatten(0, 1)
        return (weights.flatten().to(flat.dtype) @ flat).view(self.shape)

    def add_weighted_sum(self, weights: Tensor, into: Tensor, alpha: float, beta: float) -> None:  # noqa: D102
        flat = self.flat.flatten(0, 1)
        if into.dtype == flat.dtype and into.is_contiguous():
            into.view(-1).addmv_(flat.T, weights.flatten().to(flat.dtype), alpha=alpha, beta=beta)
        else:
            super().add_weighted_sum(weights, into, alpha, beta)

    def part(self, start: int, stop: int) -> "Dense":
        """The same for some rows of the parameter.

        Args:
            start: First index of the parameter's dimension 0.
            stop: Behind the last one.

        Returns:
            A factor of the shape [stop − start, ...].

        """
        return Dense(self.values[:, :, start:stop])

    def unstacked(self, calls: int) -> list[Factor]:
        """Factors of several calls of which this one holds the samples, one call after the other."""
        return [Dense(each, self.shape) for each in self.flat.unflatten(1, (calls, -1)).unbind(1)]

    def summed(self, calls: int) -> "Dense":
        """The sum of the factors of several calls of which this one holds the samples, one call after the other."""
        return Dense(self.flat.unflatten(1, (calls, -1)).sum(1), self.shape)

    def tensors(self) -> Sequence[Tensor]:  # noqa: D102
        return (self.flat,)

    def dot(self, direction: Tensor) -> Tensor:  # noqa: D102
        return self.flat @ direction.to(self.flat.dtype).flatten()


class Outer(Factor):
    """Outer products of what went in with what came back: linear layers, convolutions, embeddings.

    Args:
        left: [R or 1, N, T, d_out], or int64 [1, N, T] for one-hot rows.
        right: [R or 1, N, T, d_in].
        shape: Shape of the parameter, d_out first, d_in elements behind.
        came_back: Which side is the gradient of the operation's output, 0 for left, 1 for right.

    """

    def __init__(self, left: Tensor, right: Tensor, shape: torch.Size, came_back: int = 0) -> None:
        if left.is_floating_point():
            dtype = wide(left.dtype if left.dtype == right.dtype else torch.promote_types(left.dtype, right.dtype))
            left, right = left.to(dtype), right.to(dtype)
        self.term = OuterProducts(left, right, shape[0])
        self._made_from = tuple((x, version_of(x)) for x in (left, right))
        self.cotangents = num_cotangents(self.term)
        self.samples = right.shape[1]
        self.shape = shape
        self.came_back = came_back

    def rows(self, chunk: slice) -> Tensor:  # noqa: D102
        term = self.term
        if chunk != slice(0, self.samples):
            term = OuterProducts(term.left[:, chunk], term.right[:, chunk], term.height)
        return term.columns(0, term.height).view(self.cotangents, -1, *self.shape)

    def weighted_sum(self, weights: Tensor) -> Tensor:  # noqa: D102
        left, right = self._weighted(weights)
        if left.is_floating_point():
            return (left.T @ right).view(self.shape)
        total = right.new_zeros(self.term.height, right.shape[-1])
        return total.index_add_(0, left, right).view(self.shape)

    def add_weighted_sum(self, weights: Tensor, into: Tensor, alpha: float, beta: float) -> None:  # noqa: D102
        if into.dtype != self.term.right.dtype or not into.is_contiguous():
            super().add_weighted_sum(weights, into, alpha, beta)
            return
        left, right = self._weighted(weights)
        matrix = into.view(self.term.height, -1)
        if left.is_floating_point():
            matrix.addmm_(left.T, right, alpha=alpha, beta=beta)
        else:
            if beta != 1:
                matrix.mul_(beta)
            matrix.index_add_(0, left, right, alpha=alpha)

    def _weighted(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides over all positions of all samples, one of them weighted: Jᵀv is their product.

        The cotangents are summed up first, on the side that has them: one product for all of them.

        Returns:
            Left [N T, d_out], or int64 [N T], and right [N T, d_in].

        """
        left, right, _ = self.term
        weights = weights[:, :, None, None].to(right.dtype)
        on_right = not left.is_floating_point() or len(right) > len(left)
        if len(left) == len(right) == 1 and left.is_floating_point():
            on_right = right.shape[-1] < left.shape[-1]  # one cotangent: the smaller side
        side = right if on_right else left
        weighted = side[0] * weights[0] if self.cotangents == 1 else torch.einsum("rntd,rnxy->ntd", side, weights)
        left, right = (left[0], weighted) if on_right else (weighted, right[0])
        return left.flatten(0, 1), right.flatten(0, 1)

    def part(self, start: int, stop: int) -> "Outer":
        """The same for some rows of the parameter.

        Args:
            start: First index of the parameter's dimension 0.
            stop: Behind the last one.

        Returns:
            A factor of the shape [stop − start, ...].

        """
        left, right, _ = self.term
        if left.is_floating_point():
            left = left[..., start:stop]
        else:  # indices elsewhere get a weight of zero
            inside = (left >= start) & (left < stop)
            left, right = (left - start).clamp(0, stop - start - 1), right * inside[..., None]
        return Outer(left, right, torch.Size((stop - start, *self.shape[1:])))

    def unstacked(self, calls: int) -> list[Factor]:
        """Factors of several calls of which this one holds the samples, one call after the other."""
        left, right = (x.unflatten(1, (calls, -1)).unbind(1) for x in self.term[:2])
        return [Outer(*sides, self.shape, self.came_back) for sides in zip(left, right, strict=True)]

    def summed(self, calls: int) -> "Outer":
        """The sum of the factors of several calls of which this one holds the samples: their positions in a row."""
        left, right = (x.unflatten(1, (calls, -1)).transpose(1, 2).flatten(2, 3) for x in self.term[:2])
        return Outer(left, right, self.shape, self.came_back)

    def tensors(self) -> Sequence[Tensor]:  # noqa: D102
        return self.term.left, self.term.right

    def dot(self, direction: Tensor) -> Tensor:  # noqa: D102
        left, right, height = self.term
        direction = direction.reshape(height, -1).to(right.dtype)
        if not left.is_floating_point():
            return (right * direction[left]).flatten(2).sum(2)
        if len(right) == self.cotangents:
            return ((left[0] @ direction) * right).flatten(2).sum(2)
        return (left * (right[0] @ direction.T)).flatten(2).sum(2)


def outer(
    left: Tensor, right: Tensor, shape: torch.Size, came_back: int = 0, keep: bool = False, calls: int = 1
) -> Factor:
    """Outer products in the form that is cheapest: as they are, or added up.

    Args:
        left: [R or 1, N, T, d_out], or int64 [1, N, T] for one-hot rows.
        right: [R or 1, N, T, d_in].
        shape: Shape of the parameter, d_out first, d_in elements behind.
        came_back: Which side is the gradient of the operation's output, 0 for left, 1 for right.
        keep: Keep them as they are, whatever it costs.
        calls: Of how many calls they hold the samples; N counts all of them.

    Returns:
        The factor.

    """
    factor = Outer(left, right, shape, came_back)
    sizes = sizes_of([factor.term])
    if not keep and cheapest_form(sizes._replace(samples=sizes.samples // calls)) is Form.KEPT:
        return Dense(factor.term.columns(0, factor.term.height).flatten(2), shape)
    return factor


@dataclass
class PerOperation(Factor):
    """The default: the operation's own vector-Jacobian product, for each sample.

    Attributes:
        function: Maps the parameter and one sample's arguments to one sample's outputs, a tuple.
        parameter: The parameter's value.
        inputs: The batched arguments, each [N, ...].
        output_gradients: For each output, its cotangents [R, N, ...].
        description: The use in words, for messages.
        check: Raises if something the operation read has changed since.

    """

    function: Callable[..., tuple[Tensor, ...]]
    parameter: Tensor
    inputs: Sequence[Tensor]
    output_gradients: Sequence[Tensor]
    description: str
    check: Callable[[], None]

    def __post_init__(self) -> None:
        self.shape = self.parameter.shape
        self.cotangents, self.samples = self.output_gradients[0].shape[:2]

    def rows(self, chunk: slice) -> Tensor:  # noqa: D102
        self.check()
        inputs = tuple(x[chunk] for x in self.inputs)
        return torch.stack(
            [self._vjps(tuple(g[r, chunk] for g in self.output_gradients), inputs) for r in range(self.cotangents)]
        )

    def _vjp(self, output_gradients: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Tensor:
        pull_back = torch.func.vjp(lambda p: self.function(p, *inputs), self.parameter)[1]
        return pull_back(output_gradients)[0]

    def _vjps(self, output_gradients: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Tensor:
        devices = [self.parameter.device] if self.parameter.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices=devices):
            before = random_state(self.parameter.device)
            try:
                rows = torch.func.vmap(self._vjp, randomness="different")(output_gradients, inputs)
            except RuntimeError:  # a kernel that vmap can't batch: one sample at a time
                rows = torch.stack(
                    [
                        self._vjp(tuple(g[n] for g in output_gradients), tuple(x[n] for x in inputs))
                        for n in range(len(output_gradients[0]))
                    ]
                )
            if not torch.equal(before, random_state(self.parameter.device)):
                raise CaptureError(
                    f"{self.description} draws random numbers inside the operation, so that its per-sample gradients "
                    "can't be computed again with the same ones. Set its dropout to 0 or put the module into eval()."
                )
        return rows


def _flat(rows: Tensor) -> Tensor:
    """[R, N, *shape] → [R, N, elements], for parameters of no dimension too."""
    return rows.reshape(*rows.shape[:2], -1)


def summed_squares(factors: Sequence[Factor], weights: Tensor) -> Tensor:
    """Squares of the rows of one parameter, added up with weights.

    Args:
        factors: Its factors, at least one.
        weights: w, shape [R, N].

    Returns:
        Σ_rn w_rn G_rn∘G_rn, of the parameter's shape.

    """
    first, *others = factors
    # The square of an outer product is one, too.
    if not others and isinstance(first, Outer) and first.term.right.shape[2] == 1:
        left, right, _ = first.term
        left = left.square() if left.is_floating_point() else left
        return Outer(left, right.square(), first.shape, first.came_back).weighted_sum(weights)
    found = [
        torch.einsum("rn...,rn->...", rows.square(), weights[:, chunk].to(rows.dtype))
        for chunk in max((factor.chunks() for factor in factors), key=len)
        for rows in [summed_rows(factors, chunk)]
    ]
    return reduce(torch.add, found)


def random_state(device: torch.device) -> Tensor:
    """State of a device's random numbers.

    Args:
        device: The device.

    Returns:
        The state.

    """
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@dataclass
class PulledBack(Factor):
    """Rows of a parameter through a tensor that was made from parameters alone.

    Attributes:
        derived: The tensor D(θ), with its graph.
        parameter: θ.
        inner: Factors of D, one for each of its uses.

    """

    derived: Tensor
    parameter: Tensor
    inner: Sequence[Factor]

    def __post_init__(self) -> None:
        self.shape = self.parameter.shape
        self.cotangents, self.samples = self.inner[0].cotangents, self.inner[0].samples
        self._version = self.derived._version

    def _row_elements(self) -> int:
        return max(self.shape.numel(), self.derived.numel())

    def rows(self, chunk: slice) -> Tensor:  # noqa: D102
        rows = summed_rows(self.inner, chunk)
        flat = self._pull_back(rows.flatten(0, 1), is_grads_batched=True)
        return flat.view(*rows.shape[:2], *self.shape)

    def weighted_sum(self, weights: Tensor) -> Tensor:  # noqa: D102
        return self._pull_back(summed_weights(self.inner, weights))

    def _pull_back(self, cotangent: Tensor, **options: Any) -> Tensor:
        if self.derived._version != self._version:
            raise CaptureError("A tensor made from parameters was changed in place after it had met the batch.")
        leading = cotangent.ndim - self.derived.ndim
        scales: Tensor | None = None
        if self.derived.dtype == torch.float16:  # a sum over samples may leave its range where each of them does not
            cotangent, scales = normalised(cotangent, leading)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            self.derived,
            self.parameter,
            cotangent.to(self.derived.dtype),
            retain_graph=True,
            allow_unused=True,  # D may depend on θ through its shape alone
            **options,
        )
        if found[0] is None:
            return self.parameter.new_zeros(*cotangent.shape[:leading], *self.shape)
        if scales is None:
            return found[0]
        return upcast(found[0]) * scales.float().view(*scales.shape, *(1,) * len(self.shape))


class Joined(Factor):
    """Rows of several batches, one after the other.

    Args:
        parts: For each batch its number of samples and its factors, which may be none; not of all.
        shape: Shape of the parameter.

    """

    def __init__(self, parts: Sequence[tuple[int, Sequence[Factor]]], shape: torch.Size) -> None:
        self.parts = parts
        self.shape = shape
        self.cotangents = next(factor.cotangents for _, factors in parts for factor in factors)
        self.samples = sum(samples for samples, _ in parts)

    def rows(self, chunk: slice) -> Tensor:  # noqa: D102
        pieces: list[tuple[int, Tensor | None]] = []  # None for samples whose rows are zero
        start = 0
        for samples, factors in self.parts:
            first, last = max(chunk.start - start, 0), min(chunk.stop - start, samples)
            if first < last:
                pieces.append((last - first, summed_rows(factors, slice(first, last)) if factors else None))
            start += samples
        like = next((rows for _, rows in pieces if rows is not None), None)
        if like is None:
            like = summed_rows(next(factors for _, factors in self.parts if factors), slice(0, 1))
        return torch.cat(
            [
                like.new_zeros(self.cotangents, samples, *self.shape) if rows is None else rows
                for samples, rows in pieces
            ],
            dim=1,
        )


def joined(parts: Sequence[tuple[int, Sequence[Factor]]], shape: torch.Size) -> list[Factor]:
    """Factors of one parameter for several batches as those of one batch.

    Args:
        parts: For each batch its number of samples and its factors, which may be none.
        shape: Shape of the parameter.

    Returns:
        Factors for all samples; copies where they are outer products that fit together.

    """
    given = [factors for _, factors in parts]
    if not any(given):
        return []
    kinds = {tuple(_kind(factor) for factor in factors) for factors in given}
    if len(kinds) > 1 or None in next(iter(kinds)):
        return [Joined(parts, shape)]
    found: list[Factor] = []
    for uses in zip(*given, strict=True):
        terms = [use.term for use in uses if isinstance(use, Outer)]
        longest = max(term.right.shape[2] for term in terms)
        sides = [[_lengthened(x, longest) for x in term[:2]] for term in terms]
        came_back = next(use.came_back for use in uses if isinstance(use, Outer))
        left, right = (torch.cat([pair[side] for pair in sides], dim=1) for side in range(2))
        found.append(Outer(left, right, shape, came_back))
    return found


def _kind(factor: Factor) -> Any:
    """What outer products must have in common to be put together; None for others."""
    if not isinstance(factor, Outer):
        return None
    return tuple((len(x), x.shape[3:], x.dtype) for x in factor.term[:2])


def _lengthened(x: Tensor, positions: int) -> Tensor:
    """[R, N, T, ...] with zeros behind the last position."""
    if x.shape[2] == positions:
        return x
    return torch.cat([x, x.new_zeros(*x.shape[:2], positions - x.shape[2], *x.shape[3:])], dim=2)


def summed_rows(factors: Sequence[Factor], chunk: slice) -> Tensor:
    """The rows of one parameter through all its uses.

    Args:
        factors: Factors of one parameter.
        chunk: Which samples.

    Returns:
        Shape [R, n, *shape].

    """
    return reduce(torch.add, (factor.rows(chunk) for factor in factors))


def summed_weights(factors: Sequence[Factor], weights: Tensor) -> Tensor:
    """Jᵀv of one parameter through all its uses.

    Args:
        factors: Factors of one parameter.
        weights: v, shape [R, N].

    Returns:
        Σ_rn v_rn G_rn, of the parameter's shape.

    """
    return reduce(torch.add, (factor.weighted_sum(weights) for factor in factors))


def merged(factors: Sequence[Factor]) -> Sequence[Factor]:
    """Factors of one parameter, outer products that fit together as one: the positions of one use behind another's."""
    kinds = {_kind(factor) for factor in factors}
    if len(factors) == 1 or len(kinds) > 1 or None in kinds:
        return factors
    sides = zip(*(factor.term[:2] for factor in factors if isinstance(factor, Outer)), strict=True)
    left, right = (torch.cat(side, dim=2) for side in sides)
    return [Outer(left, right, factors[0].shape)]


def is_cheapest_dense(factors: Sequence[Factor], samples: int) -> bool:
    """Whether the rows of one parameter, with all of its uses, are cheapest as they are.

    Args:
        factors: Its factors.
        samples: N of all batches that are taken as one.

    Returns:
        Whether they are.

    """
    if not all(isinstance(factor, (Dense, Outer)) for factor in factors):
        return False  # they would be computed again for nothing where only their sum is wanted
    terms = [factor.term for factor in factors if isinstance(factor, Outer)]
    if len(terms) < len(factors):
        return True
    return cheapest_form(sizes_of(terms)._replace(samples=samples), room=MOST_FLAT) is Form.KEPT


def pairwise_sides(factors: Sequence[Factor]) -> tuple[Tensor, Tensor] | None:
    """Both sides of one parameter through all its uses, [N, T, ...], where K is cheapest by pairs of positions.

    Returns:
        The sides; None where it is not, or where they are of a kind that `add_pairwise` does not take.

    """
    found = merged(factors)
    if len(found) > 1 or not isinstance(found[0], Outer):
        return None
    left, right, _ = found[0].term
    usual = left.is_floating_point() and len(left) == len(right) == 1
    if not usual or max(left.shape[-1], right.shape[-1]) > SINGLE:
        return None
    return (left[0], right[0]) if cheapest_form(sizes_of([found[0].term])) is Form.PAIRWISE else None


def flat_rows(parameters: Sequence[Sequence[Factor]]) -> Tensor:
    """All rows of several parameters through all of their uses, side by side.

    Args:
        parameters: For each parameter its factors.

    Returns:
        Shape [R, N, ΣP].

    """
    large = {i: term for i, factors in enumerate(parameters) if (term := _large(factors)) is not None}
    others = _dense_rows([factors for i, factors in enumerate(parameters) if i not in large])
    if not large:
        return torch.cat(others, dim=2)
    # What is large is computed where it is to stand: a copy takes as long as the product.
    terms, rest, first = [*large.values()], iter(others), min(large)
    dtype = reduce(torch.promote_types, {x.dtype for x in (*others, *(term.left for term in terms))})
    sizes = [factors[0].shape.numel() for factors in parameters]
    whole = terms[0].left.new_empty(num_cotangents(terms[0]), terms[0].left.shape[1], sum(sizes), dtype=dtype)
    start, *parts = whole.split([sum(sizes[:first]), *sizes[first:]], dim=2)
    if first:  # the small ones among many, as they are sorted
        torch.cat([*islice(rest, first)], dim=2, out=start)
    for i, part in enumerate(parts, first):
        if (term := large.get(i)) is None:
            part.copy_(next(rest))
        elif term.left.dtype == dtype:
            term.columns(0, term.height, out=part.unflatten(2, (term.height, -1)))
        else:
            part.copy_(term.columns(0, term.height).flatten(2))
    return whole


def _large(factors: Sequence[Factor]) -> OuterProducts | None:
    """The outer products of one parameter whose rows are large; None if they are not, or of another kind."""
    found = merged(factors)
    if len(found) > 1 or not isinstance(found[0], Outer) or not found[0].term.left.is_floating_point():
        return None
    elements = found[0].cotangents * found[0].samples * found[0].shape.numel()
    return found[0].term if elements > _LARGE else None


def _dense_rows(parameters: Sequence[Sequence[Factor]]) -> list[Tensor]:
    """For each parameter its rows, [R, N, elements]; outer products that are alike go together."""
    found: list[Tensor | None] = [None] * len(parameters)
    alike: dict[Any, list[tuple[int, Outer]]] = {}
    for i, factors in enumerate(parameters):
        each = merged(factors)
        if len(each) == 1 and isinstance(each[0], Outer):
            sides = each[0].term[:2]
            alike.setdefault((each[0].shape, *((x.shape, x.dtype, x.device) for x in sides)), []).append((i, each[0]))
        else:
            found[i] = _rows(each, slice(0, each[0].samples))
    for members in alike.values():
        first, count = members[0][1], len(members)
        if count > 1:
            left, right = (torch.cat(x, dim=1) for x in zip(*(each.term[:2] for _, each in members), strict=True))
            first = Outer(left, right, first.shape)
        rows = first.term.columns(0, first.term.height).flatten(2)
        parts = [rows] if count == 1 else rows.unflatten(1, (count, -1)).unbind(1)
        for (i, _), part in zip(members, parts, strict=True):
            found[i] = part
    return [x for x in found if x is not None]


def factors_gram(
    factors: Sequence[Factor], products: InnerProducts | None = None, others: Sequence[Factor] | None = None
) -> Tensor:
    """K of one parameter: the gradients of its uses add up before inner products are taken.

    Args:
        factors: Factors of one parameter.
        products: How to take inner products.
        others: Factors of the same parameter for other samples; the same ones if None.

    Returns:
        Shape [R, N, R, N] or, with others, [R, N, R', N'], float64.

    """
    products = products or InnerProducts()
    factors, others = merged(factors), others and merged(others)
    terms = [factor.term for factor in (*factors, *(others or ())) if isinstance(factor, Outer)]
    if len(terms) == len(factors) + len(others or ()) and len({(t.height, t.right.shape[-1]) for t in terms}) == 1:
        ours, theirs = terms[: len(factors)], terms[len(factors) :] or None
        pairwise = cheapest_form(sizes_of(ours), theirs and sizes_of(theirs)) is Form.PAIRWISE
        return (pairwise_gram if pairwise else columns_gram)(ours, products, theirs)
    chunks = _common_chunks(factors)
    if others is not None:
        rows = [
            torch.cat(
                [dense_gram(_rows(factors, a), _rows(others, b), products) for b in _common_chunks(others)], dim=3
            )
            for a in chunks
        ]
        return torch.cat(rows, dim=1)
    if len(chunks) == 1:
        return dense_gram(_rows(factors, chunks[0]), None, products)
    for j, a in enumerate(chunks):
        own = _rows(factors, a)
        if j == 0:
            gram = own.new_zeros((len(own), factors[0].samples) * 2, dtype=torch.float64)
        gram[:, a, :, a] = dense_gram(own, None, products)
        for b in chunks[:j]:
            block = dense_gram(own, _rows(factors, b), products)
            gram[:, a, :, b] = block
            gram[:, b, :, a] = block.permute(2, 3, 0, 1)
    return gram


def _rows(factors: Sequence[Factor], chunk: slice) -> Tensor:
    only = factors[0] if len(factors) == 1 else None
    if isinstance(only, Dense) and chunk == slice(0, only.samples):
        return only.flat
    return _flat(summed_rows(factors, chunk))


def _common_chunks(factors: Sequence[Factor]) -> list[slice]:
    return min((factor.chunks() for factor in factors), key=lambda chunks: chunks[0].stop)
