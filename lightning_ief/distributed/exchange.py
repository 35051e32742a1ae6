"""The collectives of a group of ranks: the only ones of the package."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["BUCKET", "Exchange", "gathered_losses", "padded"]

BUCKET = 2**22
"""Elements that a rank hands to one collective."""


class Exchange:
    """The collectives of a group of ranks.

    Args:
        group: The group; all ranks if None.

    Attributes:
        size: W.
        rank: This rank within the group.
        sent: Bytes this rank has sent so far, as rings and direct exchanges send them: (W − 1)/W of twice a sum, its
            own part to each of the others in the other collectives. What rank 0 broadcasts counts once.

    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.sent = 0

    def gather(self, x: Tensor) -> list[Tensor]:
        """Gather tensors of the same shape from all ranks.

        Args:
            x: This rank's.

        Returns:
            Those of all ranks.

        """
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        self.sent += (self.size - 1) * x.nbytes
        return parts

    def gather_objects(self, x: Any) -> list[Any]:
        """Gather what is no tensor from all ranks; small things, now and then.

        Args:
            x: This rank's.

        Returns:
            Those of all ranks.

        """
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, x, group=self.group)
        return found

    def gather_samples(self, x: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Gather what differs from rank to rank in the number of samples.

        Args:
            x: Shape [R, n, ...].
            counts: n of each rank.

        Returns:
            Those of all ranks.

        """
        return [part[:, :n] for part, n in zip(self.gather(padded(x, 1, max(counts))), counts, strict=True)]

    def gather_all_samples(self, x: Tensor) -> list[Tensor]:
        """The same where the ranks do not know of one another's samples yet.

        Args:
            x: Shape [R, n, ...].

        Returns:
            Those of all ranks.

        Raises:
            ValueError: If no rank has samples.

        """
        counts = torch.cat(self.gather(torch.tensor([x.shape[1]], device=x.device))).tolist()
        if not any(counts):
            raise ValueError("Empty batch: no rank has samples.")
        return self.gather_samples(x, counts)

    def reshard(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Exchange all columns of this rank's samples for some columns of all samples.

        Args:
            rows: Shape [R, n, C].
            counts: n of each rank.

        Returns:
            Shape [R, N, ⌈C/W⌉], zeros behind the last column.

        """
        width = -(-rows.shape[2] // self.size)
        given = padded(rows, 2, width * self.size).unflatten(2, (self.size, width)).permute(2, 0, 1, 3)
        sizes = [rows.shape[0] * n * width for n in counts]
        taken = rows.new_empty(sum(sizes))
        dist.all_to_all_single(
            taken, given.flatten(), sizes, [rows.shape[0] * rows.shape[1] * width] * self.size, group=self.group
        )
        self.sent += (self.size - 1) * rows.shape[0] * rows.shape[1] * width * rows.itemsize
        blocks = [part.view(rows.shape[0], n, width) for part, n in zip(taken.split(sizes), counts, strict=True)]
        return torch.cat(blocks, dim=1)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place; the same to the last bit on all of them.

        Args:
            x: This rank's summand, contiguous.

        Returns:
            x.

        """
        dist.all_reduce(x, group=self.group)
        self.sent += 2 * (self.size - 1) * x.nbytes // self.size
        return x

    def own_rows(self, rows: int) -> slice:
        """The rows that are this rank's, where they are dealt out as by `torch.chunk`.

        Args:
            rows: D.

        Returns:
            ⌈D/W⌉ of them; the last ranks may have fewer, or none.

        """
        step = -(-rows // self.size)
        start = min(step * self.rank, rows)
        return slice(start, min(start + step, rows))

    def scatter_sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, each of which gets its part of the rows: as many as `torch.chunk` would give it.

        Args:
            x: This rank's summand, [D, ...].

        Returns:
            `own_rows`.

        """
        step = -(-x.shape[0] // self.size)
        given = padded(x, 0, step * self.size)
        taken = torch.empty_like(given)
        dist.all_to_all_single(taken, given, group=self.group)
        self.sent += (self.size - 1) * given.nbytes // self.size
        total = taken.view(self.size, step, *x.shape[1:]).sum(0)
        own = self.own_rows(x.shape[0])
        return total[: own.stop - own.start]

    def sum_entries(self, entries: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Sum tensors over the ranks, many at a time.

        Args:
            entries: Names and this rank's summands, which are taken one by one.

        Returns:
            The sums.

        """
        found = {}
        for alike in _bucketed(entries):
            flat = self.sum_(torch.cat([x.flatten() for _, x in alike]))
            parts = flat.split([x.numel() for _, x in alike])
            found.update({name: part.view(x.shape) for (name, x), part in zip(alike, parts, strict=True)})
        return found

    def broadcast_entries(self, entries: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Take over what rank 0 of the group has, of many tensors at a time.

        Args:
            entries: Names and tensors.

        Returns:
            Those of rank 0.

        """
        found = {}
        for alike in _bucketed(entries):
            flat = self.broadcast_(torch.cat([x.flatten() for _, x in alike]))
            parts = flat.split([x.numel() for _, x in alike])
            found.update({name: part.view(x.shape) for (name, x), part in zip(alike, parts, strict=True)})
        return found

    def join_slices(self, slices: Iterable[tuple[str, Tensor]], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put tensors together of which each rank has some rows, many at a time.

        Args:
            slices: Names and this rank's rows, as `torch.chunk` would deal them out.
            like: Tensors of the shapes of the whole, by name.

        Returns:
            The whole tensors.

        """
        found = {}
        rows = ((name, padded(x, 0, -(-like[name].shape[0] // self.size))) for name, x in slices)
        for alike in _bucketed(rows):
            parts = torch.stack(self.gather(torch.cat([x.flatten() for _, x in alike])))
            for (name, x), part in zip(alike, parts.split([x.numel() for _, x in alike], dim=1), strict=True):
                shape = like[name].shape
                found[name] = part.reshape(-1, *x.shape[1:])[: shape[0]]
        return found

    def broadcast_(self, x: Tensor) -> Tensor:
        """Take over what rank 0 of the group has, in place.

        Args:
            x: Contiguous.

        Returns:
            x.

        """
        dist.broadcast(x, dist.get_global_rank(self.group, 0) if self.group else 0, group=self.group)
        self.sent += (self.size - 1) * x.nbytes if self.rank == 0 else 0
        return x


def gathered_losses(losses: Tensor) -> list[Tensor]:
    """Gather per-sample losses of all ranks.

    Args:
        losses: Those of this rank, shape [n].

    Returns:
        Those of each rank.

    Raises:
        ValueError: If no rank has samples.

    """
    return [part[0] for part in Exchange().gather_all_samples(losses[None])]


def _bucketed(entries: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Tensors of one dtype, as many as go into one collective; each is taken when its turn has come."""
    waiting: dict[torch.dtype, list[tuple[str, Tensor]]] = {}
    for name, x in entries:
        alike = waiting.setdefault(x.dtype, [])
        alike.append((name, x))
        if sum(x.numel() for _, x in alike) >= BUCKET:
            yield waiting.pop(x.dtype)
    yield from waiting.values()


def padded(x: Tensor, dim: int, size: int) -> Tensor:
    """Add zeros behind what is there, up to a size.

    Args:
        x: A tensor.
        dim: The dimension that grows.
        size: Its new size.

    Returns:
        Contiguous; x itself if it is that already.

    """
    if x.shape[dim] == size:
        return x.contiguous()
    shape = [*x.shape]
    shape[dim] = size
    padded = x.new_zeros(shape)
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    return padded
