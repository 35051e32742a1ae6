"""`across`: this rank's samples become those of many ranks."""

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from lightning_ief.capture import LinearizedBatch
from lightning_ief.distributed.exchange import BUCKET, Exchange
from lightning_ief.distributed.ranks import Ranks
from lightning_ief.distributed.sharded import ShardedRanks

__all__ = ["Sync", "across"]

Sync: TypeAlias = Literal["global", "local"] | int
"""Between which ranks updates are exact: all of them, each for itself, so many neighbours."""

# How many batches of a model there were, by its first parameter.
_batches: "WeakKeyDictionary[dist.ProcessGroup, WeakIdKeyDictionary]" = WeakKeyDictionary()
_subgroups: "WeakKeyDictionary[dist.ProcessGroup, dict[int, dist.ProcessGroup]]" = WeakKeyDictionary()


def across(
    local: LinearizedBatch, sync: Sync = "global", parameters: Mapping[str, Tensor] | None = None
) -> LinearizedBatch:
    """See the samples of many ranks as one batch; called by all ranks.

    Args:
        local: This rank's samples, perhaps none (`LinearizedBatch` of no parts).
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
        if size != world.size or not local.parts:
            raise ValueError(
                f"sync={sync!r} with sharded parameters: only 'global' keeps shards of one update."
                if size != world.size
                else "A rank without samples can't take part where parameters are sharded: use drop_last=True."
            )
        return local.across(ShardedRanks(world, parameters or {}), parameters)
    _require_same_parameters(local, world)
    if size == world.size:
        return local.across(Ranks(world, world))
    assert dist.group.WORLD is not None
    known = _subgroups.setdefault(dist.group.WORLD, {})
    if size not in known:
        known[size] = dist.new_subgroups(size, timeout=_timeout(dist.group.WORLD, local.logits.device))[0]
    return local.across(Ranks(Exchange(known[size]), world))


def _require_same_parameters(local: LinearizedBatch, world: Exchange) -> None:
    """Compare the parameters of all ranks, on the first batch of a model and on the 10th, 100th, 1,000th ... one."""
    if dist.group.WORLD is None or world.size == 1:
        return
    known = _batches.setdefault(dist.group.WORLD, WeakIdKeyDictionary())
    first = next(iter(local.parameters.values()))
    known[first] = number = known.get(first, 0) + 1
    if str(number).strip("0") != "1":
        return
    # Not counted as sent: these few bytes are not those of an update.
    kinds = [(name, tuple(p.shape), p.dtype) for name, p in local.parameters.items()]
    everyone = world.gather_objects((kinds, [_fingerprint(p) for p in local.parameters.values()]))
    # All ranks find the same, or those that go on would wait for those that refuse.
    kinds, prints = everyone[0]
    whole = math.hypot(*(size for _, size in prints))
    for rank, (others, theirs) in enumerate(everyone):
        if others != kinds:
            names = sorted({name for name, *_ in {*others} ^ {*kinds}})
            raise ValueError(
                f"Ranks 0 and {rank} have other parameters, {names or 'or in another order'}: build the same model on "
                "all ranks, with the same parameters frozen."
            )
        for (name, *_), (ours, size), (other, _) in zip(kinds, prints, theirs, strict=True):
            # Rounding may differ between devices; what consists of nothing else is small against the whole.
            if math.isnan(ours) != math.isnan(other) or abs(ours - other) > 1e-4 * size + 1e-7 * whole:
                raise ValueError(
                    f"Parameter '{name}' differs between ranks 0 and {rank}, so that their samples have no update in "
                    "common. Begin with the same parameters on all ranks: torch.distributed.broadcast them, draw them "
                    "with the same seed, or use Trainer(strategy='ddp')."
                )


def _fingerprint(parameter: Tensor) -> tuple[float, float]:
    """Σ_k w_k θ_k with weights of order 1 that differ from entry to entry, NaN if not finite, and ‖θ‖; in float64."""
    total = squares = torch.zeros((), dtype=torch.float64, device=parameter.device)
    for number, part in enumerate(parameter.detach().flatten().split(BUCKET)):  # no copy of the whole in float64
        x = part.double()
        # Other entries change the sum by as much as the norm of the change, the same ones in another order too.
        weights = torch.arange(len(x), dtype=torch.float64, device=x.device).add_(number * BUCKET).cos_()
        total, squares = total + x @ weights, squares + x @ x
    found, size = torch.stack([total, squares.sqrt()]).tolist()
    return found if math.isfinite(found) else math.nan, size


def _timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """After how long ranks of a group stop waiting for one another; groups made from it do not inherit that."""
    timeout: timedelta = group._get_backend(device).options._timeout
    return timeout
