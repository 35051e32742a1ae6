"""J_z·d: the change of the logits along directions, by forward mode, or by two backward passes where there is none.

PyTorch's forward mode under vmap over the directions takes all of them through one forward pass, and knows every
operation. Left to itself it multiplies by tangents that are zero, and takes normalisation, GELU and attention apart
into passes over memory. So these few get rules of their own, which also share among the directions what depends on the
forward pass alone. A rule that does not apply leaves the operation to PyTorch.

With y = f(x) and K directions, a rule maps x and the tangents ẋ [K, ...] of its arguments to y and ẏ [K, ...]. Nothing
here has a graph, so that a rule may overwrite the memory it made.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_ief.capture.recorder import flatten_call, unflatten_call
from lightning_ief.capture.types import Function, Spec

__all__ = ["RULES", "by_forward_mode", "by_two_backward_passes", "load_decompositions"]

# Scores of attention that are computed together: on a CPU as many as its cache holds, elsewhere bounded for memory.
_SCORES = {"cpu": 2**17}
_MANY_SCORES = 2**26

_DECOMPOSITIONS = "torch._decomp.decompositions_for_jvp"

_Change = Callable[[Any], Tensor | None]
"""Maps an argument to its changes [K, ...]; None if it does not change."""

RULES: dict[Function, Function] = {}
"""The operations with a tangent rule of their own, and these."""


class _NoRuleError(NotImplementedError):
    """Raised by a rule that does not cover a call."""


def by_forward_mode(
    function: Callable[..., Any],
    primals: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]],
    rules: Mapping[Function, Function] = RULES,
) -> tuple[Any, Any]:
    """Derivatives of a function along several directions, from one pass through it.

    Args:
        function: Maps the primals to a tensor. It draws its random numbers once, for all directions.
        primals: Where.
        directions: K directions, each with an entry for each of the primals.
        rules: Tangent rules by operation; PyTorch's own derivative for all others.

    Returns:
        What the function returns, and its tangents [K, ...]. Where PyTorch has no derivative of an operation, it may
        have one after `load_decompositions`.

    """

    def followed(*duals: Tensor) -> Any:
        with _ForwardModeWithRules(rules):
            return function(*duals)

    def along(*tangents: Tensor) -> Any:
        return torch.func.jvp(followed, tuple(primals), tangents)

    # The fused kernels of attention have no forward mode. Only what stands under no_grad in the model is constant.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), _without_decompositions():
        if len(directions) == 1:
            output, change = along(*directions[0])
            return output, change.unsqueeze(0)
        stacked = [torch.stack(column) for column in zip(*directions, strict=True)]
        together = torch.func.vmap(along, out_dims=cast(Any, (None, 0)), randomness="same")
        return cast(tuple[Any, Any], together(*stacked))


def load_decompositions() -> bool:
    """Have PyTorch compile the derivatives that it has of backward passes of normalisations, and of a few others.

    It would do so whenever a process first enters forward mode: half a second, for what hardly any forward pass uses.

    Returns:
        Whether there is something new: they had not been there yet.

    """
    before = _DECOMPOSITIONS in sys.modules
    forward_ad._maybe_load_decompositions()
    return not before and _DECOMPOSITIONS in sys.modules


@contextmanager
def _without_decompositions() -> Iterator[None]:
    load = forward_ad._maybe_load_decompositions
    forward_ad._maybe_load_decompositions = lambda: None
    try:
        yield
    finally:
        forward_ad._maybe_load_decompositions = load


def by_two_backward_passes(
    function: Callable[..., Tensor], primals: Sequence[Tensor], direction: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The same along one direction, for kernels without forward mode.

    A backward pass is linear in the cotangent it starts from, so that its own backward pass gives the derivative.

    Args:
        function: Maps the primals to a tensor.
        primals: Where.
        direction: An entry for each of the primals.

    Returns:
        What the function returns, and its tangent.

    """
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():  # the fused kernels have no second derivative
        leaves = [x.detach().clone().requires_grad_() for x in primals]
        output = function(*leaves)
        cotangent = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, leaves, cotangent, create_graph=True, materialize_grads=True)
        (tangent,) = torch.autograd.grad(pulled, cotangent, direction, materialize_grads=True)
    return output.detach(), tangent.detach()


