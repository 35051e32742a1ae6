"""The recorder: for the length of one forward pass, every trainable parameter announces its uses.

The class of each parameter is swapped in place for a subclass with `__torch_function__`, so identity, optimizer state
and autograd graph stay as they are; the swap is undone on exit, whatever happens. Each call that touches a parameter,
or a tensor derived from parameters alone, arrives here and is recorded: its arguments and the gradient edges of its
outputs at that moment (an in-place activation right behind it does no harm).

Two ways of recording: to *measure* (no plan yet), every tensor downstream of a parameter is followed, and shapes are
logged; with a *plan*, only parameters and the tensors derived from them are, and nothing else in the model pays.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils import _pytree as pytree

from lightning_ief.capture.types import Derived, Function, LoggedCall, Plan, Source, Use, call_name

__all__ = [
    "Recorder",
    "Span",
    "autocast_dtype",
    "flatten_call",
    "is_in_place",
    "tensors_of",
    "unflatten_call",
    "version_of",
]

# Python functions that consist of plain operations on their weights: their bodies run with the weights still
# announcing, so that each inner operation is recorded instead of the whole.
_COMPOSITE = frozenset({F.multi_head_attention_forward})

_active: ContextVar["Recorder | None"] = ContextVar("active recorder", default=None)


class _TrackedTensor(Tensor):
    """A tensor that reports every operation on it to the active recorder."""

    @classmethod
    def __torch_function__(  # noqa: D102
        cls, func: Function, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recorder = _active.get()
        if recorder is None or not torch.is_grad_enabled():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _COMPOSITE:
            with _opened():
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and _drops_out(*args, **kwargs):
            return _attention(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return recorder.call(func, args, kwargs)


class _TrackedParameter(_TrackedTensor, nn.Parameter):
    """The same for a parameter."""


@contextmanager
def _opened() -> Iterator[None]:
    """Let a Python function of `torch.nn.functional` run its body although its arguments are followed."""
    name = "has_torch_function"
    original = getattr(F, name)
    setattr(F, name, lambda _: False)
    try:
        yield
    finally:
        setattr(F, name, original)


def _drops_out(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *_: Any, **__: Any
) -> bool:
    """Whether a call of attention draws random numbers, with which its rows could not be computed again."""
    return dropout_p > 0


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as plain operations (those of its documentation), so that each is recorded instead of the whole."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if masked else scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def _alias(x: Any) -> Any:
    """Give a tensor a graph node of its own, without a copy and without being a view."""
    if isinstance(x, Tensor) and x.requires_grad and not x.is_leaf:
        return torch.ops.aten._unsafe_view(x, x.shape)
    return x


def _needs_alias(outputs: list[Tensor], args: Sequence[Any]) -> bool:
    """Whether the recorded edges of an operation's outputs could miss gradients, or count some twice.

    One output may depend on another (the two states of an LSTM cell): the gradient at an alias is what reaches that
    output from outside. And an output may be a view of something inside (a linear layer on sequences): an in-place
    activation behind it would rebase the view, and nothing would reach the recorded edge.

    Returns:
        Whether they could.

    """
    if len(outputs) == 1 and not outputs[0]._is_view():
        return False
    if sum(x.requires_grad and not x.is_leaf for x in outputs) > 1:
        return True
    given = [x for x in args if isinstance(x, Tensor)]
    bases = {id(x._base) if x._is_view() else id(x) for x in given} | {id(x) for x in given}
    return any(x.requires_grad and x._is_view() and id(x._base) not in bases for x in outputs)


def autocast_dtype(device: str) -> torch.dtype | None:
    """Dtype that autocast is at, None if it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def is_in_place(func: Function) -> bool:
    """Whether a function overwrites its first argument, by its name.

    Args:
        func: A function of torch.

    Returns:
        Whether it does.

    """
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def _out_of_place(func: Function) -> Function | None:
    """Return the out-of-place form of an in-place function, None if it is none."""
    return getattr(Tensor, func.__name__[:-1], None) if is_in_place(func) else None


def flatten_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], pytree.TreeSpec | None]:
    """Flatten the arguments of a call.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The leaves, and how they hang together; None if they are the positional arguments as they are, which is the
        usual case and spares the time of a tree.

    """
    if not kwargs and not any(isinstance(x, (list, tuple, dict)) for x in args):
        return list(args), None
    return pytree.tree_flatten((tuple(args), dict(kwargs)))


