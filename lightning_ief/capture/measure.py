"""The plan: which calls of a forward pass matter, and where the batch stands in each. Measured, not guessed.

The forward pass runs twice, on the first two samples of the batch and on these with the first one repeated at the end,
and the recorded shapes are compared call by call. A dimension that grows from f·n to f·(n+1) is the batch, folded with
f positions if f > 1; a tensor that does not change is a constant. A call whose arguments and outputs all stay the same
makes a *derived* tensor from parameters alone; any other is a *use*. Where the size of a tensor depends on data (tokens
without their padding), a multiple of N may be chance: no batch is seen there.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ief.capture.recorder import Recorder, samples_first, tensors_of
from lightning_ief.capture.rules import serves_several_calls
from lightning_ief.capture.types import BatchDimension, Call, CaptureError, Derived, Plan, Source

__all__ = ["measure", "taken"]

# Samples to measure with: all tensors of the forward pass are held on to, so that it should not be a large batch.
_FEW = 2

_Logged = tuple[Call, list[Tensor | None]]  # a call, and its tensors where they are kept
_Sizes = tuple[Collection[int], Collection[int]]  # of dimensions, in the passes with N and with N + 1 samples


def measure(
    parameters: Mapping[str, nn.Parameter],
    inputs: Any,
    samples: int,
    call: Callable[[Any], Any],
    replayed: Callable[[], AbstractContextManager[None]],
) -> Plan:
    """Find out which calls matter and where the batch stands in them.

    Args:
        parameters: The parameters to follow.
        inputs: Its inputs, a tree of tensors; those of N samples are found by their dimension 0.
        samples: N.
        call: Runs the model on such inputs.
        replayed: Context in which the model can run again from where it stands, and nothing of it changes.

    Returns:
        The plan.

    Raises:
        CaptureError: If the calls can't be compared or a use has no batch dimension of its own.

    """
    few = min(samples, _FEW)
    packed: tuple[set[int], set[int]] = set(), set()

    def log(keep_values: bool) -> tuple[list[_Logged], list[_Logged]]:
        passes = []
        for sizes, indices in zip(packed, ([*range(few)], [*range(few), 0]), strict=True):
            batch = taken(inputs, samples, indices)
            recorder = Recorder(parameters, keep_values=keep_values)
            try:
                with replayed(), torch.enable_grad(), recorder, _SizesFromData(sizes):
                    call(batch)
            except Exception as error:
                with replayed():
                    call(taken(inputs, samples, [*range(samples)]))  # its own error, if any
                raise CaptureError(
                    f"The model runs on {samples} samples, but fails with {len(indices)} of them: {error}. Either it "
                    "is made for a fixed number of samples, or a constant among its inputs has as many entries on "
                    f"dimension 0 as there are samples ({samples}) and was taken for a part of the batch: build it in "
                    "the model, or give it a leading dimension of 1."
                ) from error
            passes.append(recorder.calls)
        if [call.func for call, _ in passes[0]] != [call.func for call, _ in passes[1]]:
            raise CaptureError(
                f"The model ran {len(passes[0])} operations on {few} samples, and other ones on {few + 1}. "
                "A forward pass that depends on the number of samples, or on chance, can't be captured: use a "
                "forward pass whose operations are the same every time."
            )
        return passes[0], passes[1]

    calls, more = log(keep_values=False)
    plan = compare(calls, more, few, packed)
    if any(d is not None and d.folded for c in plan.calls for d in (*c.inputs, *c.outputs)):
        calls, more = log(keep_values=True)
        plan = compare(calls, more, few, packed)
    return plan


def taken(inputs: Any, samples: int, indices: list[int]) -> Any:
    """Make a batch of some samples of another.

    Args:
        inputs: A tree of tensors; those of N samples are found by their dimension 0.
        samples: N.
        indices: Which samples, in which order; one may be there several times.

    Returns:
        The same tree. The model may change its inputs in place: constants are copied.

    """

    def each(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x[indices] if x.ndim > 0 and x.shape[0] == samples else x.clone()

    return pytree.tree_map(each, inputs)


class _SizesFromData(TorchDispatchMode):
    """Collects the sizes of tensors whose shape depends on values: what a mask has selected, for instance.

    Args:
        found: Gets the sizes of dimension 0.

    """

    _FUNCTIONS = frozenset(
        {
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
            torch.ops.aten._unique2.default,
            torch.ops.aten.unique_dim.default,
            torch.ops.aten.unique_consecutive.default,
            torch.ops.aten.repeat_interleave.Tensor,
            torch.ops.aten._pack_padded_sequence.default,
        }
    )

    def __init__(self, found: set[int]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(  # noqa: D102
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        by_mask = func is torch.ops.aten.index.Tensor and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if by_mask or func in self._FUNCTIONS:
            self.found.update(x.shape[0] for x in tensors_of(result) if x.ndim)
        return result


def compare(calls: Sequence[_Logged], more: Sequence[_Logged], samples: int, packed: _Sizes = ((), ())) -> Plan:
    """Compare the calls of two passes, of N and of N + 1 samples.

    Args:
        calls: Those of N samples.
        more: Those of N + 1 samples, of the same functions.
        samples: N.
        packed: Sizes in the two passes that came from data, in which a multiple of N may be chance.

    Returns:
        The plan.

    Raises:
        CaptureError: If a use has no batch dimension of its own.

    """
    found: list[Call] = []
    numbers: dict[int, int] = {}  # number of a call that makes derived tensors: among all → in the plan

    def in_plan(source: Source | None) -> Source | None:
        if not isinstance(source, Derived):
            return source
        return source._replace(call=numbers[source.call]) if source.call in numbers else None

    for number, ((a, values), (b, others)) in enumerate(zip(calls, more, strict=True)):
        sources = tuple(map(in_plan, a.sources))
        if not any(sources):
            continue  # touches only what is downstream of a use
        downstream = [s is not None and kept is None for s, kept in zip(a.sources, sources, strict=True)]
        derived = not any(downstream) and a.leaves == b.leaves and a.results == b.results
        call = replace(a, sources=sources, derived=derived)
        if derived:
            numbers[number] = len(found)
        else:
            call = _use(call, b, samples, packed)
            call = _with_order(call, [*zip(values, others, strict=True)], samples)
        found.append(call)
    return Plan(_with_kinds(found))


def _with_kinds(calls: Sequence[Call]) -> tuple[Call, ...]:
    """Number the kinds of calls; calls on the same sources are a kind of their own. Forget what measuring saw."""
    keys = [_described(call) for call in calls]
    used = Counter((key, call.sources) for key, call in zip(keys, calls, strict=True))
    alike: dict[Any, list[int]] = defaultdict(list)
    for number, (key, call) in enumerate(zip(keys, calls, strict=True)):
        if key is not None:
            alike[key, call.sources if used[key, call.sources] > 1 else None].append(number)
    kinds = {number: kind for kind, each in enumerate(alike.values()) if len(each) > 1 for number in each}
    return tuple(replace(call, leaves=(), results=(), kind=kinds.get(i)) for i, call in enumerate(calls))


def _described(call: Call) -> str | None:
    """What calls of one kind have in common; None where their samples can't stand one after the other."""
    if call.derived or call.counts or not serves_several_calls(call.func):
        return None
    if any(d is not None and d.folded and not d.samples_first for d in (*call.inputs, *call.outputs)):
        return None
    constants = [x for x, d, s in zip(call.leaves, call.inputs, call.sources, strict=True) if d is None and s is None]
    if any(isinstance(x, torch.Size) for x in constants):  # a tensor, of which only the shape is known
        return None
    return repr((call.func, call.followed, call.leaves, call.results, call.inputs, call.outputs))


