"""J in another metric of the parameters: its adjoint there takes the place of Jᵀ, and so in every direction."""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ief.capture.factors import Dense, Factor, Outer, summed_rows
from lightning_ief.capture.jacobian import Addition, Block, Jacobian, LocalJacobian, Sides, memory_of
from lightning_ief.linalg.gram import InnerProducts

__all__ = ["Kronecker", "MetricJacobian", "transformed", "with_ones"]


class Kronecker(NamedTuple):
    """A linear map of one layer's gradients, W ↦ C W Bᵀ, where W [d_out, d_in] may have the bias as its last column.

    Attributes:
        inputs: B, on the side of what went in, [d_in, d_in], or one more with a bias; the diagonal [d_in] of one that
            is diagonal, for one-hot inputs.
        gradients: C, on the side of what came back, [d_out, d_out].
        bias: The parameter that is the last column; None if there is none.

    """

    inputs: Tensor
    gradients: Tensor
    bias: str | None = None


class MetricJacobian(Jacobian):
    """J in a metric M of the parameters, ⟨a, b⟩ = aᵀMb: its adjoint J* = M⁻¹Jᵀ stands for Jᵀ, and K = J M⁻¹Jᵀ.

    So every direction that is made of J, Jᵀ and K is that of the metric: (H + λM)⁻¹ g instead of (H + λI)⁻¹ g.

    Args:
        plain: J.
        mapped: J M⁻¹.

    """

    is_euclidean = False

    def __init__(self, plain: Jacobian, mapped: Jacobian) -> None:
        super().__init__(plain.blocks, plain.scales)
        self.is_collective = plain.is_collective
        self.plain = plain
        self.mapped = mapped

    def restrict(self, names: Iterable[str]) -> "MetricJacobian":
        """Refused: M couples parameters.

        Args:
            names: Parameters.

        Raises:
            ValueError: Always.

        """
        raise ValueError("Rows in a metric that couples parameters can't be restricted: do it before in_metric().")

    def scaled(self, factors: Tensor) -> "MetricJacobian":  # noqa: D102
        return MetricJacobian(self.plain.scaled(factors), self.mapped.scaled(factors))

    def sides(self, name: str) -> list[Sides]:  # noqa: D102
        return self.plain.sides(name)

    def require_unmoved(self) -> None:  # noqa: D102
        self.plain.require_unmoved()

    def require_unwritten(self) -> None:  # noqa: D102
        self.plain.require_unwritten()
        self.mapped.require_unwritten()

    def _unscaled_gram(self, products: InnerProducts) -> Tensor:
        return self.plain.unscaled_products(self.mapped, products)

    def unscaled_products(self, other: "MetricJacobian", products: InnerProducts) -> Tensor:  # noqa: D102
        return self.plain.unscaled_products(other.plain, products)

    def _same(self, numbers: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain._same(numbers, v)

    def _entries(self, names: Sequence[str], weights: Tensor, scale: Tensor | float) -> dict[str, Tensor]:
        return self.mapped._entries(names, weights, scale)

    def _add(self, weights: Tensor, scale: Tensor | float, to: Addition) -> None:
        self.mapped._add(weights, scale, to)

    def _unscaled_matvec(self, d: Mapping[str, Tensor]) -> Tensor:
        return self.plain._unscaled_matvec(d)

    def _column_squares(self, weights: Tensor) -> dict[str, Tensor]:
        return self.plain._column_squares(weights)

    def _unscaled_dense(self) -> Tensor:
        return self.plain._unscaled_dense()

    def of_all_samples(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.plain.of_all_samples(x)


def transformed(rows: LocalJacobian, layers: Mapping[str, Kronecker]) -> LocalJacobian:
    """The rows of one process with the gradients of some layers mapped, from both sides of each: J itself never is.

    Args:
        rows: J, whose weights of these layers are held by their sides, see `Jacobian.sides`.
        layers: The maps by weight.

    Returns:
        A Jacobian of as many rows.

    """
    mapped = [
        Block(block.samples, reduce(_mapped, layers.items(), block.factors)) if block.factors else block
        for block in rows.blocks.each
    ]
    return LocalJacobian(rows.blocks._replace(each=mapped), rows.scales)


class _Use(NamedTuple):
    """What went into a layer [1, N, T, d_in], or [1, N, T] if one-hot, and what came back [R, N, T, d_out]."""

    inputs: Tensor
    gradients: Tensor

    def mapped(self, layer: Kronecker) -> "_Use":
        x, y = self.inputs, self.gradients
        y = y @ layer.gradients.T.to(y.dtype)
        if x.is_floating_point():
            return _Use(x @ layer.inputs.T.to(x.dtype), y)
        return _Use(x, y * layer.inputs.to(y.dtype)[x, None])


def _mapped(factors: Mapping[str, Sequence[Factor]], named: tuple[str, Kronecker]) -> Mapping[str, Sequence[Factor]]:
    """Factors of all parameters with those of one layer mapped."""
    name, layer = named
    bias = layer.bias
    used = [factor for factor in factors[name] if isinstance(factor, Outer)]
    assert len(used) == len(factors[name])
    if not used:
        return factors
    back, shape = used[0].came_back, used[0].shape
    sides = [Sides(factor.term.left, factor.term.right, back) for factor in used]
    uses = [_Use(each.inputs, each.gradients) for each in sides]
    if bias is not None:
        uses = _with_bias(uses, factors.get(bias, ()))
    uses = [use.mapped(layer) for use in uses]
    found = dict(factors)
    if bias is not None:
        found[bias] = [Dense(reduce(torch.add, (torch.einsum("snt,rntd->rnd", x[..., -1], y) for x, y in uses)))]
        uses = [_Use(x[..., :-1], y) for x, y in uses]
    found[name] = [Outer(x, y, shape, 1) if back else Outer(y, x, shape, 0) for x, y in uses]
    return found


def _with_bias(uses: Sequence[_Use], factors: Sequence[Factor]) -> list[_Use]:
    """The uses of a weight with those of its bias, which is the last of the inputs."""
    (inputs, gradients), *others = uses
    only = factors[0] if len(factors) == 1 and not others and gradients.shape[2] == 1 else None
    if isinstance(only, Dense) and memory_of(only.flat) == memory_of(gradients):
        return [_Use(with_ones(inputs), gradients)]
    found = [_Use(F.pad(x, (0, 1)), y) for x, y in uses]
    if factors:  # as a further use, in which the bias alone takes part, for it may have uses of its own
        samples = gradients.shape[1]
        rows = summed_rows(factors, slice(0, samples)).flatten(2).unsqueeze(2)
        found.append(_Use(F.pad(inputs.new_zeros(1, samples, 1, inputs.shape[-1]), (0, 1), value=1.0), rows))
    return found


def with_ones(inputs: Tensor) -> Tensor:
    """What went into a layer [..., d_in], with the 1 that its bias is multiplied by behind it."""
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
