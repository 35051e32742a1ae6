"""The Fisher matrix itself: exact (the natural gradient) and by sampled targets.

F = Σ_n J_znᵀ (∇²_z l_n) J_zn is factored by columns of the Hessian's square root, F = AᵀA with one row of A for every
sample and column; a Monte-Carlo estimate replaces them by the gradients of sampled targets. Either way the solve
happens in the space of rows (Martens, arXiv 1412.1193; Amari 1998). Where there are too many rows, conjugate gradients
need nothing but products with F (Hessian-free optimisation: Martens, ICML 2010).
"""

import math
import warnings
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from lightning_ief.capture import Direction, LinearizedBatch
from lightning_ief.directions.empirical import LeastSquaresProblem, damping_of, require_one_damping
from lightning_ief.directions.gradient import sgd
from lightning_ief.directions.registry import register
from lightning_ief.linalg.cg import conjugate_gradients

__all__ = [
    "conjugate_gradient_iterates",
    "natural_gradient",
    "natural_gradient_problem",
    "require_end",
    "sampled_fisher",
]


@register(label="natural gradient", color="#CC79A7", linestyle=":", marker="D", needs_graph=True)
def natural_gradient(
    linearization: LinearizedBatch,
    damping: float | None = None,
    max_rows: int = 20_000,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    *,
    relative_damping: float | None = None,
) -> Direction:
    """Natural gradient: d = (F + λI)⁻¹ ∇L with the exact Fisher matrix of the batch.

    With few logits, in the space of rows: one backward pass for every logit of a sample (C of them; one less for a
    softmax) and a Gram matrix of as many rows for each sample. Otherwise by conjugate gradients, each iteration of
    which costs about as much as a forward and a backward pass.

    Args:
        linearization: Model and batch, with its graph.
        damping: λ ≥ 0, in the units of F (a sum over samples). With 0, the pseudo-inverse of F.
        max_rows: Largest N·C for which to solve in the space of rows: the Gram matrix takes 8 (N·C)² bytes.
        tolerance: Conjugate gradients end when ‖(F + λI) d − ∇L‖ is this small against ‖∇L‖.
        max_iterations: Conjugate gradients end after so many iterations, with a warning that says how far they came;
            what they have then is a descent direction still, and the better the more there were.
        relative_damping: ρ ≥ 0 instead, with λ = ρ · mean diag(AAᵀ), F = AᵀA with as many rows for each sample as
            `Objective.hessian_factor` has columns; in the space of rows only.

    Returns:
        d, {parameter name: tensor}; NaN if the gradient is not finite.

    Raises:
        ValueError: If an argument is out of range, or not exactly one damping is given.

    Warns:
        RuntimeWarning: If conjugate gradients did not reach the tolerance.

    """
    if linearization.num_logits <= max_rows:
        return natural_gradient_problem(linearization, damping, relative_damping=relative_damping).solve()
    require_one_damping("natural_gradient", damping=damping, relative_damping=relative_damping)
    if damping is None:
        raise ValueError(
            f"natural_gradient(relative_damping={relative_damping}): conjugate gradients do not know the diagonal of "
            f"AAᵀ. Give damping instead, or max_rows of at least {linearization.num_logits}."
        )
    require_end("natural_gradient", tolerance, max_iterations)
    iterations = -1
    for found in islice(conjugate_gradient_iterates(linearization, damping), max_iterations + 1):
        iterations += 1
        if found[1] <= tolerance:
            break
    direction, residual = found
    if math.isnan(residual):
        return Direction.of({name: torch.full_like(entry, torch.nan) for name, entry in direction.items()})
    if residual > tolerance:
        warnings.warn(
            f"natural_gradient: after {iterations} iterations of conjugate gradients the residual is "
            f"{residual:.1e} of the gradient, tolerance={tolerance:g}. Raise max_iterations, the damping or the "
            "tolerance.",
            RuntimeWarning,
            stacklevel=2,
        )
    return Direction.of(direction)


def natural_gradient_problem(
    linearization: LinearizedBatch, damping: float | None = None, *, relative_damping: float | None = None
) -> LeastSquaresProblem:
    """What `natural_gradient` solves in the space of rows, with ∇L = Aᵀc: b = c, so that nothing is divided by λ."""
    require_one_damping("natural_gradient", damping=damping, relative_damping=relative_damping)
    rows, coordinates = linearization.hessian_rows()
    return LeastSquaresProblem.of(rows, coordinates, damping, relative_damping)


