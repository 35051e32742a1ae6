"""Rules: from one use of a parameter to the factors of its per-sample gradient.

The default rule is exact for any operation that treats samples alike; the others exist for speed, and each is tested
against it. To add one, write a generator with the signature of the operation behind the `Use`, decorate it with the
functions it serves, and yield a factor for every argument that may be a parameter. A rule that does not cover a
case raises `NotCovered`, and the default takes over.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ief.capture.factors import Dense, Factor, PerOperation, outer
from lightning_ief.capture.messages import mixes_samples
from lightning_ief.capture.recorder import Use, is_in_place, samples_first, tensors_of, unflatten_call
from lightning_ief.capture.types import CaptureError, Function, NotCovered, call_name

__all__ = ["factors_of", "known_rules", "rule", "serves_several_calls", "stacked_factors"]

Found = Iterator[tuple[Any, Factor]]
"""What a rule yields: an argument that may be a parameter (or None), and its factor."""

Rule = Callable[..., Found]
_rules: dict[Function, Rule] = {}
_for_several_calls: set[Function] = set()


def rule(*functions: Function, several_calls: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for some functions.

    Args:
        functions: The functions of torch that it serves, as `__torch_function__` names them.
        several_calls: Whether it also serves the samples of several calls, one call after the other: it reads nothing
            of a parameter but its shape, and treats all samples alike.

    Returns:
        A decorator that leaves the rule as it is.

    Raises:
        ValueError: If a function already has a rule.

    """

    def register(function: Rule) -> Rule:
        for f in functions:
            if f in _rules:
                raise ValueError(f"{call_name(f)} has a rule already: {_rules[f].__name__}.")
            _rules[f] = function
        _for_several_calls.update(functions if several_calls else ())
        return function

    return register


def known_rules() -> dict[Function, str]:
    """The operations with a rule of their own.

    Returns:
        Function → name of its rule.

    """
    return {function: r.__name__ for function, r in _rules.items()}


def serves_several_calls(function: Function) -> bool:
    """Whether the rule of a function, if it has one, serves the samples of several calls at once."""
    return function in _for_several_calls


def factors_of(use: Use) -> dict[int, Factor]:
    """Factors of all followed arguments of a use.

    Args:
        use: The use, with its gradients.

    Returns:
        Leaf number of the argument → its factor.

    Raises:
        CaptureError: If an argument was changed in place since.

    """
    use.require_unchanged()
    if all(g is None for g in use.output_gradients):
        return {}
    found = _by_rule(use)
    return {j: per_operation(use, j) for j in use.call.followed} if found is None else found


def stacked_factors(uses: Sequence[Use]) -> list[dict[int, Factor]] | None:
    """Factors of calls of one kind, all of them found at once: on small tensors, what counts is the number of kernels.

    Args:
        uses: Uses with their gradients, see `Call.kind`.

    Returns:
        Factors by leaf number for each use, uses of the same sources taken together as the first of them; None if the
        rule does not cover them.

    Raises:
        CaptureError: If an argument was changed in place since.

    """
    first, calls = uses[0], len(uses)
    for use in uses:
        use.require_unchanged()
    leaves = list(first.leaves)
    for j, dimension in first.call.batched:
        leaves[j] = torch.cat([use.leaves[j] for use in uses], dim=dimension.dim)
    gradients = [
        None if given[0] is None or dimension is None else torch.cat(given, dim=1 + dimension.dim)
        for *given, dimension in zip(*(use.gradients for use in uses), first.call.outputs, strict=True)
    ]
    found = _by_rule(replace(first, leaves=leaves, gradients=gradients, samples=calls * first.samples, stacked=calls))
    if found is None:
        return None
    if all(use.call.sources == first.call.sources for use in uses):
        return [{j: factor.summed(calls) for j, factor in found.items()}]
    parts = {j: factor.unstacked(calls) for j, factor in found.items()}
    return [{j: part[i] for j, part in parts.items()} for i in range(calls)]


