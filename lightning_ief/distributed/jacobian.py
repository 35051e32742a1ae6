"""The Jacobian of the global batch, each rank holding the factors of the samples it has seen.

It has the rows of this rank's samples, and what has been gathered of the others'; `routes` says which way the rows of
each parameter go, `gram` and `update` go it. K is solved on every rank, and rank 0's coefficients hold for all. Nothing
else of the size of the model is ever sent: DistributedDataParallel has no gradients to reduce.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from lightning_ief.capture.jacobian import Addition, Jacobian, LocalJacobian, Sides
from lightning_ief.distributed.exchange import Exchange
from lightning_ief.distributed.gram import unscaled_gram
from lightning_ief.distributed.routes import Routes
from lightning_ief.distributed.update import WHOLE, Update
from lightning_ief.linalg.gram import InnerProducts
from lightning_ief.linalg.vectors import restricted

__all__ = ["GlobalJacobian"]


@final
class GlobalJacobian(Jacobian):
    """J of the samples of all ranks of a group.

    Every method is called by all ranks of the group, and gives all of them the same. Samples are ordered by rank.

    Args:
        local: Rows of this rank's samples; there may be none.
        exchange: The group.
        update: How Jᵀv reaches the parameters.

    Raises:
        ValueError: If no rank has samples, or ranks have different numbers of cotangents or other parameters.

    """

    def __init__(self, local: LocalJacobian, exchange: Exchange, update: Update = WHOLE) -> None:
        self.local = local
        self.exchange = exchange
        self.update = update
        self.is_collective = update.is_whole  # forming is refused otherwise
        self.routes = Routes(local, exchange, hands_out=update.is_whole)
        scales = exchange.gather_samples(local.scales.view(self.routes.cotangents, local.samples), self.routes.counts)
        super().__init__(self.routes.blocks, torch.cat(scales, dim=1))

    def restrict(self, names: Iterable[str]) -> "GlobalJacobian":  # noqa: D102
        found = GlobalJacobian(self.local.restrict(names), self.exchange, self.update)
        found.scales = self.scales  # of rows that were scaled after they had been gathered
        return found

    def sides(self, name: str) -> list[Sides]:  # noqa: D102
        restricted(self.like, [name])
        if self.routes.layout[name] is not None:
            self.routes.gather([name])
        return super().sides(name)

    def require_unmoved(self) -> None:  # noqa: D102
        if self.update.is_whole:  # version counters of whole parameters do not change when their shards do
            super().require_unmoved()

    def require_unwritten(self) -> None:  # noqa: D102
        self.local.require_unwritten()
        super().require_unwritten()

    def _unscaled_gram(self, products: InnerProducts) -> Tensor:
        return unscaled_gram(self.routes, products)

    def unscaled_products(self, other: "GlobalJacobian", products: InnerProducts) -> Tensor:  # noqa: D102
        return unscaled_gram(self.routes, products, other.routes)

    def _same(self, numbers: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        same = self.exchange.broadcast_(torch.cat([numbers, v]))
        return same[: len(numbers)], same[len(numbers) :]

    def _entries(self, names: Sequence[str], weights: Tensor, scale: Tensor | float) -> dict[str, Tensor]:
        return self.update.entries(self.routes, names, weights, scale)

    def _add(self, weights: Tensor, scale: Tensor | float, to: Addition) -> None:
        self.update.add(self.routes, weights, scale, to)

    def _unscaled_matvec(self, d: Mapping[str, Tensor]) -> Tensor:
        return self.of_all_samples(self.local._unscaled_matvec(d).view(self.cotangents, self.local.samples))

    def _column_squares(self, weights: Tensor) -> dict[str, Tensor]:
        start = sum(self.routes.counts[: self.exchange.rank])
        own = weights[:, start : start + self.local.samples]
        # A rank without samples does not know how many cotangents there are, and has no rows to weigh.
        return self.exchange.sum_entries(self.local._column_squares(own).items())

    def _unscaled_dense(self) -> Tensor:
        rows = self.local._unscaled_dense()
        return self.of_all_samples(rows.view(self.cotangents, self.local.samples, rows.shape[1]))

    def of_all_samples(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.cat(self.exchange.gather_samples(x, self.routes.counts), dim=1).flatten(0, 1)
