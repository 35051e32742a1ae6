"""The Kronecker metric: curvature of earlier batches, by layer, as what damping pulls towards."""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ief.capture import LinearizedBatch
from lightning_ief.capture.jacobian import Sides
from lightning_ief.capture.metric import Kronecker, with_ones
from lightning_ief.curvature.kronecker import EARLY, Averages, add_squares, bias_of, layer_sides, lookups, require_sides
from lightning_ief.curvature.rescaling import FisherKind, fisher_rows, require_fisher
from lightning_ief.linalg.gram import full_precision, mirror

__all__ = ["KroneckerMetric"]

_NAME = "metric='kronecker'"

_BETWEEN = 20  # batches between two looks that are taken into the averages, at most

_STEPS = "kronecker_steps"  # batches that have been seen

_KEYS = "kronecker_inputs", "kronecker_gradients"  # the averages in an optimizer's state

_SEED = 0x5DEECE66D  # of sampled targets: others than those of `SampledFisher`


class KroneckerMetric(Averages):
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

    tensors = (*_KEYS, *(f"{key}_inverse" for key in _KEYS))
    numbers = (_STEPS,)

    def __init__(self, fisher: FisherKind, decay: float, every: int) -> None:
        require_fisher(_NAME, fisher)
        if not 0 <= decay < 1 or every < 1:
            raise ValueError(
                f"metric_decay={decay}, metric_every={every}: must be at least 0 and less than 1, and at least 1."
            )
        self.fisher = fisher
        self.decay = decay
        self.every = every

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
        require_sides(batch, states, _NAME)
        generator = None
        if self.fisher == "sampled":
            generator = torch.Generator(batch.losses.device)
            steps = max((state.get(_STEPS, 0) for state in states.values()), default=0)
            generator.manual_seed(_SEED + steps)
        rows = fisher_rows(batch, self.fisher, generator=generator)
        # A batch that is not finite is skipped by the optimizer, and changes no average but by a factor.
        finite = (batch.losses + batch.logit_gradient_norms).isfinite().all()
        inverses = dict[str, Kronecker]()
        for name, state in states.items():
            if (sides := layer_sides(rows, name, _STEPS in state, _NAME)) is not None:
                bias = bias_of(name, batch.parameters, sides[0])
                with full_precision(finite.device):  # a step may be taken within autocast
                    self._take_in(sides, finite, batch.parameters[name], bias is not None, state)
                inputs, gradients = (state[f"{key}_inverse"] for key in _KEYS)
                inverses[name] = Kronecker(inputs, gradients, bias)
        return batch.in_metric(inverses), [states[name] for name in inverses]

    @property
    def made_of(self) -> dict[str, str]:  # noqa: D102
        return {"curvature": "metric", "fisher": self.fisher}

    @staticmethod
    def pass_over(states: Iterable[MutableMapping[str, Any]]) -> None:
        """Do not count the batch that was seen last, which has not led to a step: the next one stands for it."""
        for state in states:
            if state.get(_STEPS):
                state[_STEPS] -= 1

    def _take_in(
        self, sides: Sequence[Sides], finite: Tensor, like: Tensor, with_bias: bool, state: MutableMapping[str, Any]
    ) -> None:
        """Take a batch into a layer's averages, and look at them, if it is time for that."""
        one_hot = not sides[0].inputs.is_floating_point()
        width = len(like) if one_hot else sides[0].inputs.shape[-1] + with_bias
        if _KEYS[0] in state and len(state[_KEYS[0]]) != width:  # a bias has come or gone
            self.forget(state)
        steps = state.get(_STEPS, 0)
        state[_STEPS] = steps + 1
        if self._takes(steps):
            all_finite = [x.isfinite().all() for use in sides for x in (use.inputs, use.gradients)]
            finite = torch.stack([finite.to(sides[0].gradients.device), *all_finite]).all()
            gradients = [torch.where(finite, use.gradients, 0.0) for use in sides]
            inputs = [use.inputs for use in sides]
            if one_hot:
                inputs = [lookups(x, y, len(like)) for x, y in zip(inputs, gradients, strict=True)]
            elif with_bias:
                inputs = [with_ones(x) for x in inputs]
            inputs = [torch.where(finite, x, 0.0) for x in inputs]
            for key, uses in zip(_KEYS, (inputs, gradients), strict=True):
                if key not in state:
                    state[key] = uses[0].new_zeros(uses[0].shape[-1:] * (1 if uses is inputs and one_hot else 2))
                add_squares(uses, state[key], self.decay, (1 - self.decay) / sides[0].inputs.shape[1])
        if steps % self.every == 0 or steps in EARLY:
            for key in _KEYS:
                state[f"{key}_inverse"] = _inverse(state[key])

    def _takes(self, steps: int) -> bool:
        """Whether the averages take in the batch after so many steps: twenty of those between two looks will do."""
        return steps % -(-self.every // _BETWEEN) == 0 or steps <= EARLY[-1]


def _inverse(average: Tensor) -> Tensor:
    """(Â + I)⁻¹, where Â is an average scaled to a mean diagonal of 1; the identity of an average of nothing."""
    size = average.mean() if average.ndim == 1 else average.diagonal().mean()
    factor = torch.where(size > 0, average / size, 0.0)
    if average.ndim == 1:
        return 1 / (factor + 1)
    factor.diagonal().add_(1.0)
    mirror(factor)
    return torch.cholesky_inverse(torch.linalg.cholesky(factor))
