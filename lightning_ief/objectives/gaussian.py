"""`Gaussian`: regression that learns its variance, too."""

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_ief.linalg.scaling import upcast
from lightning_ief.objectives.base import Objective, per_sample, require_floating
from lightning_ief.objectives.elementwise import diagonal_factor

__all__ = ["Gaussian"]


class Gaussian(Objective):
    """Real-valued targets with means and variances that are both predicted.

    Logits [N, ..., 2D], on the last dimension D means μ and behind them D logarithms of variances, log σ²; targets
    [N, ..., D]. l_n = ½ Σ_i (log σ²_ni + (y_ni − μ_ni)²/σ²_ni), without ½ log 2π. Its Hessian may have negative
    eigenvalues; F_n is the Fisher matrix of the Gaussian distribution, diagonal, 1/σ² for μ and ½ for log σ².

    Example:
        >>> Gaussian().losses(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]))  # μ = 1, σ² = 1
        tensor([2.])

    """

    curvature: ClassVar[Literal["hessian", "fisher"]] = "fisher"

    def validate(self, logits: Tensor, targets: Tensor) -> None:  # noqa: D102
        if (
            not logits.ndim
            or targets.ndim != logits.ndim
            or logits.shape != (*targets.shape[:-1], 2 * targets.shape[-1])
        ):
            raise ValueError(
                f"Gaussian needs logits [N, ..., 2D] for targets [N, ..., D], means and then logarithms of variances "
                f"on the last dimension; got logits {tuple(logits.shape)} and targets {tuple(targets.shape)}. For "
                "targets [N] write targets[:, None]."
            )
        require_floating("Gaussian", targets)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        mean, log_variance = upcast(logits).chunk(2, dim=-1)
        return per_sample((log_variance + (targets - mean).square() * (-log_variance).exp()) / 2)

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        mean, log_variance = upcast(logits).chunk(2, dim=-1)
        residual, precision = mean - targets, (-log_variance).exp()
        by_log_variance = (1 - residual.square() * precision) / 2
        return torch.cat([residual * precision, by_log_variance], -1).to(logits.dtype)

    def sample(  # noqa: D102
        self, logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        mean, log_variance = upcast(logits).chunk(2, dim=-1)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return (mean + (log_variance / 2).exp() * noise).to(targets.dtype)

    def hessian_form(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return per_sample(self._diagonal(logits) * tangents.square())

    def hessian_product(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return self._diagonal(logits) * tangents

    def hessian_factor(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        mean, log_variance = logits.double().chunk(2, dim=-1)
        root = (-log_variance / 2).exp()
        residual = (mean - targets) * root
        roots = torch.cat([root, torch.full_like(root, math.sqrt(0.5))], -1)
        return diagonal_factor(roots, torch.cat([residual, (1 - residual.square()) / math.sqrt(2)], -1), logits)

    def _diagonal(self, logits: Tensor) -> Tensor:
        """1/σ² for means, ½ for logarithms of variances."""
        precision = (-upcast(logits).chunk(2, dim=-1)[1]).exp()
        return torch.cat([precision, torch.full_like(precision, 0.5)], -1)