def unflatten_call(leaves: Sequence[Any], spec: pytree.TreeSpec | None) -> tuple[Sequence[Any], dict[str, Any]]:
    """Undo `flatten_call`.

    Args:
        leaves: The leaves.
        spec: How they hang together.

    Returns:
        Positional and keyword arguments.

    """
    return (leaves, {}) if spec is None else pytree.tree_unflatten(leaves, spec)


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors in what a function returned.

    Args:
        result: A tensor, or a tree with tensors in it.

    Returns:
        The tensors, in order.

    """
    return [result] if isinstance(result, Tensor) else [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]


def version_of(x: Tensor) -> int:
    """Version counter of a tensor, which grows when it is written to; −1 in inference mode, where nobody counts."""
    return -1 if x.is_inference() else x._version


class Span(NamedTuple):
    """What one operation added to the graph: from the nodes of its outputs to, but without, those of its inputs."""

    outputs: list[Node | None]
    inputs: list[Node | None]


class Recorder:
    """Context in which the uses of parameters are recorded.

    Args:
        parameters: The parameters to follow, by name.
        plan: What a measurement found out about the model; None to measure.
        keep_values: While measuring, also keep copies of the tensors.

    Raises:
        TypeError: If a parameter is of a class of its own, which can't be swapped.

    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], plan: Plan | None = None, keep_values: bool = False
    ) -> None:
        if len({*map(id, parameters.values())}) < len(parameters):
            raise TypeError(f"One parameter stands under several names among {[*parameters]}: name it once.")
        for name, parameter in parameters.items():
            if type(parameter) is not nn.Parameter:
                raise TypeError(
                    f"Parameter '{name}' is a {type(parameter).__qualname__}; only plain torch.nn.Parameter can be "
                    "captured. Freeze it (requires_grad_(False)) or replace it by a plain parameter."
                )
            if parameter.is_complex():
                raise TypeError(
                    f"Parameter '{name}' is complex; only real parameters can be captured. Store it as real numbers "
                    "and use torch.view_as_complex, or freeze it (requires_grad_(False))."
                )
        self.parameters = parameters
        self.plan = plan
        self.keep_values = keep_values
        self.calls: list[LoggedCall] = []
        self.uses: list[Use] = []
        self.spans: list[Span] = []
        self.derived: dict[Derived, Tensor] = {}
        self.count = 0
        self.stale: str | None = None
        self.seconds = 0.0  # spent on recording, on the host
        self._sources: dict[int, Source] = {id(p): name for name, p in parameters.items()}
        self._followed: list[Tensor] = []  # keeps ids from being used anew

    def __enter__(self) -> "Recorder":
        self._token = _active.set(self)
        for parameter in self.parameters.values():
            parameter.__class__ = _TrackedParameter
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for parameter in self.parameters.values():
            parameter.__class__ = nn.Parameter
        for tensor in self._followed:
            if type(tensor) is _TrackedTensor:
                tensor.__class__ = Tensor  # type: ignore[assignment]
        _active.reset(self._token)
        if self.plan is not None and self.stale is None and self.count != len(self.plan.calls):
            self.stale = f"{self.count} operations on trainable parameters, {len(self.plan.calls)} before"

    def call(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one operation on a followed tensor and record it.

        Args:
            func: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            What the function returns.

        """
        leaves, spec = flatten_call(args, kwargs)
        inputs = [x.grad_fn for x in leaves if isinstance(x, Tensor)]
        replaced, before = _out_of_place(func), None
        if replaced is not None and isinstance(args[0], Tensor):
            # The rule will want to see what an in-place operation overwrites; of a view, it overwrites the base.
            before = args[0].detach().clone()
            inputs += [args[0]._base.grad_fn] if args[0]._is_view() and args[0]._base is not None else []
        result = func(*args, **kwargs)
        returned = perf_counter()
        outputs = tensors_of(result)
        if self.plan is not None and _needs_alias(outputs, args):
            result = _alias(result) if isinstance(result, Tensor) else pytree.tree_map(_alias, result)
            outputs = tensors_of(result)
        # Shapes, comparisons and detached copies carry no gradient.
        if any(x.requires_grad and not x.is_leaf for x in outputs) and not self.stale:
            sources = [self._sources.get(id(x)) if isinstance(x, Tensor) else None for x in leaves]
            if self.plan is None:
                self._log(func, leaves, sources, outputs)
            else:
                if before is not None:
                    leaves[0] = before
                self._record(replaced or func, leaves, spec, sources, outputs)
                self.spans.append(Span([x.grad_fn for x in outputs], inputs))
        self.seconds += perf_counter() - returned
        return result

    def _log(self, func: Function, leaves: list[Any], sources: list[Source | None], outputs: list[Tensor]) -> None:
        logged = LoggedCall(
            _out_of_place(func) or func,
            sources,
            [x.shape if isinstance(x, Tensor) else x for x in leaves],
            [x.shape for x in outputs],
        )
        if self.keep_values:
            logged.values = [x.detach().clone() if isinstance(x, Tensor) else None for x in [*leaves, *outputs]]
        self.calls.append(logged)
        self._follow(outputs, len(self.calls) - 1)

    def _record(
        self,
        func: Function,
        leaves: list[Any],
        spec: pytree.TreeSpec | None,
        sources: list[Source | None],
        outputs: list[Tensor],
    ) -> None:
        assert self.plan is not None
        number, self.count = self.count, self.count + 1
        expected = self.plan.calls[number] if number < len(self.plan.calls) else None
        if expected is None or expected.func != func or expected.sources != tuple(sources):
            self.stale = f"operation {number} on trainable parameters is {call_name(func)} of {sources}"
            return
        if expected.derived:
            self._follow(outputs, number)
            return
        self.uses.append(
            Use(
                expected,
                func,
                [
                    x if source or not isinstance(x, Tensor) else x.detach()
                    for x, source in zip(leaves, sources, strict=True)
                ],
                spec,
                [x._version if isinstance(x, Tensor) else None for x in leaves],
                [get_gradient_edge(x) if x.requires_grad else None for x in outputs],
                autocast_dtype(outputs[0].device.type),
            )
        )

    def _follow(self, outputs: list[Tensor], number: int) -> None:
        for j, x in enumerate(outputs):
            if id(x) in self._sources and isinstance(self._sources[id(x)], str):
                continue  # an operation that hands its parameter through
            if type(x) is Tensor:
                x.__class__ = _TrackedTensor
            self._sources[id(x)] = source = Derived(number, j)
            self._followed.append(x)
            self.derived[source] = x