class _ForwardModeWithRules(TorchFunctionMode):
    """Within forward mode, give the operations that have one to their rule."""

    def __init__(self, rules: Mapping[Function, Function]) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(
        self, func: Function, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            # Constants to the backward pass, which forward mode would follow.
            return pytree.tree_map_only(Tensor, _constant, func(*args, **kwargs))
        rule = self.rules.get(func)
        if rule is None:
            return func(*args, **kwargs)
        leaves, spec = flatten_call(args, kwargs)
        tensors = {j: forward_ad.unpack_dual(x) for j, x in enumerate(leaves) if isinstance(x, Tensor)}
        changing = [j for j, dual in tensors.items() if dual.tangent is not None]
        if changing and not torch.is_autocast_enabled(tensors[changing[0]].primal.device.type):
            constants = [None if j in tensors else x for j, x in enumerate(leaves)]
            call = _Call(rule, constants, spec, list(tensors), changing)
            try:
                outputs = _ByRule.apply(
                    call, *(dual.primal for dual in tensors.values()), *(tensors[j].tangent for j in changing)
                )
                return forward_ad.make_dual(*outputs)
            except (_NoRuleError, RuntimeError):
                pass  # to PyTorch, which may know better, and whose errors are those that users know
        return func(*args, **kwargs)


def _constant(x: Tensor) -> Tensor:
    return forward_ad.unpack_dual(x).primal


@dataclass
class _Call:
    """One call of an operation that has a rule.

    Attributes:
        rule: The rule.
        constants: Its arguments, flattened, None in the place of tensors.
        spec: How `unflatten_call` puts them together again.
        tensors: Where its tensors stand among the arguments.
        changing: Which of these change.

    """

    rule: Function
    constants: list[Any]
    spec: Spec
    tensors: list[int]
    changing: list[int]

    def split(self, given: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Take apart what belongs to the tensors and what belongs to their changes."""
        return given[: len(self.tensors)], given[len(self.tensors) :]

    def __call__(self, tensors: Sequence[Tensor], changes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        leaves = list(self.constants)
        for j, x in zip(self.tensors, tensors, strict=True):
            leaves[j] = x
        by_argument = {id(leaves[j]): change for j, change in zip(self.changing, changes, strict=True)}
        args, kwargs = unflatten_call(leaves, self.spec)
        with torch.no_grad():
            return cast(tuple[Tensor, Tensor], self.rule(lambda x: by_argument.get(id(x)), *args, **kwargs))


class _ByRule(torch.autograd.Function):
    """A call of a rule, which gets plain tensors whether or not there is a vmap over the directions."""

    @staticmethod
    def forward(call: _Call, *given: Tensor) -> tuple[Tensor, Tensor]:
        tensors, changes = call.split(given)
        output, change = call(tensors, [x.unsqueeze(0) for x in changes])
        return output, change.squeeze(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *given: Tensor) -> tuple[Any, tuple[Any, Any]]:
        tensors, changes = call.split(given)
        fixed, moving = call.split(in_dims[1:])
        if any(dim is not None for dim in fixed):
            raise _NoRuleError
        changes = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(changes, moving, strict=True)
        ]
        return call(tensors, changes), (None, 0)


# --- one operation ----------------------------------------------------------------------------------------------------


def _rule(*functions: Function) -> Callable[[Function], Function]:
    def register(rule: Function) -> Function:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _stacked(changes: Sequence[Tensor]) -> Tensor:
    """The same as torch.stack, without a copy of a single one."""
    return changes[0].unsqueeze(0) if len(changes) == 1 else torch.stack(list(changes))


def _each(changes: Tensor | None, count: int) -> Sequence[Any]:
    return [None] * count if changes is None else changes.unbind()


@_rule(F.linear)
def _linear(change: _Change, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    # ẏ = x Ẇᵀ + ḃ + ẋ Wᵀ, the last for all directions at once.
    if weight.ndim != 2:
        raise _NoRuleError
    dx, dw, db = change(input), change(weight), change(bias)
    count = next(len(d) for d in (dx, dw, db) if d is not None)
    output, rows = F.linear(input, weight, bias), input.reshape(-1, weight.shape[1])
    changes = output.new_empty(count, len(rows), len(weight))
    for into, w, b in zip(changes, _each(dw, count), _each(db, count), strict=True):
        if w is None:
            into.copy_(0 if b is None else b)
        elif b is None:
            torch.mm(rows, w.t(), out=into)
        else:
            torch.addmm(b, rows, w.t(), out=into)
    if dx is not None:
        beta = 0 if dw is None and db is None else 1
        changes.view(-1, len(weight)).addmm_(dx.reshape(-1, weight.shape[1]), weight.t(), beta=beta)
    return output, changes.view(count, *output.shape)


def _convolution(convolve: Function) -> Function:
    def rule(
        change: _Change, input: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        if input.ndim != weight.ndim:
            raise _NoRuleError
        dx, dw, db = change(input), change(weight), change(bias)
        parts = []
        if dw is not None:
            parts.append(_stacked([convolve(input, w, None, *options, **named) for w in dw]))
        if dx is not None:
            together = convolve(dx.flatten(0, 1), weight, None, *options, **named)
            parts.append(together.unflatten(0, dx.shape[:2]))
        output = convolve(input, weight, bias, *options, **named)
        if db is not None:
            spread = db.view(len(db), 1, -1, *[1] * (weight.ndim - 2))
            parts.append(spread if parts else spread.expand(len(db), *output.shape).clone())
        changes = parts[0]
        for part in parts[1:]:
            changes += part
        return output, changes

    return rule


for _convolve in (F.conv1d, F.conv2d, F.conv3d):
    _rule(_convolve)(_convolution(_convolve))


@_rule(F.embedding)
def _embedding(
    change: _Change, input: Tensor, weight: Tensor, padding_idx: int | None = None, *options: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    if any(x is not None for x in (*options[:1], named.get("max_norm"))):  # it changes the weight
        raise _NoRuleError
    changes = cast(Tensor, change(weight))[:, input]
    # The backward pass takes the row of the padding for a constant; PyTorch's forward mode does not.
    if padding_idx is not None:
        changes.masked_fill_((input == padding_idx % len(weight))[..., None], 0.0)
    return F.embedding(input, weight, padding_idx), changes


@_rule(F.layer_norm)
def _layer_norm(
    change: _Change,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    # With x̂ = (x − mean) / deviation: ẏ = x̂ ẇ + ḃ + w (∂x̂/∂x) ẋ. That derivative is symmetric, so that the kernel of
    # the backward pass computes it.
    output, mean, inverse = torch.native_layer_norm(input, normalized_shape, weight, bias, eps)
    dx, dw, db = change(input), change(weight), change(bias)
    count = next(len(d) for d in (dx, dw, db) if d is not None)
    dw, db = (None if d is None else d.view(count, *[1] * (input.ndim - d.ndim + 1), *d.shape[1:]) for d in (dw, db))
    changes = output.new_empty(count, *output.shape)
    if dw is None:
        changes.copy_(changes.new_zeros(()) if db is None else db)
    else:
        normalised = F.layer_norm(input, normalized_shape, None, None, eps)
        torch.addcmul(changes.new_zeros(()) if db is None else db, normalised, dw, out=changes)
    for into, x in zip(changes, _each(dx, count), strict=True):
        if x is not None:
            slope = torch.ops.aten.native_layer_norm_backward(
                x.contiguous(), input, normalized_shape, mean, inverse, None, None, [True, False, False]
            )[0]
            into.add_(slope) if weight is None else into.addcmul_(slope, weight)
    return output, changes


@_rule(F.gelu)
def _gelu(change: _Change, input: Tensor, approximate: str = "none") -> tuple[Tensor, Tensor]:
    changes = cast(Tensor, change(input))
    slope = torch.ops.aten.gelu_backward
    output = F.gelu(input, approximate=approximate)
    if len(changes) == 1:
        return output, slope(changes[0], input, approximate=approximate).unsqueeze(0)
    return output, changes * slope(input.new_ones(()).expand_as(input), input, approximate=approximate)


@_rule(F.scaled_dot_product_attention)
def _attention(
    change: _Change,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    # P = softmax(S) with S = Q Kᵀ / √E and Y = P V. With D = P ∘ Ṡ:  Ẏ = D V − (D 1) ∘ Y + P V̇.
    alike = query.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    if dropout_p > 0 or enable_gqa or not alike or change(attn_mask) is not None:
        raise _NoRuleError
    samples, heads, length, width = query.shape
    positions, alpha = key.shape[2], 1 / math.sqrt(width) if scale is None else scale
    changing = [change(x) for x in (query, key, value)]
    count = next(len(d) for d in changing if d is not None)
    # As the model's own kernels lay them out: what follows puts the heads side by side.
    output = query.new_empty(samples, length, heads, value.shape[3]).transpose(1, 2)
    changes = query.new_empty(count, samples, length, heads, value.shape[3]).transpose(2, 3)
    if is_causal:
        attn_mask = torch.ones(length, positions, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        attn_mask = attn_mask.expand(samples, heads, length, positions)
    limit = _SCORES.get(query.device.type, _MANY_SCORES)
    step = max(1, min(samples, limit // (heads * length * positions)))
    memory = query.new_empty(2, step * heads, length, positions)
    for start in range(0, samples, step):
        part = slice(start, start + step)
        q, k, v = (x[part].flatten(0, 1) for x in (query, key, value))
        scores, turned = memory[:, : len(q)]
        scores.baddbmm_(q, k.mT, beta=0, alpha=alpha)
        if attn_mask is None:
            p = scores.softmax(-1)
        else:
            mask = attn_mask[part].flatten(0, 1)
            masked = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
            p = torch.ops.aten._safe_softmax(masked, -1)  # 0 for a query that may look at nothing, as theirs
        y = torch.bmm(p, v)
        output[part] = y.unflatten(0, (-1, heads))
        for j in range(count):
            dq, dk, dv = (None if d is None else d[j, part].flatten(0, 1) for d in changing)
            changed = torch.zeros_like(y) if dv is None else torch.bmm(p, dv)
            if dq is not None or dk is not None:
                if dq is not None:
                    turned.baddbmm_(dq, k.mT, beta=0, alpha=alpha)
                if dk is not None:
                    turned.baddbmm_(q, dk.mT, beta=0 if dq is None else 1, alpha=alpha)
                turned.mul_(p)
                changed.baddbmm_(turned, v).addcmul_(turned.sum(-1, keepdim=True), y, value=-1)
            changes[j, part] = changed.unflatten(0, (-1, heads))
    return output, changes
