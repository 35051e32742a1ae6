"""K-FAC from the present batch alone, in the paper's three kinds: KFAC, eKFAC and ieKFAC (arXiv 2406.06420, D.2.2).

They differ in whose gradients the factors are made of: those of sampled targets, those of the targets, and these
divided by ‖∂l_n/∂z_n‖. Not to be confused with EKFAC, K-FAC with corrected eigenvalues, which is an option of each.
"""

import torch

from lightning_ief.capture import Direction, LinearizedBatch
from lightning_ief.curvature.kfac import KFACCurvature
from lightning_ief.curvature.kronecker import Positions
from lightning_ief.directions.registry import register

__all__ = ["kfac_empirical", "kfac_improved", "kfac_sampled"]


@register(
    label="KFAC",
    color="#332288",
    linestyle=(0, (5, 2)),
    marker="X",
    damping="> 0",
    default_damping=1.0,
    draws=True,
    needs_graph=True,
    needs_sides=True,
)
def kfac_sampled(
    linearization: LinearizedBatch,
    damping: float,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    *,
    positions: Positions = "expand",
    eigenvalue_correction: bool = False,
) -> Direction:
    """K-FAC with factors of sampled targets, which approximate F: the paper's KFAC.

    Args:
        linearization: Model and batch, with its graph; both sides of weights kept, see `kfac_improved`.
        damping: λ, in the units of F, a sum over samples; 0 only where every factor is regular.
        num_samples: M, targets drawn per sample; each costs one backward pass.
        generator: Source of randomness on the logits' device; torch's default if None.
        positions: "expand" or "reduce".
        eigenvalue_correction: Whether eigenvalues are corrected, as in EKFAC.

    Returns:
        d, {parameter name: tensor}.

    """
    curvature = KFACCurvature("sampled", positions, eigenvalue_correction)
    return Direction.of(curvature.direction(linearization, damping, num_samples, generator))


@register(
    label="eKFAC",
    color="#882255",
    linestyle=(0, (3, 1, 1, 1)),
    marker="<",
    damping="> 0",
    default_damping=1.0,
    needs_sides=True,
)
def kfac_empirical(
    linearization: LinearizedBatch,
    damping: float,
    *,
    positions: Positions = "expand",
    eigenvalue_correction: bool = False,
) -> Direction:
    """K-FAC with factors of the gradients as they are, for JᵀJ: the paper's eKFAC; see `kfac_improved`."""
    return Direction.of(KFACCurvature("empirical", positions, eigenvalue_correction).direction(linearization, damping))


@register(
    label="ieKFAC",
    color="#88CCEE",
    linestyle=(0, (8, 2)),
    marker=">",
    damping="> 0",
    default_damping=1.0,
    needs_sides=True,
)
def kfac_improved(
    linearization: LinearizedBatch,
    damping: float,
    *,
    positions: Positions = "expand",
    eigenvalue_correction: bool = False,
) -> Direction:
    """K-FAC with factors of gradients over ‖∂l_n/∂z_n‖, which approximate iEF's matrix F̃: the paper's ieKFAC.

    Args:
        linearization: Model and batch, linearised with `keep_sides=` the names of all weights of two or more
            dimensions.
        damping: λ, in the units of F̃, a sum over samples; 0 only where every factor is regular.
        positions: "expand" takes each position for a sample; "reduce" the sum over them.
        eigenvalue_correction: Replace the eigenvalues by second moments in the eigenbasis, as in EKFAC.

    Returns:
        d, {parameter name: tensor}; see `KFACCurvature`.

    Example:
        >>> from lightning_ief import linearize, objectives
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x, y = torch.randn(6, 3), torch.arange(6) % 2
        >>> lin = linearize(model, x, y, objectives.CrossEntropy(), keep_sides=["0.weight", "2.weight"])
        >>> sorted(kfac_improved(lin, 0.1))
        ['0.bias', '0.weight', '2.bias', '2.weight']

    """
    return Direction.of(KFACCurvature("improved", positions, eigenvalue_correction).direction(linearization, damping))
