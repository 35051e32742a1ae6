"""Losses that are a sum over logits, each with a target of its own: the curvature is diagonal."""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ief.linalg.scaling import upcast
from lightning_ief.objectives.base import Objective, basis, per_sample, require_same_shape

__all__ = ["BinaryCrossEntropy", "Huber", "LeastSquares", "Poisson", "diagonal_factor"]


def diagonal_factor(root: Tensor, coordinates: Tensor, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What `Objective.hessian_factor` yields where the curvature is diagonal.

    Args:
        root: Square roots of the diagonal, shape of the logits, float64.
        coordinates: The gradient over them, float64.
        logits: z, whose dtype the columns get.

    Yields:
        For each logit its column and coordinate.

    """
    for one_hot in basis(root):
        yield (root * one_hot).to(logits.dtype), per_sample(one_hot * coordinates)


class LeastSquares(Objective):
    """Half the squared distance to real-valued targets.

    Logits and targets of the same shape [N, ...]; l_n = ½ Σ_i (z_ni − y_ni)². The predictive distribution is Gaussian
    with unit variance.

    Example:
        >>> LeastSquares().losses(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
        tensor([2.5000])

    """

    def validate(self, logits: Tensor, targets: Tensor) -> None:  # noqa: D102
        require_same_shape(self, logits, targets)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return per_sample((upcast(logits) - targets).square() / 2)

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return (upcast(logits) - targets).to(logits.dtype)

    def sample(  # noqa: D102
        self, logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        mean = upcast(logits.detach())
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return (mean + noise).to(targets.dtype)

    def hessian_form(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return per_sample(tangents.square())

    def hessian_product(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return tangents

    def hessian_factor(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        residual = (logits - targets).double()
        return diagonal_factor(torch.ones_like(residual), residual, logits)


class BinaryCrossEntropy(Objective):
    """Independent logistic regressions, one for every logit.

    Logits and targets of the same shape [N, ...], targets floating point in [0, 1] (checked on the CPU only: on a GPU
    the check would stall the device);
    l_n = Σ_i w_i (−v_i y_ni log σ(z_ni) − (1 − y_ni) log σ(−z_ni)). The predictive distribution is Bernoulli. F_n is
    the Hessian, w_i (v_i y_ni + 1 − y_ni) σ(z_ni) σ(−z_ni).

    Args:
        weight: w, for one sample: of a shape that broadcasts to a sample's logits; 1 if None.
        pos_weight: v, weights of positive targets, of such a shape; 1 if None.

    Raises:
        ValueError: If a weight is negative.

    Example:
        >>> BinaryCrossEntropy().losses(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
        tensor([1.3863])

    """

    def __init__(
        self,
        weight: Tensor | Sequence[float] | float | None = None,
        pos_weight: Tensor | Sequence[float] | float | None = None,
    ) -> None:
        self.weight, self.pos_weight = (
            None if given is None else torch.as_tensor(given, dtype=torch.float64).detach()
            for given in (weight, pos_weight)
        )
        for given in (self.weight, self.pos_weight):
            if given is not None and not bool(((given >= 0) & given.isfinite()).all()):
                raise ValueError("BinaryCrossEntropy(weight=..., pos_weight=...) (w, v): must be ≥ 0.")

    def validate(self, logits: Tensor, targets: Tensor) -> None:  # noqa: D102
        require_same_shape(self, logits, targets)
        if targets.device.type == "cpu" and ((targets < 0) | (targets > 1)).any():
            raise ValueError("BinaryCrossEntropy needs targets between 0 and 1.")
        for name, given in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if given is not None and given.numel() > 1 and not _broadcasts(given.shape, logits.shape[1:]):
                raise ValueError(
                    f"BinaryCrossEntropy has {name} of shape {tuple(given.shape)} for samples of shape "
                    f"{tuple(logits.shape[1:])}: it must broadcast to one sample, whichever it is."
                )

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        z = upcast(logits)
        weight, pos_weight = (None if w is None else w.to(z) for w in (self.weight, self.pos_weight))
        return per_sample(
            F.binary_cross_entropy_with_logits(
                z, targets.to(z.dtype), weight=weight, pos_weight=pos_weight, reduction="none"
            )
        )

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        z = upcast(logits)
        # y = 1: σ(z) − 1 = −σ(−z); written so that nothing cancels where the sample is fitted.
        positive = targets if self.pos_weight is None else targets * self.pos_weight.to(z)
        gradient = (1 - targets) * z.sigmoid() - positive * (-z).sigmoid()
        return (gradient if self.weight is None else gradient * self.weight.to(z)).to(logits.dtype)

    def sample(  # noqa: D102
        self, logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        return torch.bernoulli(upcast(logits).sigmoid(), generator=generator).to(targets.dtype)

    def sampled_gradient(self, logits: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:  # noqa: D102
        if self.weight is None and self.pos_weight is None:
            return self.gradient(logits, drawn)
        z = upcast(logits)
        gradient = (1 - drawn) * z.sigmoid() - drawn * (-z).sigmoid()
        return (self._weighted(targets, z).sqrt() * gradient).to(logits.dtype)

    def hessian_form(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return per_sample(self._diagonal(logits, targets) * tangents.square())

    def hessian_product(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return self._diagonal(logits, targets) * tangents

    def hessian_factor(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        z = logits.double()
        # √(σ(z) σ(−z)) in the log domain: the product underflows long before the gradient does.
        root = ((F.logsigmoid(z) + F.logsigmoid(-z)) / 2).clamp(min=-350).exp()
        if self.weight is not None or self.pos_weight is not None:
            root = root * self._weighted(targets, z).sqrt()
        gradient = self.gradient(z, targets)
        return diagonal_factor(root, torch.where(root > 0, gradient / root, 0.0), logits)

    def _diagonal(self, logits: Tensor, targets: Tensor) -> Tensor:
        z = upcast(logits)
        variance = z.sigmoid() * (-z).sigmoid()
        if self.weight is None and self.pos_weight is None:
            return variance
        return self._weighted(targets, z) * variance

    def _weighted(self, targets: Tensor, like: Tensor) -> Tensor:
        """The weight of each target, w (v y + 1 − y)."""
        mass = torch.ones_like(like)
        if self.pos_weight is not None:
            mass = 1 - targets + targets * self.pos_weight.to(like)
        return mass if self.weight is None else mass * self.weight.to(like)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


class Huber(Objective):
    """Huber's loss: squares up to a distance δ to the target, straight lines beyond.

    Logits and targets of the same shape [N, ...]; l_n = Σ_i ½ r² where |r| ≤ δ, else δ (|r| − δ/2), r = z_ni − y_ni.
    The predictive distribution has the density exp(−l) over its integral. F_n is its Fisher matrix, i(δ) I with
    i = P(|r| ≤ δ): the Hessian is 0 beyond δ, where the gradient is not.

    Args:
        delta: δ > 0.

    Raises:
        ValueError: If δ is not positive and finite.

    Example:
        >>> Huber(delta=1.0).losses(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2))
        tensor([2.6250])

    """

    curvature: ClassVar[Literal["hessian", "fisher"]] = "fisher"

    def __init__(self, delta: float = 1.0) -> None:
        if not 0 < delta < math.inf:
            raise ValueError(f"Huber(delta={delta}) (δ): must be > 0 and finite.")
        self.delta = delta

    @property
    def information(self) -> float:
        """i(δ), the probability that a target drawn lies within δ of the logit."""
        within = math.sqrt(2 * math.pi) * math.erf(self.delta / math.sqrt(2))
        beyond = 2 / self.delta * math.exp(-(self.delta**2) / 2)
        return within / (within + beyond)

    def validate(self, logits: Tensor, targets: Tensor) -> None:  # noqa: D102
        require_same_shape(self, logits, targets)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        z = upcast(logits)
        return per_sample(F.huber_loss(z, targets.to(z.dtype), reduction="none", delta=self.delta))

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return (upcast(logits) - targets).clamp(-self.delta, self.delta).to(logits.dtype)

    def sample(  # noqa: D102
        self, logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        draw = torch.rand(3, *logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
        side = 2 * draw[0] - 1
        within = math.sqrt(2) * torch.erfinv(side * math.erf(self.delta / math.sqrt(2)))
        beyond = side.sign() * (self.delta - torch.log1p(-draw[1]) / self.delta)
        return (logits + torch.where(draw[2] < self.information, within, beyond)).to(targets.dtype)

    def hessian_form(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return self.information * per_sample(tangents.square())

    def hessian_product(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return self.information * tangents

    def hessian_factor(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        gradient, root = self.gradient(logits.double(), targets), math.sqrt(self.information)
        return diagonal_factor(torch.full_like(gradient, root), gradient / root, logits)


class Poisson(Objective):
    """Counts with the logarithm of their rate as logits.

    Logits and targets of the same shape [N, ...], targets ≥ 0 in floating point (checked on the CPU only);
    l_n = Σ_i exp(z_ni) − y_ni z_ni, without log y! that no logit changes. The predictive distribution is Poisson. F_n
    is the Hessian, exp(z_ni).

    Example:
        >>> Poisson().losses(torch.zeros(1, 1), torch.tensor([[3.0]]))
        tensor([1.])

    """

    def validate(self, logits: Tensor, targets: Tensor) -> None:  # noqa: D102
        require_same_shape(self, logits, targets)
        if targets.device.type == "cpu" and (targets < 0).any():
            raise ValueError("Poisson needs counts ≥ 0 as targets.")

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        z = upcast(logits)
        return per_sample(z.exp() - targets * z)

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return (upcast(logits).exp() - targets).to(logits.dtype)

    def sample(  # noqa: D102
        self, logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        return torch.poisson(upcast(logits).exp(), generator=generator).to(targets.dtype)

    def hessian_form(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return per_sample(upcast(logits).exp() * tangents.square())

    def hessian_product(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return upcast(logits).exp() * tangents

    def hessian_factor(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        z = logits.double()
        return diagonal_factor((z / 2).exp(), (z / 2).exp() - targets * (-z / 2).exp(), logits)
