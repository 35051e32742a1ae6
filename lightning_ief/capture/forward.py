"""The forward direction: from a direction in parameter space to the change of the logits, u = (∂z/∂θ) d.

The backward pass from the logits to the uses is linear in the cotangent c it starts from: β = Bᵀc at the output of each
use. Recorded once with a graph of its own, it can be run in reverse, which is the product with B: what d changes in the
output of each use, by itself, is pushed on to the logits. That shares the forward pass and the linear map among all
directions of a batch, leaves out the layers before the first use, and draws no random numbers again.

Where a kernel has no second derivative, forward-mode derivatives of the whole model do, with the forward pass run once
more.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ief.capture.backward import Edges, backward_to
from lightning_ief.capture.factors import random_state
from lightning_ief.capture.recorder import is_in_place, tensors_of, unflatten_call
from lightning_ief.capture.rules import require_unchanged
from lightning_ief.capture.types import Derived, Function, Source, Use

__all__ = ["NoForwardError", "Pushforward", "by_forward_mode", "by_two_backward_passes"]


class NoForwardError(Exception):
    """Raised where an operation's forward derivative can't be had from the graph."""


class Pushforward:
    """d ↦ u = (∂z/∂θ) d through the graph of the forward pass, for as many d as are wanted.

    Args:
        output: The logits, with their graph.
        uses: The recorded uses.
        derived: Tensors made from parameters alone, with their graphs.
        ancestors: Names of the parameters that each of them is made from.
        parameters: The parameters by name.

    Raises:
        NoForwardError: If a kernel of the model has no second derivative.

    """

    def __init__(
        self,
        output: Tensor,
        uses: Sequence[Use],
        derived: Mapping[Derived, Tensor],
        ancestors: Mapping[Derived, Sequence[str]],
        parameters: Mapping[str, Tensor],
    ) -> None:
        self.uses = list(uses)
        self.derived, self.ancestors, self.parameters = derived, ancestors, parameters
        self.cotangent = torch.zeros_like(output, requires_grad=True)
        self.gradients: dict[Any, Tensor] = {}
        edges: Edges = {(e.node, e.output_nr): e for use in self.uses for e in use.edges if e is not None}
        try:
            with torch.enable_grad():
                backward_to(output, edges, self.cotangent, True, self.gradients.__setitem__, create_graph=True)
        except (RuntimeError, NotImplementedError) as error:
            raise NoForwardError(str(error)) from error

    def __call__(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Push a direction forward.

        Args:
            direction: d, an entry for each parameter, in its dtype.

        Returns:
            u, shape of the logits.

        Raises:
            CaptureError: If something the operations read was changed in place since.
            NoForwardError: If an operation's derivative can't be had.

        """
        reached, changes = [], []
        known: dict[Source, Tensor] = {}
        known.update(direction)
        for use in self.uses:
            edges = [None if e is None else self.gradients.get((e.node, e.output_nr)) for e in use.edges]
            if all(gradient is None for gradient in edges):
                continue
            require_unchanged(use)
            for gradient, change in zip(edges, _changes(use, partial(self._tangent, known)), strict=True):
                if gradient is not None and change is not None and gradient.requires_grad:
                    reached.append(gradient)
                    changes.append(change.to(gradient.dtype))
        if not reached:
            return torch.zeros_like(self.cotangent)
        try:
            (tangents,) = torch.autograd.grad(
                reached, self.cotangent, changes, retain_graph=True, materialize_grads=True
            )
        except (RuntimeError, NotImplementedError) as error:
            raise NoForwardError(str(error)) from error
        return tangents.detach()

    def _tangent(self, known: dict[Source, Tensor], source: Source) -> Tensor:
        """Change of a parameter, or of a tensor made from parameters."""
        if source not in known:
            assert isinstance(source, Derived)
            value, names = self.derived[source], self.ancestors[source]
            dummy = torch.zeros_like(value, requires_grad=True)
            with torch.enable_grad():
                pulled = torch.autograd.grad(
                    value, [self.parameters[name] for name in names], dummy,
                    retain_graph=True, create_graph=True, materialize_grads=True,
                )  # fmt: skip
            # One that the value does not depend on, but for its shape, has a gradient without a graph.
            pairs = [(p, known[name]) for p, name in zip(pulled, names, strict=True) if p.requires_grad]
            known[source] = torch.zeros_like(value)
            if pairs:
                gradients, tangents = zip(*pairs, strict=True)
                (known[source],) = torch.autograd.grad(gradients, dummy, tangents, materialize_grads=True)
        return known[source]


def by_forward_mode(
    function: Callable[..., Any], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Any, Any]:
    """Derivative of a function along a direction, by forward-mode derivatives of its kernels.

    Args:
        function: Maps the primals to a tensor, or a tuple of tensors.
        primals: Where.
        tangents: The direction, an entry for each of them.

    Returns:
        What the function returns, and its change.

    """
    return cast(tuple[Any, Any], torch.func.jvp(function, tuple(primals), tuple(tangents)))


