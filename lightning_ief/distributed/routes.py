"""Which way the rows of each parameter go, the same on all ranks.

It is the cheaper of two, by the bytes that a rank sends (W ranks, n samples on each, R cotangents, P_i elements, e
bytes each):

* *gathered*: what the rows are made of (a layer's inputs and output gradients, t bytes a sample) goes to every rank,
  (W − 1) n t bytes. Each rank computes its share of the blocks of K. For few samples the update then needs nothing
  more; for many, where every rank would compute all of it, each computes a slice and hands it out, (W − 1)/W P_i e
  bytes.
* *re-sharded*: each rank gets the rows of all samples for 1/W of the columns, a few million elements at a time,
  (W − 1) R n ⌈P_i/W⌉ e bytes, and adds their inner products to K; its part of Jᵀv is summed over the ranks in the end,
  2 (W − 1)/W P_i e bytes.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_ief.capture.factors import Dense, Factor, Outer
from lightning_ief.capture.jacobian import Block, Blocks, LocalJacobian
from lightning_ief.distributed.exchange import BUCKET, Exchange, padded

__all__ = ["Routes", "wide"]

# Multiplications that take as long as sending a byte, roughly: 25 on two cores over the loopback, 60 on a GPU over
# NVLink, hundreds over a network.
_BALANCE = 64


class _Piece(NamedTuple):
    """A tensor of a factor, but for its samples: [lead, N, *tail].

    Attributes:
        lead: R or 1.
        tail: The sizes behind the samples; of outer products, the number of positions first.
        dtype: Its dtype.
        came_back: Of outer products, whether it is the gradient of the operation's output.
        same: The first piece of the layout with the same memory: parameter, number of the factor, number within it.

    """

    lead: int
    tail: tuple[int, ...]
    dtype: torch.dtype
    came_back: bool
    same: tuple[str, int, int]

    @property
    def elements(self) -> int:
        """Of one sample."""
        return self.lead * torch.Size(self.tail).numel()


_Entry: TypeAlias = tuple[tuple[_Piece, ...], ...] | None
"""How the rows of a parameter are held: for each factor its pieces, one if dense, two if outer products. None if some
are held otherwise, or not alike on all ranks."""

_Layout: TypeAlias = dict[str, _Entry]


class Routes:
    """Which way the rows of each parameter go, and the factors that have been gathered on it.

    Args:
        local: Rows of this rank's samples; there may be none.
        exchange: The group.
        hands_out: Whether a part of Jᵀv that one rank has computed goes to all of them.

    Attributes:
        counts: n of each rank.
        cotangents: R.
        layout: How the rows of every parameter are held.
        gathers: Parameters whose factors are to be gathered; the others' rows are re-sharded.
        sliced: Those of them of which each rank computes a slice of the update.
        own: Factors of this rank's samples.
        own_samples: Which of all samples these are.
        blocks: Factors of all samples, one block for each rank; those of parameters `gathered` so far.
        device: Where K is.

    Raises:
        ValueError: If no rank has samples, or ranks have different numbers of cotangents or other parameters.

    """

    def __init__(self, local: LocalJacobian, exchange: Exchange, hands_out: bool) -> None:
        self.exchange = exchange
        self.device = local.scales.device
        self.own = local.blocks
        self.counts, self.cotangents, self.layout = _common(local, exchange)
        self.gathers, self.sliced = _cheaper(self.layout, local.like, self.counts, self.cotangents, hands_out)
        starts = accumulate(self.counts, initial=0)
        blocks = [Block(slice(i, i + n), {}) for i, n in zip(starts, self.counts, strict=False)]
        self.blocks = Blocks(blocks, local.like, local.blocks.versions)
        self.own_samples = blocks[exchange.rank].samples
        self.gathered: set[str] = set()
        self._received: list[dict[tuple[str, int, int], Tensor]] = [{} for _ in self.counts]

    def batches(self) -> Iterator[list[str]]:
        """Parameters that are to be gathered, as many as go into one collective; then all that have been."""
        there = [name for name in self.blocks.like if name in self.gathers & self.gathered]
        batch, size = list[str](), 0
        for name in [name for name in self.blocks.like if name in self.gathers - self.gathered]:
            batch.append(name)
            size += max(self.counts) * sum(piece.elements for pieces in self.layout[name] or () for piece in pieces)
            if size >= BUCKET:
                yield batch
                batch, size = [], 0
        yield from (each for each in (batch, there) if each)

    def gather(self, names: Sequence[str]) -> None:
        """Gather the factors of parameters, each tensor once."""
        names = [name for name in names if name not in self.gathered]
        wanted: dict[tuple[str, int, int], tuple[_Piece, Tensor]] = {}
        for name in names:
            for f, pieces in enumerate(self.layout[name] or ()):
                for p, piece in enumerate(pieces):
                    if piece.same not in self._received[0] and piece.same not in wanted:
                        wanted[piece.same] = piece, self._own_piece(name, f, p, piece)
        longest = max(self.counts)
        for dtype in dict.fromkeys(piece.dtype for piece, _ in wanted.values()):
            alike = {key: (piece, x) for key, (piece, x) in wanted.items() if piece.dtype == dtype}
            sizes = [longest * piece.elements for piece, _ in alike.values()]
            flat = torch.cat([padded(x, 1, longest).flatten() for _, x in alike.values()])
            for r, part in enumerate(self.exchange.gather(flat)):
                for (key, (piece, _)), x in zip(alike.items(), part.split(sizes), strict=True):
                    self._received[r][key] = x.view(piece.lead, longest, *piece.tail)[:, : self.counts[r]]
        for received, block in zip(self._received, self.blocks.each, strict=True):
            for name in names if block.size else ():
                factors: list[Factor] = []
                shape = self.blocks.like[name].shape
                for pieces in self.layout[name] or ():
                    # What is shared may be seen in another shape.
                    x = [received[p.same].reshape(p.lead, -1, *p.tail) for p in pieces]
                    came_back = int(pieces[-1].came_back)
                    factors.append(Outer(x[0], x[1], shape, came_back) if len(x) == 2 else Dense(x[0], shape))
                block.factors[name] = factors  # type: ignore[index]  # made here, and so a dict
        self.gathered.update(names)

    def _own_piece(self, name: str, factor: int, number: int, piece: _Piece) -> Tensor:
        """A tensor of a factor, of all blocks of this rank's samples."""
        held = (block.factors[name][factor].tensors() for block in self.own.each if block.size)
        parts = [padded(tensors[number], 2, piece.tail[0]) for tensors in held if tensors is not None]
        if not parts:
            return torch.zeros(piece.lead, 0, *piece.tail, dtype=piece.dtype, device=self.device)
        return torch.cat(parts, dim=1)


