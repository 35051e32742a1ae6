"""The empirical Fisher (EF) and the improved empirical Fisher (iEF).

Wu, Yu, Zhang, Woodland, "An Improved Empirical Fisher Approximation for Natural Gradient Descent", NeurIPS 2024,
arXiv 2406.06420. Both are solved in sample space, where the matrix is N × N.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ief.capture import Direction, Jacobian, LinearizedBatch
from lightning_ief.curvature import fisher_rows
from lightning_ief.directions.registry import register

__all__ = ["LeastSquaresProblem", "damping_of", "ef", "ef_problem", "ief", "ief_problem", "require_one_damping"]


class LeastSquaresProblem(NamedTuple):
    """What directions in row space solve: the least ‖A d − b‖² + λ‖d − d₀‖².

    Attributes:
        rows: A.
        rhs: b, one number for each row.
        damping: λ.
        relative_damping: ρ, if λ is ρ times the mean diagonal of AAᵀ.

    """

    rows: Jacobian
    rhs: Tensor
    damping: float
    relative_damping: float | None = None

    @classmethod
    def of(
        cls, rows: Jacobian, rhs: Tensor, damping: float | None, relative_damping: float | None
    ) -> "LeastSquaresProblem":
        """Make one with λ as it is given, or as a multiple of the mean diagonal of AAᵀ; see `damping_of`."""
        return cls(rows, rhs, damping_of(rows, damping, relative_damping), relative_damping)

    def restrict(self, names: Iterable[str]) -> "LeastSquaresProblem":
        """The same for some parameters alone, for the whole of b; a relative damping is relative to their own AAᵀ.

        Args:
            names: The parameters.

        Returns:
            Their problem.

        """
        return self.of(self.rows.restrict(names), self.rhs, self.damping, self.relative_damping)

    def solve(self, reached: Tensor | None = None) -> Direction:
        """The rest, d − d₀ = Aᵀ(AAᵀ + λI)⁻¹(b − A d₀), not yet formed.

        Args:
            reached: A d₀, shape of b; d₀ = 0 if None.

        Returns:
            d − d₀.

        """
        return self.rows.solve(self.rhs if reached is None else self.rhs - reached, self.damping)

    def report(self) -> dict[str, float]:
        """What there is to know of the solve with d₀ = 0, from the eigenvalues κ of AAᵀ.

        Returns:
            `damping`, λ; `effective_rank`, Σ κ/(κ + λ); `condition`, that of AAᵀ + λI; `damped_share`, the part of b
            that damping took, ‖b − A d‖/‖b‖.

        """
        values, vectors = torch.linalg.eigh(self.rows.gram())
        values, along = values.clamp(min=0), vectors.T @ self.rhs.double()
        damped = values + self.damping
        shares = torch.where(damped > 0, values / damped, 0.0)
        left = ((1 - shares) * along).norm() / along.norm()
        numbers = torch.stack([shares.sum(), damped.amax() / damped.amin(), left]).tolist()
        return {"damping": self.damping} | dict(
            zip(("effective_rank", "condition", "damped_share"), numbers, strict=True)
        )


def damping_of(rows: Jacobian, damping: float | None, relative_damping: float | None) -> float:
    """λ, given as it is or as a multiple of the mean diagonal of AAᵀ.

    Args:
        rows: A.
        damping: λ.
        relative_damping: ρ, if there is no λ; λ = ρ · mean diag(AAᵀ).

    Returns:
        λ.

    """
    if relative_damping is None:
        assert damping is not None  # see `require_one_damping`
        return damping
    scale = float(rows.row_norms().square().mean())
    # What is not finite makes a direction of NaN, which optimizers know what to do about.
    return relative_damping * scale if scale < float("inf") else 0.0


def require_one_damping(caller: str, **dampings: float | None) -> None:
    """Require exactly one damping.

    Args:
        caller: Who was given them.
        **dampings: By the name of their arguments.

    Raises:
        ValueError: If there is none, or more than one, or it is negative or not finite.

    """
    given = {name: value for name, value in dampings.items() if value is not None}
    if len(given) != 1:
        found = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
        raise ValueError(f"{caller} takes one of {', '.join(dampings)}, got {found}: leave the others out (None).")
    for name, value in given.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{caller}({name}={value}): must be a finite number ≥ 0.")


@register(label="EF", color="#D55E00", linestyle="--", marker="^")
def ef(
    linearization: LinearizedBatch, damping: float | None = None, *, relative_damping: float | None = None
) -> Direction:
    """Empirical Fisher: d = Jᵀ(JJᵀ + λI)⁻¹ 1 = (JᵀJ + λI)⁻¹ ∇L.

    With λ → 0 every sample's loss falls at the same rate, J d = 1, however small its gradient: the inversely-scaled
    projection issue of the paper.

    Args:
        linearization: Model and batch.
        damping: λ ≥ 0, in the units of JJᵀ: squared norms of per-sample gradients.
        relative_damping: ρ ≥ 0 instead, with λ = ρ · mean diag(JJᵀ).

    Returns:
        d, {parameter name: tensor}.

    Raises:
        ValueError: If not exactly one damping is given, or it is out of range.

    """
    return ef_problem(linearization, damping, relative_damping=relative_damping).solve()


def ef_problem(
    linearization: LinearizedBatch, damping: float | None = None, *, relative_damping: float | None = None
) -> LeastSquaresProblem:
    """What `ef` solves: A = J, b = 1."""
    require_one_damping("ef", damping=damping, relative_damping=relative_damping)
    rows = linearization.jacobian
    ones = torch.ones_like(linearization.logit_gradient_norms)
    rhs = _nan_where_not_finite(ones, linearization.losses)
    return LeastSquaresProblem.of(rows, rhs, damping, relative_damping)


@register(label="iEF", color="#0072B2", linestyle="-", marker="o")
def ief(
    linearization: LinearizedBatch,
    damping: float | None = None,
    *,
    relative_damping: float | None = None,
    absolute_damping: float | None = None,
) -> Direction:
    """Improved empirical Fisher: d = Jᵀ(JJᵀ + λI)⁻¹ s with s_n = ‖∂l_n/∂z_n‖².

    With λ → 0 each sample's loss falls at the rate at which gradient descent on its own logits lowers it, J d = s. For
    scalar outputs and least squares it then is the natural gradient, wherever J d = s has a solution (it has with no
    more samples than parameters; without one, the two weigh what is left differently).

    `damping` is the paper's, the same number for every sample, however large its gradient: with much of it, d tends to
    Σ_n s_n ∇l_n. The other two damp the matrix of iEF itself, F̃ = JᵀS⁻¹J with S = diag(s): d = (F̃ + λI)⁻¹∇L
    = Jᵀ(JJᵀ + λS)⁻¹ s. With much of it, d tends to ∇L/λ; for scalar outputs and least squares it is the damped natural
    gradient at any N. A sample with s_n = 0 takes no part.

    Args:
        linearization: Model and batch.
        damping: λ ≥ 0, in the units of JJᵀ: squared norms of per-sample gradients.
        relative_damping: ρ ≥ 0 instead, damps F̃ with λ = ρ · mean diag(S^-½ JJᵀ S^-½).
        absolute_damping: λ ≥ 0 instead, damps F̃, in the units of F: squared derivatives of logits.

    Returns:
        d, {parameter name: tensor}.

    Raises:
        ValueError: If not exactly one damping is given, or it is out of range.

    """
    return ief_problem(
        linearization, damping, relative_damping=relative_damping, absolute_damping=absolute_damping
    ).solve()


def ief_problem(
    linearization: LinearizedBatch,
    damping: float | None = None,
    *,
    relative_damping: float | None = None,
    absolute_damping: float | None = None,
) -> LeastSquaresProblem:
    """What `ief` solves: A = J and b = s, or A = S^-½ J and b = S^½ 1."""
    require_one_damping("ief", damping=damping, relative_damping=relative_damping, absolute_damping=absolute_damping)
    s = linearization.logit_gradient_norms
    if damping is not None:
        return LeastSquaresProblem(linearization.jacobian, _nan_where_not_finite(s, linearization.losses), damping)
    rows = fisher_rows(linearization, "improved")
    rhs = _nan_where_not_finite(s.sqrt(), linearization.losses)
    return LeastSquaresProblem.of(rows, rhs, absolute_damping, relative_damping)


def _nan_where_not_finite(rhs: Tensor, losses: Tensor) -> Tensor:
    """A sample whose loss is not finite makes the direction NaN, even where its gradient is a number."""
    return torch.where(losses.isfinite(), rhs, torch.nan)
