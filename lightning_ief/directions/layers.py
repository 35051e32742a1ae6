"""Layerwise directions: each layer's from its own Gram matrix, as if curvature were block-diagonal."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_ief.capture import Direction, LinearizedBatch
from lightning_ief.directions.empirical import LeastSquaresProblem, ef_problem, ief_problem
from lightning_ief.directions.gauss_newton import gauss_newton_problem
from lightning_ief.directions.registry import register

__all__ = ["layers_of", "layerwise", "layerwise_ef", "layerwise_gauss_newton", "layerwise_ief"]


def layers_of(names: Iterable[str]) -> list[list[str]]:
    """Names of parameters by the module that they stand in, such as a weight and its bias.

    Args:
        names: Names of parameters.

    Returns:
        A list for each module.

    Example:
        >>> layers_of(["0.weight", "0.bias", "2.weight", "scale"])
        [['0.weight', '0.bias'], ['2.weight'], ['scale']]

    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return [*found.values()]


def layerwise(problem: LeastSquaresProblem) -> Direction:
    """The direction of each layer from a solve of its own, d_l = A_lᵀ(A_l A_lᵀ + λI)⁻¹ b for its columns A_l.

    Layers are modules, see `layers_of`. A relative damping is relative to each layer's own mean diagonal. Every layer
    solves for the whole of b, so that together they go further than one direction of all: with λ = 0, A d = L b for L
    layers that can reach b each.

    Args:
        problem: What the direction of all parameters solves.

    Returns:
        d, {parameter name: tensor}, formed.

    """
    found: dict[str, Any] = {}
    for layer in layers_of(problem.rows.like):
        found.update(problem.restrict(layer).solve().form())
    return Direction.of({name: found[name] for name in problem.rows.like})


@register(label="layerwise EF", color="#999933", linestyle=(0, (1, 3)), marker="P")
def layerwise_ef(
    linearization: LinearizedBatch, damping: float | None = None, *, relative_damping: float | None = None
) -> Mapping[str, Any]:
    """EF by layers, d_l = J_lᵀ(J_l J_lᵀ + λI)⁻¹ 1 = (J_lᵀJ_l + λI)⁻¹ ∇_l L; see `ef` and `layerwise`.

    Args:
        linearization: Model and batch.
        damping: λ ≥ 0.
        relative_damping: ρ ≥ 0 instead, of the mean diagonal of each layer's own J_l J_lᵀ.

    Returns:
        d, {parameter name: tensor}.

    Raises:
        ValueError: If not exactly one damping is given, or it is out of range.

    """
    return layerwise(ef_problem(linearization, damping, relative_damping=relative_damping))


@register(label="layerwise iEF", color="#56B4E9", linestyle=(0, (3, 1)), marker="p")
def layerwise_ief(
    linearization: LinearizedBatch,
    damping: float | None = None,
    *,
    relative_damping: float | None = None,
    absolute_damping: float | None = None,
) -> Mapping[str, Any]:
    """Improved EF by layers, d_l = J_lᵀ(J_l J_lᵀ + λI)⁻¹ s; see `ief` and `layerwise`.

    Args:
        linearization: Model and batch.
        damping: λ ≥ 0, the paper's.
        relative_damping: ρ ≥ 0 instead, damps each layer's own block of F̃, relative to its mean diagonal.
        absolute_damping: λ ≥ 0 instead, damps the blocks of F̃.

    Returns:
        d, {parameter name: tensor}.

    Raises:
        ValueError: If not exactly one damping is given, or it is out of range.

    """
    return layerwise(
        ief_problem(linearization, damping, relative_damping=relative_damping, absolute_damping=absolute_damping)
    )


@register(label="layerwise Gauss-Newton", color="#44AA99", linestyle=(0, (4, 1, 1, 1)), marker="h", needs_graph=True)
def layerwise_gauss_newton(
    linearization: LinearizedBatch, damping: float | None = None, *, relative_damping: float | None = None
) -> Mapping[str, Any]:
    """Gauss-Newton by layers; see `gauss_newton` and `layerwise`.

    Args:
        linearization: Model and batch, with its graph.
        damping: λ ≥ 0.
        relative_damping: ρ ≥ 0 instead, relative to each layer's own mean diagonal.

    Returns:
        d, {parameter name: tensor}.

    Raises:
        ValueError: If not exactly one damping is given, or it is out of range.

    """
    return layerwise(gauss_newton_problem(linearization, damping, relative_damping=relative_damping))
