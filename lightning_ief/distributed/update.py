"""Jᵀv of the samples of all ranks, formed on all of them or added in place.

Of gathered factors each rank computes all of it, or a slice that it hands out; of re-sharded rows each has the part of
its own samples, and these parts are summed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ief.capture.factors import Dense, Outer
from lightning_ief.capture.jacobian import Addition
from lightning_ief.distributed.routes import Routes, wide

__all__ = ["WHOLE", "Update", "add", "entries", "own_slice"]


def entries(routes: Routes, names: Sequence[str], weights: Tensor, scale: Tensor | float) -> dict[str, Tensor]:
    """Form entries of Jᵀv; called by all ranks.

    Args:
        routes: Which way the rows go.
        names: The parameters.
        weights: v σ / scale of the samples of all ranks, shape [R, N].
        scale: What they were divided by.

    Returns:
        {parameter name: tensor of its shape and dtype}, the same on all ranks.

    """
    like, sliced = routes.blocks.like, routes.sliced
    root, own = scale**0.5, weights[:, routes.own_samples]
    found = {name: routes.blocks.entry(name, weights) for name in names if name in routes.gathered - sliced}
    summands = (
        (name, routes.own.entry(name, own).to(wide(like[name].dtype))) for name in names if name not in routes.gathered
    )
    slices = ((name, own_slice(routes, name, weights)) for name in names if name in routes.gathered & sliced)
    found |= routes.exchange.sum_entries(summands) | routes.exchange.join_slices(slices, like)
    # The scale is put back in two halves: the whole may be infinite in float32.
    return {name: found[name].mul_(root).mul_(root).to(like[name].device, like[name].dtype) for name in names}


def add(routes: Routes, weights: Tensor, scale: Tensor | float, to: Addition) -> None:
    """Add Jᵀv in place; called by all ranks.

    Args:
        routes: Which way the rows go.
        weights: v σ / scale of the samples of all ranks, shape [R, N].
        scale: What they were divided by.
        to: Where to.

    """
    factor = float(scale)
    whole = [name for name in to.into if name in routes.gathered - routes.sliced]
    direct = routes.blocks.apart(whole, to.into, factor)
    to.of(entries(routes, [name for name in to.into if name not in direct], weights, scale))
    routes.blocks.add(direct, weights, factor, to)


def own_slice(routes: Routes, name: str, weights: Tensor) -> Tensor:
    """This rank's rows of one parameter's entry of Jᵀv / scale, from gathered factors.

    Args:
        routes: Which way the rows go.
        name: The parameter.
        weights: v σ / scale of the samples of all ranks, shape [R, N].

    Returns:
        `Exchange.own_rows` of it; float32 at least.

    """
    parameter = routes.blocks.like[name]
    own = routes.exchange.own_rows(parameter.shape[0])
    shape = own.stop - own.start, *parameter.shape[1:]
    total = torch.zeros(shape, dtype=wide(parameter.dtype), device=parameter.device)
    for block in routes.blocks.each if len(total) else ():
        for factor in block.factors.get(name, ()):
            assert isinstance(factor, (Dense, Outer))
            factor.part(own.start, own.stop).add_weighted_sum(weights[:, block.samples], total, 1.0, 1.0)
    return total


class Update(NamedTuple):
    """How Jᵀv reaches the parameters.

    Attributes:
        is_whole: Whether all ranks hold whole parameters, and so whole directions.
        entries: Forms some of its entries.
        add: Adds it in place.

    """

    is_whole: bool
    entries: Callable[[Routes, Sequence[str], Tensor, Tensor | float], dict[str, Tensor]]
    add: Callable[[Routes, Tensor, Tensor | float, Addition], None]


WHOLE = Update(True, entries, add)
