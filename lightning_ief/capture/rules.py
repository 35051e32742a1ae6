"""Rules: from one use of a parameter to the factors of its per-sample gradient.

The default rule is exact for any operation that treats samples alike; the others exist for speed, and each is tested
against it. To add one, write a generator with the signature of the operation behind the `Operation`, decorate it with
the functions it serves, and yield a factor for every argument that may be a parameter. A rule that does not cover a
case raises `NotCovered`, and the default takes over.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ief.capture.factors import Dense, Factor, PerOperation, outer
from lightning_ief.capture.recorder import is_in_place, tensors_of, unflatten_call
from lightning_ief.capture.types import BatchDimension, CaptureError, Function, Use, call_name
from lightning_ief.linalg.scaling import upcast

__all__ = [
    "NotCovered",
    "Operation",
    "factors_of",
    "known_rules",
    "require_unchanged",
    "rule",
    "samples_first",
    "stacked_factors",
]

Found = Iterator[tuple[Any, Factor]]
"""What a rule yields: an argument that may be a parameter (or None), and its factor."""

Rule = Callable[..., Found]
_rules: dict[Function, Rule] = {}
_for_several_calls: set[Function] = set()

_IN_FRONT = BatchDimension(0), BatchDimension(0, folded=True)


class NotCovered(Exception):
    """Raised by a rule for arguments it has no formula for."""


class Operation:
    """A use together with the gradients of its outputs, as rules see it.

    Args:
        use: The recorded use.
        output_gradients: For each output of the operation, its cotangents [R, *output shape], None if there are none.
        samples: N.
        calls: Of how many calls it holds the samples, one call after the other; N counts all of them.
        keep_sides: Parameters of which outer products are kept as they are.

    Raises:
        CaptureError: If the batch does not stand where it was measured, or an argument was changed in place since.

    """

    def __init__(
        self,
        use: Use,
        output_gradients: Sequence[Tensor | None],
        samples: int,
        calls: int = 1,
        keep_sides: Collection[str] = (),
    ) -> None:
        self.use = use
        self.keep_sides = keep_sides
        self.samples = samples
        self.calls = calls
        self.args, self.kwargs = unflatten_call(use.leaves, use.spec)
        self.check_unchanged()
        self.output_gradients = [
            None if g is None or dimension is None else _split_each(g, dimension, samples)
            for g, dimension in zip(output_gradients, use.plan.outputs, strict=True)
        ]

    def check_unchanged(self) -> None:
        """Require that no argument was changed in place since it was recorded.

        Raises:
            CaptureError: If one was.

        """
        require_unchanged(self.use)

    def tracks(self, x: Any) -> bool:
        """Whether rows are wanted for this argument.

        Args:
            x: An argument of the operation.

        Returns:
            Whether it is a parameter, or a tensor made from parameters.

        """
        return any(
            leaf is x and source is not None
            for leaf, source in zip(self.use.leaves, self.use.plan.sources, strict=True)
        )

    def outer(self, parameter: Tensor, left: Tensor, right: Tensor, came_back: int = 0) -> Factor:
        """Outer products, in the form that is cheapest unless both sides are to be kept; see `outer`.

        Args:
            parameter: The argument whose rows they are.
            left: [R or 1, N, T, d_out], or int64 [1, N, T] for one-hot rows.
            right: [R or 1, N, T, d_in].
            came_back: Which side is the gradient of the output, 0 for left, 1 for right.

        Returns:
            The factor.

        """
        sources = zip(self.use.leaves, self.use.plan.sources, strict=True)
        keep = any(leaf is parameter and source in self.keep_sides for leaf, source in sources)
        return outer(left, right, parameter.shape, came_back, keep, self.calls)

    @property
    def cotangent(self) -> Tensor:
        """Gradient of the only output.

        Returns:
            Shape [R, N, *output shape of a batch of one].

        Raises:
            NotCovered: If there are several.

        """
        if len(self.output_gradients) != 1 or self.output_gradients[0] is None:
            raise NotCovered
        return upcast(self.output_gradients[0])

    def positions(self, x: Tensor) -> Tensor:
        """Samples of an argument, and the vectors in each of them.

        Args:
            x: An argument of the operation.

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
            x: An argument of the operation.

        Returns:
            The dimension, None for constants.

        """
        dimension = self._dimension(x)
        return None if dimension is None else dimension.dim

    def _dimension(self, x: Tensor) -> BatchDimension | None:
        for leaf, dimension in zip(self.use.leaves, self.use.plan.inputs, strict=True):
            if leaf is x and dimension is not None:
                return dimension
        return None

    def split(self, value: Tensor, like: Tensor) -> Tensor:
        """Bring the samples of a tensor to the front.

        Args:
            value: A tensor with the batch where the argument `like` has it.
            like: An argument of the operation.

        Returns:
            Shape [N, *shape for a batch of one].

        Raises:
            NotCovered: If that argument is a constant.

        """
        dimension = self._dimension(like)
        if dimension is None:
            raise NotCovered
        return samples_first(value, dimension, self.samples)


def require_unchanged(use: Use) -> None:
    """Require that no argument of an operation was changed in place since it was recorded.

    Args:
        use: The operation.

    Raises:
        CaptureError: If one was.

    """
    for leaf, version in zip(use.leaves, use.versions, strict=True):
        if isinstance(leaf, Tensor) and leaf._version != version:
            raise CaptureError(
                f"An argument of {use.plan.describe()} was changed in place after the call, so that the "
                "per-sample gradients can't be computed from it any more. Use the out-of-place operation there; "
                "and read everything you need of a linearization before the parameters are updated."
            )


def samples_first(x: Tensor, dimension: BatchDimension, samples: int) -> Tensor:
    """Bring the samples of a tensor to the front.

    Args:
        x: The tensor.
        dimension: Where the batch stands in it.
        samples: N.

    Returns:
        Shape [N, ...], where ... are the sizes of x with the batch dimension replaced by the number of folded positions
        (1 if none): what the operation would see of a batch of one.

    """
    if not dimension.folded and dimension.dim == 0:
        return x.unsqueeze(1)
    if dimension.samples_first:
        return x.unflatten(dimension.dim, (samples, -1)).movedim(dimension.dim, 0)
    return x.unflatten(dimension.dim, (-1, samples)).movedim(dimension.dim + 1, 0)


def _split_each(cotangents: Tensor, dimension: BatchDimension, samples: int) -> Tensor:
    """[R, *shape] → [R, N, ...], see `samples_first`; without a copy."""
    dim = 1 + dimension.dim
    if not dimension.folded and dim == 1:
        return cotangents.unsqueeze(2)
    if dimension.samples_first:
        return cotangents.unflatten(dim, (samples, -1)).movedim(dim, 1)
    return cotangents.unflatten(dim, (-1, samples)).movedim(dim + 1, 1)


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


def factors_of(operation: Operation) -> dict[int, Factor]:
    """Factors of all followed arguments of an operation.

    Args:
        operation: The operation.

    Returns:
        Leaf number of the argument → its factor.

    """
    if all(g is None for g in operation.output_gradients):
        return {}
    found = _by_rule(operation)
    if found is None:
        sources = operation.use.plan.sources
        found = {j: per_operation(operation, j) for j, source in enumerate(sources) if source is not None}
    return found


def stacked_factors(
    uses: Sequence[Use], output_gradients: Sequence[Sequence[Tensor | None]], samples: int
) -> list[dict[int, Factor]] | None:
    """Factors of calls of one kind, all of them found at once: on small tensors, what counts is the number of kernels.

    Args:
        uses: The calls, see `CallPlan.kind`.
        output_gradients: As for `Operation`, for each of them.
        samples: N.

    Returns:
        Factors by leaf number for each call, calls on the same sources taken together as the first of them; None if
        there is no rule that serves several calls at once.

    """
    first, calls = uses[0], len(uses)
    if first.func not in _for_several_calls:
        return None
    for use in uses:
        require_unchanged(use)
    leaves = [
        x if dimension is None else torch.cat([use.leaves[j] for use in uses], dim=dimension.dim)
        for j, (x, dimension) in enumerate(zip(first.leaves, first.plan.inputs, strict=True))
    ]
    versions = [x._version if isinstance(x, Tensor) else None for x in leaves]
    gradients = [
        None if given[0] is None or dimension is None else torch.cat(given, dim=1 + dimension.dim)
        for *given, dimension in zip(*output_gradients, first.plan.outputs, strict=True)
    ]
    together = replace(first, leaves=leaves, versions=versions)
    found = _by_rule(Operation(together, gradients, calls * samples, calls))
    if found is None:
        return None
    if all(use.plan.sources == first.plan.sources for use in uses):
        return [{j: factor.summed(calls) for j, factor in found.items()}]
    parts = {j: factor.unstacked(calls) for j, factor in found.items()}
    return [{j: part[i] for j, part in parts.items()} for i in range(calls)]


def _by_rule(operation: Operation) -> dict[int, Any] | None:
    """What the rule of an operation finds for all of its followed arguments; None if it does not serve them all."""
    sources, leaves = operation.use.plan.sources, operation.use.leaves
    numbers = [j for j, source in enumerate(sources) if source is not None]
    apply = _rules.get(operation.use.func)
    if apply is None or not _takes(apply, operation):
        return None
    found: dict[int, Factor] = {}
    try:
        for argument, factor in apply(operation, *operation.args, **operation.kwargs):
            if operation.tracks(argument):
                found[next(j for j in numbers if leaves[j] is argument)] = factor
    except NotCovered:
        return None
    return found if len(found) == len(numbers) else None


def _takes(apply: Rule, operation: Operation) -> bool:
    """Whether a rule admits the call: by its signature, and without complex numbers.

    Returns:
        Whether it does.

    """
    if any(isinstance(x, Tensor) and x.is_complex() for x in operation.use.leaves):
        return False
    return _admits(apply, len(operation.args), tuple(operation.kwargs))


@lru_cache(maxsize=1024)
def _admits(apply: Rule, positional: int, keywords: tuple[str, ...]) -> bool:
    """Whether a rule has room for so many positional arguments, behind the operation, and for these keywords.

    Returns:
        Whether it has.

    """
    try:
        inspect.signature(apply).bind(*[None] * (1 + positional), **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def per_operation(operation: Operation, number: int) -> Factor:
    """The default rule: differentiate the operation itself, one sample at a time.

    Args:
        operation: The operation.
        number: Leaf number of the parameter.

    Returns:
        Its factor.

    """
    use, plan = operation.use, operation.use.plan
    batched = [j for j, dimension in enumerate(plan.inputs) if dimension is not None]
    wanted = [j for j, g in enumerate(operation.output_gradients) if g is not None]
    # Constants are copied: running the operation again must not touch a buffer that it updates.
    constants = [
        x.detach()
        if isinstance(x, Tensor) and dimension is not None
        else x.detach().clone()
        if isinstance(x, Tensor)
        else x
        for x, dimension in zip(use.leaves, plan.inputs, strict=True)
    ]
    for j in plan.counts:
        constants[j] = use.leaves[j] // operation.samples

    in_place = is_in_place(use.func)

    def one_sample(parameter: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = list(constants)
        leaves[number] = parameter
        for j, x in zip(batched, inputs, strict=True):
            leaves[j] = x.clone() if in_place else x
        args, kwargs = unflatten_call(leaves, use.spec)
        with torch.autocast(parameter.device.type, use.autocast, enabled=use.autocast is not None, cache_enabled=False):
            outputs = tensors_of(use.func(*args, **kwargs))
        return tuple(outputs[j] for j in wanted)

    inputs = []
    for j in batched:
        dimension = plan.inputs[j]
        assert dimension is not None
        inputs.append(samples_first(constants[j], dimension, operation.samples))
    return PerOperation(
        one_sample,
        constants[number],
        inputs,
        [g for g in operation.output_gradients if g is not None],
        plan.describe(),
        operation.check_unchanged,
    )


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
def linear(operation: Operation, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Found:
    """Linear layer, y = x Wᵀ + b."""
    if weight.ndim != 2:
        raise NotCovered
    gradient = operation.cotangent.flatten(2, -2)
    if operation.tracks(weight):
        inputs = operation.positions(input)
        yield weight, operation.outer(weight, gradient, inputs)
    # One position is not copied: weight and bias then share the inner products of this gradient.
    if operation.tracks(bias):
        yield bias, Dense(gradient.sum(2) if gradient.shape[2] > 1 else gradient[:, :, 0])


@rule(torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, several_calls=True)
def matmul(operation: Operation, input: Tensor, other: Tensor) -> Found:
    """Product with a matrix, y = x W."""
    if other.ndim != 2 or operation.tracks(input):
        raise NotCovered
    yield other, operation.outer(other, operation.positions(input), operation.cotangent.flatten(2, -2), came_back=1)


@rule(torch.addmm, Tensor.addmm, several_calls=True)
def addmm(
    operation: Operation, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Found:
    """Linear layer of GPT-2, y = b + x W."""
    if beta != 1 or alpha != 1 or operation.tracks(mat1) or input.shape != mat2.shape[1:]:
        raise NotCovered
    gradient = operation.cotangent
    if operation.tracks(input):
        yield input, Dense(gradient.flatten(2, -2).sum(2))
    if operation.tracks(mat2):
        yield mat2, operation.outer(mat2, operation.positions(mat1), gradient.flatten(2, -2), came_back=1)


@rule(F.conv1d, F.conv2d, F.conv3d, several_calls=True)
def convolution(
    operation: Operation,
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
    if groups != 1 or isinstance(padding, str) or input.ndim != weight.ndim or operation.batch_dim(input) != 0:
        raise NotCovered
    gradient = operation.cotangent.flatten(4)  # [R, N, 1 or folded, d_out, positions]
    gradient = gradient.transpose(-1, -2).flatten(2, 3)
    if operation.tracks(weight):
        patches = _patches(input, weight.shape[2:], *(_each(x, dims) for x in (stride, padding, dilation)))
        inputs = operation.split(patches, input)[None].flatten(2, 3)
        yield weight, operation.outer(weight, gradient, inputs)
    if operation.tracks(bias):
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
    operation: Operation,
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
            f"{operation.use.plan.describe()} uses {option}, which makes the gradient of a sample depend on the whole "
            f"batch. Switch {option} off or freeze the embedding with requires_grad_(False)."
        )
    index = operation.split(input, input).flatten(1)
    gradient = operation.cotangent.flatten(2, -2)
    if padding_idx is not None:
        padding = index == (padding_idx if padding_idx >= 0 else padding_idx + len(weight))
        gradient = gradient.masked_fill(padding[None, :, :, None], 0.0)
    yield weight, operation.outer(weight, index[None].long(), gradient, came_back=1)


def _affine(
    operation: Operation, input: Tensor, normalised: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Found:
    """Affine map y = x̂ ⊙ w + b, with w and b on the trailing dimensions."""
    gradient = operation.cotangent
    if weight is not None:
        yield weight, Dense(sum_to(gradient * operation.split(normalised, input), weight.shape))
    if bias is not None:
        yield bias, Dense(sum_to(gradient, bias.shape))


@rule(F.layer_norm, several_calls=True)
def layer_norm(
    operation: Operation,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Found:
    """Layer normalisation."""
    yield from _affine(operation, input, F.layer_norm(input, normalized_shape, eps=eps), weight, bias)


@rule(F.rms_norm, several_calls=True)
def rms_norm(
    operation: Operation,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Found:
    """Root-mean-square normalisation."""
    yield from _affine(operation, input, F.rms_norm(input, normalized_shape, eps=eps), weight, None)


def _channelwise(
    operation: Operation, input: Tensor, normalised: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Found:
    """The same for channels on dimension 1 of the input: they are moved to the end first."""
    gradient = operation.cotangent.flatten(3 + 1) if input.ndim > 2 else operation.cotangent.unsqueeze(-1)
    # [R, N, 1 or folded, C, positions]
    if weight is not None:
        x = operation.split(normalised, input)
        x = x.flatten(3) if input.ndim > 2 else x.unsqueeze(-1)
        yield weight, Dense((gradient * x).sum((2, 4)))
    if bias is not None:
        yield bias, Dense(gradient.sum((2, 4)))


@rule(F.group_norm, several_calls=True)
def group_norm(
    operation: Operation,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Found:
    """Group normalisation."""
    yield from _channelwise(operation, input, F.group_norm(input, num_groups, eps=eps), weight, bias)


@rule(F.batch_norm)
def batch_norm(
    operation: Operation,
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
        raise CaptureError(mixes_samples(operation.use.plan.describe()))
    normalised = F.batch_norm(input, running_mean, running_var, eps=eps)
    yield from _channelwise(operation, input, normalised, weight, bias)


def mixes_samples(what: str) -> str:
    """The message for batch normalisation in training.

    Args:
        what: The operation or module in words.

    Returns:
        The message.

    """
    return (
        f"{what} normalises with the statistics of the batch, so that no sample has a gradient of its own. "
        "Put it into eval() (fixed statistics), or replace it: torch.nn.GroupNorm, torch.nn.LayerNorm."
    )


@rule(torch.mul, Tensor.mul, several_calls=True)
def mul(operation: Operation, input: Tensor, other: Tensor) -> Found:
    """Elementwise product, y = x ⊙ p, either way round."""
    p, x = (input, other) if operation.tracks(input) else (other, input)
    if operation.tracks(x):
        raise NotCovered
    gradient = operation.cotangent
    x = operation.split(x, x)
    # One sample's x may have fewer dimensions than the output.
    x = x.reshape(len(x), *(1,) * (gradient.ndim - 1 - x.ndim), *x.shape[1:])
    yield p, Dense(sum_to(gradient * x, p.shape))


def _added(operation: Operation, p: Any, factor: float = 1.0) -> Found:
    if operation.tracks(p):
        gradient = operation.cotangent if factor == 1.0 else operation.cotangent * factor
        yield p, Dense(sum_to(gradient, p.shape))


@rule(torch.add, Tensor.add, several_calls=True)
def add(operation: Operation, input: Any, other: Any, *, alpha: float = 1.0) -> Found:
    """Sum, y = x + α p."""
    yield from _added(operation, input)
    yield from _added(operation, other, alpha)


@rule(torch.sub, Tensor.sub, several_calls=True)
def sub(operation: Operation, input: Any, other: Any, *, alpha: float = 1.0) -> Found:
    """Difference, y = x − α p."""
    yield from _added(operation, input)
    yield from _added(operation, other, -alpha)


@rule(Tensor.expand)
def expand(operation: Operation, input: Tensor, *sizes: int) -> Found:
    """One parameter for all samples: a class token."""
    yield input, Dense(sum_to(operation.cotangent, input.shape))
