"""Objectives: what the package needs to know of a loss, all of it in logit space.

An objective maps the logits z_n and the target y_n of each sample to its loss l_n. F = Σ_n J_znᵀ F_n J_zn with the
Fisher matrix F_n of the predictive distribution p(y | z_n). Where l_n = −log p(y_n | z_n) up to a constant, and p
belongs to an exponential family in z, that is the Hessian ∇²_z l_n, and F the generalised Gauss-Newton matrix, too
(Martens, arXiv 1412.1193, section 9). For a loss of one's own, of which nothing but `losses` is known, F_n is the
Hessian.

Units: a sample is an index of dimension 0; l_n is the sum, never the mean, over everything else that the sample holds.

| objective | F_n |
|---|---|
| `CrossEntropy`, `BinaryCrossEntropy`, `LeastSquares`, `Poisson` | Hessian, weighted like the loss |
| `Focal` | that of the softmax distribution, since the loss is not convex |
| `Gaussian` | that of the Gaussian distribution, since the loss is not convex |
| `Huber` | that of the density exp(−l), since beyond δ the loss has no curvature |
| `WeightedSum` | that of each head, weighted |
| a subclass with nothing but `losses` | Hessian by autograd, refused where it is not positive semidefinite |
"""

from lightning_ief.objectives.base import Objective
from lightning_ief.objectives.elementwise import BinaryCrossEntropy, Huber, LeastSquares, Poisson
from lightning_ief.objectives.gaussian import Gaussian
from lightning_ief.objectives.losses_of_torch import as_objective
from lightning_ief.objectives.softmax import CrossEntropy, Focal
from lightning_ief.objectives.weighted_sum import WeightedSum

__all__ = [
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Focal",
    "Gaussian",
    "Huber",
    "LeastSquares",
    "Objective",
    "Poisson",
    "WeightedSum",
    "as_objective",
]
