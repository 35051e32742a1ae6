"""Directions: pure functions of a linearization and a damping.

A direction d is a mapping {parameter name: tensor} over the trainable parameters, formed when it is first read; a step
along it is θ ← θ − lr · d.
Units: L = Σ_n l_n (a sum), rows of J are ∇l_n, damping is λ in (K + λI) or (F + λI).
"""

from lightning_ief.capture import Direction as Direction
from lightning_ief.directions.empirical import ef, ief
from lightning_ief.directions.fisher import natural_gradient, sampled_fisher
from lightning_ief.directions.gauss_newton import gauss_newton
from lightning_ief.directions.gradient import sgd
from lightning_ief.directions.kfac import kfac_empirical, kfac_improved, kfac_sampled
from lightning_ief.directions.layers import layerwise_ef, layerwise_gauss_newton, layerwise_ief
from lightning_ief.directions.weighted import weighted

__all__ = [
    "ef",
    "gauss_newton",
    "ief",
    "kfac_empirical",
    "kfac_improved",
    "kfac_sampled",
    "layerwise_ef",
    "layerwise_gauss_newton",
    "layerwise_ief",
    "natural_gradient",
    "sampled_fisher",
    "sgd",
    "weighted",
]
