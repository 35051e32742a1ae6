"""The Fisher matrix itself: exact (the natural gradient) and by sampled targets.

F = Σ_n J_znᵀ (∇²_z l_n) J_zn is factored by columns of the Hessian's square root, F = AᵀA with one row of A for every
sample and column; a Monte-Carlo estimate replaces them by the gradients of sampled targets. Either way the solve
happens in the space of rows (Martens, arXiv 1412.1193; Amari 1998).
"""

import torch
from torch import Tensor

from lightning_ief.capture import Linearization, RowCombination

__all__ = ["natural_gradient", "natural_gradient_rows", "sampled_fisher"]


def natural_gradient(linearization: Linearization, damping: float, max_rows: int = 20_000) -> dict[str, Tensor]:
    """Natural gradient: d = (F + λI)⁻¹ ∇L with the exact Fisher matrix of the batch.

    Needs one backward pass for every logit of a sample (C of them; one less for a softmax) and a Gram matrix of as
    many rows for each sample.

    Args:
        linearization: Model and batch.
        damping: λ ≥ 0, in the units of F (a sum over samples). With 0, the pseudo-inverse of F.
        max_rows: Largest N·C for which to try: the Gram matrix takes 8 (N·C)² bytes.

    Returns:
        d, {parameter name: tensor}.

    Raises:
        ValueError: If N·C is larger than `max_rows`.

    """
    return natural_gradient_rows(linearization, damping, max_rows).form()


def natural_gradient_rows(linearization: Linearization, damping: float, max_rows: int = 20_000) -> RowCombination:
    """Natural gradient in the space of the rows of A, F = AᵀA.

    Args:
        linearization: Model and batch.
        damping: λ ≥ 0.
        max_rows: Largest N·C for which to try.

    Returns:
        d = Aᵀv.

    Raises:
        ValueError: If N·C is larger than `max_rows`.

    """
    rows = linearization.logits.numel()
    if rows > max_rows:
        raise ValueError(
            f"The exact natural gradient needs a Gram matrix of {rows} rows (one for every logit of the batch), more "
            f"than max_rows={max_rows}. Use fewer samples, or sampled_fisher with enough samples."
        )
    pairs = list(linearization.objective.hessian_factor(linearization.logits, linearization.targets))
    jacobian = linearization.pullback(column for column, _ in pairs)
    # ∇L = Aᵀc, so that (AᵀA + λI)⁻¹∇L = Aᵀ(AAᵀ + λI)⁻¹c: no division by λ.
    coordinates = torch.stack([coordinate for _, coordinate in pairs]).flatten()
    return jacobian.solve(coordinates, damping)


def sampled_fisher(
    linearization: Linearization, damping: float, num_samples: int = 1, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Fisher by sampled targets, F̂(M): d = (ĴᵀĴ/M + λI)⁻¹ ∇L.

    Ĵ holds the gradients of each sample's loss for M targets ŷ drawn from the model's own predictive distribution; it
    tends to the natural gradient as M grows.

    Args:
        linearization: Model and batch.
        damping: λ > 0, in the units of F (a sum over samples). The part of ∇L outside the rows of Ĵ is divided by λ:
            with float32 gradients, values below about 1e-6 of F's largest eigenvalue amplify rounding.
        num_samples: M, targets drawn per sample; each costs one backward pass.
        generator: Source of randomness on the logits' device; torch's default if None.

    Returns:
        d, {parameter name: tensor}.

    Raises:
        ValueError: If λ or M is not positive.

    """
    if not damping > 0:
        raise ValueError(f"sampled_fisher needs damping (λ) > 0, got {damping}: ∇L is not in the span of F̂'s rows.")
    if num_samples < 1:
        raise ValueError(f"num_samples (M) must be at least 1, got {num_samples}.")
    logits, targets, objective = linearization.logits, linearization.targets, linearization.objective
    gradient = linearization.jacobian.rmatvec(torch.ones_like(linearization.losses, dtype=torch.float64))
    sampled = linearization.pullback(
        objective.gradient(logits, objective.sample(logits, targets, generator)) for _ in range(num_samples)
    )
    # Woodbury: (ĴᵀĴ/M + λI)⁻¹ g = (g − Ĵᵀ(ĴĴᵀ + MλI)⁻¹ Ĵ g) / λ.
    explained = sampled.solve(sampled.matvec(gradient), num_samples * damping).form()
    return {name: (g - explained[name]) / damping for name, g in gradient.items()}
