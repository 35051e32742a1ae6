"""The data that capture passes on: what is recorded of a forward pass, and what is known of it beforehand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

__all__ = [
    "BatchDimension",
    "CallPlan",
    "CaptureError",
    "Derived",
    "Function",
    "LoggedCall",
    "Plan",
    "Source",
    "Use",
    "call_name",
]

Function = Callable[..., Any]


class CaptureError(RuntimeError):
    """Per-sample gradients can't be captured exactly; the message says of what, why, and what to do."""


@dataclass(frozen=True)
class Derived:
    """A tensor made from parameters alone: output `output` of call number `call`."""

    call: int
    output: int


Source = str | Derived
"""Where a followed tensor comes from: a parameter's name, or a call that made it from parameters."""


@dataclass(frozen=True)
class BatchDimension:
    """Where the batch stands in a tensor.

    Attributes:
        dim: The dimension.
        folded: Whether it also holds positions: its size is a multiple of N.
        samples_first: For a folded dimension, whether entry n·f + t (else t·N + n) is position t of sample n.

    """

    dim: int
    folded: bool = False
    samples_first: bool = True


@dataclass(frozen=True)
class CallPlan:
    """What is known of one call that touches a parameter or a derived tensor.

    Attributes:
        func: The function, its out-of-place form.
        sources: For each leaf of the arguments, where it comes from if it is followed.
        derived: Whether the outputs depend on parameters alone.
        inputs: For each leaf, where the batch stands; None for constants and everything that is no tensor.
        counts: Leaves that are integers proportional to N.
        outputs: For each tensor output, where the batch stands.
        kind: Calls of one kind differ in what they are called on, and in nothing else; None for those that are the only
            one, and where samples of several calls can't stand one after the other.

    """

    func: Function
    sources: tuple[Source | None, ...]
    derived: bool
    inputs: tuple[BatchDimension | None, ...] = ()
    counts: tuple[int, ...] = ()
    outputs: tuple[BatchDimension | None, ...] = ()
    kind: int | None = None

    def describe(self) -> str:
        """The call in words, for messages.

        Returns:
            For instance "torch.nn.functional.linear of 'head.weight'".

        """
        names = ", ".join(
            f"'{s}'" if isinstance(s, str) else "a tensor made from parameters" for s in self.sources if s is not None
        )
        return f"{call_name(self.func)} of {names}"


@dataclass(frozen=True)
class Plan:
    """The calls that matter, in the order of the forward pass."""

    calls: tuple[CallPlan, ...]


@dataclass
class Use:
    """One operation in which a parameter, or a tensor derived from parameters, met the batch.

    Attributes:
        plan: What is known of this call: where the batch stands in its arguments and outputs.
        func: The function, its out-of-place form.
        leaves: Its arguments, flattened; tensors detached, but for the followed ones.
        spec: How `unflatten_call` puts them together again.
        versions: Version counters of the tensors among the leaves.
        edges: Gradient edge of each output, None for outputs without a gradient.
        autocast: The dtype that autocast was at, None if it was off.

    """

    plan: CallPlan
    func: Function
    leaves: list[Any]
    spec: pytree.TreeSpec | None
    versions: list[int | None]
    edges: list[GradientEdge | None]
    autocast: torch.dtype | None


@dataclass
class LoggedCall:
    """One call as seen while measuring.

    Attributes:
        func: The function.
        sources: For each leaf of the arguments, where it comes from if it is followed.
        leaves: Tensors as their shapes, everything else as it is.
        outputs: Shape of each tensor output.
        values: Copies of the tensors among leaves and outputs, where asked for.

    """

    func: Function
    sources: list[Source | None]
    leaves: list[Any]
    outputs: list[torch.Size]
    values: list[Tensor | None] = field(default_factory=list)


def call_name(func: Function) -> str:
    """Name of a function as users know it.

    Args:
        func: A function of torch.

    Returns:
        For instance 'torch.nn.functional.linear'.

    """
    return torch.overrides.resolve_name(func) or getattr(func, "__name__", repr(func))
