"""What goes into a layer and what comes back, and second moments of both: the factors of a Kronecker product.

One layout throughout: inputs [N, T, d_in] and gradients of the outputs [R, N, T, d_out] for N samples, T positions and
R cotangents; a weight that is used several times has the positions of all its uses, one use behind the other. The
inputs of an embedding are int64 [N, T], the indices of one-hot rows, and their second moment is diagonal, [d_in].

Positions that share a weight are taken in one of two ways (Eschenhagen et al., arXiv 2311.00636): "expand" takes each
position for a sample, Â = mean_nt a_nt a_ntᵀ and Ĝ = Σ_nt g_nt g_ntᵀ/N; "reduce" the sum over them,
Â = mean_n ā_n ā_nᵀ of the means ā_n = mean_t a_nt, and Ĝ = mean_n (Σ_t g_nt)(Σ_t g_nt)ᵀ. With one they are the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_ief.capture import Jacobian, LinearizedBatch
from lightning_ief.capture.jacobian import Sides
from lightning_ief.capture.metric import with_ones
from lightning_ief.capture.types import CaptureError
from lightning_ief.linalg.scaling import wide

__all__ = [
    "EARLY",
    "Averages",
    "Eigen",
    "Layer",
    "Positions",
    "add_moments",
    "add_squares",
    "bias_of",
    "layer_of",
    "layer_sides",
    "lookups",
    "require_sides",
    "sides_of",
]

Positions: TypeAlias = Literal["expand", "reduce"]
"""How positions that share a weight are taken."""

EARLY = (0, 2, 5, 10)
"""Batches after which averages are looked at anew besides: they change fast at first."""

_PANEL = 512  # columns of a second moment, of which the lower triangle is computed, that go through one product

_SAME = 2e-2  # difference of rows that is rounding, also of bfloat16, over the largest entry

_CHUNK = 2**23  # elements of rotated per-sample gradients that exist at once


class Layer(NamedTuple):
    """One weight, and its bias, with what went in and what came back.

    Attributes:
        inputs: a, [N, T, d_in] with a 1 for the bias at the end, or int64 [N, T] of an embedding.
        gradients: g, [R, N, T, d_out].
        width: d_in, the 1 included.
        bias: The parameter that the 1 is multiplied by; None if there is none.
        transposed: Whether the weight is [d_in, d_out] instead of [d_out, d_in].

    """

    inputs: Tensor
    gradients: Tensor
    width: int
    bias: str | None
    transposed: bool

    @property
    def is_one_hot(self) -> bool:
        """Whether it is an embedding."""
        return not self.inputs.is_floating_point()

    @property
    def is_finite(self) -> bool:
        """Whether the squares of all numbers can be added up; the host waits for it."""
        sides = [self.gradients] if self.is_one_hot else [self.inputs, self.gradients]
        return bool(torch.stack([x.square().sum().isfinite() for x in sides]).all())

    def add_to(self, inputs: Tensor, gradients: Tensor, positions: Positions, decay: float) -> None:
        """Add the second moments of this batch to averages: Â ← β Â + (1 − β) A in place, Ĝ alike.

        Args:
            inputs: Â, of which the lower triangle counts, [d_in, d_in]; or its diagonal, of an embedding.
            gradients: Ĝ, of which the lower triangle counts, [d_out, d_out].
            positions: How positions are taken.
            decay: β.

        """
        samples, shared = self.inputs.shape[:2]
        a, g, alpha = self.inputs, self.gradients, (1 - decay) / samples
        if positions == "reduce":
            a, g = a if self.is_one_hot else a.mean(1, keepdim=True), g.sum(2, keepdim=True)
        if self.is_one_hot:
            a = lookups(a[None], self.gradients, self.width, squared=positions == "reduce")
        over = shared if positions == "expand" else shared**2 if self.is_one_hot else 1
        add_squares([a], inputs, decay, alpha / over)
        add_squares([g], gradients, decay, alpha)

    def matrix_of(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """An entry of a direction for the weight, and one for the bias behind it, as a matrix [d_out, d_in]."""
        matrix = weight.reshape(len(weight), -1)
        matrix = matrix.T if self.transposed else matrix
        return matrix if bias is None else torch.cat([matrix, bias[:, None]], dim=1)

    def entries_of(self, matrix: Tensor, name: str, shape: torch.Size) -> dict[str, Tensor]:
        """Back from a matrix [d_out, d_in] to the entries of the weight, of this name and shape, and of its bias."""
        found = {} if self.bias is None else {self.bias: matrix[:, -1].contiguous()}
        matrix = matrix if self.bias is None else matrix[:, :-1]
        return {name: (matrix.T if self.transposed else matrix).reshape(shape), **found}


class Eigen(NamedTuple):
    """A positive matrix Q diag(values) Qᵀ.

    Attributes:
        values: [d], ≥ 0.
        basis: Q, [d, d]; None for the identity.

    """

    values: Tensor
    basis: Tensor | None

    @classmethod
    def of(cls, average: Tensor, weight: float) -> "Eigen":
        """Decompose an average, of which the lower triangle counts, over a weight; or one that is a diagonal."""
        if average.ndim == 1:
            return cls(average / weight, None)
        try:
            values, basis = torch.linalg.eigh(average)
        except RuntimeError:  # float32 does not always converge
            values, basis = (x.to(average) for x in torch.linalg.eigh(average.double()))
        return cls(values.clamp(min=0) / weight, basis)

    def into(self, x: Tensor) -> Tensor:
        """Coordinates x Q of vectors [..., d]."""
        return x if self.basis is None else x @ self.basis

    def back(self, x: Tensor) -> Tensor:
        """Vectors x Qᵀ of coordinates [..., d]."""
        return x if self.basis is None else x @ self.basis.T


class Averages(ABC):
    """What is kept of both sides of layers in the state of their weights, from batch to batch, and how it is resumed.

    Attributes:
        tensors: Keys of the averages, and of what is made of them.
        numbers: Keys of what is counted beside them.

    """

    tensors: ClassVar[tuple[str, ...]]
    numbers: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def made_of(self) -> dict[str, str]:
        """What the averages are of: those of another kind are no beginning for them."""

    @staticmethod
    def sides_of(parameters: Mapping[str, Tensor]) -> list[str]:
        """Weights of which both sides are to be kept in `linearize(..., keep_sides=...)`."""
        return sides_of(parameters)

    def load(self, state: MutableMapping[str, Any], saved: Mapping[str, Any], like: Tensor) -> None:
        """Take over what is kept of a parameter: in full precision, as it is also where that is in half of it."""
        state.update({key: saved[key].to(like.device, wide(like.dtype)) for key in self.tensors if key in saved})

    def forget(self, state: MutableMapping[str, Any]) -> None:
        """Drop what is kept of a parameter."""
        for key in (*self.tensors, *self.numbers):
            state.pop(key, None)


def sides_of(parameters: Mapping[str, Tensor]) -> list[str]:
    """Weights of which both sides are to be kept in `linearize(..., keep_sides=...)`."""
    return [name for name, p in parameters.items() if p.ndim >= 2]


def require_sides(batch: LinearizedBatch, names: Iterable[str], caller: str) -> None:
    """Require that a batch has kept both sides of weights.

    Args:
        batch: The batch.
        names: The weights.
        caller: Who needs them.

    Raises:
        CaptureError: If it has not.

    """
    for part in batch.parts:
        if missing := {*names}.difference(getattr(part, "keep_sides", names)):
            raise CaptureError(
                f"{caller} needs both sides of {sorted(missing)}: name them in linearize(..., keep_sides=optimizer."
                "sides_of(model)), as NaturalGradientMixin does; without an optimizer, "
                "lightning_ief.curvature.sides_of(parameters)."
            )


def layer_sides(rows: Jacobian, name: str, known: bool, caller: str) -> list[Sides] | None:
    """Both sides of a weight, for each of its uses.

    Args:
        rows: Its rows.
        name: The weight.
        known: Whether it had sides in an earlier batch: then it must have them.
        caller: Who needs them.

    Returns:
        The sides; None if it has none, is used from both sides, as x W and as x Wᵀ, or by indices and otherwise.

    Raises:
        ValueError: If one that had sides has none any more.

    """
    try:
        sides = rows.sides(name)
    except ValueError:
        if known:
            raise
        return None
    if len({(each.came_back, each.inputs.is_floating_point()) for each in sides}) > 1:
        if known:
            raise ValueError(
                f"'{name}' is used from both sides, or by indices and otherwise, as it was not before: {caller} has no "
                "form for it."
            )
        return None
    return sides or None


def bias_of(name: str, parameters: Mapping[str, Tensor], sides: Sides) -> str | None:
    """The bias beside a weight, with as many entries as the layer has outputs; an embedding has none."""
    bias = f"{name.removesuffix('weight')}bias"
    there = name.endswith("weight") and bias in parameters and sides.inputs.is_floating_point()
    return bias if there and parameters[bias].shape == sides.gradients.shape[-1:] else None


def layer_of(rows: Jacobian, name: str, parameters: Mapping[str, Tensor], known: bool, caller: str) -> Layer | None:
    """A weight as a layer, see `layer_sides`; None if it has no sides. Its bias is what is added to its output."""
    if (sides := layer_sides(rows, name, known, caller)) is None:
        return None
    inputs, gradients = (torch.cat(x, dim=2) for x in zip(*((s.inputs, s.gradients) for s in sides), strict=True))
    bias = bias_of(name, parameters, sides[0])
    if bias is not None and not _is_added(rows, bias, gradients):
        bias = None
    if not inputs.is_floating_point():
        return Layer(inputs[0], gradients, len(parameters[name]), None, transposed=True)
    inputs = inputs[0] if bias is None else with_ones(inputs[0])
    return Layer(inputs, gradients, inputs.shape[-1], bias, transposed=bool(sides[0].came_back))


def _is_added(rows: Jacobian, bias: str, gradients: Tensor) -> bool:
    """Whether a parameter is added to what comes out of a layer, and to nothing else: whether its rows are Σ_t g_nt."""
    expected = gradients.sum(2).flatten(0, 1)
    difference = (rows.restrict([bias]).to_dense().to(expected) - expected).abs().amax()
    return not bool(difference > _SAME * expected.abs().amax())  # of what is not finite nothing can be told


def lookups(rows: Tensor, gradients: Tensor, height: int, squared: bool = False) -> Tensor:
    """How often rows of an embedding are looked up, where something comes back (to padding nothing does).

    Args:
        rows: Which ones, int64 [1, N, T].
        gradients: What comes back, [R, N, T, d].
        height: Number of rows.
        squared: Add up the squares of each sample's number of times.

    Returns:
        Σ_n c_nv or Σ_n c_nv² for each row v, [height].

    """
    matters = gradients.ne(0).any(-1).any(0).to(gradients.dtype)
    if squared:
        matters = matters * (_alike(rows[0]).to(matters) @ matters[..., None])[..., 0]
    return gradients.new_zeros(height).index_add_(0, rows.flatten(), matters.flatten())


def add_squares(uses: Sequence[Tensor], average: Tensor, decay: float, alpha: float) -> None:
    """Add the sides of a layer's uses [..., d] to an average of their squares [d, d], in its lower triangle.

    Or counts [d] to an average of them. Squares that are too large to be added up are left out.

    Args:
        uses: The sides, or the counts.
        average: The average, changed in place.
        decay: β, what it is multiplied by.
        alpha: What they are multiplied by.

    """
    flat = [x if average.ndim == 1 else x.flatten(0, -2) for x in uses]
    # No entry of xᵀx is larger than this, which may be too large.
    finite = torch.stack([x.square().sum() for x in flat]).sum().isfinite()
    for number, x in enumerate(flat):
        x = torch.where(finite, x, 0.0)  # noqa: PLW2901
        beta = 1.0 if number else decay
        if average.ndim == 1:
            average.mul_(beta).add_(x, alpha=alpha)
            continue
        for start in range(0, len(average), _PANEL):
            lower = average[start:, start : start + _PANEL]
            lower.addmm_(x[:, start:].T, x[:, start : start + _PANEL], beta=beta, alpha=alpha)


def add_moments(layer: Layer, inputs: Eigen, gradients: Eigen, average: Tensor, decay: float) -> None:
    """Add second moments of the gradients of samples in an eigenbasis, V_n = Q_Gᵀ (Σ_t g_nt a_ntᵀ) Q_A, to an average.

    M ← β M + (1 − β) mean_n V_n∘V_n (George et al., arXiv 1806.03884), exact whatever the number of positions.

    Args:
        layer: The layer.
        inputs: Q_A.
        gradients: Q_G.
        average: M, [d_out, d_in], changed in place.
        decay: β.

    """
    samples, shared = layer.inputs.shape[:2]
    alpha = (1 - decay) / samples
    g = gradients.into(layer.gradients)  # [R, N, T, d_out]
    average.mul_(decay)
    if layer.is_one_hot:
        # Σ_n (Σ_t g_nt [v_nt = v])² = Σ_nt [v_nt = v] g_nt Σ_u [v_nu = v_nt] g_nu
        squares = (g * (_alike(layer.inputs).to(g) @ g)).sum(0)
        average.index_add_(1, layer.inputs.flatten(), squares.flatten(0, 1).T, alpha=alpha)
        return
    a = inputs.into(layer.inputs)  # [N, T, d_in]
    if shared == 1:
        average.addmm_(g.square().sum((0, 2)).T, a[:, 0].square(), alpha=alpha)
        return
    step = max(1, _CHUNK // (len(g) * average.numel()))
    for start in range(0, samples, step):
        chunk = slice(start, start + step)
        average.add_((g[:, chunk].mT @ a[chunk]).square().sum((0, 1)), alpha=alpha)


def _alike(rows: Tensor) -> Tensor:
    """Which positions of a sample look up the same row, [N, T] → [N, T, T]."""
    return rows[:, :, None] == rows[:, None]
