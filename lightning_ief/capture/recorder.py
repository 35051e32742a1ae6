"""The recorder: for the length of one forward pass, every trainable parameter announces its uses.

The class of each parameter is swapped in place for a subclass with `__torch_function__`, so identity, optimizer state
and autograd graph stay as they are; the swap is undone on exit, whatever happens. Each call that touches a parameter,
or a tensor derived from parameters alone, arrives here and is recorded: its arguments and the gradient edges of its
outputs at that moment (an in-place activation right behind it does no harm).

Two ways of recording: to *measure* (no plan yet), every tensor downstream of a parameter is followed, and shapes are
logged; with a *plan*, only parameters and the tensors derived from them are, and nothing else in the model pays.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils import _pytree as pytree

from lightning_ief.capture.composite import COMPOSITE, attention, drops_out, opened
from lightning_ief.capture.recurrent import RECURRENT, is_opened
from lightning_ief.capture.types import (
    BatchDimension,
    Call,
    CaptureError,
    Derived,
    Function,
    NotCovered,
    Plan,
    Source,
    Spec,
    call_name,
)
from lightning_ief.linalg.scaling import upcast

__all__ = [
    "Recorder",
    "Span",
    "Use",
    "autocast_dtype",
    "flatten_call",
    "is_in_place",
    "samples_first",
    "tensors_of",
    "unflatten_call",
    "version_of",
]

# What arguments usually are, and the sequences that they come in.
_PLAIN = {Tensor, nn.Parameter, bool, int, float, str, type(None), torch.dtype, torch.device}
_SEQUENCES = {tuple, list, torch.Size}

_IN_FRONT = BatchDimension(0), BatchDimension(0, folded=True)

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
        if func in COMPOSITE:
            with opened():
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and drops_out(*args, **kwargs):
            return attention(*args, **kwargs)
        if func in RECURRENT and is_opened(args):
            return RECURRENT[func](*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return recorder.call(func, args, kwargs)


class _TrackedParameter(_TrackedTensor, nn.Parameter):
    """The same for a parameter."""


_PLAIN |= {_TrackedTensor, _TrackedParameter}


def _alias(x: Any) -> Any:
    """Give a tensor a graph node of its own, without a copy and without being a view."""
    if isinstance(x, Tensor) and x.requires_grad and not x.is_leaf:
        return torch.ops.aten._unsafe_view(x, x.shape)
    return x


def _origin(x: Tensor, leaves: Sequence[Any], overwritten: Any) -> Tensor | None:
    """The tensor whose gradient is that of an output, whatever is written to the output in place behind the operation.

    That is the output itself, but for a view of something inside (a linear layer on sequences): an in-place activation
    would rebase the view, and nothing would reach its node any more. What it is a view of, as a whole, keeps its node.

    Args:
        x: The output.
        leaves: The arguments.
        overwritten: The argument that the operation overwrites, None if it does not.

    Returns:
        The tensor, with the same numbers in the same order; None if there is none.

    """
    base = x._base
    if base is None:
        return x
    if x is not overwritten and any(base is y or base is y._base for y in leaves if isinstance(y, Tensor)):
        return x
    is_whole = (
        (x.numel(), x.dtype, x.storage_offset()) == (base.numel(), base.dtype, base.storage_offset())
        and x.is_floating_point()
        and x.is_contiguous()
        and base.is_contiguous()
    )
    return base if is_whole else x if x is overwritten else None


def _needs_alias(outputs: list[Tensor], leaves: Sequence[Any], overwritten: Any) -> bool:
    """Whether there are no edges that stand for an operation's outputs: some gradients would be missed or count twice.

    One output may depend on another (the two states of an LSTM cell): the gradient at an alias is what reaches that
    output from outside. And an output may be a view of a part of something inside.

    Returns:
        Whether they need an alias.

    """
    if len(outputs) > 1 and sum(x.requires_grad and not x.is_leaf for x in outputs) > 1:
        return True
    return any(x.requires_grad and _origin(x, leaves, overwritten) is None for x in outputs)


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


def flatten_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Spec]:
    """Flatten the arguments of a call.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The leaves, and how they hang together.

    """
    given = [*args, *kwargs.values()]
    if _PLAIN.issuperset(map(type, given)):  # the usual case
        return given, (tuple(kwargs), None)
    leaves: list[Any] = []
    lengths: list[tuple[type, int] | None] = []
    for x in given:
        if type(x) in _SEQUENCES:
            leaves += x
            lengths.append((type(x), len(x)))
        else:
            leaves.append(x)
            lengths.append(None)
    if _PLAIN.issuperset(map(type, leaves)):
        return leaves, (tuple(kwargs), tuple(lengths))
    return pytree.tree_flatten((tuple(args), dict(kwargs)))


def unflatten_call(leaves: Sequence[Any], spec: Spec) -> tuple[Sequence[Any], dict[str, Any]]:
    """Undo `flatten_call`.

    Args:
        leaves: The leaves.
        spec: How they hang together.

    Returns:
        Positional and keyword arguments.

    """
    if isinstance(spec, pytree.TreeSpec):
        return pytree.tree_unflatten(leaves, spec)
    names, lengths = spec
    given = leaves
    if lengths is not None:
        rest = iter(leaves)
        given = [next(rest) if each is None else each[0](islice(rest, each[1])) for each in lengths]
    positional = len(given) - len(names)
    return given[:positional], dict(zip(names, given[positional:], strict=True))


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


def samples_first(x: Tensor, dimension: BatchDimension, samples: int, leading: int = 0) -> Tensor:
    """Bring the samples of a tensor to the front, without a copy.

    Args:
        x: The tensor.
        dimension: Where the batch stands in it.
        samples: N.
        leading: How many other dimensions stand in front of it, and stay there.

    Returns:
        Shape [*leading, N, ...], where ... are the sizes of x with the batch dimension replaced by the number of folded
        positions (1 if none): what the operation would see of a batch of one.

    """
    dim = leading + dimension.dim
    if not dimension.folded and dimension.dim == 0:
        return x.unsqueeze(dim + 1)
    if dimension.samples_first:
        return x.unflatten(dim, (samples, -1)).movedim(dim, leading)
    return x.unflatten(dim, (-1, samples)).movedim(dim + 1, leading)


def _fits(x: Any, dimension: BatchDimension, samples: int) -> bool:
    """Whether an argument is a tensor in which the samples of a batch can stand where they did."""
    if not isinstance(x, Tensor) or x.ndim <= dimension.dim:
        return False
    size = x.shape[dimension.dim]
    return size % samples == 0 if dimension.folded else size == samples


@dataclass(eq=False)
class Use:
    """A call of one batch in which a parameter, or a tensor derived from parameters, met the batch.

    Rules see it with the gradients of its outputs.

    Attributes:
        call: What is known of it beforehand.
        samples: N.
        leaves: Its arguments, flattened; tensors detached, but for the followed ones.
        spec: How `unflatten_call` puts them together again.
        versions: Version counters of the tensors among the leaves.
        edges: Gradient edge of each output, None for outputs without a gradient.
        shapes: Shape of each output; a gradient at its edge has as many elements, in the same order.
        autocast: The dtype that autocast was at, None if it was off.
        gradients: For each output its gradients [R, *output shape] once they have come; None if it has none.
        keep_sides: Parameters of which outer products are kept as they are.
        stacked: Of how many calls it holds the samples, one call after the other; N counts all of them.

    """

    call: Call
    samples: int
    leaves: list[Any]
    spec: Spec
    versions: list[int | None]
    edges: list[GradientEdge | None]
    shapes: list[torch.Size]
    autocast: torch.dtype | None
    gradients: Sequence[Tensor | None] = ()
    keep_sides: Collection[str] = ()
    stacked: int = 1

    def with_gradients(self, gradients: Sequence[Tensor | None], keep_sides: Collection[str]) -> "Use":
        """The same use with its gradients, in a fraction of the time that `replace` takes."""
        recorded = self.call, self.samples, self.leaves, self.spec, self.versions, self.edges, self.shapes
        return Use(*recorded, self.autocast, gradients, keep_sides)

    def require_unchanged(self) -> None:
        """Require that no argument was changed in place since it was recorded.

        Raises:
            CaptureError: If one was.

        """
        for leaf, version in zip(self.leaves, self.versions, strict=True):
            if version is not None and leaf._version != version:
                raise CaptureError(
                    f"An argument of {self.call.describe()} was changed in place after the call, so that the "
                    "per-sample gradients can't be computed from it any more. Use the out-of-place operation there; "
                    "and read everything you need of a linearization before the parameters are updated."
                )

    @cached_property
    def output_gradients(self) -> list[Tensor | None]:
        """For each output its gradients, [R, N, *output shape of a batch of one]; None if there are none."""
        return [
            None if g is None or dimension is None else samples_first(g, dimension, self.samples, leading=1)
            for g, dimension in zip(self.gradients, self.call.outputs, strict=True)
        ]

    @property
    def cotangent(self) -> Tensor:
        """Gradients of the only output, float32 at least.

        Returns:
            Shape [R, N, *output shape of a batch of one].

        Raises:
            NotCovered: If there are several.

        """
        if len(self.output_gradients) != 1 or self.output_gradients[0] is None:
            raise NotCovered
        return upcast(self.output_gradients[0])

    def number_of(self, x: Any) -> int | None:
        """Number of a followed leaf.

        Args:
            x: An argument of the call.

        Returns:
            Its number, None if it is not followed.

        """
        return next((j for j in self.call.followed if self.leaves[j] is x), None)

    def tracks(self, x: Any) -> bool:
        """Whether rows are wanted for an argument: it is a parameter, or a tensor made from parameters."""
        return self.number_of(x) is not None

    def positions(self, x: Tensor) -> Tensor:
        """Samples of an argument, and the vectors in each of them.

        Args:
            x: An argument of the call.

        Returns:
            Shape [1, N, T, x.shape[-1]].

        Raises:
            NotCovered: If the argument is a constant.

        """
        if x.ndim > 1 and self._dimension(x) in _IN_FRONT:
            return x.reshape(1, self.samples, -1, x.shape[-1])
        return self.split(x, x)[None].flatten(2, -2)

    def batch_dim(self, x: Tensor) -> int | None:
        """Where the batch stands in an argument.

        Args:
            x: An argument of the call.

        Returns:
            The dimension, None for constants.

        """
        dimension = self._dimension(x)
        return None if dimension is None else dimension.dim

    def split(self, value: Tensor, like: Tensor) -> Tensor:
        """Bring the samples of a tensor to the front.

        Args:
            value: A tensor with the batch where the argument `like` has it.
            like: An argument of the call.

        Returns:
            Shape [N, *shape for a batch of one].

        Raises:
            NotCovered: If that argument is a constant.

        """
        dimension = self._dimension(like)
        if dimension is None:
            raise NotCovered
        return samples_first(value, dimension, self.samples)

    def _dimension(self, x: Tensor) -> BatchDimension | None:
        return next((dimension for j, dimension in self.call.batched if self.leaves[j] is x), None)


class Span(NamedTuple):
    """What one operation added to the graph: from the nodes of its outputs to, but without, those of its inputs."""

    outputs: list[Node | None]
    inputs: list[Node | None]


class Recorder:
    """Context in which the uses of parameters are recorded.

    Args:
        parameters: The parameters to follow, by name.
        plan: What a measurement found out about the model; None to measure.
        samples: N, of the batch that a plan is followed on.
        keep_values: While measuring, also keep copies of the tensors.

    Attributes:
        calls: While measuring, the calls; each beside copies of the tensors among its leaves and outputs, if kept.
        uses: With a plan, the uses.
        spans: With a plan, what each call added to the graph.
        derived: The tensors derived from parameters.
        stale: What differs from the plan.
        seconds: Time spent on recording, on the host.

    Raises:
        TypeError: If a parameter is of a class of its own, which can't be swapped.

    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan | None = None,
        samples: int = 0,
        keep_values: bool = False,
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
        self.samples = samples
        self.keep_values = keep_values
        self.calls: list[tuple[Call, list[Tensor | None]]] = []
        self.uses: list[Use] = []
        self.spans: list[Span] = []
        self.derived: dict[Derived, Tensor] = {}
        self.count = 0
        self.stale: str | None = None
        self.seconds = 0.0
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
        nodes = [x.grad_fn for x in leaves if isinstance(x, Tensor)]
        replaced, overwritten = _out_of_place(func), None
        if replaced is not None and isinstance(args[0], Tensor):
            # The rule will want to see what an in-place operation overwrites; of a view, it overwrites the base.
            overwritten, before = args[0], args[0].detach().clone()
            nodes += [overwritten._base.grad_fn] if overwritten._base is not None else []
        result = func(*args, **kwargs)
        returned = perf_counter()
        outputs = tensors_of(result)
        if self.plan is not None and _needs_alias(outputs, leaves, overwritten):
            result = _alias(result) if isinstance(result, Tensor) else pytree.tree_map(_alias, result)
            outputs = tensors_of(result)
        # Shapes, comparisons and detached copies carry no gradient.
        if not self.stale and any(x.requires_grad and not x.is_leaf for x in outputs):
            sources = tuple([self._sources.get(id(x)) for x in leaves])
            if self.plan is None:
                self._log(replaced or func, leaves, sources, outputs)
            elif (call := self._planned(self.plan, replaced or func, leaves, sources)) is not None:
                self.spans.append(Span([x.grad_fn for x in outputs], nodes))
                if call.derived:
                    self._follow(outputs, self.count - 1)
                else:
                    origins = [_origin(x, leaves, overwritten) for x in outputs]
                    if overwritten is not None:
                        leaves[0] = before
                    self.uses.append(self._use(call, leaves, spec, outputs, origins))
        self.seconds += perf_counter() - returned
        return result

    def _log(
        self, func: Function, leaves: list[Any], sources: tuple[Source | None, ...], outputs: list[Tensor]
    ) -> None:
        shapes = tuple(x.shape if isinstance(x, Tensor) else x for x in leaves)
        call = Call(func, sources, shapes, tuple(x.shape for x in outputs))
        tensors = (*leaves, *outputs) if self.keep_values else ()
        self.calls.append((call, [x.detach().clone() if isinstance(x, Tensor) else None for x in tensors]))
        self._follow(outputs, len(self.calls) - 1)

    def _planned(
        self, plan: Plan, func: Function, leaves: Sequence[Any], sources: tuple[Source | None, ...]
    ) -> Call | None:
        """The call of the plan whose turn it is; None if this is another one."""
        number, self.count = self.count, self.count + 1
        call = plan.calls[number] if number < len(plan.calls) else None
        if call is None or call.func != func or call.sources != sources:
            self.stale = f"operation {number} on trainable parameters is {call_name(func)} of {[*sources]}"
            return None
        for j, dimension in call.batched:
            if not _fits(leaves[j], dimension, self.samples):
                shape = tuple(getattr(leaves[j], "shape", ()))
                self.stale = f"{call.describe()} got an argument of shape {shape}"
                return None
        return call

    def _use(
        self,
        call: Call,
        leaves: list[Any],
        spec: Spec,
        outputs: Sequence[Tensor],
        origins: Sequence[Tensor | None],
    ) -> Use:
        versions = [x._version if isinstance(x, Tensor) else None for x in leaves]
        for j, version in enumerate(versions):
            if version is not None and call.sources[j] is None:
                leaves[j] = leaves[j].detach()
        return Use(
            call,
            self.samples,
            leaves,
            spec,
            versions,
            [get_gradient_edge(x) if x is not None and x.requires_grad else None for x in origins],
            [x.shape for x in outputs],
            autocast_dtype(outputs[0].device.type),
        )

    def _follow(self, outputs: list[Tensor], number: int) -> None:
        for j, x in enumerate(outputs):
            if isinstance(self._sources.get(id(x)), str):
                continue  # an operation that hands its parameter through
            if type(x) is Tensor:
                x.__class__ = _TrackedTensor
            self._sources[id(x)] = source = Derived(number, j)
            self._followed.append(x)
            self.derived[source] = x