def _by_rule(use: Use) -> dict[int, Any] | None:
    """What the rule of a use finds for all of its followed arguments; None if it does not serve them all."""
    apply = _rules.get(use.call.func)
    args, kwargs = unflatten_call(use.leaves, use.spec)
    if apply is None or not _admits(apply, len(args), tuple(kwargs)):
        return None
    if any(isinstance(x, Tensor) and x.is_complex() for x in use.leaves):
        return None
    found: dict[int, Factor] = {}
    try:
        for argument, factor in apply(use, *args, **kwargs):
            number = use.number_of(argument)
            if number is not None:
                found[number] = factor
    except NotCovered:
        return None
    return found if len(found) == len(use.call.followed) else None


@lru_cache(maxsize=1024)
def _admits(apply: Rule, positional: int, keywords: tuple[str, ...]) -> bool:
    """Whether a rule has room for so many positional arguments, behind the use, and for these keywords.

    Returns:
        Whether it has.

    """
    try:
        inspect.signature(apply).bind(*[None] * (1 + positional), **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def per_operation(use: Use, number: int) -> Factor:
    """The default rule: differentiate the operation itself, one sample at a time.

    Args:
        use: The use.
        number: Leaf number of the parameter.

    Returns:
        Its factor.

    """
    call = use.call
    batched = [j for j, _ in call.batched]
    wanted = [j for j, g in enumerate(use.output_gradients) if g is not None]
    # Constants are copied: running the operation again must not touch a buffer that it updates.
    constants = [
        x if not isinstance(x, Tensor) else x.detach() if j in batched else x.detach().clone()
        for j, x in enumerate(use.leaves)
    ]
    for j in call.counts:
        constants[j] = use.leaves[j] // use.samples

    in_place = is_in_place(call.func)

    def one_sample(parameter: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = list(constants)
        leaves[number] = parameter
        for j, x in zip(batched, inputs, strict=True):
            leaves[j] = x.clone() if in_place else x
        args, kwargs = unflatten_call(leaves, use.spec)
        with torch.autocast(parameter.device.type, use.autocast, enabled=use.autocast is not None, cache_enabled=False):
            outputs = tensors_of(call.func(*args, **kwargs))
        return tuple(outputs[j] for j in wanted)

    return PerOperation(
        one_sample,
        constants[number],
        [samples_first(constants[j], dimension, use.samples) for j, dimension in call.batched],
        [g for g in use.output_gradients if g is not None],
        call.describe(),
        use.require_unchanged,
    )


def outer_of(use: Use, parameter: Tensor, left: Tensor, right: Tensor, came_back: int = 0) -> Factor:
    """Outer products, in the form that is cheapest unless both sides are to be kept; see `factors.outer`.

    Args:
        use: The use.
        parameter: The argument whose rows they are.
        left: [R or 1, N, T, d_out], or int64 [1, N, T] for one-hot rows.
        right: [R or 1, N, T, d_in].
        came_back: Which side is the gradient of the output, 0 for left, 1 for right.

    Returns:
        The factor.

    """
    number = use.number_of(parameter)
    keep = number is not None and use.call.sources[number] in use.keep_sides
    return outer(left, right, parameter.shape, came_back, keep, use.stacked)


# --- the fast rules ---------------------------------------------------------------------------------------------------


def sum_to(values: Tensor, shape: torch.Size) -> Tensor:
    """Undo broadcasting: sum per-sample values [R, N, ...] to [R, N, *shape].

    Args:
        values: Values, as broadcast.
        shape: Shape before.

    Returns:
        The sums.

    Raises:
        NotCovered: If there are fewer dimensions than before.

    """
    extra = values.ndim - 2 - len(shape)
    if extra < 0:
        raise NotCovered
    if extra:
        values = values.flatten(2, 1 + extra).sum(2)
    spread = [2 + d for d, size in enumerate(shape) if size == 1 and values.shape[2 + d] != 1]
    return values.sum(spread, keepdim=True) if spread else values


@rule(F.linear, several_calls=True)
def linear(use: Use, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Found:
    """Linear layer, y = x Wᵀ + b."""
    if weight.ndim != 2:
        raise NotCovered
    gradient = use.cotangent.flatten(2, -2)
    if use.tracks(weight):
        inputs = use.positions(input)
        yield weight, outer_of(use, weight, gradient, inputs)
    # One position is not copied: weight and bias then share the inner products of this gradient.
    if use.tracks(bias):
        yield bias, Dense(gradient.sum(2) if gradient.shape[2] > 1 else gradient[:, :, 0])


@rule(torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, several_calls=True)
def matmul(use: Use, input: Tensor, other: Tensor) -> Found:
    """Product with a matrix, y = x W."""
    if other.ndim != 2 or use.tracks(input):
        raise NotCovered
    yield other, outer_of(use, other, use.positions(input), use.cotangent.flatten(2, -2), came_back=1)


@rule(torch.addmm, Tensor.addmm, several_calls=True)
def addmm(use: Use, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Found:
    """Linear layer of GPT-2, y = b + x W."""
    if beta != 1 or alpha != 1 or use.tracks(mat1) or input.shape != mat2.shape[1:]:
        raise NotCovered
    gradient = use.cotangent
    if use.tracks(input):
        yield input, Dense(gradient.flatten(2, -2).sum(2))
    if use.tracks(mat2):
        yield mat2, outer_of(use, mat2, use.positions(mat1), gradient.flatten(2, -2), came_back=1)


@rule(F.conv1d, F.conv2d, F.conv3d, several_calls=True)
def convolution(
    use: Use,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Found:
    """A convolution is a linear layer on patches."""
    dims = weight.ndim - 2
    if groups != 1 or isinstance(padding, str) or input.ndim != weight.ndim or use.batch_dim(input) != 0:
        raise NotCovered
    gradient = use.cotangent.flatten(4)  # [R, N, 1 or folded, d_out, positions]
    gradient = gradient.transpose(-1, -2).flatten(2, 3)
    if use.tracks(weight):
        patches = _patches(input, weight.shape[2:], *(_each(x, dims) for x in (stride, padding, dilation)))
        inputs = use.split(patches, input)[None].flatten(2, 3)
        yield weight, outer_of(use, weight, gradient, inputs)
    if use.tracks(bias):
        yield bias, Dense(gradient.sum(2))


def _each(x: int | Sequence[int], dims: int) -> Sequence[int]:
    return [x] * dims if isinstance(x, int) else list(x) * (dims if len(x) == 1 else 1)


def _patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The patches a kernel sees, in any number of dimensions: [N, C, *size] → [N, positions, C * kernel elements]."""
    x = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
    for dim, (size, step, spacing) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(dim, spacing * (size - 1) + 1, step)[..., ::spacing]
    dims = len(kernel)
    return x.movedim(1, 1 + dims).flatten(1, dims).flatten(2)  # from [N, C, *positions, *kernel]


@rule(F.embedding, several_calls=True)
def embedding(
    use: Use,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Found:
    """Embedding, y = W[i]: the outer product of a one-hot row with the gradient."""
    if max_norm is not None or scale_grad_by_freq:
        option = "max_norm" if max_norm is not None else "scale_grad_by_freq"
        raise CaptureError(
            f"{use.call.describe()} uses {option}, which makes the gradient of a sample depend on the whole "
            f"batch. Switch {option} off or freeze the embedding with requires_grad_(False)."
        )
    index = use.split(input, input).flatten(1)
    gradient = use.cotangent.flatten(2, -2)
    if padding_idx is not None:
        padding = index == (padding_idx if padding_idx >= 0 else padding_idx + len(weight))
        gradient = gradient.masked_fill(padding[None, :, :, None], 0.0)
    yield weight, outer_of(use, weight, index[None].long(), gradient, came_back=1)


def _affine(use: Use, input: Tensor, normalised: Tensor, weight: Tensor | None, bias: Tensor | None) -> Found:
    """Affine map y = x̂ ⊙ w + b, with w and b on the trailing dimensions."""
    gradient = use.cotangent
    if weight is not None:
        yield weight, Dense(sum_to(gradient * use.split(normalised, input), weight.shape))
    if bias is not None:
        yield bias, Dense(sum_to(gradient, bias.shape))


@rule(F.layer_norm, several_calls=True)
def layer_norm(
    use: Use,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Found:
    """Layer normalisation."""
    yield from _affine(use, input, F.layer_norm(input, normalized_shape, eps=eps), weight, bias)


@rule(F.rms_norm, several_calls=True)
def rms_norm(
    use: Use,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Found:
    """Root-mean-square normalisation."""
    yield from _affine(use, input, F.rms_norm(input, normalized_shape, eps=eps), weight, None)


def _channelwise(use: Use, input: Tensor, normalised: Tensor, weight: Tensor | None, bias: Tensor | None) -> Found:
    """The same for channels on dimension 1 of the input: they are moved to the end first."""
    gradient = use.cotangent.flatten(3 + 1) if input.ndim > 2 else use.cotangent.unsqueeze(-1)
    # [R, N, 1 or folded, C, positions]
    if weight is not None:
        x = use.split(normalised, input)
        x = x.flatten(3) if input.ndim > 2 else x.unsqueeze(-1)
        yield weight, Dense((gradient * x).sum((2, 4)))
    if bias is not None:
        yield bias, Dense(gradient.sum((2, 4)))


@rule(F.group_norm, several_calls=True)
def group_norm(
    use: Use,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Found:
    """Group normalisation."""
    yield from _channelwise(use, input, F.group_norm(input, num_groups, eps=eps), weight, bias)


@rule(F.batch_norm)
def batch_norm(
    use: Use,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Found:
    """Batch normalisation with fixed statistics; with those of the batch it mixes samples."""
    if training:
        raise CaptureError(mixes_samples(use.call.describe()))
    normalised = F.batch_norm(input, running_mean, running_var, eps=eps)
    yield from _channelwise(use, input, normalised, weight, bias)


@rule(torch.mul, Tensor.mul, several_calls=True)
def mul(use: Use, input: Tensor, other: Tensor) -> Found:
    """Elementwise product, y = x ⊙ p, either way round."""
    p, x = (input, other) if use.tracks(input) else (other, input)
    if use.tracks(x):
        raise NotCovered
    gradient = use.cotangent
    x = use.split(x, x)
    # One sample's x may have fewer dimensions than the output.
    x = x.reshape(len(x), *(1,) * (gradient.ndim - 1 - x.ndim), *x.shape[1:])
    yield p, Dense(sum_to(gradient * x, p.shape))


def _added(use: Use, p: Any, factor: float = 1.0) -> Found:
    if use.tracks(p):
        gradient = use.cotangent if factor == 1.0 else use.cotangent * factor
        yield p, Dense(sum_to(gradient, p.shape))


@rule(torch.add, Tensor.add, several_calls=True)
def add(use: Use, input: Any, other: Any, *, alpha: float = 1.0) -> Found:
    """Sum, y = x + α p."""
    yield from _added(use, input)
    yield from _added(use, other, alpha)


@rule(torch.sub, Tensor.sub, several_calls=True)
def sub(use: Use, input: Any, other: Any, *, alpha: float = 1.0) -> Found:
    """Difference, y = x − α p."""
    yield from _added(use, input)
    yield from _added(use, other, -alpha)


@rule(Tensor.expand)
def expand(use: Use, input: Tensor, *sizes: int) -> Found:
    """One parameter for all samples: a class token."""
    yield input, Dense(sum_to(use.cotangent, input.shape))
