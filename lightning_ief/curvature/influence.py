"""The influence of training samples on the losses of queries, from inner products of rows alone.

Koh and Liang, arXiv 1703.04730: without training sample n the minimum θ of Σ_n l_n + λ/2 ‖θ‖² moves by H⁻¹∇l_n to first
order, H = Σ_n ∇²l_n + λI, so that the loss of query q rises by ∇l_qᵀH⁻¹∇l_n. A Fisher matrix stands for Σ_n ∇²l_n.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ief.capture import Jacobian, LinearizedBatch
from lightning_ief.curvature.rescaling import FisherKind, fisher_rows
from lightning_ief.linalg.solve import damped_inverse_times

__all__ = ["InfluenceProducts", "influence_products"]


@dataclass(frozen=True)
class InfluenceProducts:
    """What the influence of a block of samples is made of, nothing of it as large as a model.

    With rows R of a Fisher matrix of the block, N_b of N samples, F = (N/N_b) RᵀR stands for that of all samples.

    Attributes:
        plain: J_q J_bᵀ, shape [Q, N_b]; None if it is not needed.
        cross: J_q Rᵀ, shape [Q, RN_b]; None if there is no F.
        gram: RRᵀ, shape [RN_b, RN_b]; None if there is no F.
        scales: √s, J_b = diag(√s) R, shape [N_b]; None if R is of other targets.
        mixed: R J_bᵀ, shape [RN_b, N_b]; None if R is of the same targets.

    """

    plain: Tensor | None = None
    cross: Tensor | None = None
    gram: Tensor | None = None
    scales: Tensor | None = None
    mixed: Tensor | None = None

    @property
    def samples(self) -> int:
        """N_b."""
        if self.plain is not None:
            return self.plain.shape[1]
        assert self.scales is not None
        return len(self.scales)

    def influence(self, damping: float, share: float = 1.0) -> Tensor:
        """J_q (F + λI)⁻¹ J_bᵀ, solved for in the space of rows.

        With c = N_b/N and J_b = diag(√s) R it is c J_q Rᵀ (RRᵀ + cλI)⁻¹ diag(√s), in which nothing cancels; with R of
        other targets, by the Woodbury identity, (J_q J_bᵀ − J_q Rᵀ (RRᵀ + cλI)⁻¹ R J_bᵀ)/λ; without F, J_q J_bᵀ/λ.

        Args:
            damping: λ, in the units of F, a sum over all samples.
            share: c, the part of all samples that the block holds.

        Returns:
            Shape [Q, N_b], float64.

        Raises:
            ValueError: If λ is negative or not finite, or RRᵀ + cλI is singular up to rounding.

        """
        if self.cross is None or self.gram is None:
            assert self.plain is not None
            return self.plain / damping
        solved = damped_inverse_times(self.gram, self.cross.T, share * damping).T
        if self.scales is not None:
            return share * solved * self.scales
        assert self.plain is not None
        assert self.mixed is not None
        return (self.plain - solved @ self.mixed) / damping


def influence_products(
    queries: Jacobian | None,
    block: LinearizedBatch,
    fisher: FisherKind | None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> InfluenceProducts:
    """Inner products of the rows of queries with those of a block of training samples, in float64 throughout.

    Args:
        queries: J_q; the block's own J if None.
        block: Training samples, linearised at the same parameters; for "sampled" with its graph.
        fisher: Which Fisher matrix, see `fisher_rows`; None for none.
        num_samples: M, for "sampled" alone.
        generator: Source of random numbers for "sampled", on the logits' device; torch's default if None.

    Returns:
        The products.

    Raises:
        ValueError: If there is no matrix of this name, M is not positive, or the two are not of the same parameters
            at the same values, on this process alone.

    Example:
        >>> from lightning_ief import linearize, objectives
        >>> net, objective = torch.nn.Linear(3, 2), objectives.CrossEntropy()
        >>> query, block = (linearize(net, torch.randn(n, 3), torch.arange(n) % 2, objective) for n in (2, 4))
        >>> found = influence_products(query.jacobian, block, "improved").influence(damping=0.1)
        >>> rows = fisher_rows(block, "improved").to_dense()
        >>> inverse = torch.linalg.inv(rows.T @ rows + 0.1 * torch.eye(8))
        >>> expected = query.jacobian.to_dense() @ inverse @ block.jacobian.to_dense().T
        >>> torch.allclose(found.float(), expected, atol=1e-4)
        True

    """
    own = block.jacobian
    if fisher is None:
        return InfluenceProducts(plain=_cross(queries, own))
    rows = fisher_rows(block, fisher, num_samples, generator)
    gram = rows.gram(precise=True)
    if fisher == "sampled":
        mixed = rows.cross_gram(own, precise=True)
        cross = mixed.T if queries is None else queries.cross_gram(rows, precise=True)
        return InfluenceProducts(_cross(queries, own), cross, gram, mixed=mixed)
    s = block.logit_gradient_norms
    scales = s.sqrt() if fisher == "improved" else torch.ones_like(s)
    cross = gram * scales[:, None] if queries is None else queries.cross_gram(rows, precise=True)
    return InfluenceProducts(cross=cross, gram=gram, scales=scales)


def _cross(queries: Jacobian | None, rows: Jacobian) -> Tensor:
    return rows.gram(precise=True) if queries is None else queries.cross_gram(rows, precise=True)