def _common(local: LocalJacobian, exchange: Exchange) -> tuple[list[int], int, _Layout]:
    """What the rows of all ranks have in common: n of each rank, R, and how they are held."""
    layout = reduce(_merged, [_layout(block.factors, local.like) for block in local.blocks.each])
    digest = hashlib.sha256(repr(layout).encode()).digest() if local.samples else b""
    header = torch.tensor([local.samples, local.cotangents, int.from_bytes(digest[:7], "big")])
    headers = torch.stack(exchange.gather(header.to(local.scales.device))).tolist()
    counts = [n for n, _, _ in headers]
    cotangents = {r for n, r, _ in headers if n}
    if len(cotangents) != 1:
        raise ValueError(
            f"Ranks have logits of different shapes, {[r for _, r, _ in headers]} rows for a sample: pad the "
            "batches to one length."
            if cotangents
            else "Empty batch: no rank has samples."
        )
    if len({digest for _, _, digest in headers}) > 1:
        # Lengths differ, or how the rows are best held; every rank learns about every other.
        layouts = [each for each in exchange.gather_objects(layout if local.samples else None) if each is not None]
        if other := sorted(set[str]().union(*layouts) - {*layouts[0]}.intersection(*layouts)):
            raise ValueError(
                f"Only some ranks have rows of {other}: restrict linearizations to the same parameters on all "
                "ranks, and give optimizers the same ones."
            )
        layout = reduce(_merged, layouts)
    return counts, cotangents.pop(), layout


