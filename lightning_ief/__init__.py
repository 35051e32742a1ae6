"""Exact natural-gradient updates for PyTorch Lightning: EF, iEF, sampled and exact Fisher, and their indicators."""

from lightning_ief import directions, objectives
from lightning_ief.attribution import influence
from lightning_ief.callbacks import GammaIndicators, GradientStatistics, StepTiming
from lightning_ief.capture import linearize
from lightning_ief.indicators import gamma
from lightning_ief.module import NaturalGradientMixin
from lightning_ief.optim import EF, IEF, KFAC, GaussNewton, NaturalGradient, SampledFisher

__version__ = "0.1.0"

__all__ = [
    "EF",
    "IEF",
    "KFAC",
    "GammaIndicators",
    "GradientStatistics",
    "GaussNewton",
    "NaturalGradient",
    "NaturalGradientMixin",
    "SampledFisher",
    "StepTiming",
    "directions",
    "gamma",
    "influence",
    "linearize",
    "objectives",
]
