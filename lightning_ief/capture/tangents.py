"""J_z·d of a forward pass that runs once more as it was: by forward mode, or by two backward passes; checked by J."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ief.capture.jvp import by_forward_mode, by_two_backward_passes, load_decompositions
from lightning_ief.capture.types import CaptureError

__all__ = [
    "ForwardPass",
    "along_each_by_backward_passes",
    "along_together_by_forward_mode",
    "are_same",
    "random_direction",
]

_NO_DERIVATIVE = (NotImplementedError, RuntimeError, ValueError)
"""What PyTorch raises where it has no derivative of a kernel."""


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass that can be run again.

    Attributes:
        model: Name of the model's class.
        run: Runs it at other values of the parameters, in their order; leaves no trace.
        parameters: θ, by name.
        logits: What it returned, detached.
        deviation: Relative difference between the changes of the losses by tangents of the logits and by J d; NaN if
            J can't be had.
        tolerance: The deviation that is rounding.

    """

    model: str
    run: Callable[..., Tensor]
    parameters: Mapping[str, Tensor]
    logits: Tensor
    deviation: Callable[[Mapping[str, Tensor], Tensor], float]
    tolerance: float

    @property
    def values(self) -> list[Tensor]:
        """The parameters' values."""
        return [p.detach() for p in self.parameters.values()]

    def gave(self, output: Tensor) -> bool:
        """Whether logits are those of this forward pass, up to the rounding of other kernels."""
        return are_same(self.logits, output, self.tolerance)


def are_same(logits: Tensor, others: Tensor, tolerance: float) -> bool:
    """Whether logits of one shape differ by rounding alone.

    Args:
        logits: z.
        others: What another forward pass returned.
        tolerance: Which part of the spread of z is rounding.

    Returns:
        Whether they do, or z is not finite.

    """
    before, after = logits.detach().double(), others.detach().double()
    spread = (before - before.mean()).abs().max()  # an offset would hide anything
    rounding = 100 * torch.finfo(logits.dtype).eps * before.abs().max()
    return bool(((after - before).abs().max() <= tolerance * spread + rounding) | ~torch.isfinite(spread))


def random_direction(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A direction of normal random numbers, always the same; the state of torch's generators stays."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for name, p in parameters.items()
    }


def along_together_by_forward_mode(
    forward: ForwardPass, directions: Sequence[Mapping[str, Tensor]], probe: Mapping[str, Tensor] | None
) -> tuple[Sequence[Tensor] | None, float]:
    """Tangents along several directions from one forward pass.

    Args:
        forward: The forward pass.
        directions: Entries in the order and dtypes of the parameters.
        probe: Another direction, along which J confirms what forward mode finds; None if that is known already.

    Returns:
        Tangents, each of the shape of the logits, None if there are none or others than those of J; and the deviation
        along the probe, 0 without one.

    """
    columns = [list(d.values()) for d in (*directions, *([] if probe is None else [probe]))]
    try:
        try:
            logits, tangents = _together_or_one_by_one(forward, columns)
        except _NO_DERIVATIVE:
            if not load_decompositions():
                raise
            logits, tangents = _together_or_one_by_one(forward, columns)
    except _NO_DERIVATIVE:
        return None, torch.nan
    deviation = 0.0 if probe is None else forward.deviation(probe, tangents[-1])
    if not forward.gave(logits) or deviation > forward.tolerance:
        return None, deviation
    return tangents[: len(directions)].detach().unbind(), deviation


def _together_or_one_by_one(forward: ForwardPass, columns: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    try:
        return by_forward_mode(forward.run, forward.values, columns)
    except _NO_DERIVATIVE:
        if len(columns) == 1:
            raise
        # What vmap over the directions refuses, such as writing to a part of a constant tensor: one by one.
        passes = [by_forward_mode(forward.run, forward.values, [column]) for column in columns]
        return passes[0][0], torch.cat([each for _, each in passes])


def along_each_by_backward_passes(forward: ForwardPass, directions: Sequence[Mapping[str, Tensor]]) -> Sequence[Tensor]:
    """Tangents along directions, from a forward and two backward passes for each.

    Args:
        forward: The forward pass.
        directions: Entries in the order and dtypes of the parameters.

    Returns:
        Tangents, each of the shape of the logits.

    Raises:
        CaptureError: If there are none, or the forward pass does not repeat.

    """
    return [_by_backward_passes(forward, direction) for direction in directions]


def _by_backward_passes(forward: ForwardPass, direction: Mapping[str, Tensor]) -> Tensor:
    cause: Exception | None = None
    try:
        output, tangent = by_two_backward_passes(forward.run, forward.values, list(direction.values()))
    except _NO_DERIVATIVE as error:
        cause = error
    else:
        if not forward.gave(output):
            raise CaptureError(
                f"The forward pass of {forward.model} does not repeat with the same random numbers: set the dropout "
                "within attention to 0, or use eval()."
            )
        if not forward.deviation(direction, tangent) > forward.tolerance:
            return tangent
    problem = cause or "a custom backward pass hides what it depends on."
    raise CaptureError(
        f"The logits of {forward.model} have no derivative along a direction: {problem} Without it there is no γ; the "
        "Jacobian, and all directions but those of conjugate gradients, can be had."
    ) from cause
