"""Gram matrices of per-sample gradients, accumulated in float64.

One layout throughout: a *row* of J belongs to cotangent r and sample n, so arrays start with [R, N]. R is 1 for the
gradient of the loss; sampled targets and columns of a Hessian factor give more.

The gradient of a matrix-shaped parameter is held as a sum of outer products over the positions t of a sample,

    G_rn = Σ_t left_rntᵀ right_rnt,

with one side from the forward pass (R = 1: shared by all cotangents) and one from the backward pass. The left side may
be integer: then it stands for one-hot rows (an embedding's indices).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from functools import lru_cache, reduce
from itertools import combinations_with_replacement, product
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ief.linalg.vectors import SMALL, chunks

__all__ = [
    "SINGLE",
    "Form",
    "InnerProducts",
    "OuterProducts",
    "Sizes",
    "add_pairwise",
    "add_products",
    "cheapest_form",
    "columns_gram",
    "dense_gram",
    "form_costs",
    "full_precision",
    "mirror",
    "num_cotangents",
    "pairwise_gram",
    "sample_dot",
    "sizes_of",
]

# Elements of the largest temporary array: 2²³ doubles are 64 MiB.
_CHUNK = 2**23
# Rows of G that are built at once, in elements: they should still be in the cache when their inner products are taken.
_CACHED = 2**21
# So many products are summed in single precision before the sum goes on in double precision.
SINGLE = 4096
# Inner products between so many positions and as many others exist at once: they stay in the cache of a processor, and
# keep other devices busy.
_TILE, _LARGE_TILE = 256, 4096
# What a matrix product costs beyond its multiplications, in multiplications: pairs of cotangents go one by one.
_PER_CALL = 1e6
# What a pair of positions costs beyond its inner products, in multiplications: passes over memory.
_PER_PAIR = 200
# Symmetric products are computed in panels of so many rows, each up to the diagonal.
_PANEL = 256


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

    def columns(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows start … stop−1 of the parameter's gradient G_rn, densely.

        Args:
            start: First row of the parameter.
            stop: Behind its last row.
            out: Where to write them; not for indices.

        Returns:
            Shape [R, N, stop − start, d_in].

        """
        if self.left.is_floating_point():
            left = self.left if stop - start == self.height else self.left[..., start:stop]
            product = torch.mul if self.right.shape[2] == 1 else torch.matmul
            return product(left.transpose(-1, -2), self.right, out=out)
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


