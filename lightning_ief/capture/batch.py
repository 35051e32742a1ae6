"""Linearizations as one batch: what directions, optimizers and indicators read, whoever holds the samples.

A batch consists of parts, linearizations of one forward pass each, seen by some of their parameters, and of the ranks
that take part. It asks its parts for two things, rows for given cotangents and J_z·d; all the rest is made of these.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from lightning_ief.capture.jacobian import Block, Blocks, Jacobian, LocalJacobian
from lightning_ief.capture.metric import Kronecker, MetricJacobian, transformed
from lightning_ief.linalg.gram import full_precision, sample_dot
from lightning_ief.linalg.scaling import upcast
from lightning_ief.linalg.vectors import check_same_space, chunks, restricted
from lightning_ief.objectives import Objective

__all__ = ["ONE_RANK", "LinearizedBatch", "OneRank", "are_equal", "gamma_terms_of", "name_samples"]


class OneRank:
    """The ranks whose samples make up a batch: this one alone. `distributed.Ranks` are many."""

    group = slice(0, 1)
    """Which of all ranks directions are exact between."""

    def of_all(self, losses: Tensor, norms: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What all ranks hold, of every group, each [n].

        Args:
            losses: l_n of this rank's samples.
            norms: s_n.

        Returns:
            Both for each rank.

        """
        return [(losses, norms)]

    def rows(self, own: LocalJacobian) -> Jacobian:
        """The operator of the group, from this rank's rows."""
        return own

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over the group, in place."""
        return x

    def sum_over_all(self, x: Tensor) -> Tensor:
        """The sum over the ranks of all groups, in place."""
        return x

    def sum_entries(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same of tensors by name."""
        return entries

    def of_the_first(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the first rank of the group has, of tensors by name."""
        return entries

    def sample(
        self, objective: Objective, logits: Tensor, targets: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw targets ŷ for this rank's samples, see `LinearizedBatch.sample`."""
        return objective.sample(logits, targets, generator)

    def require_whole(self, who: str) -> None:
        """Raise CaptureError where no rank holds whole directions, which somebody needs."""

    def require_unmoved(self, names: Iterable[str]) -> None:
        """Raise CaptureError if parameters have been changed that the parts do not know."""


ONE_RANK = OneRank()


class LinearizedBatch:
    """A model at its present parameters θ, seen by the samples of one batch, of several, or of those of many ranks.

    On many ranks every attribute is read by all of them, and the same on those of a group; `logits` and `targets` are
    this rank's. With some of the parameters only, it asks for nothing but that these have not moved since, as long as
    its rows are there: head and body of a model may be updated one after the other. What needs the graph once more
    refuses that.

    Args:
        parts: Linearizations of the same model at the same parameters; none for a rank that has nothing to do.
        parameters: The trainable parameters, by name; perhaps some of those of the parts.
        objective: The objective.
        ranks: Whose samples they are.

    Raises:
        ValueError: If they do not fit together.

    """

    ranks = ONE_RANK

    _metric: Mapping[str, Kronecker] | None = None

    def __init__(
        self,
        parts: Sequence["LinearizedBatch"],
        parameters: Mapping[str, Any],
        objective: Objective,
        ranks: OneRank = ONE_RANK,
    ) -> None:
        self._parts = [*parts]
        self.parameters = dict(parameters)
        self.objective = objective
        self.ranks = ranks
        for part in self._parts[1:]:
            self._require_alike(part, self._parts[0])

    @classmethod
    def of(cls, batches: Sequence["LinearizedBatch"]) -> "LinearizedBatch":
        """Take several batches as one, the samples of the first one first.

        Args:
            batches: Linearizations of the same model at the same parameters, made in the same way.

        Returns:
            The batch; the only one that has samples, where there is one.

        Raises:
            ValueError: If they do not fit together.

        """
        first = batches[0]
        full = [batch for batch in batches if batch.parts]
        if len(batches) == 1 or (len(full) < 2 and first.ranks is ONE_RANK):
            return (full or [first])[0]
        for batch in batches:
            batch._require_no_metric()
            check_same_space(batch.parameters, first.parameters)
        return cls([part for batch in full for part in batch.parts], first.parameters, first.objective, first.ranks)

    def _require_no_metric(self) -> None:
        if self._metric is not None:
            raise ValueError("A batch in a metric stays as it is: restrict and put together before in_metric().")

    def _require_alike(self, part: "LinearizedBatch", first: "LinearizedBatch") -> None:
        if other := [name for name in self.parameters if part.parameters.get(name) is not first.parameters.get(name)]:
            raise ValueError(
                f"Batches of which {other} are not the same parameters are not one batch: linearize the same model, "
                "with the same parameters under each name."
            )
        if part.objective is not first.objective and not are_equal(part.objective, first.objective):
            raise ValueError(
                f"Batches with other objectives, {type(first.objective).__name__} and {type(part.objective).__name__} "
                "or with other settings, are not one batch: give all the same."
            )

    @property
    def parts(self) -> Sequence["LinearizedBatch"]:
        """This rank's linearizations of one forward pass each."""
        return self._parts

    def restrict(self, names: Iterable[str]) -> "LinearizedBatch":
        """The same samples, seen by some parameters alone: as if the others were frozen.

        Rows of all parameters are computed and held all the same: where no others are wanted,
        `linearize(..., parameters=...)` costs less. On many ranks, all of them have to call it with the same names.

        Args:
            names: Parameters, in any order.

        Returns:
            A linearization with these `parameters` only; itself if they are all.

        Raises:
            ValueError: If there is no parameter of a name, or no name.

        """
        parameters = restricted(self.parameters, names)
        if len(parameters) == len(self.parameters):
            return self
        self._require_no_metric()
        return LinearizedBatch(self.parts, parameters, self.objective, self.ranks)

    def in_metric(self, inverses: Mapping[str, Kronecker]) -> "LinearizedBatch":
        """The same samples in a metric M ≥ I of the parameters: rows have M⁻¹Jᵀ for Jᵀ, see `MetricJacobian`.

        Args:
            inverses: M⁻¹ of each layer by weight, which is held by its sides (`keep_sides`). Of all other parameters, M
                is the identity.

        Returns:
            A linearization whose directions are those of the metric.

        """
        found = LinearizedBatch(self.parts, self.parameters, self.objective, self.ranks)
        found._metric = inverses
        return found

    def across(self, ranks: OneRank, parameters: Mapping[str, Any] | None = None) -> "LinearizedBatch":
        """This rank's samples as a part of those of many; see `distributed.across`."""
        self._require_no_metric()
        return LinearizedBatch(self.parts, parameters or self.parameters, self.objective, ranks)

    # --- samples

    @property
    def logits(self) -> Tensor:
        """z, shape [N, ...], detached."""
        return self._of_parts("logits")

    @property
    def targets(self) -> Tensor:
        """y, samples on dimension 0."""
        return self._of_parts("targets")

    def _of_parts(self, name: str) -> Tensor:
        found = [getattr(part, name) for part in self.parts]
        shapes = [tuple(x.shape) for x in found]
        if len({shape[1:] for shape in shapes}) > 1:
            raise ValueError(f"{name.capitalize()} of shapes {shapes} are not one batch: pad them to one length.")
        return torch.cat(found) if found else torch.zeros(0, device=self._device)

    @property
    def _device(self) -> torch.device:
        return self.parts[0].logits.device if self.parts else next(iter(self.parameters.values())).device

    @cached_property
    def _everywhere(self) -> list[tuple[Tensor, Tensor]]:
        """Losses and s of every rank of all."""
        none = torch.zeros(0, device=self._device)
        losses = torch.cat([part.losses for part in self.parts] or [none])
        return self.ranks.of_all(losses, torch.cat([part.logit_gradient_norms for part in self.parts] or [none]))

    @property
    def losses(self) -> Tensor:
        """Per-sample losses l_n, shape [N], detached. Their sum is L."""
        return torch.cat([losses for losses, _ in self._everywhere[self.ranks.group]])

    @property
    def logit_gradient_norms(self) -> Tensor:
        """s_n = ‖∂l_n/∂z_n‖², summed over all logits of sample n; shape [N], float64."""
        return torch.cat([norms for _, norms in self._everywhere[self.ranks.group]]).double()

    @property
    def all_losses(self) -> Tensor:
        """Losses of the samples of all ranks, also of other groups."""
        return torch.cat([losses for losses, _ in self._everywhere])

    @property
    def samples_by_rank(self) -> list[int]:
        """Number of samples of each rank of all."""
        return [len(losses) for losses, _ in self._everywhere]

    @property
    def num_samples(self) -> int:
        """N."""
        return sum(self.samples_by_rank[self.ranks.group])

    @cached_property
    def num_logits(self) -> int:
        """Number of all logits, N·C: as many rows as A has at most, F = AᵀA."""
        count = sum(part.logits.numel() for part in self.parts)
        return int(self.ranks.sum_(torch.tensor([count], device=self._device)))

    @cached_property
    def not_finite(self) -> str | None:
        """A sentence that names the samples of all ranks whose loss or logits are not finite; None if all is well."""
        bad = [~torch.isfinite(losses + norms) for losses, norms in self._everywhere]
        if not bool(torch.cat(bad).any()):
            return None
        losses = self.all_losses[torch.cat(bad)].tolist()
        found = f"{name_samples(bad)} (of {len(self.all_losses)})"
        return (
            f"losses or logit gradients are not finite, {found}: losses {losses}. Look for NaN or Inf in their inputs, "
            "or lower the learning rate."
        )

    # --- rows and changes of the logits

    @cached_property
    def jacobian(self) -> Jacobian:
        """J, whose row n is ∇l_n (unscaled); an operator, see `Jacobian`."""
        return self._rows([part.jacobian for part in self.parts])

    def pullback(self, cotangents: Iterable[Tensor]) -> Jacobian:
        """Rows (∂z_n/∂θ)ᵀ c_rn for given cotangents.

        Args:
            cotangents: c_r for r = 1 … R, each of the shape of this rank's logits.

        Returns:
            A Jacobian of R·N rows, row r·N + n for cotangent r and sample n.

        """
        return self._rows([part.pullback(own) for part, own in zip(self.parts, self._split(cotangents), strict=True)])

    def jvps(self, directions: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Changes of this rank's logits along several directions, u_n = (∂z_n/∂θ) d for each d.

        Args:
            directions: K of them, {parameter name: tensor}, an entry for every trainable parameter.

        Returns:
            u, shape [K, N, ...], in float32 at least.

        """
        none = torch.zeros(len(directions), 0, device=self._device)
        return torch.cat([self._changes(part, directions) for part in self.parts] or [none], dim=1)

    def _rows(self, found: Sequence[Jacobian]) -> Jacobian:
        """The operator of all samples, from the rows of this rank's parts."""
        if not found:
            none = torch.zeros(1, 0, dtype=torch.float64, device=self._device)
            versions = [p._version for p in self.parameters.values()]
            blocks = Blocks([Block(slice(0, 0), {})], self.parameters, versions)
            rows = LocalJacobian(blocks, none)
        else:
            seen = [self._restricted(rows) for rows in found]
            rows = seen[0] if len(seen) == 1 else LocalJacobian.stack(seen)
        if self._metric is None:
            return self.ranks.rows(rows)
        with full_precision(rows.scales.device):  # a step may be taken within autocast
            mapped = transformed(rows, self._metric)
        return MetricJacobian(self.ranks.rows(rows), self.ranks.rows(mapped))

    def _restricted(self, rows: Jacobian) -> LocalJacobian:
        assert isinstance(rows, LocalJacobian)  # parts are of this process
        return rows if len(rows.like) == len(self.parameters) else rows.restrict(self.parameters)

    def _split(self, tensors: Iterable[Tensor]) -> list[list[Tensor]]:
        """Tensors of this rank's samples, for each part its own."""
        sizes = [part.num_samples for part in self.parts]
        split = [x.split(sizes) for x in tensors]
        return [[each[i] for each in split] for i in range(len(sizes))]

    def _changes(self, part: "LinearizedBatch", directions: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """J_z·d of a part; its other parameters do not move."""
        for direction in directions:
            check_same_space(direction, self.parameters)
        if len(part.parameters) > len(self.parameters):
            zeros = {name: torch.zeros_like(p.detach()) for name, p in part.parameters.items()}
            directions = [zeros | dict(direction) for direction in directions]
        return part.jvps(directions)

    # --- what is made of them

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw targets ŷ from the predictive distribution of every sample.

        Many ranks draw what one process would draw that has their samples in the order in which `DistributedSampler`
        deals them out: the first of every rank, the second of every rank, and so on.

        Args:
            generator: Source of randomness, on the device of the logits; on many ranks in the same state on all of
                them. Other groups of ranks go on with other numbers.

        Returns:
            ŷ of this rank's samples, for `target_rows` (`sampled_rows` does both).

        Raises:
            ValueError: If shapes differ between parts or ranks.

        """
        return self.ranks.sample(self.objective, self.logits, self.targets, generator)

    def target_rows(self, targets: Iterable[Tensor]) -> Jacobian:
        """Gradients of the losses that other targets would give.

        Args:
            targets: ŷ_r for r = 1 … R, each of the shape of this rank's targets.

        Returns:
            A Jacobian of R·N rows, row r·N + n for targets r and sample n.

        """
        self.ranks.require_whole("Gradients of other targets need")
        gradient = self.objective.gradient
        pairs = zip(self.parts, self._split(targets), strict=True)
        return self._rows([part.pullback([gradient(upcast(part.logits), y) for y in own]) for part, own in pairs])

    def sampled_rows(self, num_samples: int = 1, generator: torch.Generator | None = None) -> Jacobian:
        """Rows Ĵ with E[ĴᵀĴ] = M F, from targets drawn from the predictive distribution; see `sample`.

        Args:
            num_samples: M, targets drawn for each sample.
            generator: Source of randomness, as for `sample`.

        Returns:
            A Jacobian of M·N rows, row r·N + n for draw r and sample n.

        """
        self.ranks.require_whole("Gradients of other targets need")
        drawn = [self.sample(generator) for _ in range(num_samples)]
        gradient = self.objective.sampled_gradient
        pairs = zip(self.parts, self._split(drawn), strict=True)
        return self._rows(
            [part.pullback([gradient(upcast(part.logits), part.targets, y) for y in own]) for part, own in pairs]
        )

    def hessian_rows(self) -> tuple[Jacobian, Tensor]:
        """A with F = AᵀA, and c with ∇L = Aᵀc; see `Objective.hessian_factor`.

        Returns:
            A Jacobian of R·N rows, and c, shape [RN].

        """
        found, coordinates = [], []
        for part in self.parts:
            columns, values = zip(*self.objective.hessian_factor(upcast(part.logits), part.targets), strict=True)
            found.append(part.pullback(columns))
            coordinates.append(torch.stack(values).double())
        return self._rows_with(found, coordinates)

    def logit_rows(self) -> tuple[Jacobian, Tensor]:
        """J_z, with a row for each logit that counts of each sample, and ∂l/∂z, its numbers in the same order.

        Returns:
            A Jacobian of R·N rows for R logits of a sample, and ∂l/∂z, shape [RN], float64; both are 0 for what counts
            for nothing (targets of −100).

        """
        found, gradients = [], []
        for part in self.parts:
            gradient = self.objective.gradient(upcast(part.logits), part.targets)
            counted = self.objective.counted(part.logits, part.targets).reshape(len(gradient), -1).to(gradient)
            columns = torch.diag_embed(counted).unbind(1)  # c_r is 1 for logit r of the samples where it counts
            found.append(part.pullback([column.view_as(gradient) for column in columns]))
            gradients.append(gradient.reshape(len(gradient), -1).T.double())
        return self._rows_with(found, gradients)

    def _rows_with(self, found: Sequence[Jacobian], numbers: Sequence[Tensor]) -> tuple[Jacobian, Tensor]:
        """The operator of all samples, and a number for each row, from those of this rank's parts, each [R, n]."""
        rows = self._rows(found)
        none = torch.zeros(rows.cotangents, 0, dtype=torch.float64, device=self._device)
        return rows, rows.of_all_samples(torch.cat([*numbers], dim=1) if numbers else none)

    def fisher_product(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F v.

        Args:
            v: {parameter name: tensor}, an entry for every trainable parameter.

        Returns:
            {parameter name: tensor}.

        """
        self.ranks.require_whole("Conjugate gradients need")
        total = {name: torch.zeros_like(entry) for name, entry in v.items()}
        for number, part in enumerate(self.parts):
            product = self.objective.hessian_product(upcast(part.logits), part.targets, self._changes(part, [v])[0])
            rows = self._restricted(part.pullback([product]))
            found = rows.rmatvec(torch.ones(rows.num_rows, dtype=torch.float64, device=self._device))
            total = {name: total[name].add_(found[name]) if number else found[name] for name in total}
        return self.ranks.sum_entries(total)

    def gamma_terms(self, directions: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """dᵀFd = Σ_n u_nᵀ(∇²_z l_n)u_n and dᵀ∇L = Σ_n ⟨∂l_n/∂z_n, u_n⟩ of several directions; Fd is never formed.

        Args:
            directions: K of them that are there already, {parameter name: tensor}, an entry for every trainable
                parameter.

        Returns:
            Each of shape [K], float64.

        """
        self.ranks.require_whole("γ needs")
        none = torch.zeros(2, len(directions), dtype=torch.float64, device=self._device)
        terms = [
            torch.stack(gamma_terms_of(self.objective, part.logits, part.targets, self._changes(part, directions)))
            for part in self.parts
        ]
        curvatures, slopes = self.ranks.sum_(reduce(torch.add, terms, none))
        return curvatures, slopes

    def loss_at(self, values: Mapping[str, Tensor]) -> Tensor:
        """L at other values of parameters, of the samples of all ranks, also of other groups.

        The forward pass runs once more as it was, without a graph and with the same random numbers.

        Args:
            values: {parameter name: tensor}; parameters that are missing stay as they are.

        Returns:
            A scalar, float64.

        Raises:
            CaptureError: If the forward pass can't be run again as it was.

        """
        return self.ranks.sum_over_all(self.losses_at(values).double().sum())

    def losses_at(self, values: Mapping[str, Tensor]) -> Tensor:
        """Losses of this rank's samples at other values of parameters, see `loss_at`; shape [n]."""
        none = torch.zeros(0, device=self._device)
        return torch.cat([part.losses_at(values) for part in self.parts] or [none])

    # --- the graph and the parameters

    def release(self) -> None:
        """Let the graph go; the Jacobian is computed before, if it has not been."""
        for part in self.parts:
            part.release()

    def require_unmoved(self, names: Iterable[str] | None = None) -> None:
        """Raise CaptureError if these parameters, or any if None, have been changed since they were linearised."""
        names = [*(self.parameters if names is None else names)]
        self.ranks.require_unmoved(names)
        for part in self.parts:
            part.require_unmoved(names)


def gamma_terms_of(objective: Objective, logits: Tensor, targets: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """dᵀFd and dᵀ∇L from the changes of the logits.

    Args:
        objective: The objective.
        logits: z, shape [N, ...].
        targets: y.
        tangents: u for each of K directions, shape [K, N, ...].

    Returns:
        Each of shape [K], float64.

    """
    curvatures, slopes = torch.zeros(2, len(tangents), dtype=torch.float64, device=logits.device)
    for part in chunks(len(logits), logits.shape[1:].numel()):
        z, y = logits[part], targets[part]
        gradients, wide = objective.gradient(upcast(z), y), z.double()
        for k, u in enumerate(tangents[:, part]):
            curvatures[k] += objective.hessian_form(wide, y, u.double()).sum()
            slopes[k] += sample_dot(gradients, u).sum()
    return curvatures, slopes


def name_samples(chosen: Sequence[Tensor]) -> str:
    """Name some samples.

    Args:
        chosen: For each rank which of its samples, boolean [n].

    Returns:
        For instance 'samples [0, 3] of rank 1, samples [2] of rank 2', or of the batch where there is one rank.

    """
    owners = [f"rank {rank}" for rank in range(len(chosen))] if len(chosen) > 1 else ["the batch"]
    found = [(x.nonzero().flatten().tolist(), owner) for x, owner in zip(chosen, owners, strict=True)]
    return ", ".join(f"samples {at} of {owner}" for at, owner in found if at)


def are_equal(a: Objective, b: Objective) -> bool:
    """Whether two objectives are of one class, with the same settings."""
    return (
        type(a) is type(b) and vars(a).keys() == vars(b).keys() and all(map(_alike, vars(a).values(), vars(b).values()))
    )


def _alike(x: Any, y: Any) -> bool:
    """Whether two settings are the same; of what has no truth value nothing is known."""
    if isinstance(x, Objective) and isinstance(y, Objective):
        return are_equal(x, y)
    if isinstance(x, tuple | list) and isinstance(y, tuple | list):
        return len(x) == len(y) and all(map(_alike, x, y))
    try:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else bool(x == y)
    except (RuntimeError, ValueError):
        return False
