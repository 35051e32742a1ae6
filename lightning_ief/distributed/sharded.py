"""Parameters that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded: each rank updates its shard only.

In the forward pass a sharded parameter shows itself whole, as a parameter of its own that FSDP keeps (without memory
in between); its uses are what is captured. No rank ever forms the whole update: from gathered factors each computes
the rows of its shard, the others are summed over the ranks shard by shard.
"""

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lightning_ief.capture import Jacobian
from lightning_ief.capture.jacobian import Addition, LocalJacobian
from lightning_ief.capture.types import CaptureError
from lightning_ief.distributed.exchange import Exchange
from lightning_ief.distributed.jacobian import GlobalJacobian
from lightning_ief.distributed.ranks import Ranks
from lightning_ief.distributed.routes import Routes, wide
from lightning_ief.distributed.update import Update, add, own_slice

__all__ = ["SHARDS", "ShardedRanks", "whole_parameters"]

_REMEDY = (
    "Use IEF, EF or NaturalGradient in row space (max_rows ≥ N·C), or Trainer(strategy='ddp'); γ can be had of a "
    "checkpoint."
)

_known: "WeakKeyDictionary[nn.Module, tuple[list[int], dict[str, nn.Parameter]]]" = WeakKeyDictionary()


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The sharded parameters of a model as its forward pass sees them; called by all ranks.

    The first call gathers the parameters once, module by module.

    Args:
        model: A model of which parts may be sharded.

    Returns:
        {parameter name: whole parameter}, for sharded ones; use them as `parameters` of `linearize`. They have no
        memory outside the forward and backward pass of their module.

    Raises:
        CaptureError: If a parameter is sharded in another way than along dimension 0 over all ranks.

    """
    sharded = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    ids = [id(p) for p in sharded.values()]
    if model in _known and _known[model][0] == ids:
        return _known[model][1]
    for name, parameter in sharded.items():
        mesh = parameter.device_mesh
        if tuple(parameter.placements) != (Shard(0),) or mesh.size() != dist.get_world_size():
            raise CaptureError(
                f"Parameter '{name}' is a DTensor of placements {parameter.placements} on {mesh}; exact updates need "
                "fully_shard along dimension 0, over a mesh of one dimension with all ranks (no tensor parallelism, "
                "no replicas of shards)."
            )
    whole: dict[str, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            whole |= {name: p for name, p in model.named_parameters() if name in sharded and not isinstance(p, DTensor)}
            module.reshard()
    if missing := sharded.keys() - whole.keys():
        raise CaptureError(f"Parameters {sorted(missing)} are DTensors, but not of fully_shard. {_REMEDY}")
    _known[model] = ids, whole
    return whole


def _entries(*_: Any) -> dict[str, Tensor]:
    """There are none: no rank holds a whole direction."""
    raise CaptureError(f"A direction can't be formed where parameters are sharded. {_REMEDY}")


def _add(routes: Routes, weights: Tensor, scale: Tensor | float, to: Addition) -> None:
    """Add Jᵀv in place, each rank to its shards."""
    shards = {name: x for name, x in to.into.items() if isinstance(x, DTensor)}
    add(routes, weights, scale, to._replace(into={name: x for name, x in to.into.items() if name not in shards}))
    root, own = scale**0.5, weights[:, routes.own_samples]
    for name, x in shards.items():
        if name in routes.gathered:
            entry = own_slice(routes, name, weights)
        else:
            whole = routes.own.entry(name, own)
            entry = routes.exchange.scatter_sum(whole.to(wide(whole.dtype)))
        shard = x.to_local()
        entry = entry.mul_(root).mul_(root).to(shard.dtype)
        to._replace(into={name: shard}).of({name: entry.view(shard.shape)})


SHARDS = Update(False, _entries, _add)
"""Jᵀv by shards."""


class ShardedRanks(Ranks):
    """All ranks, of a model with sharded parameters; their parts are linearised by the whole ones.

    Args:
        world: All ranks.
        parameters: The parameters as the optimizer has them, by name.

    """

    def __init__(self, world: Exchange, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(world, world)
        self.parameters = dict(parameters)
        self._versions = self._present_versions()

    @torch.no_grad()  # under which a shard is handed out as it is
    def _present_versions(self) -> dict[str, int]:
        return {n: (p.to_local() if isinstance(p, DTensor) else p)._version for n, p in self.parameters.items()}

    def rows(self, own: LocalJacobian) -> Jacobian:  # noqa: D102
        return GlobalJacobian(own, self.exchange, SHARDS)

    def require_whole(self, who: str) -> None:  # noqa: D102
        raise CaptureError(f"{who} whole directions; here, parameters are sharded. {_REMEDY}")

    def require_unmoved(self, names: Iterable[str]) -> None:  # noqa: D102
        found = self._present_versions()
        if any(found[name] != self._versions[name] for name in names):
            raise CaptureError("The parameters were changed after they had been linearised. Linearize the batch again.")
