"""The best of several step lengths on the same samples."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_ief.capture import LinearizedBatch

__all__ = ["best_length"]


def best_length(
    batch: LinearizedBatch,
    direction: Mapping[str, Tensor],
    alpha: Mapping[str, float],
    decay: Mapping[str, float],
    lengths: Sequence[float],
) -> float | None:
    """Find the t with the smallest loss at θ ← (1 − t · decay) θ + t · α d; called by all ranks, alike on all.

    Args:
        batch: The samples; their forward pass runs once for each t, without a graph and with its random numbers.
        direction: d, formed.
        alpha: α of each parameter that moves, by name.
        decay: Its weight decay.
        lengths: Values of t.

    Returns:
        t; None if the loss is at none of them a smaller number than at θ.

    """
    losses = [batch.all_losses.double().sum()]
    for t in lengths:
        values = {
            name: torch.add(
                p.detach() if not decay[name] else p.detach() * (1 - t * decay[name]),
                direction[name],
                alpha=t * alpha[name],
            )
            for name, p in batch.parameters.items()
            if name in alpha
        }
        losses.append(batch.loss_at(values))
    before, *found = torch.stack(losses).tolist()
    best, t = min((loss if math.isfinite(loss) else math.inf, -t) for loss, t in zip(found, lengths, strict=True))
    return -t if best < before else None
