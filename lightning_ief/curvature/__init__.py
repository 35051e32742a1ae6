"""Curvature made of per-sample gradients, one code for three kinds of them.

Files, in the order to read them: `rescaling` (rows of the empirical, improved or sampled Fisher matrix), `kronecker`
(what goes into a layer and what comes back, and second moments of both), `kfac` (K-FAC: averages, their eigenbases, a
gradient solved for), `influence` (of training samples on the losses of queries), `blocks` (a Fisher matrix by blocks of
consecutive weights), `pruning` (WoodFisher with it).
"""

from lightning_ief.curvature.blocks import BlockFisher
from lightning_ief.curvature.influence import InfluenceProducts, influence_products
from lightning_ief.curvature.kfac import KFACCurvature
from lightning_ief.curvature.kronecker import sides_of
from lightning_ief.curvature.pruning import block_fishers, removed, woodfisher
from lightning_ief.curvature.rescaling import FisherKind, fisher_rows

__all__ = [
    "BlockFisher",
    "FisherKind",
    "InfluenceProducts",
    "KFACCurvature",
    "block_fishers",
    "fisher_rows",
    "influence_products",
    "removed",
    "sides_of",
    "woodfisher",
]