def _cheaper(
    layout: _Layout, like: Mapping[str, Tensor], counts: Sequence[int], cotangents: int, hands_out: bool
) -> tuple[set[str], set[str]]:
    """Parameters whose factors are gathered, by the bytes of either way; and those of them with a sliced update."""
    ranks, rows, known = len(counts), cotangents * sum(counts), set[tuple[str, int, int]]()
    gathers, sliced = set[str](), set[str]()
    for name, entry in layout.items():
        if entry is None:
            continue
        parameter = like[name]
        itemsize = wide(parameter.dtype).itemsize
        pieces = {piece.same: piece for pieces in entry for piece in pieces if piece.same not in known}
        sample = sum(piece.elements * piece.dtype.itemsize for piece in pieces.values())
        # Multiplications for an element of the update, by one rank instead of all of them, for its bytes.
        positions = sum(pieces[0].tail[0] if len(pieces) == 2 else 1 for pieces in entry)
        slices = parameter.ndim > 0 and rows * positions > _BALANCE * itemsize
        handed_out = hands_out * itemsize * ranks * -(-parameter.numel() // ranks)
        resharded = rows * itemsize * -(-parameter.numel() // ranks) + itemsize * parameter.numel()
        if ranks * max(counts) * sample + slices * handed_out <= resharded + handed_out:
            gathers.add(name)
            known |= pieces.keys()
            if slices:
                sliced.add(name)
    return gathers, sliced


def _layout(factors: Mapping[str, Sequence[Factor]], names: Iterable[str]) -> _Layout:
    """How the rows of every parameter are held."""
    first: dict[Any, tuple[str, int, int]] = {}
    layout: _Layout = {}
    for name in names:
        entry: list[tuple[_Piece, ...]] = []
        for f, factor in enumerate(factors.get(name, ())):
            pieces = []
            for p, x in enumerate(factor.tensors() or ()):
                # Weight and bias of a layer have the gradient of its output in common.
                key = (x.data_ptr(), x.numel(), x.dtype) if x.is_contiguous() else (name, f, p)
                came_back = isinstance(factor, Outer) and factor.came_back == p
                same = first.setdefault(key, (name, f, p))
                pieces.append(_Piece(len(x), tuple(x.shape[2:]), x.dtype, came_back, same))
            entry.append(tuple(pieces))
        layout[name] = None if any(not pieces for pieces in entry) else tuple(entry)
    return layout


def _merged(a: _Layout, b: _Layout) -> _Layout:
    """What two layouts have in common; the larger number of positions holds for both."""

    def merged(ours: _Entry, theirs: _Entry) -> _Entry:
        if ours is None or theirs is None or _but_for_positions(ours) != _but_for_positions(theirs):
            return None
        pairs = (zip(*pieces, strict=True) for pieces in zip(ours, theirs, strict=True))
        return tuple(tuple(max(pair, key=lambda piece: piece.tail[0]) for pair in each) for each in pairs)

    return {name: merged(a[name], b[name]) for name in a}


def _but_for_positions(entry: tuple[tuple[_Piece, ...], ...]) -> list[list[_Piece]]:
    return [[piece._replace(tail=piece.tail[len(pieces) - 1 :]) for piece in pieces] for pieces in entry]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What parts of Jᵀv are sent in.

    Args:
        dtype: That of the parameter.

    Returns:
        float32, or float64.

    """
    return torch.promote_types(dtype, torch.float32)
