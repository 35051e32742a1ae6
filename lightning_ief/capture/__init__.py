"""Capture: from one forward pass to the per-sample Jacobian as an operator.

Read in this order: `types` (what is recorded), `recorder` (who used which parameter), `measure` (where
the batch stands), `rules` (one operation, its per-sample gradient), `factors` (how a per-sample gradient is held),
`backward` (from cotangents to factors), `jacobian` (the operator), `joint` (several batches as one), `forward` and
`fused` (from directions to the change of the logits), `verification` (of a first batch), `linearization` (the front
door).
"""

from lightning_ief.capture.jacobian import Direction, Jacobian
from lightning_ief.capture.joint import LinearizedBatch
from lightning_ief.capture.linearization import Linearization, linearize, preserved_state, push_forward
from lightning_ief.capture.types import CaptureError

__all__ = [
    "CaptureError",
    "Direction",
    "Jacobian",
    "Linearization",
    "LinearizedBatch",
    "linearize",
    "preserved_state",
    "push_forward",
]
