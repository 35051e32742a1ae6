"""What measuring finds of a call, and the words that all of capture shares."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

__all__ = [
    "BatchDimension",
    "Call",
    "CaptureError",
    "Derived",
    "Function",
    "NotCovered",
    "Plan",
    "Source",
    "Spec",
    "call_name",
]

Function = Callable[..., Any]

Spec = tuple[tuple[str, ...], tuple[tuple[type, int] | None, ...] | None] | pytree.TreeSpec
"""How the leaves of a call hang together: the names of those that are keyword arguments, which come last; and for each
argument the kind and length of the sequence that it is, None for others, or None if there is no sequence. Or a tree."""


class CaptureError(RuntimeError):
    """Per-sample gradients can't be captured exactly; the message says of what, why, and what to do."""


class NotCovered(Exception):
    """Raised by a rule for arguments it has no formula for."""


class Derived(NamedTuple):
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
class Call:
    """What measuring found of one call that touches a parameter or a derived tensor.

    Attributes:
        func: The function, its out-of-place form.
        sources: For each leaf of the arguments, where it comes from if it is followed.
        leaves: While measuring, the leaves: tensors as their shapes, everything else as it is.
        results: While measuring, the shape of each tensor output.
        derived: Whether the outputs depend on parameters alone.
        inputs: For each leaf, where the batch stands; None for constants and everything that is no tensor.
        counts: Leaves that are integers proportional to N.
        outputs: For each tensor output, where the batch stands.
        kind: Calls of one kind differ in what they are called on, and in nothing else; None for those that are the only
            one, and where samples of several calls can't stand one after the other.

    """

    func: Function
    sources: tuple[Source | None, ...]
    leaves: tuple[Any, ...] = ()
    results: tuple[torch.Size, ...] = ()
    derived: bool = False
    inputs: tuple[BatchDimension | None, ...] = ()
    counts: tuple[int, ...] = ()
    outputs: tuple[BatchDimension | None, ...] = ()
    kind: int | None = None

    @cached_property
    def followed(self) -> tuple[int, ...]:
        """The leaves that are followed."""
        return tuple(j for j, source in enumerate(self.sources) if source is not None)

    @cached_property
    def batched(self) -> tuple[tuple[int, BatchDimension], ...]:
        """The leaves that hold the batch, and where it stands in each."""
        return tuple((j, dimension) for j, dimension in enumerate(self.inputs) if dimension is not None)

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

    calls: tuple[Call, ...]


def call_name(func: Function) -> str:
    """Name of a function as users know it.

    Args:
        func: A function of torch.

    Returns:
        For instance 'torch.nn.functional.linear'.

    """
    return torch.overrides.resolve_name(func) or getattr(func, "__name__", repr(func))
