"""`across`: this rank's samples become those of many ranks."""

from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_ief.capture import LinearizedBatch
from lightning_ief.capture.joint import EmptyLinearization
from lightning_ief.distributed.exchange import Exchange
from lightning_ief.distributed.linearization import GlobalLinearization
from lightning_ief.distributed.sharded import ShardedLinearization

__all__ = ["Sync", "across"]

Sync: TypeAlias = Literal["global", "local"] | int
"""Between which ranks updates are exact: all of them, each for itself, so many neighbours."""

_batches: "WeakKeyDictionary[dist.ProcessGroup, Counter[tuple[str, ...]]]" = WeakKeyDictionary()
_subgroups: "WeakKeyDictionary[dist.ProcessGroup, dict[int, dist.ProcessGroup]]" = WeakKeyDictionary()


def across(
    local: LinearizedBatch, sync: Sync = "global", parameters: Mapping[str, Tensor] | None = None
) -> GlobalLinearization:
    """See the samples of many ranks as one batch; called by all ranks.

    Args:
        local: This rank's samples, perhaps none (`EmptyLinearization`).
        sync: Between which ranks directions are exact: "global", all of them; "local", each for itself; a number, so
            many neighbours. Directions of different groups are averaged.
        parameters: The parameters as the optimizer has them, by name, where some are sharded; then `local` is
            linearised by their `whole_parameters`.

    Returns:
        What directions and optimizers take.

    Raises:
        ValueError: If the number of ranks is no multiple of `sync`, what is sharded has no exact update, or ranks have
            other parameters.

    """
    world = Exchange()
    size = {"global": world.size, "local": 1}.get(sync, sync) if isinstance(sync, str) else sync
    if not isinstance(size, int) or size < 1 or world.size % size:
        raise ValueError(
            f"sync={sync!r} with {world.size} ranks: must be 'global', 'local', or a divisor of the number of ranks."
        )
    if any(isinstance(p, DTensor) for p in (parameters or {}).values()):
        if size != world.size or isinstance(local, EmptyLinearization):
            raise ValueError(
                f"sync={sync!r} with sharded parameters: only 'global' keeps shards of one update."
                if size != world.size
                else "A rank without samples can't take part where parameters are sharded: use drop_last=True."
            )
        return ShardedLinearization(local, world, parameters or {})
    _require_same_parameters(local, world)
    if size == world.size:
        return GlobalLinearization(local, world, world)
    assert dist.group.WORLD is not None
    known = _subgroups.setdefault(dist.group.WORLD, {})
    if size not in known:
        known[size] = dist.new_subgroups(size, timeout=_timeout(dist.group.WORLD, local.logits.device))[0]
    return GlobalLinearization(local, Exchange(known[size]), world)


def _require_same_parameters(local: LinearizedBatch, world: Exchange) -> None:
    """Compare sums over the parameters between ranks, the first time and on the 10th, 100th, 1,000th ... batch."""
    if dist.group.WORLD is None:
        return
    # Counted by what is the same on all ranks, so that all of them compare on the same batches.
    known = _batches.setdefault(dist.group.WORLD, Counter())
    known[names := tuple(local.parameters)] += 1
    if str(known[names]).strip("0") != "1":
        return
    values = [p.detach().double() for p in local.parameters.values()]
    own = torch.stack([torch.stack([x.sum(), x.norm()]) for x in values])
    # By an exchange of its own: these few bytes are not those of an update.
    for rank, others in enumerate(torch.stack(Exchange().gather(own)).tolist()):
        for name, (total, size), (other, _) in zip(local.parameters, own.tolist(), others, strict=True):
            # Other random numbers change a sum by as much as the norm.
            if abs(total - other) > 1e-4 * size:
                raise ValueError(
                    f"Parameter '{name}' differs between ranks {world.rank} and {rank}, so that their samples have no "
                    "update in common. Begin with the same parameters on all ranks: torch.distributed.broadcast them, "
                    "draw them with the same seed, or use Trainer(strategy='ddp')."
                )


def _timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """After how long ranks of a group stop waiting for one another; groups made from it do not inherit that."""
    timeout: timedelta = group._get_backend(device).options._timeout
    return timeout
