"""The indicators as metrics of torchmetrics: means over batches, right on many ranks.

As with all metrics, `persistent(True)` keeps their state in checkpoints.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_ief.capture import LinearizedBatch
from lightning_ief.indicators.functional import (
    gamma,
    gammas,
    gradient_noise,
    gradient_norm_imbalance,
    loss_gradient_norm,
    projections,
)
from lightning_ief.linalg.vectors import cosine, norm

__all__ = [
    "CosineSimilarity",
    "Gamma",
    "GradientNormImbalance",
    "GradientNorms",
    "Indicator",
    "LogitGradientNorms",
    "LossGradientNorm",
    "NoiseScale",
    "Projections",
    "RelativeGamma",
    "UpdateNorm",
]


class Indicator(Metric):
    """Mean over batches of a number that each batch has; `deviation` is its standard deviation over batches.

    Of numbers that each sample has, both are over samples. To add an indicator, derive from this class and call
    `record` in `update`. A batch whose value is NaN makes the mean NaN, one whose value is inf makes it inf: neither is
    left out silently.

    Args:
        **options: Options of `torchmetrics.Metric`.

    """

    full_state_update = False
    higher_is_better: bool | None = None
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def record(self, value: Tensor) -> None:
        """Take the value of a batch, or those of its samples.

        Args:
            value: A scalar, or a number for each sample, [N].

        """
        value = value.detach().to(self.total)
        self.total = self.total + value.sum()
        self.squares = self.squares + value.square().sum()
        self.count = self.count + value.numel()

    def compute(self) -> Tensor:
        """Mean over batches.

        Returns:
            float64 scalar; NaN without batches.

        """
        return self.total / self.count

    def deviation(self) -> Tensor:
        """Standard deviation over batches, that of a sample (n − 1).

        Returns:
            float64 scalar; NaN with fewer than two batches.

        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            spread = self.squares - self.total.square() / self.count
            return torch.where(self.count > 1, (spread.clamp(min=0) / (self.count - 1)).sqrt(), torch.nan)


class Gamma(Indicator):
    """Mean of γ(d) = √(dᵀFd) / |dᵀ∇L|; see `gamma`.

    Example:
        >>> from lightning_ief import directions, linearize, objectives
        >>> metric = Gamma()
        >>> lin = linearize(torch.nn.Linear(3, 2), torch.rand(4, 3), torch.rand(4, 2), objectives.LeastSquares())
        >>> metric.update(lin, directions.ief(lin, damping=0.0))
        >>> metric.compute() > 0
        tensor(True)

    """

    higher_is_better = False

    def update(self, linearization: LinearizedBatch, direction: Mapping[str, Tensor]) -> None:
        """Take a batch.

        Args:
            linearization: Model and batch.
            direction: d.

        """
        self.record(gamma(linearization, direction))


class RelativeGamma(Indicator):
    """Mean of γ(d) / γ(reference) on the same batch; NaN where neither changes the loss.

    With `sgd` as the reference, below 1 is closer to the natural gradient than gradient descent. With the natural
    gradient as d it is the share of the achievable decrease that the reference has, in (0, 1].
    """

    higher_is_better = False

    def update(
        self, linearization: LinearizedBatch, direction: Mapping[str, Tensor], reference: Mapping[str, Tensor]
    ) -> None:
        """Take a batch.

        Args:
            linearization: Model and batch.
            direction: d.
            reference: The direction to compare with.

        """
        mine, other = gammas(linearization, [direction, reference])
        self.record(mine / other)


class GradientNormImbalance(Indicator):
    """Mean of max_n |∇l_n| / min_n |∇l_n|; see `gradient_norm_imbalance`."""

    def update(self, linearization: LinearizedBatch) -> None:
        """Take a batch.

        Args:
            linearization: Model and batch.

        """
        self.record(gradient_norm_imbalance(linearization))


class LossGradientNorm(Indicator):
    """Mean over batches of ‖∇L‖, for losses summed over a batch; see `loss_gradient_norm`."""

    def update(self, linearization: LinearizedBatch) -> None:
        """Take a batch.

        Args:
            linearization: Model and batch.

        """
        self.record(loss_gradient_norm(linearization))


class GradientNorms(Indicator):
    """Mean of the norms of samples' gradients, ‖∇l_n‖; `deviation` is their standard deviation over samples.

    Example:
        >>> from lightning_ief import linearize, objectives
        >>> metric, model = GradientNorms(), torch.nn.Linear(3, 2)
        >>> metric.update(linearize(model, torch.rand(4, 3), torch.arange(4) % 2, objectives.CrossEntropy()))
        >>> metric.compute() > 0, metric.deviation() > 0
        (tensor(True), tensor(True))

    """

    def update(self, linearization: LinearizedBatch) -> None:
        """Take a batch.

        Args:
            linearization: Model and batch.

        """
        self.record(linearization.jacobian.row_norms())


class LogitGradientNorms(Indicator):
    """Mean of s_n = ‖∂l_n/∂z_n‖² over samples; `deviation` is their standard deviation, the root of their variance.

    With iEF each sample's loss falls in proportion to s_n: where all are alike, it points where EF does.
    """

    def update(self, linearization: LinearizedBatch) -> None:
        """Take a batch.

        Args:
            linearization: Model and batch.

        """
        self.record(linearization.logit_gradient_norms)


class NoiseScale(Metric):
    """tr Σ / ‖∇L‖², each averaged over batches: the batch size at which noise is as large as the gradient.

    See `gradient_noise`. Batches of one sample, which tell nothing of noise, are left out. NaN without batches; inf
    where the gradient can't be told from noise.

    Args:
        **options: Options of `torchmetrics.Metric`.

    """

    full_state_update = False
    higher_is_better: bool | None = None
    noise: Tensor
    square: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("noise", "square"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, linearization: LinearizedBatch) -> None:
        """Take a batch.

        Args:
            linearization: Model and batch.

        """
        if linearization.num_samples < 2:
            return
        noise, square = gradient_noise(linearization)
        self.noise, self.square = self.noise + noise.to(self.noise), self.square + square.to(self.square)

    def compute(self) -> Tensor:
        """The noise scale.

        Returns:
            float64 scalar, in samples.

        """
        return torch.where(self.square < 0, torch.inf, self.noise / self.square)


class CosineSimilarity(Indicator):
    """Mean cosine of the angle between two directions; NaN where one of them is zero."""

    def update(self, direction: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
        """Take a batch.

        Args:
            direction: d.
            reference: The direction to compare with.

        """
        self.record(cosine(direction, reference))


class UpdateNorm(Indicator):
    """Mean Euclidean norm of a direction, over all parameters."""

    def update(self, direction: Mapping[str, Tensor]) -> None:
        """Take a batch.

        Args:
            direction: d.

        """
        self.record(norm(direction))


class Projections(Metric):
    """For every sample seen: its loss, the norm of its gradient, and the projection of the update on it.

    Args:
        **options: Options of `torchmetrics.Metric`.

    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, linearization: LinearizedBatch, direction: Mapping[str, Tensor]) -> None:
        """Take a batch.

        Args:
            linearization: Model and batch.
            direction: d.

        """
        columns = (linearization.losses, linearization.jacobian.row_norms(), projections(linearization, direction))
        self.rows.append(torch.stack([column.detach().double() for column in columns], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """What was seen.

        Returns:
            `loss`, `gradient_norm` and `projection`, each of shape [samples], float64.

        """
        rows = dim_zero_cat(self.rows)  # after an exchange between ranks it is one tensor already
        return dict(zip(("loss", "gradient_norm", "projection"), rows.unbind(1), strict=True))
