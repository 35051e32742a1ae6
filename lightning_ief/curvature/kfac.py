"""K-FAC: the Fisher matrix by layers, each a Kronecker product of what goes in and what comes back, and its inverse.

Martens and Grosse, arXiv 1503.05671; convolutions: Grosse and Martens, arXiv 1602.01407; positions: Eschenhagen et al.,
arXiv 2311.00636; eigenvalues corrected (EKFAC): George et al., arXiv 1806.03884; improved by the rescaling of arXiv
2406.06420.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_ief.capture import Jacobian, LinearizedBatch
from lightning_ief.curvature.kronecker import (
    EARLY,
    Averages,
    Eigen,
    Layer,
    Positions,
    add_moments,
    layer_of,
    require_sides,
    sides_of,
)
from lightning_ief.curvature.rescaling import FisherKind, fisher_rows, require_fisher
from lightning_ief.linalg.gram import full_precision

__all__ = ["KFACCurvature", "preconditioned"]

_STEPS, _TAKEN, _SEEN = "kfac_steps", "kfac_weight", "kfac_moments_weight"  # numbers in an optimizer's state

_SIDES = "kfac_inputs", "kfac_gradients"  # averages there, with `_values` and `_basis` of each

_MOMENTS = "kfac_moments"

_TENSORS = (*(f"{side}{part}" for side in _SIDES for part in ("", "_values", "_basis")), _MOMENTS)


class KFACCurvature(Averages):
    """(F + λI)⁻¹∇L by layers, with F ≈ Â ⊗ N Ĝ for each weight and its bias, from moving averages over batches.

    Units: L = Σ_n l_n is a sum, and so is F: Â is a mean over samples, Ĝ one too, times the N samples of the batch at
    hand. λ is in the units of F, as that of EF, iEF in its own matrix F̃, and the natural gradient. Damping is factored,
    (Â + π√λ I) ⊗ (N Ĝ + √λ/π I) with π² the ratio of the mean diagonals of Â and N Ĝ. With corrected eigenvalues, those
    of Â ⊗ N Ĝ are replaced by N times the second moments of the gradients of samples in its eigenbasis, and λ is added
    to them.

    All parameters without factors (norms, biases without their weight, raw parameters, weights that are used from both
    sides or whose operation has no sides) are one block, exact: (R_bᵀR_b + λI)⁻¹∇_b L with the rows R_b of
    `fisher_rows` for these parameters on the batch at hand, solved for in the space of rows.

    With W the gradient of a layer, d = Q_G [(Q_Gᵀ W Q_A) / eigenvalues] Q_Aᵀ takes 2 d_out d_in (d_out + d_in)
    multiplications whatever N; mapping the sides of each sample, as the Kronecker metric does that needs its rows,
    would take N T (d_out² + d_in²). Memory: d_in² + d_out² elements for the averages of each layer, and as many for
    their eigenbases; d_in d_out with corrected eigenvalues; of an embedding d_in instead of d_in².

    On many ranks d is that of the first of them. With corrected eigenvalues and fewer samples in the averages than d_in
    the basis of the null space of Â is chosen by rounding, and d depends on it.

    Args:
        fisher: Whose gradients, see `fisher_rows`.
        positions: How positions that share a weight are taken: "expand", each for a sample, or "reduce", their sum.
        eigenvalue_correction: Correct the eigenvalues.
        decay: β of the averages, 0 for the present batch alone.

    Raises:
        ValueError: If an argument is out of range.

    """

    tensors = _TENSORS
    numbers = (_STEPS, _TAKEN, _SEEN)

    def __init__(
        self,
        fisher: FisherKind = "improved",
        positions: Positions = "expand",
        eigenvalue_correction: bool = False,
        decay: float = 0.0,
    ) -> None:
        require_fisher("K-FAC", fisher)
        if positions not in get_args(Positions):
            raise ValueError(f"K-FAC: positions={positions!r}: must be 'expand' or 'reduce'.")
        if not 0 <= decay < 1:
            raise ValueError(f"K-FAC: decay={decay}: must be at least 0 and less than 1.")
        self.fisher = fisher
        self.positions = positions
        self.eigenvalue_correction = eigenvalue_correction
        self.decay = decay

    def direction(
        self,
        batch: LinearizedBatch,
        damping: float,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        states: Mapping[str, MutableMapping[str, Any]] | None = None,
        every: int = 1,
    ) -> dict[str, Tensor]:
        """Take a batch into the averages, and solve for the direction; called by all ranks.

        Args:
            batch: The batch.
            damping: λ ≥ 0.
            num_samples: M, for "sampled".
            generator: Source of random numbers for "sampled", on many ranks in the same state on all of them.
            states: What is kept of each of `sides_of` from batch to batch, by name; changed in place. None for this
                batch alone.
            every: Batches between two eigendecompositions of the averages; there are more at first, at `EARLY`.

        Returns:
            d, {parameter name: tensor}; NaN if a loss or a gradient is not finite.

        Raises:
            CaptureError: If the batch was linearised without `keep_sides`.
            ValueError: If λ is out of range, or 0 where the curvature is singular; if a layer that had factors has
                none any more.

        """
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping (λ) must be a finite number ≥ 0, got {damping}.")
        batch.ranks.require_whole("K-FAC needs")
        names = sides_of(batch.parameters)
        require_sides(batch, names, "K-FAC")
        states = {name: {} for name in names} if states is None else states
        found = batch.jacobian.rmatvec(torch.where(batch.losses.isfinite(), 1.0, torch.nan))
        rows = fisher_rows(batch, self.fisher, num_samples, generator)
        with full_precision(batch.losses.device):  # a step may be taken within autocast
            found = self._solved_by_layers(batch, found, rows, damping, states, every)
        return batch.ranks.of_the_first(found)  # others may round otherwise, and an eigenbasis makes that large

    @property
    def made_of(self) -> dict[str, str]:  # noqa: D102
        return {"curvature": "kfac", "fisher": self.fisher, "positions": self.positions}

    def _solved_by_layers(
        self,
        batch: LinearizedBatch,
        found: dict[str, Tensor],
        rows: Jacobian,
        damping: float,
        states: Mapping[str, MutableMapping[str, Any]],
        every: int,
    ) -> dict[str, Tensor]:
        """The direction from ∇L."""
        others = dict.fromkeys(found)
        for name, state in states.items():
            if (layer := layer_of(rows, name, batch.parameters, _STEPS in state, "K-FAC")) is None:
                continue
            if layer.is_finite:
                self._take_in(layer, state, every)
            bias = None if layer.bias is None else found[layer.bias]
            matrix = layer.matrix_of(found[name], bias)
            if matrix.dtype.itemsize < 4:
                # What is rounded before it is divided by small numbers would be far off after.
                matrix = self._gradient_of(batch, name, layer.bias)
            if _TAKEN in state:
                matrix = self._solved(matrix, state, batch.num_samples, damping, name)
            else:  # nothing finite has been seen yet
                matrix = torch.full_like(matrix, torch.nan)
            for each, x in layer.entries_of(matrix, name, found[name].shape).items():
                found[each] = x.to(found[each].dtype)
                del others[each]
        if others:
            found |= self._exact_block(batch, rows, {name: found[name] for name in others}, damping)
        return found

    @staticmethod
    def _gradient_of(batch: LinearizedBatch, name: str, bias: str | None) -> Tensor:
        """∇L of a layer in full precision, [d_out, d_in], Σ_nt g_nt a_ntᵀ."""
        layer = layer_of(batch.jacobian, name, batch.parameters, True, "K-FAC")
        assert layer is not None
        assert layer.bias == bias
        g = layer.gradients.flatten(0, 2)
        if layer.is_one_hot:
            return g.new_zeros(layer.width, g.shape[1]).index_add_(0, layer.inputs.flatten(), g).T
        return g.T @ layer.inputs.flatten(0, 1)

    def _take_in(self, layer: Layer, state: MutableMapping[str, Any], every: int) -> None:
        """Take a batch into a layer's averages, and decompose them, if it is time for that."""
        if _TAKEN in state and len(state[_SIDES[0]]) != layer.width:  # a bias has come or gone
            self.forget(state)
        new, outputs = layer.gradients.new_zeros, layer.gradients.shape[-1]
        if _TAKEN not in state:
            state.update({_STEPS: 0, _TAKEN: 0.0})
            state[_SIDES[0]] = new(layer.width) if layer.is_one_hot else new(layer.width, layer.width)
            state[_SIDES[1]] = new(outputs, outputs)
        layer.add_to(state[_SIDES[0]], state[_SIDES[1]], self.positions, self.decay)
        state[_TAKEN] = self.decay * state[_TAKEN] + (1 - self.decay)
        if state[_STEPS] % every == 0 or state[_STEPS] in EARLY:
            self._decompose(state)
        state[_STEPS] += 1
        if self.eigenvalue_correction:
            if _MOMENTS not in state:
                state.update({_MOMENTS: new(outputs, layer.width), _SEEN: 0.0})
            add_moments(layer, *_eigen(state), state[_MOMENTS], self.decay)
            state[_SEEN] = self.decay * state[_SEEN] + (1 - self.decay)

    def _decompose(self, state: MutableMapping[str, Any]) -> None:
        """Look at the averages anew; second moments in the old eigenbasis are carried over into the new one.

        What they stand for, the matrix Q diag(M) Qᵀ, keeps its diagonal: M ← (U_G∘U_G) M (U_A∘U_A)ᵀ, U = Q_newᵀ Q_old.
        """
        for side, axis in zip(_SIDES, (1, 0), strict=True):
            eigen = Eigen.of(state[side], state[_TAKEN])
            before = state.get(f"{side}_basis")
            state[f"{side}_values"] = eigen.values
            if eigen.basis is not None:
                state[f"{side}_basis"] = eigen.basis
                if _MOMENTS in state and before is not None:
                    turned = (eigen.basis.T @ before).square()
                    moments = state[_MOMENTS]
                    state[_MOMENTS] = moments @ turned.T if axis else turned @ moments

    def _solved(self, gradient: Tensor, state: Mapping[str, Any], samples: int, damping: float, name: str) -> Tensor:
        inputs, gradients = _eigen(state)
        if self.eigenvalue_correction and _MOMENTS not in state:  # of a run without, and nothing finite since
            return torch.full_like(gradient, torch.nan)
        moments = state[_MOMENTS] / state[_SEEN] * samples if self.eigenvalue_correction else None
        outputs = gradients._replace(values=gradients.values * samples)
        return preconditioned(gradient, inputs, outputs, damping, moments, name)

    def _exact_block(
        self, batch: LinearizedBatch, rows: Jacobian, gradient: dict[str, Tensor], damping: float
    ) -> dict[str, Tensor]:
        """(R_bᵀR_b + λI)⁻¹∇_b L for parameters without factors, all together."""
        block = rows.restrict(gradient)
        if self.fisher != "sampled":  # ∇L = Rᵀb
            s = batch.logit_gradient_norms
            b = s.sqrt() if self.fisher == "improved" else torch.ones_like(s)
            return dict(block.solve(torch.where(batch.losses.isfinite(), b, torch.nan), damping).form())
        if damping == 0:
            raise ValueError(
                f"K-FAC with sampled targets needs damping > 0 for the exact block of {[*gradient]}: their gradient is "
                "not in the span of its rows."
            )
        explained = block.solve(block.matvec(gradient), damping).form()  # Woodbury
        return {name: (x - explained[name]) / damping for name, x in gradient.items()}


