"""Several linearizations as one: what directions, optimizers and indicators read, whoever holds the samples."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from lightning_ief.capture.jacobian import Jacobian
from lightning_ief.linalg.vectors import check_same_space, restricted
from lightning_ief.objectives import Objective

__all__ = [
    "EmptyLinearization",
    "LinearizedBatch",
    "RestrictedLinearization",
    "StackedLinearization",
    "gamma_terms_of",
    "stacked_coordinates",
]


class LinearizedBatch(ABC):
    """A model at its present parameters θ, seen by the samples of one batch, of several, or of those of many ranks.

    Attributes:
        parameters: The trainable parameters, by name.
        objective: The objective.
        logits: z, shape [N, ...], detached.
        targets: y.

    """

    parameters: dict[str, Any]
    objective: Objective
    logits: Tensor
    targets: Tensor

    @property
    @abstractmethod
    def losses(self) -> Tensor:
        """Per-sample losses l_n, shape [N], detached. Their sum is L."""

    @property
    @abstractmethod
    def logit_gradient_norms(self) -> Tensor:
        """s_n = ‖∂l_n/∂z_n‖², summed over all logits of sample n; shape [N], float64."""

    @property
    @abstractmethod
    def jacobian(self) -> Jacobian:
        """J, whose row n is ∇l_n (unscaled); an operator, see `Jacobian`."""

    @abstractmethod
    def target_rows(self, targets: Iterable[Tensor]) -> Jacobian:
        """Gradients of the losses that other targets would give.

        Args:
            targets: ŷ_r for r = 1 … R, each of the shape of the targets.

        Returns:
            A Jacobian of R·N rows, row r·N + n for targets r and sample n.

        """

    @abstractmethod
    def hessian_rows(self) -> tuple[Jacobian, Tensor]:
        """A with F = AᵀA, and c with ∇L = Aᵀc; see `Objective.hessian_factor`.

        Returns:
            A Jacobian of R·N rows, and c, shape [RN].

        """

    @abstractmethod
    def fisher_product(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F v.

        Args:
            v: {parameter name: tensor}, an entry for every trainable parameter.

        Returns:
            {parameter name: tensor}.

        """

    @abstractmethod
    def gamma_terms(self, directions: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """dᵀFd and dᵀ∇L of several directions that are there already; Fd is never formed.

        Args:
            directions: K of them, {parameter name: tensor}, an entry for every trainable parameter.

        Returns:
            Each of shape [K], float64.

        """

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.losses)

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
        return self if len(parameters) == len(self.parameters) else self._restricted(parameters)

    def _restricted(self, parameters: dict[str, Any]) -> "LinearizedBatch":
        return RestrictedLinearization(self, parameters)

    def require_unmoved(self, names: Iterable[str] | None = None) -> None:  # noqa: B027  # of no samples, all is well
        """Raise CaptureError if these parameters, or any if None, have been changed since they were linearised."""

    @property
    def num_logits(self) -> int:
        """Number of all logits, N·C: as many rows as A has at most, F = AᵀA."""
        return self.logits.numel()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw targets ŷ from the predictive distribution of every sample.

        Args:
            generator: Source of randomness, on the device of the logits.

        Returns:
            ŷ, for `target_rows`.

        """
        return self.objective.sample(self.logits, self.targets, generator)

    @cached_property
    def not_finite(self) -> str | None:
        """A sentence that names the samples whose loss or logits are not finite; None if all is well."""
        bad = ~torch.isfinite(self.losses + self.logit_gradient_norms)
        if not bool(bad.any()):
            return None
        return (
            f"losses or logit gradients of samples {bad.nonzero().flatten().tolist()} of the batch (of {len(bad)}) are "
            f"not finite: losses {self.losses[bad].tolist()}. Look for NaN or Inf in their inputs, or lower the "
            "learning rate."
        )

    def release(self) -> None:  # noqa: B027  # most hold nothing
        """Let the graph go; the Jacobian is computed before, if it has not been."""

    def joined(self, others: Sequence["LinearizedBatch"]) -> "LinearizedBatch":
        """Take several batches as one.

        Args:
            others: Linearizations of the same model at the same parameters, made in the same way.

        Returns:
            The samples of this one and then theirs as one batch.

        """
        parts = [part for part in (self, *others) if part.num_samples]
        return StackedLinearization(parts) if len(parts) > 1 else (parts or [self])[0]


class StackedLinearization(LinearizedBatch):
    """Several batches, one after the other.

    Args:
        parts: Linearizations of the same model at the same parameters.

    Raises:
        ValueError: If they do not fit together.

    """

    def __init__(self, parts: Sequence[LinearizedBatch]) -> None:
        self.parts = parts
        self.parameters = parts[0].parameters
        self.objective = parts[0].objective
        for part in parts:
            check_same_space(part.parameters, self.parameters)
            if other := [name for name, p in self.parameters.items() if part.parameters[name] is not p]:
                raise ValueError(
                    f"Batches of which {other} are not the same parameters are not one batch: linearize the same "
                    "model, with the same parameters under each name."
                )
            if part.objective is not self.objective and not _equal(part.objective, self.objective):
                raise ValueError(
                    f"Batches with other objectives, {type(self.objective).__name__} and "
                    f"{type(part.objective).__name__} or with other settings, are not one batch: give all the same."
                )

    @property
    def logits(self) -> Tensor:  # type: ignore[override]  # noqa: D102
        self._require_alike("logits")
        return torch.cat([part.logits for part in self.parts])

    @property
    def targets(self) -> Tensor:  # type: ignore[override]  # noqa: D102
        self._require_alike("targets")
        return torch.cat([part.targets for part in self.parts])

    def _require_alike(self, name: str) -> None:
        shapes = [tuple(getattr(part, name).shape) for part in self.parts]
        if len({shape[1:] for shape in shapes}) > 1:
            raise ValueError(f"{name.capitalize()} of shapes {shapes} are not one batch: pad them to one length.")

    def require_unmoved(self, names: Iterable[str] | None = None) -> None:  # noqa: D102
        for part in self.parts:
            part.require_unmoved(names)

    @property
    def num_logits(self) -> int:  # noqa: D102
        return sum(part.num_logits for part in self.parts)

    @property
    def losses(self) -> Tensor:  # noqa: D102
        return torch.cat([part.losses for part in self.parts])

    @property
    def logit_gradient_norms(self) -> Tensor:  # noqa: D102
        return torch.cat([part.logit_gradient_norms for part in self.parts])

    @cached_property
    def jacobian(self) -> Jacobian:  # noqa: D102
        return Jacobian.stack([part.jacobian for part in self.parts])

    def target_rows(self, targets: Iterable[Tensor]) -> Jacobian:  # noqa: D102
        sizes = [part.num_samples for part in self.parts]
        drawn = [each.split(sizes) for each in targets]
        return Jacobian.stack([part.target_rows([y[i] for y in drawn]) for i, part in enumerate(self.parts)])

    def hessian_rows(self) -> tuple[Jacobian, Tensor]:  # noqa: D102
        pairs = [part.hessian_rows() for part in self.parts]
        jacobian = Jacobian.stack([rows for rows, _ in pairs])
        return jacobian, stacked_coordinates([c for _, c in pairs], jacobian.cotangents)

    def gamma_terms(self, directions: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:  # noqa: D102
        curvatures, slopes = zip(*(part.gamma_terms(directions) for part in self.parts), strict=True)
        return reduce(torch.add, curvatures), reduce(torch.add, slopes)

    def fisher_product(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        products = [part.fisher_product(v) for part in self.parts]
        return {name: reduce(torch.add, (product[name] for product in products)) for name in self.parameters}


class RestrictedLinearization(LinearizedBatch):
    """A linearization seen by some of its parameters alone, made by `LinearizedBatch.restrict`.

    It asks for nothing but that these parameters have not moved since, as long as its rows are there: head and body
    of a model may be updated one after the other. What needs the graph once more refuses that.

    Args:
        whole: The linearization.
        parameters: Some of its parameters.

    """

    def __init__(self, whole: LinearizedBatch, parameters: dict[str, Any]) -> None:
        self.whole = whole
        self.parameters = parameters
        self.objective = whole.objective

    @property
    def logits(self) -> Tensor:  # type: ignore[override]  # noqa: D102
        return self.whole.logits

    @property
    def targets(self) -> Tensor:  # type: ignore[override]  # noqa: D102
        return self.whole.targets

    @property
    def losses(self) -> Tensor:  # noqa: D102
        return self.whole.losses

    @property
    def logit_gradient_norms(self) -> Tensor:  # noqa: D102
        return self.whole.logit_gradient_norms

    @property
    def num_logits(self) -> int:  # noqa: D102
        return self.whole.num_logits

    def require_unmoved(self, names: Iterable[str] | None = None) -> None:  # noqa: D102
        self.whole.require_unmoved(self.parameters if names is None else names)

    def release(self) -> None:  # noqa: D102
        self.whole.release()

    def _restricted(self, parameters: dict[str, Any]) -> LinearizedBatch:
        return self.whole.restrict(parameters)

    @cached_property
    def jacobian(self) -> Jacobian:  # noqa: D102
        return self.whole.jacobian.restrict(self.parameters)

    def target_rows(self, targets: Iterable[Tensor]) -> Jacobian:  # noqa: D102
        return self.whole.target_rows(targets).restrict(self.parameters)

    def hessian_rows(self) -> tuple[Jacobian, Tensor]:  # noqa: D102
        rows, coordinates = self.whole.hessian_rows()
        return rows.restrict(self.parameters), coordinates

    def gamma_terms(self, directions: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.whole.gamma_terms([self._with_zeros(direction) for direction in directions])

    def fisher_product(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        return restricted(self.whole.fisher_product(self._with_zeros(v)), self.parameters)

    def _with_zeros(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with entries of zero for all other parameters."""
        check_same_space(v, self.parameters)
        everything = self.whole.parameters.items()
        return {name: v[name] if name in self.parameters else torch.zeros_like(p.detach()) for name, p in everything}


