"""Indicators: how close a direction is to the natural gradient, how unequal the samples' gradients are."""

from lightning_ief.indicators.gamma import gamma, gradient_norm_imbalance

__all__ = ["gamma", "gradient_norm_imbalance"]
