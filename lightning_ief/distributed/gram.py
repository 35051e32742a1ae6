"""K of the samples of all ranks: from what has been gathered, and by exchanging rows for columns.

Of gathered factors each rank takes its share of the pairs of ranks; of re-sharded rows, the inner products over its
part of the columns. K is summed over the ranks in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import repeat

import torch
from torch import Tensor

from lightning_ief.capture.factors import Outer, factors_gram, summed_rows
from lightning_ief.capture.jacobian import Block
from lightning_ief.distributed.exchange import BUCKET
from lightning_ief.distributed.routes import Routes, wide
from lightning_ief.linalg.gram import InnerProducts, dense_gram

__all__ = ["unscaled_gram"]

# Rows of K that are sent together, each up to the last one's diagonal.
_PANEL = 64


def unscaled_gram(routes: Routes, products: InnerProducts, others: Routes | None = None) -> Tensor:
    """K over σσᵀ; called by all ranks.

    Args:
        routes: Which way the rows go; factors are gathered where they are not there yet.
        products: How to take inner products.
        others: Those of other rows to take them with, which a symmetric map of the whole
            space has made of these; the same ones if None.

    Returns:
        Shape [RN, RN], float64, of which the lower triangle counts: that is the same on all ranks to the last bit.

    """
    exchange, like = routes.exchange, routes.blocks.like
    total, rank, ranks = _zeros(routes), exchange.rank, exchange.size
    # Every pair of blocks once: this rank's with its own and with half of the others; of even many, the opposite
    # one belongs to the lower rank.
    distances = range(ranks // 2 + 1 - (ranks % 2 == 0 and rank >= ranks // 2))
    pairs = [(rank, (rank + distance) % ranks) for distance in distances]
    if others is not None:
        # Of a layer's weight and bias, only the sum is symmetric: what is mirrored must be what lies above.
        pairs = [(max(pair), min(pair)) for pair in pairs]
    for names in routes.batches():
        routes.gather(names)
        if others is not None:
            others.gather(names)
        total += _sum_blocks(routes, others, names, pairs, products)
    resharded = [name for name in like if name not in routes.gathers and routes.layout[name] != ()]
    theirs = repeat(None) if others is None else _columns(others, resharded)
    for rows, other in zip(_columns(routes, resharded), theirs, strict=False):
        mine, mapped = (x if x is None else exchange.reshard(x, routes.counts) for x in (rows, other))
        assert mine is not None
        total += dense_gram(mine, mapped, products)
    # About one half of K goes over the wire.
    size = total.shape[0] * total.shape[1]
    flat = total.view(size, size)
    panels = [slice(i, min(i + _PANEL, size)) for i in range(0, size, _PANEL)]
    parts = [flat[panel, : panel.stop] for panel in panels]
    packed = exchange.sum_(torch.cat([part.flatten() for part in parts]))
    for panel, part in zip(panels, packed.split([part.numel() for part in parts]), strict=True):
        flat[panel, : panel.stop] = part.view(-1, panel.stop)
    return flat


def _zeros(routes: Routes) -> Tensor:
    shape = routes.cotangents, sum(routes.counts)
    return torch.zeros(shape * 2, dtype=torch.float64, device=routes.device)


def _sum_blocks(
    routes: Routes,
    others: Routes | None,
    names: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    products: InnerProducts,
) -> Tensor:
    """K over σσᵀ of some parameters, for pairs of blocks and their mirror images; zero elsewhere."""
    total = _zeros(routes)
    for name in names:
        for i, j in pairs:
            a, b = routes.blocks.each[i], (others or routes).blocks.each[j]
            ours, theirs = a.factors.get(name, ()), b.factors.get(name, ())
            if not ours or not theirs:
                continue
            block = factors_gram(ours, products, None if others is None and i == j else theirs).to(total.device)
            total[:, a.samples, :, b.samples] += block
            if i != j:
                total[:, b.samples, :, a.samples] += block.permute(2, 3, 0, 1)
    return total


def _columns(routes: Routes, names: Sequence[str]) -> Iterator[Tensor]:
    """This rank's rows, some columns at a time: the same columns on all ranks.

    Yields:
        Shape [R, n, C].

    """
    like = routes.blocks.like
    limit = max(1, BUCKET // (routes.cotangents * max(routes.counts)))
    for dtype in dict.fromkeys(wide(like[name].dtype) for name in names):
        waiting: list[Tensor] = []
        for name in names:
            if wide(like[name].dtype) != dtype:
                continue
            for rows in _row_pieces(routes, name, limit):
                waiting.append(rows.to(dtype))
                if sum(x.shape[2] for x in waiting) >= limit:
                    yield torch.cat(waiting, dim=2)
                    waiting = []
        if waiting:
            yield torch.cat(waiting, dim=2)


def _row_pieces(routes: Routes, name: str, limit: int) -> Iterator[Tensor]:
    """The same of one parameter."""
    shape = routes.blocks.like[name].shape
    height = shape[0] if shape else 1
    width = shape.numel() // max(1, height)
    step = max(1, limit // max(1, width))
    blocks = [_reader(routes, block, name, height, width) for block in routes.own.each]
    for start in range(0, height, step):
        stop = min(start + step, height)
        yield torch.cat([read(start, stop).flatten(2) for read in blocks], dim=1)


def _reader(routes: Routes, block: Block, name: str, height: int, width: int) -> Callable[[int, int], Tensor]:
    """How to read rows start … stop−1 of a parameter's gradients in a block, [R, n, stop − start, width]."""
    factors, shape = block.factors.get(name, ()), (routes.cotangents, block.size, height, width)
    terms = [factor.term for factor in factors if isinstance(factor, Outer)]
    if terms and len(terms) == len(factors):
        return lambda start, stop: reduce(torch.add, (term.columns(start, stop) for term in terms))
    none = torch.zeros((), dtype=torch.float64, device=routes.device).expand(shape)
    whole = summed_rows(factors, slice(0, block.size)).reshape(shape) if factors else none
    return lambda start, stop: whole[:, :, start:stop]
