"""Rows of three Fisher matrices; the improved one (arXiv 2406.06420) is the empirical one with its rows rescaled."""

from typing import Literal, TypeAlias, get_args

import torch

from lightning_ief.capture import Jacobian, LinearizedBatch

__all__ = ["FisherKind", "fisher_rows", "require_fisher"]

FisherKind: TypeAlias = Literal["empirical", "improved", "sampled"]
"""Whose gradients a Fisher matrix is made of, see `fisher_rows`."""


def fisher_rows(
    batch: LinearizedBatch,
    fisher: FisherKind,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Jacobian:
    """Rows R of a Fisher matrix RᵀR, a sum over samples, as an operator of the same form as J.

    * "empirical": J itself, JᵀJ = Σ_n ∇l_n ∇l_nᵀ.
    * "improved": J̃ = S^-½ J with S = diag(s), s_n = ‖∂l_n/∂z_n‖², so that J̃ᵀJ̃ = F̃ = Σ_n s_n⁻¹ ∇l_n ∇l_nᵀ, the matrix of
      iEF. A sample with s_n = 0 takes no part. What J is made of is shared, not copied.
    * "sampled": Ĵ/√M of M targets for each sample drawn from the predictive distribution, whose expectation is F.

    A method that is made of an empirical Fisher matrix is improved by these rows in the place of J's.

    Args:
        batch: Model and batch; for "sampled" with its graph.
        fisher: Which matrix.
        num_samples: M, for "sampled" alone; each costs one backward pass.
        generator: Source of random numbers for "sampled", on the logits' device; torch's default if None.

    Returns:
        A Jacobian of N rows, or M·N.

    Raises:
        ValueError: If there is no matrix of this name, or M is not positive.

    Example:
        >>> from lightning_ief import linearize, objectives
        >>> lin = linearize(torch.nn.Linear(3, 2), torch.randn(4, 3), torch.arange(4) % 2, objectives.CrossEntropy())
        >>> rows = fisher_rows(lin, "improved").to_dense()
        >>> torch.allclose(rows, lin.jacobian.to_dense() / lin.logit_gradient_norms.sqrt()[:, None].float())
        True

    """
    require_fisher("fisher_rows", fisher, num_samples)
    if fisher == "sampled":
        rows = batch.sampled_rows(num_samples, generator)
        return rows if num_samples == 1 else rows.scaled(torch.full_like(rows.scales.flatten(), num_samples**-0.5))
    if fisher == "empirical":
        return batch.jacobian
    s = batch.logit_gradient_norms
    return batch.jacobian.scaled(torch.where(s > 0, s.rsqrt(), 0.0))


def require_fisher(caller: str, fisher: str, num_samples: int = 1) -> None:
    """Require a matrix that is known, and a positive number of samples.

    Args:
        caller: Who was given them.
        fisher: Its name.
        num_samples: M.

    Raises:
        ValueError: If it is another one.

    """
    if fisher not in get_args(FisherKind):
        raise ValueError(f"{caller}: fisher={fisher!r}: must be 'empirical', 'improved' or 'sampled'.")
    if num_samples < 1:
        raise ValueError(f"{caller}: num_samples={num_samples} (M): must be at least 1.")