class InnerProducts:
    """Inner products between rows, accumulated in float64.

    Products of float32 rows are summed in single precision over at most 4096 columns, then in double precision: the
    error of an entry is below 1e-6 of |a_n| |b_m|, in the mean below 1e-7. Where that is too much, `precise` sums in
    double precision throughout, at two to four times the price.

    Args:
        precise: Whether to sum in double precision throughout.

    """

    def __init__(self, precise: bool = False) -> None:
        self.precise = precise

    def __call__(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """Compute a bᵀ, or a aᵀ.

        Args:
            a: Shape [n, d].
            b: Shape [m, d]; a if None.

        Returns:
            Shape [n, m]: float64, or float32 for what could be summed in single precision as a whole.

        """
        rows, width = a.shape[0], a.shape[1]
        others = rows if b is None else b.shape[0]
        if a.dtype == torch.float64 and width * max(rows, others) <= _CHUNK:
            return _products(a, b)
        single = a.dtype != torch.float64 and not self.precise
        if single and width <= SINGLE:
            return _products(a.float(), None if b is None else b.float())
        step = width // -(-width // SINGLE) if single else max(1, _CHUNK // max(1, rows, others))
        whole = width // step * step
        if single and max(rows, others) <= _PANEL:
            parts = [_blocks(x[:, :whole].float(), step) for x in ((a,) if b is None else (a, b))]
            total = torch.bmm(parts[0], parts[-1].transpose(1, 2)).sum(0, dtype=torch.float64)
            if whole < width:
                total += a[:, whole:].float() @ (a if b is None else b)[:, whole:].float().T
            return total
        total = torch.zeros(rows, others, dtype=torch.float64, device=a.device)
        dtype = torch.float32 if single else torch.float64
        for start in range(0, width, step):
            columns = slice(start, start + step)
            total += _products(a[:, columns].to(dtype), None if b is None else b[:, columns].to(dtype))
        return total


def _blocks(x: Tensor, width: int) -> Tensor:
    """[n, k · width] → [k, n, width]."""
    return x.unflatten(1, (-1, width)).transpose(0, 1)


def _products(a: Tensor, b: Tensor | None) -> Tensor:
    """Compute a bᵀ, or a aᵀ at little more than half the price."""
    if b is not None:
        return a @ b.T
    rows = a.shape[0]
    if rows <= _PANEL:
        return a @ a.T
    result = a.new_empty(rows, rows)
    for start in range(0, rows, _PANEL):
        stop = min(start + _PANEL, rows)
        panel = a[start:stop] @ a[:stop].T
        result[start:stop, :stop] = panel
        result[:start, start:stop] = panel[:, :start].T
    return result


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No TF32 or bfloat16 within float32 products, whatever the user allows elsewhere, and no autocast.

    Args:
        device: Where the products are taken.

    Yields:
        Nothing.

    """
    allowed, autocast = torch.get_float32_matmul_precision(), torch.is_autocast_enabled(device.type)
    if allowed != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            yield
    finally:
        if allowed != "highest":
            torch.set_float32_matmul_precision(allowed)


def dense_gram(rows: Tensor, other: Tensor | None = None, products: InnerProducts | None = None) -> Tensor:
    """K = G Gᵀ (or G Hᵀ) for rows that are given as they are.

    Args:
        rows: G, shape [R, N, ...].
        other: H, shape [R', N', ...] with the same trailing sizes; G if None.
        products: How to take inner products.

    Returns:
        Shape [R, N, R', N'], float64.

    """
    products = products or InnerProducts()
    a = rows.flatten(2).flatten(0, 1)
    b = None if other is None else other.flatten(2).flatten(0, 1)
    shape = (*rows.shape[:2], *(rows if other is None else other).shape[:2])
    return products(a, b).double().view(shape)


def columns_gram(
    terms: Sequence[OuterProducts],
    products: InnerProducts | None = None,
    others: Sequence[OuterProducts] | None = None,
) -> Tensor:
    """K for a sum of outer products, building G for a few rows of the parameter at a time.

    Costs N T d_out d_in + N² d_out d_in multiplications per cotangent (pair); memory is bounded by a constant.

    Args:
        terms: Uses of one parameter; their gradients add up.
        products: How to take inner products.
        others: Uses of the same parameter by other samples; the same ones if None.

    Returns:
        Shape [R, N, R, N] or, with others, [R, N, R', N'], float64.

    """
    products = products or InnerProducts()
    gram = _no_gram(terms, terms if others is None else others)
    cotangents, samples = gram.shape[:2]
    height, width = terms[0].height, terms[0].right.shape[-1]
    step = max(1, _CACHED // (max(1, cotangents * samples, gram.shape[2] * gram.shape[3]) * width))
    for start in range(0, height, step):
        columns = [
            reduce(torch.add, (term.columns(start, min(start + step, height)) for term in each))
            for each in (terms, others)
            if each is not None
        ]
        gram += dense_gram(columns[0], columns[1] if others is not None else None, products)
    return gram


def _no_gram(terms: Sequence[OuterProducts], others: Sequence[OuterProducts]) -> Tensor:
    rows, columns = ((max(map(num_cotangents, each)), each[0].right.shape[1]) for each in (terms, others))
    return torch.zeros(*rows, *columns, dtype=torch.float64, device=terms[0].right.device)


def pairwise_gram(
    terms: Sequence[OuterProducts],
    products: InnerProducts | None = None,
    others: Sequence[OuterProducts] | None = None,
) -> Tensor:
    """K for a sum of outer products without ever building G (the "ghost" form).

    ⟨G_n, G_m⟩ = Σ_tu ⟨left_nt, left_mu⟩ ⟨right_nt, right_mu⟩, which costs ½ (N T)² (d_out + d_in) multiplications;
    memory is bounded by a constant beyond the result.

    Args:
        terms: Uses of one parameter; their gradients add up, so that every pair of uses contributes.
        products: How to take inner products.
        others: Uses of the same parameter by other samples; the same ones if None.

    Returns:
        Shape [R, N, R, N] or, with others, [R, N, R', N'], float64.

    """
    products = products or InnerProducts()
    gram = _no_gram(terms, terms if others is None else others)
    cotangents, samples, other_cotangents, other_samples = gram.shape
    uses = combinations_with_replacement(terms, 2) if others is None else product(terms, others)
    for a, b in uses:
        length, other = a.right.shape[2], b.right.shape[2]
        itself = others is None and a is b
        step = max(1, _CHUNK // max(1, length * other_samples * other))
        # Where even one sample has too many pairs of positions with all others, some of these at a time.
        width = other_samples if others is None else max(1, _CHUNK // max(1, length * other))
        blocks = product(range(0, samples, step), range(0, other_samples, max(1, width)))
        for start, first in blocks:
            rows = slice(start, min(start + step, samples))
            # Of a use with itself, what lies left of the diagonal block is the mirror image of what lies right of it.
            columns = slice(start if itself else first, min(first + width, other_samples))
            whole = itself and step >= samples
            left = _Inner(a.left[:, rows], None if whole else b.left[:, columns], products)
            right = _Inner(a.right[:, rows], None if whole else b.right[:, columns], products)
            for r, q in product(range(cotangents), range(other_cotangents)):
                by_position = (left(r, q) * right(r, q)).view(
                    rows.stop - rows.start, length, columns.stop - columns.start, other
                )
                block = by_position.sum(3).sum(1, dtype=torch.float64)
                gram[r, rows, q, columns] += block
                if itself:
                    gram[q, rows.stop :, r, rows] += block[:, rows.stop - rows.start :].T
                elif others is None:
                    gram[q, columns, r, rows] += block.T
    return gram


def add_pairwise(gram: Tensor, left: Tensor, right: Tensor, with_bias: bool = False) -> None:
    """Add what one use contributes to K, by pairs of positions, to the lower triangle of a matrix.

    A few samples at a time, so that what lies between stays in the cache: passes over memory cost more than products.

    Args:
        gram: Shape [N, N], float64.
        left: [N, T, d_out].
        right: [N, T, d_in].
        with_bias: Whether the bias of the layer is to be added too, whose row is Σ_t left_t.

    """
    (samples, length), a, b = left.shape[:2], left.flatten(0, 1), right.flatten(0, 1)
    step = max(1, (_TILE if left.device.type == "cpu" else _LARGE_TILE) // max(1, length))
    buffers = left.new_empty(2, (min(step, samples) * length) ** 2)
    for start, other in ((i, j) for i in range(0, samples, step) for j in range(0, i + 1, step)):
        height, width = min(step, samples - start), min(step, samples - other)
        rows, columns = (
            slice(start * length, (start + height) * length),
            slice(other * length, (other + width) * length),
        )
        size = height * length, width * length
        x, y = (buffer[: size[0] * size[1]].view(size) for buffer in buffers)
        torch.mm(a[rows], a[columns].T, out=x)
        torch.mm(b[rows], b[columns].T, out=y)
        x.mul_(y.add_(1.0) if with_bias else y)
        if length > 1:
            x = x.view(height, length, width, length).sum((1, 3), dtype=torch.float64)
        gram[start : start + height, other : other + width] += x


def add_products(gram: Tensor, rows: Tensor, products: InnerProducts) -> None:
    """Add rows · rowsᵀ to the lower triangle of a matrix.

    Args:
        gram: Shape [n, n], float64.
        rows: Shape [n, d].
        products: How to take inner products.

    """
    if len(rows) <= _PANEL:
        gram.add_(products(rows))
        return
    for start in range(0, len(rows), _PANEL):
        stop = min(start + _PANEL, len(rows))
        gram[start:stop, :stop] += products(rows[start:stop], rows[:stop])


def mirror(matrix: Tensor) -> None:
    """Make a square matrix symmetric, in place: what is right of the diagonal becomes what is left of it."""
    size = len(matrix)
    if size <= _PANEL:
        matrix.tril_().add_(matrix.tril(-1).T)
        return
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        mirror(matrix[start:stop, start:stop])
        matrix[:start, start:stop] = matrix[start:stop, :start].T


class _Inner:
    """Inner products between all positions of some samples and all positions of others (or the same), [n T, m U]."""

    def __init__(self, a: Tensor, b: Tensor | None, products: InnerProducts) -> None:
        self.a, self.products = a.flatten(1, 2), products
        self.b = self.a if b is None else b.flatten(1, 2)
        # The forward pass's side is the same for all cotangents: compute it once.
        self.shared = self.compute(0, 0) if len(self.a) == len(self.b) == 1 else None

    def __call__(self, r: int, q: int) -> Tensor:
        if self.shared is not None:
            return self.shared
        return self.compute(min(r, len(self.a) - 1), min(q, len(self.b) - 1))

    def compute(self, r: int, q: int) -> Tensor:
        a, b = self.a[r], self.b[q]
        match a.is_floating_point(), b.is_floating_point():
            case True, True:
                return self.products(a, None if self.b is self.a and r == q else b)
            case True, False:
                return a[:, b]
            case False, True:
                return b[:, a].T
            case _:
                return (a[:, None] == b).float()


class Form(Enum):
    """How the per-sample gradient of a matrix is kept, and its Gram computed."""

    KEPT = "G itself"
    PAIRWISE = "both sides, Gram by pairs of positions"
    COLUMNS = "both sides, Gram from a few rows of G at a time"


class Sizes(NamedTuple):
    """What the choice of a form depends on.

    Attributes:
        samples: N.
        positions: T, summed over the uses of the parameter.
        height: d_out.
        width: d_in.
        cotangents: R.
        one_hot: Whether the left side stands for one-hot rows.

    """

    samples: int
    positions: int
    height: int
    width: int
    cotangents: int = 1
    one_hot: bool = False


def sizes_of(terms: Sequence[OuterProducts]) -> Sizes:
    """Sizes of a sum of outer products.

    Args:
        terms: Uses of one parameter.

    Returns:
        The sizes.

    """
    return Sizes(
        samples=terms[0].right.shape[1],
        positions=sum(term.right.shape[2] for term in terms),
        height=terms[0].height,
        width=terms[0].right.shape[-1],
        cotangents=max(map(num_cotangents, terms)),
        one_hot=all(not term.left.is_floating_point() for term in terms),
    )


def form_costs(sizes: Sizes, others: Sizes | None = None, room: int = 0) -> dict[Form, float]:
    """Multiplications that Gram and update of a matrix take in each form that comes into question.

    G itself does only where it is smaller than what it is made from, or small anyway. Applying the update, which counts
    as well, costs N T d_out d_in from both sides and N d_out d_in from G.

    Args:
        sizes: Sizes of the matrix and its uses.
        others: The same for other samples, if inner products with those are wanted instead.
        room: Elements that rows may have though they are larger than what they are made from.

    Returns:
        Multiplications by form.

    """
    samples, positions, height, width, cotangents, one_hot = sizes
    rows, size = cotangents * samples, height * width
    # One side's inner products are shared by all pairs of cotangents, the other's are not; one-hot rows cost nothing.
    sides = (1 if one_hot else height, width)
    calls = cotangents * (cotangents if others is None else others.cotangents)
    per_pair = (sum(sides) if calls == 1 else calls * max(sides)) + calls * _PER_PAIR
    apply = rows * positions * (width if one_hot else size)
    build = rows * positions * size
    gram = rows**2 * size / 2
    pairs = (samples * positions) ** 2 / 2
    if others is not None:
        build += others.cotangents * others.samples * others.positions * size
        gram = rows * others.cotangents * others.samples * size
        pairs = samples * positions * others.samples * others.positions
    costs = {
        Form.PAIRWISE: pairs * per_pair + apply + calls * _PER_CALL,
        Form.COLUMNS: build + gram + apply + _PER_CALL,
    }
    smaller = cotangents * size <= positions * (cotangents * height + width)
    if not one_hot and (smaller or rows * size <= room):
        costs = {Form.KEPT: build + gram + rows * size, **costs}
    return costs


@lru_cache(maxsize=4096)
def cheapest_form(sizes: Sizes, others: Sizes | None = None, room: int = 0) -> Form:
    """Choose the form with the fewest multiplications.

    Args:
        sizes: Sizes of the matrix and its uses.
        others: The same for other samples, if inner products with those are wanted instead.
        room: Elements that rows may have though they are larger than what they are made from.

    Returns:
        The form.

    """
    costs = form_costs(sizes, others, room)
    return min(costs, key=costs.__getitem__)


def sample_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of two tensors, one for each index of dimension 0.

    Args:
        a: Shape [N, ...].
        b: Of the same shape.

    Returns:
        Shape [N], float64; no copy of that precision is made of what is large.

    Example:
        >>> sample_dot(torch.ones(2, 3), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]))
        tensor([6., 1.], dtype=torch.float64)

    """
    if a.numel() <= SMALL:
        products = a.double().square() if a is b else a.double() * b.double()
        return products.flatten(1).sum(1) if products.ndim > 1 else products
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    for part in chunks(a.shape[1], len(a)):
        total += (a[:, part].double() * b[:, part].double()).sum(1)
    return total
