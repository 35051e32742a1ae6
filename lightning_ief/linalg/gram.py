"""Gram matrices of per-sample gradients, accumulated in float64.

One layout throughout: a *row* of J belongs to cotangent r and sample n, so arrays start with [R, N]. R is 1 for the
gradient of the loss; sampled targets and columns of a Hessian factor give more.

The gradient of a matrix-shaped parameter is held as a sum of outer products over the positions t of a sample,

    G_rn = Σ_t left_rntᵀ right_rnt,

with one side from the forward pass (R = 1: shared by all cotangents) and one from the backward pass. The left side may
be integer: then it stands for one-hot rows (an embedding's indices).
"""

from collections.abc import Sequence
from functools import reduce
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["OuterProducts", "columns_gram", "dense_gram", "pairwise_gram", "prefers_pairwise"]

# Elements of the largest temporary array: 2²³ doubles are 64 MiB.
_CHUNK = 2**23


class OuterProducts(NamedTuple):
    """Σ_t leftᵀ right for every row.

    Attributes:
        left: [1 or R, N, T, d_out], or int64 [1, N, T] for one-hot rows.
        right: [1 or R, N, T, d_in].
        height: d_out.

    """

    left: Tensor
    right: Tensor
    height: int

    def columns(self, start: int, stop: int) -> Tensor:
        """Rows start … stop−1 of the parameter's gradient G_rn, densely.

        Args:
            start: First row of the parameter.
            stop: Behind its last row.

        Returns:
            Shape [R, N, stop − start, d_in].

        """
        if self.left.is_floating_point():
            return self.left[..., start:stop].transpose(-1, -2) @ self.right
        index, right = self.left[0], self.right
        sample, position = ((index >= start) & (index < stop)).nonzero(as_tuple=True)
        block = right.new_zeros(*right.shape[:2], stop - start, right.shape[-1])
        for r in range(len(right)):  # a sample may hold an index twice: accumulate
            at = sample, index[sample, position] - start
            block[r].index_put_(at, right[r, sample, position], accumulate=True)
        return block


def num_cotangents(term: OuterProducts) -> int:
    """R, the number of rows per sample.

    Args:
        term: The outer products.

    Returns:
        The larger leading size of the two sides.

    """
    return max(term.left.shape[0], term.right.shape[0])


def dense_gram(rows: Tensor, other: Tensor | None = None) -> Tensor:
    """K = G Gᵀ (or G Hᵀ) for rows that are given as they are.

    Args:
        rows: G, shape [R, N, ...].
        other: H, shape [R', N', ...] with the same trailing sizes; G if None.

    Returns:
        Shape [R, N, R', N'], float64.

    """
    flat = rows.flatten(2)
    paired = flat if other is None else other.flatten(2)
    gram = torch.zeros(*flat.shape[:2], *paired.shape[:2], dtype=torch.float64, device=rows.device)
    width = max(1, _CHUNK // max(1, flat.shape[0] * flat.shape[1]))
    for start in range(0, flat.shape[2], width):
        a = flat[:, :, start : start + width].double()
        b = a if other is None else paired[:, :, start : start + width].double()
        gram += torch.einsum("anp,bmp->anbm", a, b)
    return gram


def columns_gram(terms: Sequence[OuterProducts]) -> Tensor:
    """K for a sum of outer products, building G for a few rows of the parameter at a time.

    Costs N T d_out d_in + N² d_out d_in multiplications per cotangent (pair); memory is bounded by a constant.

    Args:
        terms: Uses of one parameter; their gradients add up.

    Returns:
        Shape [R, N, R, N], float64.

    """
    samples, height, width = terms[0].right.shape[1], terms[0].height, terms[0].right.shape[-1]
    cotangents = max(map(num_cotangents, terms))
    gram = torch.zeros(cotangents, samples, cotangents, samples, dtype=torch.float64, device=terms[0].right.device)
    step = max(1, _CHUNK // (cotangents * samples * width))
    for start in range(0, height, step):
        stop = min(start + step, height)
        gram += dense_gram(reduce(torch.add, (term.columns(start, stop) for term in terms)))
    return gram


def pairwise_gram(terms: Sequence[OuterProducts]) -> Tensor:
    """K for a sum of outer products without ever building G (the "ghost" form).

    ⟨G_n, G_m⟩ = Σ_tu ⟨left_nt, left_mu⟩ ⟨right_nt, right_mu⟩, which costs (N T)² (d_out + d_in) multiplications;
    memory is bounded by a constant beyond the result.

    Args:
        terms: Uses of one parameter; their gradients add up, so that every pair of uses contributes.

    Returns:
        Shape [R, N, R, N], float64.

    """
    samples, cotangents = terms[0].right.shape[1], max(map(num_cotangents, terms))
    gram = torch.zeros(cotangents, samples, cotangents, samples, dtype=torch.float64, device=terms[0].right.device)
    for a, b in product(terms, terms):
        length, other = a.right.shape[2], b.right.shape[2]
        step = max(1, _CHUNK // max(1, length * samples * other))
        for start in range(0, samples, step):
            chunk = slice(start, start + step)
            left, right = _Inner(a.left, b.left, chunk), _Inner(a.right, b.right, chunk)
            for r, q in product(range(cotangents), range(cotangents)):
                products = left(r, q) * right(r, q)
                gram[r, chunk, q] += products.view(-1, length, samples, other).sum((1, 3))
    return gram


class _Inner:
    """Inner products between all positions of a chunk of samples and all positions of all samples, [n T, N U]."""

    def __init__(self, a: Tensor, b: Tensor, chunk: slice) -> None:
        self.a, self.b = a[:, chunk].flatten(1, 2), b.flatten(1, 2)
        # The forward pass's side is the same for all cotangents: compute it once.
        self.shared = self.compute(0, 0) if len(a) == len(b) == 1 else None

    def __call__(self, r: int, q: int) -> Tensor:
        if self.shared is not None:
            return self.shared
        return self.compute(min(r, len(self.a) - 1), min(q, len(self.b) - 1))

    def compute(self, r: int, q: int) -> Tensor:
        a, b = self.a[r], self.b[q]
        match a.is_floating_point(), b.is_floating_point():
            case True, True:
                return a.double() @ b.double().T
            case True, False:
                return a[:, b].double()
            case False, True:
                return b[:, a].T.double()
            case _:
                return (a[:, None] == b).double()


def prefers_pairwise(terms: Sequence[OuterProducts]) -> bool:
    """Choose between the two forms of the Gram by the number of multiplications.

    Args:
        terms: Uses of one parameter.

    Returns:
        Whether `pairwise_gram` needs fewer than `columns_gram`.

    """
    samples, height, width = terms[0].right.shape[1], terms[0].height, terms[0].right.shape[-1]
    cotangents = max(map(num_cotangents, terms))
    positions = sum(term.right.shape[2] for term in terms)
    # One side's inner products are shared by all pairs of cotangents, the other's are not; one-hot rows cost nothing.
    heights = [term.height if term.left.is_floating_point() else 1 for term in terms]
    per_pair = max(heights) + width if cotangents == 1 else cotangents**2 * max(*heights, width)
    pairwise = (samples * positions) ** 2 * per_pair
    columns = cotangents * samples * height * width * (positions + cotangents * samples)
    return pairwise <= columns
