"""The ranks whose samples are one batch: what `LinearizedBatch` asks where the samples of one process are not all."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_ief.capture import Direction, Jacobian, LinearizedBatch
from lightning_ief.capture.batch import OneRank
from lightning_ief.capture.jacobian import LocalJacobian
from lightning_ief.distributed.exchange import Exchange
from lightning_ief.distributed.jacobian import GlobalJacobian
from lightning_ief.objectives import Objective

__all__ = ["Ranks", "mean_over_groups"]


class Ranks(OneRank):
    """Many ranks, in groups between which directions are exact.

    Args:
        exchange: This rank's group.
        world: All ranks.

    """

    def __init__(self, exchange: Exchange, world: Exchange) -> None:
        self.exchange = exchange
        self.world = world
        first = world.rank - exchange.rank
        self.group = slice(first, first + exchange.size)

    def of_all(self, losses: Tensor, norms: Tensor) -> list[tuple[Tensor, Tensor]]:  # noqa: D102
        found = self.world.gather_all_samples(torch.stack([losses.double(), norms.double()]))
        return [(x[0], x[1]) for x in found]

    def rows(self, own: LocalJacobian) -> Jacobian:  # noqa: D102
        return GlobalJacobian(own, self.exchange) if self.exchange.size > 1 else own

    def sum_(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.exchange.sum_(x)

    def sum_over_all(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.world.sum_(x)

    def sum_entries(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        return self.exchange.sum_entries(entries.items())

    def of_the_first(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        return self.exchange.broadcast_entries(entries.items())

    def sample(  # noqa: D102
        self, objective: Objective, logits: Tensor, targets: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        if generator is not None and (index := self.world.rank // self.exchange.size):
            # Other groups than the first must not draw as it does: the errors of their directions would add up.
            seeds = torch.randint(2**62, (index,), generator=generator, device=generator.device)
            generator.manual_seed(int(seeds[-1]))
        kinds = self.exchange.gather_objects([(len(x), x.shape[1:], x.dtype) for x in (logits, targets)])
        given = [kind for kind in kinds if kind[0][0]]
        if any(kind[x][1:] != given[0][x][1:] for kind in given for x in range(2)):
            raise ValueError(
                "Targets can't be sampled for logits or targets that differ in shape between ranks, "
                f"{[tuple(shape) for (_, shape, _), _ in given]}: pad them to one length."
            )
        counts = [kind[0][0] for kind in kinds]
        if not len(logits):
            logits, targets = (torch.zeros(0, *s, dtype=t, device=logits.device) for _, s, t in given[0])
        logits, targets = (torch.cat(self.exchange.gather_samples(x[None], counts), 1)[0] for x in (logits, targets))
        order = torch.tensor([i * len(counts) + r for r, n in enumerate(counts) for i in range(n)]).argsort()
        order = order.to(logits.device)
        drawn = objective.sample(logits[order], targets[order], generator)
        back = torch.empty_like(drawn).index_copy_(0, order, drawn)
        return back.split(counts)[self.exchange.rank]


def mean_over_groups(
    batch: LinearizedBatch, find: Callable[[LinearizedBatch], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    """The mean of the directions of all groups that have samples; called by all ranks.

    Args:
        batch: The samples of this rank's group, perhaps none.
        find: Finds their direction.

    Returns:
        What it finds, if there is one group only.

    """
    ranks = batch.ranks
    if not isinstance(ranks, Ranks) or ranks.exchange.size == ranks.world.size:
        return find(batch)
    size = ranks.exchange.size
    groups = int(torch.tensor(batch.samples_by_rank).view(-1, size).sum(1).count_nonzero())
    if batch.num_samples:
        formed: Mapping[str, Tensor] = Direction.of(find(batch)).form()
    else:
        formed = {name: torch.zeros_like(p.detach()) for name, p in batch.parameters.items()}
    return ranks.world.sum_entries((name, x * (1 / (size * groups))) for name, x in formed.items())
