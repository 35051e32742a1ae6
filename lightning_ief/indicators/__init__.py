"""Indicators: how close a direction is to the natural gradient, how unequal the samples' gradients are."""

from lightning_ief.indicators.functional import (
    gamma,
    gammas,
    gradient_noise,
    gradient_norm_imbalance,
    loss_gradient_norm,
    measure_gammas,
    projections,
)
from lightning_ief.indicators.metrics import (
    CosineSimilarity,
    Gamma,
    GradientNormImbalance,
    GradientNorms,
    Indicator,
    LogitGradientNorms,
    LossGradientNorm,
    NoiseScale,
    Projections,
    RelativeGamma,
    UpdateNorm,
)

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
    "gamma",
    "gammas",
    "gradient_noise",
    "gradient_norm_imbalance",
    "loss_gradient_norm",
    "measure_gammas",
    "projections",
]
