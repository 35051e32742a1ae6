"""Capture: from one forward pass to the per-sample Jacobian as an operator.

Read in this order: `types` (what is known of a call), `composite` (functions recorded as the operations they consist
of), `recurrent` (layers that are products over all steps), `recorder` (who used which parameter), `rules` (one use,
its per-sample gradient), `factors` (how a per-sample gradient is held), `snapshot` (what a forward pass starts from),
`measure` (where the batch stands), `backward` (from cotangents to factors), `jacobian` (the operator, and directions
made from its rows), `metric` (the operator in another metric of the parameters), `batch` (several batches as one),
`jvp` (derivatives along directions), `tangents` (the same of a forward pass that runs again), `verification` (of what
was captured), `escaping` (what was not), `messages` (what is said of models that are refused) and `linearization` (all
of it, for one batch).
"""

from lightning_ief.capture.batch import LinearizedBatch
from lightning_ief.capture.jacobian import Direction, Jacobian
from lightning_ief.capture.linearization import Linearization, linearize, push_forward
from lightning_ief.capture.snapshot import preserved_state
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