def by_two_backward_passes(
    function: Callable[..., Any], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Any, Any]:
    """The same for kernels without forward mode: the backward pass is linear, so that its own gives the derivative.

    Args:
        function: Maps the primals to a tensor, or a tuple of tensors.
        primals: Where.
        tangents: The direction, an entry for each of them.

    Returns:
        What the function returns, and its change.

    """
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in primals]
        result = function(*leaves)
        outputs = tensors_of(result)
        dummies = [torch.zeros_like(x, requires_grad=True) for x in outputs]
        pulled = torch.autograd.grad(outputs, leaves, dummies, create_graph=True, materialize_grads=True)
        changes = torch.autograd.grad(pulled, dummies, tangents, materialize_grads=True)
    return result, changes if isinstance(result, tuple) else changes[0]


# --- one operation ----------------------------------------------------------------------------------------------------


def _changes(use: Use, tangent: Callable[[Source], Tensor]) -> Sequence[Tensor | None]:
    """Change of each output of an operation as its parameters change and nothing else."""
    followed = {j: tangent(source) for j, source in enumerate(use.plan.sources) if source is not None}
    where = next(iter(followed.values())).device
    with (
        torch.no_grad(),
        torch.autocast(where.type, use.autocast, enabled=use.autocast is not None, cache_enabled=False),
    ):
        if (shortcut := _SHORTCUTS.get(use.func)) is not None:
            args, kwargs = unflatten_call(use.leaves, use.spec)
            change = shortcut(partial(_change_of, use, followed), *args, **kwargs)
            if change is not None:
                return [change]
        with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
            before = random_state(where)
            try:
                changes = _by_jvp(use, followed)
            except (RuntimeError, NotImplementedError) as error:
                raise NoForwardError(f"{use.plan.describe()}: {error}") from error
            if not torch.equal(before, random_state(where)):
                raise NoForwardError(f"{use.plan.describe()} draws random numbers inside the operation")
        return changes


def _by_jvp(use: Use, followed: Mapping[int, Tensor]) -> Sequence[Tensor]:
    """The default: the operation's own forward derivative."""
    # Running the operation again must not touch what it overwrites, or a buffer that it updates: those are copied.
    copied = [is_in_place(use.func) or dimension is None for dimension in use.plan.inputs]
    constants = [
        x if not isinstance(x, Tensor) or j in followed else x.detach().clone() if copied[j] else x.detach()
        for j, x in enumerate(use.leaves)
    ]

    def function(*parameters: Tensor) -> tuple[Tensor, ...]:
        leaves = list(constants)
        for j, parameter in zip(followed, parameters, strict=True):
            leaves[j] = parameter
        args, kwargs = unflatten_call(leaves, use.spec)
        return tuple(tensors_of(use.func(*args, **kwargs)))

    primals = [use.leaves[j].detach() for j in followed]
    tangents = [d.to(p.dtype) for d, p in zip(followed.values(), primals, strict=True)]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward mode
        with suppress(NotImplementedError, RuntimeError):
            return cast(Sequence[Tensor], by_forward_mode(function, primals, tangents)[1])
        return cast(Sequence[Tensor], by_two_backward_passes(function, primals, tangents)[1])


_Change = Callable[[Any], Tensor | None]


def _change_of(use: Use, followed: Mapping[int, Tensor], argument: Any) -> Tensor | None:
    """Change of an argument; None if it does not change."""
    return next((d for j, d in followed.items() if use.leaves[j] is argument), None)


def _linear(change: _Change, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if change(weight) is None or change(input) is not None:
        return None
    return F.linear(input, change(weight), change(bias))  # type: ignore[arg-type]  # it changes


def _convolution(convolve: Function) -> Function:
    def shortcut(
        change: _Change, input: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any, **named: Any
    ) -> Tensor | None:
        if change(weight) is None or change(input) is not None:
            return None
        return convolve(input, change(weight), change(bias), *options, **named)

    return shortcut


def _embedding(
    change: _Change, input: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any
) -> Tensor | None:
    changed = F.embedding(input, change(weight))  # type: ignore[arg-type]  # nothing else can change
    if padding_idx is None:
        return changed
    # That row counts as a constant, here as in the backward pass.
    return changed.masked_fill((input == padding_idx % len(weight)).unsqueeze(-1), 0.0)


def _embedding_bag(
    change: _Change,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    *options: Any,
    **named: Any,
) -> Tensor | None:
    others = [*options, *named.values()]
    if mode == "max" or max_norm is not None or any(isinstance(x, Tensor) and change(x) is not None for x in others):
        return None
    options = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, *options)
    return F.embedding_bag(input, change(weight), *options, **named)  # type: ignore[arg-type]  # it changes


# Operations that are linear in their parameters: the change is the operation itself, instead of twice that. None where
# a case is not covered.
_SHORTCUTS: dict[Function, Function] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    **{convolve: _convolution(convolve) for convolve in (F.conv1d, F.conv2d, F.conv3d)},
}
