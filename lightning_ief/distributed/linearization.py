"""Many ranks as one: what directions, optimizers and indicators read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_ief.capture import Direction, LinearizedBatch
from lightning_ief.capture.jacobian import Jacobian
from lightning_ief.capture.joint import stacked_coordinates
from lightning_ief.distributed.exchange import Exchange, name_samples
from lightning_ief.distributed.jacobian import GlobalJacobian

__all__ = ["GlobalLinearization", "mean_over_groups"]


class GlobalLinearization(LinearizedBatch):
    """A model seen by the samples of all ranks of a group: what directions read.

    Every attribute is read by all ranks, and the same on those of a group; `logits` and `targets` are this rank's.

    Args:
        local: This rank's samples.
        group: Ranks between which directions are exact.
        world: All ranks.

    """

    def __init__(self, local: LinearizedBatch, group: Exchange, world: Exchange) -> None:
        self.local = local
        self.group = group
        self.world = world
        self.parameters = local.parameters
        self.objective = local.objective

    @property
    def logits(self) -> Tensor:  # type: ignore[override]  # noqa: D102
        return self.local.logits

    @property
    def targets(self) -> Tensor:  # type: ignore[override]  # noqa: D102
        return self.local.targets

    @cached_property
    def _everywhere(self) -> list[Tensor]:
        """Losses and s of every rank of all, each [2, n], float64."""
        own = torch.stack([self.local.losses.double(), self.local.logit_gradient_norms.double()])
        return self.world.gather_all_samples(own)

    @cached_property
    def _within(self) -> Tensor:
        """The same for the ranks of the group, one after the other, [2, N]."""
        first = self.world.rank - self.group.rank
        return torch.cat(self._everywhere[first : first + self.group.size], dim=1)

    @property
    def groups_with_samples(self) -> int:
        """Number of groups that have any."""
        counts = torch.tensor([x.shape[1] for x in self._everywhere]).view(-1, self.group.size).sum(1)
        return int(counts.count_nonzero())

    @property
    def losses(self) -> Tensor:  # noqa: D102
        return self._within[0].clone()

    @property
    def all_losses(self) -> Tensor:
        """Losses of the samples of all ranks, also of other groups; float64."""
        return torch.cat(self._everywhere, dim=1)[0]

    @property
    def logit_gradient_norms(self) -> Tensor:  # noqa: D102
        return self._within[1].clone()

    def require_unmoved(self, names: Iterable[str] | None = None) -> None:  # noqa: D102
        self.local.require_unmoved(names)

    def _restricted(self, parameters: dict[str, Any]) -> LinearizedBatch:
        return self._of(self.local.restrict(parameters))

    @cached_property
    def not_finite(self) -> str | None:
        """A sentence that names the samples of all ranks whose loss or logits are not finite; None if all is well."""
        bad = [~torch.isfinite(x.sum(0)) for x in self._everywhere]
        losses = self.all_losses[torch.cat(bad)].tolist()
        if not losses:
            return None
        return (
            f"losses or logit gradients are not finite, {name_samples(bad)}: losses {losses}. Look for NaN or Inf in "
            "their inputs, or lower the learning rate."
        )

    @cached_property
    def jacobian(self) -> Jacobian:  # noqa: D102
        return self._row_operator(self.local.jacobian)

    def _row_operator(self, rows: Jacobian) -> Jacobian:
        """The operator for all ranks of the group, from this rank's rows."""
        return self._global(rows) if self.group.size > 1 else rows

    def _global(self, rows: Jacobian) -> GlobalJacobian:
        return GlobalJacobian(rows, self.group)

    @cached_property
    def num_logits(self) -> int:  # noqa: D102
        count = torch.tensor([self.local.num_logits], device=self.local.logits.device)
        return int(torch.cat(self.group.gather(count)).sum())

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw targets ŷ for this rank's samples, as one process would draw them for those of the group.

        Such a process has them in the order in which `DistributedSampler` deals them out: the first of every rank, the
        second of every rank, and so on.

        Args:
            generator: Source of randomness, in the same state on all ranks; other groups go on with other numbers.

        Returns:
            ŷ, for `target_rows`.

        Raises:
            ValueError: If shapes differ between ranks.

        """
        if generator is not None and (index := self.world.rank // self.group.size):
            # Other groups than the first must not draw as it does: the errors of their directions would add up.
            seeds = torch.randint(2**62, (index,), generator=generator, device=generator.device)
            generator.manual_seed(int(seeds[-1]))
        logits, targets = self.logits, self.targets
        kinds = self.group.gather_objects([(len(x), x.shape[1:], x.dtype) for x in (logits, targets)])
        given = [kind for kind in kinds if kind[0][0]]
        if any(kind[x][1:] != given[0][x][1:] for kind in given for x in range(2)):
            raise ValueError(
                "Targets can't be sampled for logits or targets that differ in shape between ranks, "
                f"{[tuple(shape) for (_, shape, _), _ in given]}: pad them to one length."
            )
        counts = [kind[0][0] for kind in kinds]
        if not len(logits):
            logits, targets = (torch.zeros(0, *s, dtype=t, device=logits.device) for _, s, t in given[0])
        logits, targets = (torch.cat(self.group.gather_samples(x[None], counts), dim=1)[0] for x in (logits, targets))
        order = torch.tensor([i * len(counts) + r for r, n in enumerate(counts) for i in range(n)]).argsort()
        order = order.to(logits.device)
        drawn = self.objective.sample(logits[order], targets[order], generator)
        back = torch.empty_like(drawn).index_copy_(0, order, drawn)
        return back.split(counts)[self.group.rank]

    def target_rows(self, targets: Iterable[Tensor]) -> Jacobian:  # noqa: D102
        return self._row_operator(self.local.target_rows(targets))

    def hessian_rows(self) -> tuple[Jacobian, Tensor]:  # noqa: D102
        rows, coordinates = self.local.hessian_rows()
        if self.group.size == 1:
            return rows, coordinates
        jacobian = self._global(rows)
        own = coordinates.double().view(jacobian.cotangents, rows.samples)
        parts = self.group.gather_samples(own, jacobian.counts)
        return jacobian, stacked_coordinates(parts, jacobian.cotangents)

    def gamma_terms(self, directions: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:  # noqa: D102
        curvatures, slopes = self.group.sum_(torch.stack(self.local.gamma_terms(directions)))
        return curvatures, slopes

    def fisher_product(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        return self.group.sum_entries(self.local.fisher_product(v).items())

    def release(self) -> None:  # noqa: D102
        self.local.release()

    def joined(self, others: Sequence[LinearizedBatch]) -> LinearizedBatch:  # noqa: D102
        own = [part.local for part in others if isinstance(part, GlobalLinearization)]
        return self._of(self.local.joined(own)) if own else self

    def _of(self, local: LinearizedBatch) -> "GlobalLinearization":
        """The same ranks with other samples."""
        return GlobalLinearization(local, self.group, self.world)


def mean_over_groups(
    linearization: GlobalLinearization, find: Callable[[LinearizedBatch], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    """The mean of the directions of all groups that have samples; called by all ranks.

    Args:
        linearization: The samples of this rank's group, perhaps none.
        find: Finds their direction.

    Returns:
        What it finds, if there is one group only.

    """
    group, world = linearization.group, linearization.world
    if group.size == world.size:
        return find(linearization)
    share = 1 / (group.size * linearization.groups_with_samples)
    if linearization.num_samples:
        formed: Mapping[str, Tensor] = Direction.of(find(linearization)).form()
    else:
        formed = {name: torch.zeros_like(p.detach()) for name, p in linearization.parameters.items()}
    return world.sum_entries((name, x * share) for name, x in formed.items())
