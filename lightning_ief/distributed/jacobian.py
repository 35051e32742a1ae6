"""The Jacobian of the global batch, each rank holding the factors of the samples it has seen.

Each parameter's rows go the cheaper of two ways, by the bytes that a rank sends (W ranks, n samples on each, R
cotangents, P_i elements, e bytes each):

* *gathered*: what the rows are made of (a layer's inputs and output gradients, t bytes a sample) goes to every rank,
  (W − 1) n t bytes. Each rank computes its share of the blocks of K. For few samples the update then needs nothing
  more; for many, where every rank would compute all of it, each computes a slice and hands it out, (W − 1)/W P_i e
  bytes.
* *re-sharded*: each rank gets the rows of all samples for 1/W of the columns, a few million elements at a time,
  (W − 1) R n ⌈P_i/W⌉ e bytes, and adds their inner products to K; its part of Jᵀv is summed over the ranks in the end,
  2 (W − 1)/W P_i e bytes.

K is summed in float64, solved on every rank, and rank 0's coefficients hold for all. Nothing else of the size of the
model is ever sent: DistributedDataParallel has no gradients to reduce.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_ief.capture.factors import Dense, Factor, Outer, factors_gram, summed_rows
from lightning_ief.capture.jacobian import Block, Jacobian, Sides
from lightning_ief.distributed.exchange import BUCKET, Exchange, padded
from lightning_ief.linalg.gram import InnerProducts, dense_gram, full_precision
from lightning_ief.linalg.vectors import restricted

__all__ = ["GlobalJacobian", "wide"]

# Multiplications that take as long as sending a byte, roughly: 25 on two cores over the loopback, 60 on a GPU over
# NVLink, hundreds over a network.
_BALANCE = 64

# Rows of K that are sent together, each up to the last one's diagonal.
_PANEL = 64


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


_Entry: TypeAlias = tuple[tuple[_Piece, ...], ...] | None
"""How the rows of a parameter are held: for each factor its pieces, one if dense, two if outer products. None if some
are held otherwise, or not alike on all ranks."""

_Layout: TypeAlias = dict[str, _Entry]


class GlobalJacobian(Jacobian):
    """J of the samples of all ranks of a group.

    Every method is called by all ranks of the group, and gives all of them the same. Samples are ordered by rank.

    Args:
        local: Rows of this rank's samples; there may be none.
        exchange: The group.

    Raises:
        ValueError: If no rank has samples, or ranks have different numbers of cotangents.

    """

    is_collective = True

    _flat = None  # gathered rows stay as they came

    hands_out = True
    """Whether a part of Jᵀv that one rank has computed goes to all of them."""

    def __init__(self, local: Jacobian, exchange: Exchange) -> None:
        self.local = local
        self.exchange = exchange
        layout = reduce(_merged, [_layout(block.factors, local) for block in local._blocks])
        digest = hashlib.sha256(repr(layout).encode()).digest() if local.samples else b""
        header = torch.tensor([local.samples, local.cotangents, int.from_bytes(digest[:7], "big")])
        headers = torch.stack(exchange.gather(header.to(local._scales.device))).tolist()
        self.counts = [n for n, _, _ in headers]
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
        self.layout = layout
        scales = local._scales if local.samples else local._scales.new_zeros(*cotangents, 0)
        super().__init__(
            {}, local.like, torch.cat(exchange.gather_samples(scales, self.counts), dim=1), local._versions
        )
        starts = accumulate(self.counts, initial=0)
        self._blocks = [Block(slice(i, i + n), {}) for i, n in zip(starts, self.counts, strict=False)]
        self.own = self._blocks[exchange.rank].samples
        self.gathers, self.sliced = self._routes()
        self._gathered: set[str] = set()
        self._received: list[dict[tuple[str, int, int], Tensor]] = [{} for _ in self.counts]

    def restrict(self, names: Iterable[str]) -> "GlobalJacobian":  # noqa: D102
        return type(self)(self.local.restrict(names), self.exchange)

    def scaled(self, factors: Tensor) -> "GlobalJacobian":  # noqa: D102
        found = super().scaled(factors)
        assert isinstance(found, GlobalJacobian)  # a copy
        found.local = self.local.scaled(factors.view(self._scales.shape)[:, self.own].flatten())
        return found

    def sides(self, name: str) -> list[Sides]:
        """The same of the samples of all ranks, which are gathered; see `Jacobian.sides`.

        Args:
            name: A weight, named in `linearize(..., keep_sides=...)`.

        Returns:
            For each use left, right, and which of them came back.

        """
        restricted(self.like, [name])
        if self.layout[name] is not None:
            self._gather([name])
        return super().sides(name)

    def _routes(self) -> tuple[set[str], set[str]]:
        """Parameters whose factors are gathered, by the bytes of either way; and those of them with a sliced update."""
        ranks, known = self.exchange.size, set[tuple[str, int, int]]()
        gathers, sliced = set[str](), set[str]()
        for name, entry in self.layout.items():
            if entry is None:
                continue
            parameter = self.like[name]
            itemsize = wide(parameter.dtype).itemsize
            pieces = {piece.same: piece for pieces in entry for piece in pieces if piece.same not in known}
            sample = sum(piece.lead * _size(piece.tail) * piece.dtype.itemsize for piece in pieces.values())
            # Multiplications for an element of the update, by one rank instead of all of them, for its bytes.
            positions = sum(pieces[0].tail[0] if len(pieces) == 2 else 1 for pieces in entry)
            slices = parameter.ndim > 0 and self.num_rows * positions > _BALANCE * itemsize
            handed_out = self.hands_out * itemsize * ranks * -(-parameter.numel() // ranks)
            resharded = self.num_rows * itemsize * -(-parameter.numel() // ranks) + itemsize * parameter.numel()
            if ranks * max(self.counts) * sample + slices * handed_out <= resharded + handed_out:
                gathers.add(name)
                known |= pieces.keys()
                if slices:
                    sliced.add(name)
        return gathers, sliced

    def _compute_gram(self, products: InnerProducts) -> Tensor:
        self.local.require_unwritten()
        total, rank, ranks = self._no_gram(), self.exchange.rank, self.exchange.size
        # Every pair of blocks once: this rank's with its own and with half of the others; of even many, the opposite
        # one belongs to the lower rank.
        distances = range(ranks // 2 + 1 - (ranks % 2 == 0 and rank >= ranks // 2))
        pairs = [(rank, (rank + distance) % ranks) for distance in distances]
        with full_precision(total.device):
            for names in self._batches(self.gathers):
                self._gather(names)
                total += self._sum_blocks(names, pairs, products)
            for rows in self._columns([name for name in self.like if name not in self.gathers]):
                total += dense_gram(self.exchange.reshard(rows, self.counts), None, products)
        # About one half of K goes over the wire.
        flat = total.view(self.num_rows, self.num_rows)
        panels = [slice(i, min(i + _PANEL, self.num_rows)) for i in range(0, self.num_rows, _PANEL)]
        parts = [flat[panel, : panel.stop] for panel in panels]
        packed = self.exchange.sum_(torch.cat([part.flatten() for part in parts]))
        for panel, part in zip(panels, packed.split([part.numel() for part in parts]), strict=True):
            flat[panel, : panel.stop] = part.view(-1, panel.stop)
            flat[: panel.start, panel] = flat[panel, : panel.start].T
        return self._times_scales(total)

    def _sum_blocks(self, names: Sequence[str], pairs: Sequence[tuple[int, int]], products: InnerProducts) -> Tensor:
        """K over σσᵀ of some parameters, for pairs of blocks and their mirror images; zero elsewhere."""
        total = self._no_gram()
        for name in names:
            for i, j in pairs:
                a, b = self._blocks[i], self._blocks[j]
                ours, theirs = a.factors.get(name, ()), b.factors.get(name, ())
                if not ours or not theirs:
                    continue
                block = factors_gram(ours, products, None if i == j else theirs).to(total.device)
                total[:, a.samples, :, b.samples] += block
                if i != j:
                    total[:, b.samples, :, a.samples] += block.permute(2, 3, 0, 1)
        return total

    def _same_on_all_ranks(self, numbers: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        same = self.exchange.broadcast_(torch.cat([numbers, v]))
        return same[: len(numbers)], same[len(numbers) :]

    def _batches(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Parameters whose factors are not there yet, as many as go into one collective; then all that are there."""
        there, batch, size = [], list[str](), 0
        for name in (name for name in self.like if name in names):
            if name in self._gathered:
                there.append(name)
                continue
            batch.append(name)
            entry = self.layout[name] or ()
            size += max(self.counts) * sum(piece.lead * _size(piece.tail) for pieces in entry for piece in pieces)
            if size >= BUCKET:
                yield batch
                batch, size = [], 0
        yield from (each for each in (batch, there) if each)

    def _gather(self, names: Sequence[str]) -> None:
        """Gather the factors of parameters, each tensor once."""
        names = [name for name in names if name not in self._gathered]
        wanted: dict[tuple[str, int, int], tuple[_Piece, Tensor]] = {}
        for name in names:
            for f, pieces in enumerate(self.layout[name] or ()):
                for p, piece in enumerate(pieces):
                    if piece.same not in self._received[0] and piece.same not in wanted:
                        wanted[piece.same] = piece, self._own_piece(name, f, p, piece)
        longest = max(self.counts)
        for dtype in dict.fromkeys(piece.dtype for piece, _ in wanted.values()):
            alike = {key: (piece, x) for key, (piece, x) in wanted.items() if piece.dtype == dtype}
            sizes = [piece.lead * longest * _size(piece.tail) for piece, _ in alike.values()]
            flat = torch.cat([padded(x, 1, longest).flatten() for _, x in alike.values()])
            for r, part in enumerate(self.exchange.gather(flat)):
                for (key, (piece, _)), x in zip(alike.items(), part.split(sizes), strict=True):
                    self._received[r][key] = x.view(piece.lead, longest, *piece.tail)[:, : self.counts[r]]
        for received, block in zip(self._received, self._blocks, strict=True):
            for name in names if block.samples.start < block.samples.stop else ():
                factors: list[Factor] = []
                shape = self.like[name].shape
                for pieces in self.layout[name] or ():
                    # What is shared may be seen in another shape.
                    tensors = [received[p.same].reshape(p.lead, -1, *p.tail) for p in pieces]
                    if len(tensors) == 2:
                        factors.append(Outer(tensors[0], tensors[1], shape, int(pieces[1].came_back)))
                    else:
                        factors.append(Dense(tensors[0], shape))
                block.factors[name] = factors  # type: ignore[index]  # made here, and so a dict
        self._gathered.update(names)

    def _own_piece(self, name: str, factor: int, number: int, piece: _Piece) -> Tensor:
        """A tensor of a factor, of all blocks of this rank's samples."""
        parts = [
            _tensors(block.factors[name][factor])[number]
            for block in self.local._blocks
            if block.samples.start < block.samples.stop
        ]
        if not parts:
            return torch.zeros(piece.lead, 0, *piece.tail, dtype=piece.dtype, device=self._scales.device)
        return torch.cat([padded(part, 2, piece.tail[0]) for part in parts], dim=1)

    def _columns(self, names: Sequence[str]) -> Iterator[Tensor]:
        """This rank's rows, some columns at a time: the same columns on all ranks.

        Yields:
            Shape [R, n, C].

        """
        limit = max(1, BUCKET // (self.cotangents * max(self.counts)))
        for dtype in dict.fromkeys(wide(self.like[name].dtype) for name in names):
            waiting: list[Tensor] = []
            for name in names:
                if self.layout[name] == () or wide(self.like[name].dtype) != dtype:
                    continue
                for rows in self._row_pieces(name, limit):
                    waiting.append(rows.to(dtype))
                    if sum(x.shape[2] for x in waiting) >= limit:
                        yield torch.cat(waiting, dim=2)
                        waiting = []
            if waiting:
                yield torch.cat(waiting, dim=2)

    def _row_pieces(self, name: str, limit: int) -> Iterator[Tensor]:
        shape = self.like[name].shape
        height = shape[0] if shape else 1
        width = shape.numel() // max(1, height)
        step = max(1, limit // max(1, width))
        blocks = [
            (block.samples.stop - block.samples.start, block.factors.get(name, ())) for block in self.local._blocks
        ]
        whole: dict[int, Tensor] = {}
        for start in range(0, height, step):
            stop = min(start + step, height)
            parts = []
            for number, (samples, factors) in enumerate(blocks):
                terms = [factor.term for factor in factors if isinstance(factor, Outer)]
                if terms and len(terms) == len(factors):
                    rows = reduce(torch.add, (term.columns(start, stop) for term in terms)).flatten(2)
                elif factors:
                    if number not in whole:
                        found = summed_rows(factors, slice(0, samples))
                        whole[number] = found.reshape(self.cotangents, samples, height, width)
                    rows = whole[number][:, :, start:stop].flatten(2)
                else:
                    rows = self._scales.new_zeros(self.cotangents, samples, (stop - start) * width)
                parts.append(rows)
            yield torch.cat(parts, dim=1)

    def _entries(self, names: Sequence[str], weights: Tensor, scale: Tensor | float) -> dict[str, Tensor]:
        whole = [name for name in names if self._is_whole(name)]
        found = super()._entries(whole, weights, scale)
        root, own = scale**0.5, weights[:, self.own]
        summands = (
            (name, self.local.weighted_entry(name, own).to(wide(self.like[name].dtype)))
            for name in names
            if name not in self._gathered
        )
        slices = (
            (name, self.weighted_slice(name, weights))
            for name in names
            if name in self._gathered and name in self.sliced
        )
        more = self.exchange.sum_entries(summands) | self.exchange.join_slices(slices, self.like)
        for name, x in more.items():
            found[name] = x.mul_(root).mul_(root).to(self.like[name].dtype)
        return {name: found[name] for name in names}

    def weighted_slice(self, name: str, weights: Tensor) -> Tensor:
        """This rank's rows of one parameter's entry of Jᵀv, from gathered factors.

        Args:
            name: The parameter.
            weights: v σ, shape [R, N].

        Returns:
            `Exchange.own_rows` of it; float32 at least.

        """
        parameter = self.like[name]
        own = self.exchange.own_rows(parameter.shape[0])
        shape = own.stop - own.start, *parameter.shape[1:]
        total = torch.zeros(shape, dtype=wide(parameter.dtype), device=parameter.device)
        for block in self._blocks if len(total) else ():
            for factor in block.factors.get(name, ()):
                assert isinstance(factor, (Dense, Outer))
                factor.part(own.start, own.stop).add_weighted_sum(weights[:, block.samples], total, 1.0, 1.0)
        return total

    def _is_whole(self, name: str) -> bool:
        """Whether this rank computes all of a parameter's update."""
        return name in self._gathered and name not in self.sliced

    def _is_apart(self, name: str, storages: set[int]) -> bool:
        return self._is_whole(name) and super()._is_apart(name, storages)

    def matvec(self, d: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return self.of_all_samples(self.local.matvec(d).view(self.cotangents, self.local.samples))

    def to_dense(self) -> Tensor:  # noqa: D102
        rows = self.local.to_dense()
        return self.of_all_samples(rows.view(self.cotangents, self.local.samples, rows.shape[1]))

    def of_all_samples(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.cat(self.exchange.gather_samples(x, self.counts), dim=1).flatten(0, 1)


def _layout(factors: Mapping[str, Sequence[Factor]], local: Jacobian) -> _Layout:
    """How the rows of every parameter are held."""
    first: dict[Any, tuple[str, int, int]] = {}
    layout: _Layout = {}
    for name in local.like:
        entry: list[tuple[_Piece, ...]] = []
        for f, factor in enumerate(factors.get(name, ())):
            pieces = []
            for p, x in enumerate(_tensors(factor)):
                # Weight and bias of a layer have the gradient of its output in common.
                key = (x.data_ptr(), x.numel(), x.dtype) if x.is_contiguous() else (name, f, p)
                came_back = isinstance(factor, Outer) and factor.came_back == p
                same = first.setdefault(key, (name, f, p))
                pieces.append(_Piece(len(x), tuple(x.shape[2:]), x.dtype, came_back, same))
            entry.append(tuple(pieces))
        layout[name] = None if any(not pieces for pieces in entry) else tuple(entry)
    return layout


def _tensors(factor: Factor) -> list[Tensor]:
    """What a factor's rows are made of, each [R or 1, N, T or P, ...]; nothing where that is more than tensors."""
    if isinstance(factor, Outer):
        return [factor.term.left, factor.term.right]
    if isinstance(factor, Dense):
        return [factor.flat]
    return []


def _merged(a: _Layout, b: _Layout) -> _Layout:
    """What two layouts have in common; the larger number of positions holds for both."""

    def merged(ours: _Entry, theirs: _Entry) -> _Entry:
        if ours is None or theirs is None or [len(p) for p in ours] != [len(p) for p in theirs]:
            return None
        factors = []
        for mine, other in zip(ours, theirs, strict=True):
            outer = len(mine) == 2
            pieces = []
            for p, q in zip(mine, other, strict=True):
                if p._replace(tail=p.tail[outer:]) != q._replace(tail=q.tail[outer:]):
                    return None
                pieces.append(max(p, q, key=lambda piece: piece.tail[0]))
            factors.append(tuple(pieces))
        return tuple(factors)

    return {name: merged(a[name], b[name]) for name in a}


def _size(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def wide(dtype: torch.dtype) -> torch.dtype:
    """What parts of Jᵀv are sent in.

    Args:
        dtype: That of the parameter.

    Returns:
        float32, or float64.

    """
    return torch.promote_types(dtype, torch.float32)
