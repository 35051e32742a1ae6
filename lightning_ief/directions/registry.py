"""What lists of names, tables and figures know of each direction: one registration, beside its function.

Whoever evaluates, compares or draws directions asks here, so that a new one needs its function and nothing else.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_ief.capture import LinearizedBatch

__all__ = ["REFERENCE", "DampingRange", "NamedDirection", "find", "names", "register", "unknown"]

REFERENCE = "sgd"
"""The direction that others are compared with: γ over its γ, cosine to it."""

DampingRange: TypeAlias = Literal["none", "≥ 0", "> 0"]
"""The values of λ for which a direction is defined; "none" if it has no λ."""

Function = TypeVar("Function", bound=Callable[..., Any])

_registered: dict[str, "NamedDirection"] = {}


@dataclass(frozen=True)
class NamedDirection:
    """The function of a direction, and what there is to know of it.

    Attributes:
        name: What it is called in lists, log keys and tables.
        function: Maps a linearization to d. Takes λ after it unless `damping` is "none", then M and a generator of
            random numbers if it `draws`.
        label: What it is called in figures; mathematics as matplotlib has it.
        style: Colour, line style and marker in figures, as keywords of matplotlib's `plot`.
        damping: Which λ it takes.
        default_damping: λ where the user names none for it in particular; that of all directions if None.
        draws: Whether it draws random numbers.
        needs_graph: Whether it takes the graph of the forward pass once more after the first backward pass.
        needs_sides: Whether linearizations have to keep both sides of weights, `linearize(..., keep_sides=...)`.

    """

    name: str
    function: Callable[..., Mapping[str, Tensor]]
    label: str
    style: Mapping[str, Any] = field(default_factory=dict)
    damping: DampingRange = "≥ 0"
    default_damping: float | None = None
    draws: bool = False
    needs_graph: bool = False
    needs_sides: bool = False

    def compute(
        self,
        linearization: LinearizedBatch,
        damping: float,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Mapping[str, Tensor]:
        """Compute the direction.

        Args:
            linearization: Model and batch, with its graph if the direction needs it.
            damping: λ; ignored by a direction that has none.
            num_samples: M, targets drawn per sample; ignored by a direction that draws none.
            generator: Source of randomness on the logits' device; torch's default if None.

        Returns:
            d, {parameter name: tensor}.

        """
        arguments = () if self.damping == "none" else (damping,)
        return self.function(linearization, *arguments, *((num_samples, generator) if self.draws else ()))

    def check_damping(self, damping: float) -> None:
        """Require a λ for which the direction is defined.

        Args:
            damping: λ; a finite number ≥ 0 also where there is none.

        Raises:
            ValueError: If it is another one.

        """
        least = "> 0" if self.damping == "> 0" else "≥ 0"
        if not 0 <= damping < float("inf") or (damping == 0 and least == "> 0"):
            raise ValueError(f"the damping of '{self.name}' must be finite and {least}, got {damping}.")


def register(
    *,
    label: str,
    color: str,
    linestyle: str | tuple[Any, ...],
    marker: str,
    damping: DampingRange = "≥ 0",
    default_damping: float | None = None,
    draws: bool = False,
    needs_graph: bool = False,
    needs_sides: bool = False,
) -> Callable[[Function], Function]:
    """Register a direction under the name of the decorated function.

    Args:
        label: What it is called in figures.
        color: Colour of its lines.
        linestyle: Style of its lines.
        marker: Marker of its points.
        damping: Which λ it takes.
        default_damping: λ where the user names none for it in particular.
        draws: Whether it draws random numbers.
        needs_graph: Whether it takes the graph once more.
        needs_sides: Whether both sides of weights are to be kept.

    Returns:
        A decorator that returns the function as it is.

    Raises:
        ValueError: If a direction of this name is registered already.

    """

    def add(function: Function) -> Function:
        name = function.__name__
        if name in _registered:
            other = _registered[name].function.__module__
            raise ValueError(f"a direction '{name}' is registered already, in {other}; choose another name.")
        style = {"color": color, "linestyle": linestyle, "marker": marker}
        _registered[name] = NamedDirection(
            name, function, label, style, damping, default_damping, draws, needs_graph, needs_sides
        )
        return function

    return add


def names() -> list[str]:
    """Names of the registered directions."""
    return [*_registered]


def find(name: str) -> NamedDirection:
    """Find a registered direction by its name.

    Args:
        name: Its name.

    Returns:
        The direction.

    Raises:
        ValueError: If there is none of this name.

    """
    if name not in _registered:
        raise ValueError(unknown(name, names()))
    return _registered[name]


def unknown(name: str, known: Iterable[str], place: str = "") -> str:
    """Say that there is no direction of a name: what may have been meant, or what there is.

    Args:
        name: The name.
        known: Those there are.
        place: Where it stands, as " in dampings".

    Returns:
        The message.

    Example:
        >>> unknown("eif", names())
        "unknown direction 'eif'. Did you mean ief?"

    """
    known = [*known]
    close = get_close_matches(name.lower(), known)
    close.sort(key=lambda each: sorted(each) != sorted(name.lower()))  # first of all, letters that changed places
    return f"unknown direction '{name}'{place}" + (f". Did you mean {close[0]}?" if close else f"; there are {known}.")
