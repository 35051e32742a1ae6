"""A Fisher matrix by blocks of consecutive entries of a weight, and solves with it: exact, in float64.

One layout throughout: a weight's P entries, flattened, stand as [B, b], B blocks of b entries; the last one is filled
up with entries that take no part. Singh and Alistarh, arXiv 2004.14340, who add one gradient at a time by Sherman and
Morrison's formula; here a block goes through one Cholesky factorisation, of its b entries or, by Woodbury's identity,
of its rows where these are fewer.
"""

from collections.abc import Iterator
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BlockFisher"]

_CHUNK = 2**23  # elements of factors that exist at once, 64 MiB


class _Factor(NamedTuple):
    """λI + F of some blocks, of the entries that take part: Cholesky's L, of it or of NλI + RRᵀ with the rows R.

    Attributes:
        lower: L, [B, b, b] or [B, n, n].
        rows: R, [B, n, b]; None if L is that of the blocks.
    """

    lower: Tensor
    rows: Tensor | None


@final
class BlockFisher:
    """F = (1/N) Σ_n g_n g_nᵀ of one weight, its entries in blocks of b consecutive ones; products between blocks are 0.

    Units: a mean over the N samples, as in the paper, not a sum. Held are the rows g_n while there are fewer than b of
    them, the blocks after that: min(N, b) · P numbers in float64.

    Args:
        active: Which entries take part, boolean, P elements; the others' rows and columns of F are 0.
        block_size: b; a weight of fewer entries is one block.

    Raises:
        ValueError: If b is not positive, or the weight has no entries.

    Example:
        >>> g = torch.randn(9, 4, dtype=torch.float64)
        >>> fisher = BlockFisher(torch.ones(4, dtype=torch.bool), block_size=4)
        >>> fisher.add(g, samples=9)
        >>> dense = g.T @ g / 9 + 0.1 * torch.eye(4, dtype=torch.float64)
        >>> torch.allclose(fisher.inverse_diagonal(damping=0.1), torch.linalg.inv(dense).diagonal())
        True

    """

    def __init__(self, active: Tensor, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: must be at least 1.")
        if not active.numel():
            raise ValueError("A weight without entries has no Fisher matrix: leave it out.")
        self.size = active.numel()
        self.block_size = min(block_size, self.size)
        self.active = active.flatten()
        self.samples = 0
        self._all_active = bool(self.active.all())
        self._rows: list[Tensor] = []  # each [n, B, b]
        self._sum: Tensor | None = None  # Σ g gᵀ, [B, b, b]

    def add(self, rows: Tensor, samples: int) -> None:
        """Take further samples in.

        Args:
            rows: Their gradients, or what stands for these, [n, P], or each of the shape of the weight.
            samples: How many samples they are of, which N grows by; n, but for M sampled targets for each.

        Raises:
            ValueError: If the rows are not of P entries.

        """
        rows = rows.flatten(1)
        if rows.shape[1] != self.size:
            raise ValueError(f"Rows of {rows.shape[1]} entries for a weight of {self.size}.")
        self.samples += samples
        rows = rows.double()
        self._rows.append(self._blocked(rows if self._all_active else torch.where(self.active, rows, 0.0)))
        if self._sum is None and sum(map(len, self._rows)) >= self.block_size:
            _, blocks, b = self._rows[0].shape
            self._sum = rows.new_zeros(blocks, b, b, dtype=torch.float64)
        if self._sum is not None:
            for part in self._rows:
                self._sum.baddbmm_(part.permute(1, 2, 0), part.transpose(0, 1))
            self._rows.clear()

    def inverse_diagonal(self, damping: float) -> Tensor:
        """The diagonal of (λI + F)⁻¹.

        Args:
            damping: λ ≥ 0, in the units of F.

        Returns:
            Shape [P], float64; 1/λ for entries that take no part, infinite with λ = 0.

        Raises:
            ValueError: If λ is out of range, nothing has been added, a row is not finite, or a block is singular.

        """
        parts = []
        for factor, active in self._factors(damping, self.active):
            if factor.rows is None:
                parts.append(torch.cholesky_inverse(factor.lower).diagonal(dim1=1, dim2=2))
            else:
                explained = torch.linalg.solve_triangular(factor.lower, factor.rows, upper=False).square().sum(1)
                parts.append((1 - explained) / damping)
            parts[-1] = torch.where(active, parts[-1], 1 / damping if damping else torch.inf)
        found = torch.cat(parts).flatten()[: self.size]
        if not bool((found > 0).all()):  # lost in rounding
            raise ValueError(_SINGULAR.format(damping=damping, samples=self.samples, size=self.block_size))
        return found

    def solve(self, v: Tensor, damping: float, among: Tensor | None = None) -> Tensor:
        """Solve (λI + F) x = v in the rows and columns of some entries; x is 0 at all others.

        Args:
            v: Right-hand side, [P].
            damping: λ ≥ 0, in the units of F.
            among: Which entries, boolean [P]; all that take part if None. Others than these take no part anyway.

        Returns:
            Shape [P], float64.

        Raises:
            ValueError: If λ is out of range, nothing has been added, a row is not finite, or a block is singular.

        """
        among = self.active if among is None else self.active & among
        rest, parts = self._blocked(torch.where(among, v.double(), 0.0)), []
        for factor, _ in self._factors(damping, among):
            part, rest = rest[: len(factor.lower)], rest[len(factor.lower) :]
            if factor.rows is None:
                parts.append(torch.cholesky_solve(part[..., None], factor.lower)[..., 0])
            else:
                inner = torch.cholesky_solve(factor.rows @ part[..., None], factor.lower)
                parts.append((part - (factor.rows.mT @ inner)[..., 0]) / damping)
        return torch.where(among, torch.cat(parts).flatten()[: self.size], 0.0)

    def product(self, v: Tensor) -> Tensor:
        """F v, without damping; for v of shape [P] of the same."""
        self._require_samples()
        blocks = self._blocked(v.double())
        if self._sum is not None:
            found = (self._sum @ blocks[..., None])[..., 0]
        else:
            rows = torch.cat(self._rows).transpose(0, 1)
            found = (rows.mT @ (rows @ blocks[..., None]))[..., 0]
        return found.flatten()[: self.size] / self.samples

    def _blocked(self, x: Tensor) -> Tensor:
        """[..., P] as [..., B, b], filled up with zeros."""
        missing = -self.size % self.block_size
        return (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, self.block_size))

    def _factors(self, damping: float, among: Tensor) -> Iterator[tuple[_Factor, Tensor]]:
        """Factors of all blocks in the entries `among`, a few blocks at a time, and these entries, [B, b]."""
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping (λ) must be a finite number ≥ 0, got {damping}.")
        self._require_samples()
        taking, n = self._blocked(among), self.samples
        rows = None if self._sum is not None else torch.cat(self._rows).transpose(0, 1)
        side = self.block_size if rows is None else rows.shape[1]
        step = max(1, _CHUNK // (side * max(side, self.block_size)))
        for start in range(0, len(taking), step):
            part = taking[start : start + step]
            if rows is None:
                assert self._sum is not None
                matrix = self._sum[start : start + step] / n
                matrix *= part[:, :, None] & part[:, None, :]
                diagonal = matrix.diagonal(dim1=1, dim2=2)
                diagonal.copy_(torch.where(part, diagonal + damping, 1.0))
                chosen, own = part, None
            else:
                own = rows[start : start + step] * part[:, None, :]
                matrix = own @ own.mT
                diagonal = matrix.diagonal(dim1=1, dim2=2)
                diagonal += n * damping
                chosen = torch.ones_like(diagonal, dtype=torch.bool)
            self._require_finite(diagonal)
            largest = torch.where(chosen, diagonal, 0.0).amax(1)
            lower, info = torch.linalg.cholesky_ex(matrix)
            pivots = torch.where(chosen, lower.diagonal(dim1=1, dim2=2).square(), torch.inf).amin(1)
            rounding = torch.finfo(torch.float64).eps * side
            # By rows, λ = 0 would leave F⁻¹ without its largest part.
            singular = (info > 0) | (pivots <= rounding * largest) | (damping == 0 and own is not None)
            if bool(singular.any()):
                raise ValueError(_SINGULAR.format(damping=damping, samples=n, size=self.block_size))
            yield _Factor(lower, own), part

    def _require_samples(self) -> None:
        if not self.samples:
            raise ValueError("A Fisher matrix of no samples: add some before.")

    @staticmethod
    def _require_finite(diagonal: Tensor) -> None:
        if not bool(diagonal.isfinite().all()):
            raise ValueError(
                "Gradients are not finite, or their squares are not. Look for NaN or Inf in weights and inputs."
            )


_SINGULAR = (
    "damping={damping}: a block of the Fisher matrix ({samples} samples, blocks of {size}) is singular, or too nearly "
    "so for float64, as it is with fewer samples than entries of a block and where inputs are always 0. Give more "
    "damping."
)
