"""Curvature made of per-sample gradients, one code for three kinds of them.

Files, in the order to read them: `rescaling` (rows of the empirical, improved or sampled Fisher matrix), `kronecker`
(what goes into a layer and what comes back, and second moments of both), `kfac` (K-FAC: averages, their eigenbases, a
gradient solved for).
"""

from lightning_ief.curvature.kfac import KFACCurvature
from lightning_ief.curvature.kronecker import sides_of
from lightning_ief.curvature.rescaling import FisherKind, fisher_rows

__all__ = ["FisherKind", "KFACCurvature", "fisher_rows", "sides_of"]
