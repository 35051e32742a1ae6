"""Recurrent layers as products over all steps at once, so that each weight has one use, whatever the length.

The trajectory of the states is found first, without a graph. At the states it went through, all steps are one product
with each weight: what the steps take from the input, W_ih x_t + b_ih, and from the state before, W_hh h_{t−1} + b_hh,
where h_{t−1} is a constant. That states depend on one another is left to `_Recurrence`, which hands the trajectory on,
and whose backward pass walks along the steps. It gives the gradient at each product, through all later steps: with
what went into the product, that is all that a rule needs. Cells are elementwise but for the products, so that a step
of the backward pass is a product with slopes that are found for all steps together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from lightning_ief.capture.types import CaptureError, Function
from lightning_ief.linalg.scaling import upcast

__all__ = ["RECURRENT", "is_opened"]

Cell = Callable[..., tuple[Tensor, ...]]
"""One step: maps what comes from the input and what comes from the state, gates side by side, and the states before to
those behind; the first one is h. Elementwise in the hidden units."""


def _lstm(x: Tensor, h: Tensor, state: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + h).chunk(4, -1)
    memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
    return o.sigmoid() * memory.tanh(), memory


def _gru(x: Tensor, h: Tensor, state: Tensor) -> tuple[Tensor]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return (n + (x_z + h_z).sigmoid() * (state - n),)


def _rnn_tanh(x: Tensor, h: Tensor, state: Tensor) -> tuple[Tensor]:
    return ((x + h).tanh(),)


def _rnn_relu(x: Tensor, h: Tensor, state: Tensor) -> tuple[Tensor]:
    return ((x + h).relu(),)


def is_opened(args: Sequence[Any]) -> bool:
    """Whether a recurrent function of these arguments is recorded as plain operations, otherwise as a whole.

    Not for packed sequences, where the biases come one place later; nor where hooks pack what the graph saves:
    activation checkpointing would run torch's own kernel when it runs again.

    Args:
        args: The arguments.

    Returns:
        Whether it is.

    """
    padded = len(args) == 9 and isinstance(args[3], bool)
    return padded and torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _layers(cell: Cell) -> Function:
    """A function of torch for all layers and directions, in both of the forms in which it takes and gives states."""

    def run(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        x, initial = input if batch_first else input.transpose(0, 1), (hx,) if isinstance(hx, Tensor) else hx
        directions = 2 if bidirectional else 1
        each = len(params) // (num_layers * directions)
        last: list[Sequence[Tensor]] = []
        for layer in range(num_layers):
            outputs: list[Tensor] = []
            for backwards in (False, True)[:directions]:
                number = len(last)
                weight_ih, weight_hh, *others = params[number * each : (number + 1) * each]
                bias_ih, bias_hh = others[:2] if has_biases else (None, None)
                weight_hr = others[-1] if len(others) % 2 else None
                steps = x.flip(1) if backwards else x
                states = [state[number] for state in initial]
                y, *found = _direction(cell, steps, states, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
                last.append(found)
                outputs.append(y.flip(1) if backwards else y)
            x = torch.cat(outputs, -1) if bidirectional else outputs[0]
            if train and dropout > 0 and layer + 1 < num_layers:
                # On steps first, as torch has it: it draws the same random numbers.
                x = F.dropout(x.transpose(0, 1).contiguous(), dropout).transpose(0, 1)
        return x if batch_first else x.transpose(0, 1), *(torch.stack(states) for states in zip(*last, strict=True))

    return run


RECURRENT: dict[Function, Function] = {
    torch.lstm: _layers(_lstm),
    torch.gru: _layers(_gru),
    torch.rnn_tanh: _layers(_rnn_tanh),
    torch.rnn_relu: _layers(_rnn_relu),
}
"""Functions of torch that are recorded as plain operations, and these."""


def _direction(
    cell: Cell,
    x: Tensor,
    initial: Sequence[Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
) -> tuple[Tensor, ...]:
    """One layer in one direction.

    Args:
        cell: Its step.
        x: Its input, shape [N, T, d].
        initial: The states before the first step, [N, h] each.
        weight_ih: W_ih.
        weight_hh: W_hh.
        bias_ih: b_ih.
        bias_hh: b_hh.
        weight_hr: What h is projected by; None if it is not.

    Returns:
        h behind all steps [N, T, h], and all states behind the last one.

    """
    from_input = F.linear(x, weight_ih, bias_ih)
    with torch.no_grad():
        to_gates, projection = weight_hh.detach(), None if weight_hr is None else weight_hr.detach()
        bias = None if bias_hh is None else bias_hh.detach()
        start = states = [state.detach() for state in initial]
        outputs: list[Tensor] = []
        trajectory: list[Sequence[Tensor]] = []
        for gates in from_input.detach().unbind(1):
            output, *others = cell(gates, F.linear(states[0], to_gates, bias), *states)
            outputs.append(output)
            states = [output if projection is None else F.linear(output, projection), *others]
            trajectory.append(states)
        after = [torch.stack(each, 1) for each in zip(*trajectory, strict=True)]
        before = [torch.cat([s.unsqueeze(1), each[:, :-1]], 1) for s, each in zip(start, after, strict=True)]
    from_state = F.linear(before[0], weight_hh, bias_hh)
    projected = None if weight_hr is None else F.linear(torch.stack(outputs, 1), weight_hr)
    found = _recurrence(cell, to_gates, projection, before, after, from_input, from_state, projected, *initial)
    return found[0], found[0][:, -1], *found[1:]


def _recurrence(*args: Any) -> tuple[Tensor, ...]:
    """`_Recurrence`, as an operation that can be followed."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if has_torch_function(tensors):
        return handle_torch_function(_recurrence, tensors, *args)
    return _Recurrence.apply(*args)