def require_end(caller: str, tolerance: float, max_iterations: int) -> None:
    """Require that conjugate gradients come to an end.

    Args:
        caller: Who was given the arguments.
        tolerance: Relative residual at which they end.
        max_iterations: Most iterations.

    Raises:
        ValueError: If one of them is out of range.

    """
    if not tolerance > 0 or max_iterations < 1:
        raise ValueError(
            f"{caller}(tolerance={tolerance}, max_iterations={max_iterations}): must be > 0 and at least 1."
        )


def conjugate_gradient_iterates(
    linearization: LinearizedBatch, damping: float
) -> Iterator[tuple[dict[str, Tensor], float]]:
    """The iterates of conjugate gradients on (F + λI) d = ∇L, from d = 0.

    With λ = 0, γ falls from each to the next: dᵀFd = dᵀ∇L holds at every one of them, and dᵀ∇L grows.

    Args:
        linearization: Model and batch, with its graph.
        damping: λ ≥ 0, in the units of F.

    Returns:
        Yields d, overwritten by the next iteration, and ‖(F + λI) d − ∇L‖ / ‖∇L‖.

    Raises:
        ValueError: If λ is negative or not finite.

    """
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping (λ) must be a finite number ≥ 0, got {damping}.")

    def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
        result = linearization.fisher_product(v)
        return {name: x.add_(v[name], alpha=damping) for name, x in result.items()} if damping else result

    return conjugate_gradients(product, sgd(linearization).form())


@register(
    label=r"$\hat{F}$, sampled Fisher",
    color="#009E73",
    linestyle="-.",
    marker="s",
    damping="> 0",
    default_damping=1.0,  # a few sampled targets make a poor Fisher matrix where it is small
    draws=True,
    needs_graph=True,
)
def sampled_fisher(
    linearization: LinearizedBatch,
    damping: float | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    *,
    relative_damping: float | None = None,
) -> Direction:
    """Fisher by sampled targets, F̂(M): d = (ĴᵀĴ/M + λI)⁻¹ ∇L.

    Ĵ holds the gradients of each sample's loss for M targets ŷ drawn from the model's own predictive distribution; it
    tends to the natural gradient as M grows.

    Args:
        linearization: Model and batch.
        damping: λ > 0, in the units of F (a sum over samples). The part of ∇L outside the rows of Ĵ is divided by λ:
            with float32 gradients, values below about 1e-6 of F's largest eigenvalue amplify rounding.
        num_samples: M, targets drawn per sample; each costs one backward pass.
        generator: Source of randomness on the logits' device; torch's default if None.
        relative_damping: ρ > 0 instead, with λ = ρ · mean diag(ĴĴᵀ/M).

    Returns:
        d, {parameter name: tensor}.

    Raises:
        ValueError: If λ, ρ or M is not positive, or not exactly one damping is given.

    """
    require_one_damping("sampled_fisher", damping=damping, relative_damping=relative_damping)
    for name, value in (("damping (λ)", damping), ("relative_damping (ρ)", relative_damping)):
        if value == 0:
            raise ValueError(f"sampled_fisher needs {name} > 0, got {value}: ∇L is not in the span of F̂'s rows.")
    if num_samples < 1:
        raise ValueError(f"num_samples (M) must be at least 1, got {num_samples}.")
    gradient = sgd(linearization).form()
    sampled = linearization.sampled_rows(num_samples, generator)
    # Woodbury: (ĴᵀĴ/M + λI)⁻¹ g = (g − Ĵᵀ(ĴĴᵀ + MλI)⁻¹ Ĵ g) / λ.
    scaled = damping_of(sampled, None if damping is None else num_samples * damping, relative_damping)
    explained = sampled.solve(sampled.matvec(gradient), scaled).form()
    rest = torch._foreach_sub([*gradient.values()], [explained[name] for name in gradient])
    torch._foreach_div_(rest, scaled / num_samples)
    return Direction.of(dict(zip(gradient, rest, strict=True)))
