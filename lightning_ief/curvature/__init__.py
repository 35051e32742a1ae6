"""Curvature made of per-sample gradients, one code for three kinds of them.

Files, in the order to read them: `rescaling` (rows of the empirical, improved or sampled Fisher matrix), `kronecker`
(what goes into a layer and what comes back, and second moments of both), `kfac` (K-FAC: averages, their eigenbases, a
gradient solved for), `influence` (of training samples on the losses of queries).
"""

from lightning_ief.curvature.influence import InfluenceProducts, influence_products
from lightning_ief.curvature.kfac import KFACCurvature
from lightning_ief.curvature.kronecker import sides_of
from lightning_ief.curvature.rescaling import FisherKind, fisher_rows

__all__ = [
    "FisherKind",
    "InfluenceProducts",
    "KFACCurvature",
    "fisher_rows",
    "influence_products",
    "sides_of",
]