class _Recurrence(torch.autograd.Function):
    """A trajectory as a function of the products that its steps consist of, and of the first states."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        to_gates: Tensor,
        projection: Tensor | None,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        from_input: Tensor,
        from_state: Tensor,
        projected: Tensor | None,
        *initial: Tensor,
    ) -> tuple[Tensor, ...]:
        by_input, by_state, *by_states = _slopes(cell, from_input, from_state, *before)
        ctx.are_added = all(x is h for x, h in zip(by_input, by_state, strict=True))
        projected_by = None if projection is None else upcast(projection)
        ctx.save_for_backward(upcast(to_gates), projected_by, *by_input, *by_state, *sum(by_states, []))
        h, *others = after
        return h.clone(), *(each[:, -1].clone() for each in others)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise CaptureError(
                "The forward pass takes a gradient through a recurrent layer and computes with it "
                "(create_graph=True), so that there are second derivatives: these can't be captured. Freeze the layer "
                "with requires_grad_(False), or write it as a loop over torch.nn.LSTMCell, GRUCell or RNNCell."
            )
        to_gates, projection, *saved = ctx.saved_tensors
        states, units = len(gradients), to_gates.shape[1] if projection is None else projection.shape[1]
        # Gates, which stood side by side, one below the other.
        saved[: 2 * states] = [None if x is None else x.unflatten(-1, (-1, units)) for x in saved[: 2 * states]]
        by_input, *by_others = [saved[i : i + states] for i in range(0, len(saved), states)]
        by_step = [[None if x is None else x.unbind(1) for x in slopes] for slopes in by_others]
        outside, *carried = [upcast(x) for x in gradients]
        given = [torch.zeros_like(outside[:, 0]), *outside.unbind(1)]  # to h before the first step, behind it, ...
        carried.insert(0, given.pop())
        of_projected: list[Tensor] = []
        of_results: list[list[Tensor]] = []
        of_gates: list[Tensor] = []
        for t in reversed(range(len(given))):
            if projection is not None:
                of_projected.append(carried[0])
                carried[0] = carried[0] @ projection
            of_results.append(carried)
            at_gates, *at_states = [[None if x is None else x[t] for x in slopes] for slopes in by_step]
            gates = _through([x.unsqueeze(1) for x in carried], at_gates).reshape(len(outside), -1)
            of_gates.append(gates)
            direct, *carried = [_through(carried, slopes) for slopes in at_states]
            arrives = given[t] if direct is None else given[t] + direct
            carried.insert(0, torch.addmm(arrives, gates, to_gates))
        from_state = from_input = _in_order(of_gates)
        if not ctx.are_added:
            results = [_in_order([*x]).unsqueeze(-2) for x in zip(*of_results, strict=True)]
            from_input = _through(results, by_input).reshape(from_state.shape)
        projected = None if projection is None else _in_order(of_projected)
        return None, None, None, None, None, from_input, from_state, projected, *carried


def _slopes(cell: Cell, *arguments: Tensor) -> list[list[Tensor | None]]:
    """For each argument of a cell the derivatives of its results, all of them elementwise.

    Args:
        cell: The cell.
        arguments: As it takes them, those of all steps at once, [N, T, ...] each.

    Returns:
        For each argument and each result the shape of the argument; None where it is 0.

    """
    with torch.enable_grad():
        leaves = [upcast(x.detach()).requires_grad_() for x in arguments]
        slopes = [
            torch.autograd.grad(result.sum(), leaves, retain_graph=True, allow_unused=True) for result in cell(*leaves)
        ]
    return [[*column] for column in zip(*slopes, strict=True)]


def _through(gradients: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Any:
    """The gradient of an argument of a cell, from those of its results and their slopes by it; None if it is 0."""
    total = None
    for gradient, slope in zip(gradients, slopes, strict=True):
        if slope is not None:
            total = gradient * slope if total is None else torch.addcmul(total, gradient, slope)
    return total


def _in_order(steps: list[Tensor]) -> Tensor:
    """Put together what was found from the last step to the first: [N, ...] each, [N, T, ...]."""
    return torch.stack(steps[::-1], 1)
