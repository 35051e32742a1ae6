"""The Kronecker metric: curvature of earlier batches, by layer, as what damping pulls towards."""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_ief.capture import Jacobian, LinearizedBatch
from lightning_ief.capture.jacobian import Sides
from lightning_ief.capture.metric import Kronecker, with_ones
from lightning_ief.capture.types import CaptureError
from lightning_ief.linalg.gram import full_precision, mirror
from lightning_ief.linalg.scaling import wide

__all__ = ["FisherKind", "KroneckerMetric"]

FisherKind: TypeAlias = Literal["empirical", "improved", "sampled"]

_EARLY = (0, 2, 5, 10)  # steps at which the metric is looked at anew besides: it changes fast at first

_BETWEEN = 20  # batches between two looks that are taken into the averages, at most

_PANEL = 512  # columns of averages, of which the lower triangle is computed, that go through one product

_STEPS = "kronecker_steps"  # batches that have been seen

_KEYS = "kronecker_inputs", "kronecker_gradients"  # the averages in an optimizer's state

_SEED = 0x5DEECE66D  # of sampled targets: others than those of `SampledFisher`


class KroneckerMetric:
    """M = (Â + I) ⊗ (Ĝ + I) of each layer, from moving averages over the batches of a run.

    Â is the second moment of what goes into the layer, with a 1 for the bias; Ĝ that of the gradients of its output, of
    "empirical" targets, of "sampled" ones, or "improved": each sample's divided by ‖∂l_n/∂z_n‖, as in the improved
    K-FAC of arXiv 2406.06420. Both are scaled to a mean diagonal of 1. Of an embedding, Â is diagonal: how often a row
    is looked up. Of parameters without sides (biases alone, norms, factors), M is the identity.

    Args:
        fisher: Which gradients.
        decay: Of the averages, per batch that they take in.
        every: Steps between two looks at the averages; of the batches between, at most twenty are taken in, evenly.

    Raises:
        ValueError: If an argument is out of range.

    """

    def __init__(self, fisher: FisherKind, decay: float, every: int) -> None:
        if fisher not in ("empirical", "improved", "sampled"):
            raise ValueError(f"fisher={fisher!r}: must be 'empirical', 'improved' or 'sampled'.")
        if not 0 <= decay < 1 or every < 1:
            raise ValueError(
                f"metric_decay={decay}, metric_every={every}: must be at least 0 and less than 1, and at least 1."
            )
        self.fisher = fisher
        self.decay = decay
        self.every = every

    @staticmethod
    def sides_of(parameters: Mapping[str, Tensor]) -> list[str]:
        """Weights of which both sides are to be kept in `linearize(..., keep_sides=...)`."""
        return [name for name, p in parameters.items() if p.ndim >= 2]

    def of(
        self, batch: LinearizedBatch, states: Mapping[str, MutableMapping[str, Any]]
    ) -> tuple[LinearizedBatch, list[MutableMapping[str, Any]]]:
        """Take a batch into the averages, and see it in the metric; called by all ranks.

        Args:
            batch: The batch.
            states: What is kept of each of `sides_of`, by name; changed in place.

        Returns:
            The same samples in the metric; and the states that have counted them, for `pass_over`.

        Raises:
            CaptureError: If it was linearised without `keep_sides`.
            ValueError: If a layer has no form in the metric, and had one before.

        """
        for part in batch.parts:
            if missing := {*states}.difference(getattr(part, "keep_sides", states)):
                raise CaptureError(
                    f"metric='kronecker' needs both sides of {sorted(missing)}: give linearize(..., "
                    "keep_sides=optimizer.sides_of(model)) what it asks for, as NaturalGradientMixin does."
                )
        rows = batch.jacobian
        if self.fisher == "sampled":
            generator = torch.Generator(batch.losses.device)
            steps = max((state.get(_STEPS, 0) for state in states.values()), default=0)
            generator.manual_seed(_SEED + steps)
            rows = batch.target_rows([batch.sample(generator)])
        s = batch.logit_gradient_norms
        weights = torch.where(s > 0, s.rsqrt(), 0.0) if self.fisher == "improved" else torch.ones_like(s)
        # A batch that is not finite is skipped by the optimizer, and changes no average but by a factor.
        weights = torch.where((batch.losses + s).isfinite().all(), weights, 0.0)
        inverses = dict[str, Kronecker]()
        for name, state in states.items():
            if (sides := _sides(rows, name, known=_STEPS in state)) is not None:
                bias = _bias_of(name, batch.parameters, sides[0])
                with full_precision(weights.device):  # a step may be taken within autocast
                    self._take_in(sides, weights, batch.parameters[name], bias is not None, state)
                inputs, gradients = (state[f"{key}_inverse"] for key in _KEYS)
                inverses[name] = Kronecker(inputs, gradients, bias)
        return batch.in_metric(inverses), [states[name] for name in inverses]

    @staticmethod
    def load(state: MutableMapping[str, Any], saved: Mapping[str, Any], like: Tensor) -> None:
        """Take over the averages of a parameter: in full precision, as they are also where that is in half of it."""
        known = (*_KEYS, *(f"{key}_inverse" for key in _KEYS))
        state.update({key: saved[key].to(like.device, wide(like.dtype)) for key in known if key in saved})

    @staticmethod
    def pass_over(states: Iterable[MutableMapping[str, Any]]) -> None:
        """Do not count the batch that was seen last, which has not led to a step: the next one stands for it."""
        for state in states:
            if state.get(_STEPS):
                state[_STEPS] -= 1

    def _take_in(
        self, sides: Sequence[Sides], weights: Tensor, like: Tensor, with_bias: bool, state: MutableMapping[str, Any]
    ) -> None:
        """Take a batch into a layer's averages, and look at them, if it is time for that."""
        one_hot = not sides[0].inputs.is_floating_point()
        width = len(like) if one_hot else sides[0].inputs.shape[-1] + with_bias
        if _KEYS[0] in state and len(state[_KEYS[0]]) != width:  # a bias has come or gone
            for key in (*_KEYS, _STEPS):
                del state[key]
        steps = state.get(_STEPS, 0)
        state[_STEPS] = steps + 1
        if self._takes(steps):
            finite = torch.stack([x.isfinite().all() for use in sides for x in (use.inputs, use.gradients)]).all()
            weights = torch.where(finite, weights, 0.0)[:, None, None]
            # In float64, since 1/‖∂l/∂z‖ may be beyond float32 where the gradient is as far below.
            gradients = [torch.where(weights > 0, (y := use.gradients).double() * weights, 0.0).to(y) for use in sides]
            inputs = [use.inputs for use in sides]
            if one_hot:
                inputs = [_counts(x, y, len(like)) for x, y in zip(inputs, gradients, strict=True)]
            elif with_bias:
                inputs = [with_ones(x) for x in inputs]
            inputs = [torch.where(weights.any(), x, 0.0) for x in inputs]
            for key, uses in zip(_KEYS, (inputs, gradients), strict=True):
                if key not in state:
                    state[key] = uses[0].new_zeros(uses[0].shape[-1:] * (1 if uses is inputs and one_hot else 2))
                _add(uses, state[key], self.decay, (1 - self.decay) / len(weights))
        if steps % self.every == 0 or steps in _EARLY:
            for key in _KEYS:
                state[f"{key}_inverse"] = _inverse(state[key])

    def _takes(self, steps: int) -> bool:
        """Whether the averages take in the batch after so many steps: twenty of those between two looks will do."""
        return steps % -(-self.every // _BETWEEN) == 0 or steps <= _EARLY[-1]


def _counts(rows: Tensor, gradients: Tensor, height: int) -> Tensor:
    """How often rows of an embedding are looked up, where something comes back (to padding nothing does); [height]."""
    matters = gradients.ne(0).any(-1).any(0).to(gradients.dtype)
    return gradients.new_zeros(height).index_add_(0, rows.flatten(), matters.flatten())


def _add(uses: Sequence[Tensor], average: Tensor, decay: float, alpha: float) -> None:
    """Add the sides of a layer's uses [R, N, T, d] to an average of their squares [d, d], in its lower triangle.

    Or counts [d] to an average of them.
    """
    flat = [x if average.ndim == 1 else x.flatten(0, 2) for x in uses]
    # No entry of xᵀx is larger than this, which may be too large; the scale of an average does not matter.
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


def _inverse(average: Tensor) -> Tensor:
    """(Â + I)⁻¹, where Â is an average scaled to a mean diagonal of 1; the identity of an average of nothing."""
    size = average.mean() if average.ndim == 1 else average.diagonal().mean()
    factor = torch.where(size > 0, average / size, 0.0)
    if average.ndim == 1:
        return 1 / (factor + 1)
    factor.diagonal().add_(1.0)
    mirror(factor)
    return torch.cholesky_inverse(torch.linalg.cholesky(factor))


def _bias_of(name: str, parameters: Mapping[str, Tensor], sides: Sides) -> str | None:
    """The bias beside a weight, with as many entries as the layer has outputs; an embedding has none."""
    bias = f"{name.removesuffix('weight')}bias"
    there = name.endswith("weight") and bias in parameters and sides.inputs.is_floating_point()
    return bias if there and parameters[bias].shape == sides.gradients.shape[-1:] else None


def _sides(rows: Jacobian, name: str, known: bool) -> list[Sides] | None:
    """Both sides of a layer; None if it has none. One that had some before must have them."""
    try:
        sides = rows.sides(name)
    except ValueError:
        if known:
            raise
        return None
    # A matrix that is used transposed, too, or both with indices and with vectors of its rows.
    if len({(each.came_back, each.inputs.is_floating_point()) for each in sides}) > 1:
        if known:
            raise ValueError(
                f"'{name}' is used from both sides, or by indices and otherwise, as it was not before: "
                "metric='kronecker' has no form for it."
            )
        return None
    return sides or None
