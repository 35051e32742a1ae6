"""Optimizers: a direction, applied."""

from lightning_ief.optim.base import DirectionOptimizer
from lightning_ief.optim.kfac import KFAC
from lightning_ief.optim.metric import KroneckerMetric
from lightning_ief.optim.optimizers import EF, IEF, GaussNewton, NaturalGradient, SampledFisher, Weighted

__all__ = [
    "EF",
    "IEF",
    "KFAC",
    "DirectionOptimizer",
    "GaussNewton",
    "KroneckerMetric",
    "NaturalGradient",
    "SampledFisher",
    "Weighted",
]