def preconditioned(
    gradient: Tensor, inputs: Eigen, gradients: Eigen, damping: float, moments: Tensor | None = None, name: str = ""
) -> Tensor:
    """(A ⊗ G + damping)⁻¹ applied to the gradient of a layer.

    Args:
        gradient: W, [d_out, d_in].
        inputs: A.
        gradients: G.
        damping: λ, factored: A + π√λ I and G + √λ/π I with π² the ratio of the mean diagonals of A and G; λ itself
            where one of these is 0.
        moments: Eigenvalues in the place of those of A ⊗ G, [d_out, d_in], to which λ is added as it is.
        name: Whose, for messages.

    Returns:
        Shape [d_out, d_in].

    Raises:
        ValueError: If λ is 0 and the curvature is singular.

    """
    a, g = inputs.values, gradients.values
    if moments is None:
        means = torch.stack([a.mean(), g.mean()]).double()  # whose ratio may be beyond float32
        both = (means > 0).all()
        pi = torch.where(both, (means[0] / means[1]).sqrt(), 1.0)
        a, g = a + pi * damping**0.5, g + damping**0.5 / pi
        moments = torch.where(both, g[:, None] * a, damping)  # the limit, where the squares of one are too small
        singular = (
            [bool(x.amin() <= x.amax() * len(x) * torch.finfo(x.dtype).eps) for x in (a, g)] if not damping else []
        )
    else:
        singular = [] if damping else [bool(moments.amin() <= moments.amax() * torch.finfo(moments.dtype).eps)]
        moments = moments + damping
    if any(singular):
        raise ValueError(
            f"K-FAC needs damping > 0 for '{name}', got 0: its curvature is singular, as it is with fewer samples than "
            "inputs or outputs, and behind a softmax."
        )
    rotated = gradients.into(inputs.into(gradient).T).T / moments
    return gradients.back(inputs.back(rotated).T).T


def _eigen(state: Mapping[str, Any]) -> tuple[Eigen, Eigen]:
    """Eigenbases of a layer's averages, as they were when these were looked at last."""
    inputs, gradients = (Eigen(state[f"{side}_values"], state.get(f"{side}_basis")) for side in _SIDES)
    return inputs, gradients
