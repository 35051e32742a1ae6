"""Callbacks for `Trainer(callbacks=[...])`: indicators of the updates' quality, and a timing table."""

from lightning_ief.callbacks.gamma_indicators import GammaIndicators, OwnDirection
from lightning_ief.callbacks.step_timing import StepTiming

__all__ = ["GammaIndicators", "OwnDirection", "StepTiming"]