def _equal(a: Objective, b: Objective) -> bool:
    """Whether two objectives are of one class, with the same settings."""
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
        return False
    pairs = [(x, vars(b)[name]) for name, x in vars(a).items()]
    try:
        return all(torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y for x, y in pairs)
    except (RuntimeError, ValueError):  # of what has no truth value, such as lists of tensors, nothing is known
        return False


class EmptyLinearization(LinearizedBatch):
    """No samples at all: what a rank holds that has nothing to do.

    Args:
        parameters: The trainable parameters, by name.
        objective: The objective.

    """

    def __init__(self, parameters: Mapping[str, Tensor], objective: Objective) -> None:
        self.parameters = dict(parameters)
        self.objective = objective
        self.device = next(iter(self.parameters.values())).device
        self.logits = torch.zeros(0, device=self.device)
        self.targets = torch.zeros(0, device=self.device)

    def _restricted(self, parameters: dict[str, Any]) -> LinearizedBatch:
        return EmptyLinearization(parameters, self.objective)

    @property
    def losses(self) -> Tensor:  # noqa: D102
        return self.logits

    @property
    def logit_gradient_norms(self) -> Tensor:  # noqa: D102
        return self.logits.double()

    @property
    def jacobian(self) -> Jacobian:  # noqa: D102
        return Jacobian({}, self.parameters, torch.zeros(1, 0, dtype=torch.float64, device=self.device))

    def target_rows(self, targets: Iterable[Tensor]) -> Jacobian:  # noqa: D102
        return self.jacobian

    def hessian_rows(self) -> tuple[Jacobian, Tensor]:  # noqa: D102
        return self.jacobian, self.logit_gradient_norms

    def gamma_terms(self, directions: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:  # noqa: D102
        none = torch.zeros(len(directions), dtype=torch.float64, device=self.device)
        return none, none

    def fisher_product(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        return {name: torch.zeros_like(entry) for name, entry in v.items()}


def gamma_terms_of(
    objective: Objective, logits: Tensor, targets: Tensor, gradients: Tensor, tangents: Tensor
) -> tuple[Tensor, Tensor]:
    """dᵀFd = Σ_n u_nᵀ(∇²_z l_n)u_n and dᵀ∇L = Σ_n ⟨∂l_n/∂z_n, u_n⟩ from the changes of the logits.

    Args:
        objective: The objective.
        logits: z, shape [N, ...].
        targets: y.
        gradients: ∂l_n/∂z_n, shape of the logits.
        tangents: u for each of K directions, shape [K, N, ...].

    Returns:
        Each of shape [K], float64.

    """
    gradients, wide = gradients.double(), logits.double()
    curvatures = [objective.hessian_form(wide, targets, u.double()).sum() for u in tangents]
    slopes = [(gradients * u.double()).sum() for u in tangents]
    return torch.stack(curvatures), torch.stack(slopes)


def stacked_coordinates(parts: Sequence[Tensor], cotangents: int) -> Tensor:
    """Put together what belongs to the rows of stacked Jacobians.

    Args:
        parts: For each Jacobian, shape [RN].
        cotangents: R.

    Returns:
        In the order of rows of `Jacobian.stack`.

    """
    return torch.cat([part.view(cotangents, -1) for part in parts], dim=1).flatten()