def _use(call: Call, other: Call, samples: int, packed: _Sizes) -> Call:
    """Fill in where the batch stands in the arguments and outputs of a use."""
    inputs: list[BatchDimension | None] = []
    counts: list[int] = []
    for j, (x, y) in enumerate(zip(call.leaves, other.leaves, strict=True)):
        if isinstance(x, torch.Size):
            inputs.append(_batch_dimension(call, x, y, samples, packed))
            continue
        inputs.append(None)
        if x != y and not isinstance(x, float):
            if not (isinstance(x, int) and x % samples == 0 and y == x // samples * (samples + 1)):
                raise CaptureError(
                    f"The argument {x!r} of {call.describe()} turned into {y!r} with one more sample: the operation "
                    "treats samples unlike. Compute it for every sample alike, or freeze the parameter."
                )
            counts.append(j)
    results = zip(call.results, other.results, strict=True)
    outputs = tuple(_batch_dimension(call, x, y, samples, packed) for x, y in results)
    if not any(outputs):
        raise CaptureError(
            f"No output of {call.describe()} grows with the number of samples (shapes "
            f"{[tuple(x) for x in call.results]}): it mixes the samples of a batch. Give each sample an output of its "
            "own, or freeze the parameter with requires_grad_(False)."
        )
    return replace(call, inputs=tuple(inputs), counts=tuple(counts), outputs=outputs)


def _with_order(call: Call, values: Sequence[tuple[Tensor | None, Tensor | None]], samples: int) -> Call:
    """Decide how folded dimensions run: the way in which the samples look the same in both passes, if values are known.

    All tensors of a call decide together, since some look the same either way (a zero-initialised weight's outputs).

    Returns:
        The call with the order filled in.

    """

    def ordered(first: bool) -> Call:
        def turn(d: BatchDimension | None) -> BatchDimension | None:
            return replace(d, samples_first=first) if d is not None and d.folded else d

        return replace(call, inputs=tuple(map(turn, call.inputs)), outputs=tuple(map(turn, call.outputs)))

    def distance(call: Call) -> float:
        return sum(
            _distance(samples_first(x, d, samples), samples_first(y, d, samples + 1)[:samples])
            for d, (x, y) in zip((*call.inputs, *call.outputs), values, strict=True)
            if d is not None and d.folded and x is not None and y is not None
        )

    if not values:
        return call
    return min(ordered(True), ordered(False), key=distance)


def _batch_dimension(call: Call, a: torch.Size, b: torch.Size, samples: int, packed: _Sizes) -> BatchDimension | None:
    """Compare the shapes of one tensor."""
    grown = [d for d in range(len(a)) if len(a) == len(b) and a[d] != b[d]]
    if len(a) == len(b) and not grown:
        return None
    if len(grown) != 1 or a[grown[0]] % samples or b[grown[0]] != a[grown[0]] // samples * (samples + 1):
        raise CaptureError(
            f"A tensor in {call.describe()} has shape {tuple(a)} for {samples} samples and {tuple(b)} for "
            f"{samples + 1}: no dimension of it is the batch. Packed sequences and operations across samples can't "
            "be captured: pad the sequences, or freeze the parameter with requires_grad_(False)."
        )
    dim = grown[0]
    if a[dim] != samples and a[dim] in packed[0] and b[dim] in packed[1]:
        raise CaptureError(
            f"A tensor in {call.describe()} has as many entries ({a[dim]}) as values have selected, by a mask or an "
            "index, so that it can't be known which belong to which sample. Packed sequences can't be captured: pad "
            "them, or freeze the parameter with requires_grad_(False)."
        )
    return BatchDimension(dim, folded=a[dim] != samples)


def _distance(x: Tensor, y: Tensor) -> float:
    difference = (x != y) if not x.is_floating_point() else (x.double() - y.double()).abs()
    return float(difference.double().nan_to_num().mean())
