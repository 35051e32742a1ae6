"""Parameters that no layer holds: functions, raw and derived tensors, reuse, and batches that do not stand in front.

Cases as in test_layers: N = 1, 3 and 5, sizes 3 and 5, against one sample at a time in float64.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.helpers import Function, assert_exact

pytestmark = pytest.mark.usefixtures("float64")
T, D = 3, 5  # length, features
Body = Callable[..., Tensor]
Case = tuple[Body, dict[str, tuple[int, ...]]]


def case(body: Body, **parameters: tuple[int, ...]) -> Case:
    """A function `body(m, x)` with x [N, T, D] and the parameters m.name."""
    return body, parameters


class Within(nn.Module):
    """A function in the middle of a network: its input has a gradient, and its output is not the logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(torch.sin(self.scale * x)))


def inplace(x: Tensor, operation: Callable[[Tensor], Any]) -> Tensor:
    """A copy of x after an in-place operation."""
    x = x.clone()
    operation(x)
    return x


def iadd(x: Tensor, p: Tensor) -> Tensor:
    x = x.clone()
    x += p
    return x


def imul(x: Tensor, p: Tensor) -> Tensor:
    x = x.clone()
    x *= p
    return x


def isub_slice(x: Tensor, p: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] -= p
    return x


def folded(x: Tensor, samples_first: bool) -> Tensor:
    """[N, T, D] → [N T, D] or [T N, D]."""
    return x.flatten(0, 1) if samples_first else x.transpose(0, 1).flatten(0, 1)


def unfolded(x: Tensor, samples: int, samples_first: bool) -> Tensor:
    return x.unflatten(0, (samples, -1)) if samples_first else x.unflatten(0, (-1, samples)).transpose(0, 1)


SHAPES = {"[]": (), "[D]": (D,), "[1]": (1,), "[T, 1]": (T, 1), "[T, D]": (T, D), "[1, T, D]": (1, T, D),
          "[1, 1, D]": (1, 1, D), "[2, 1, 1, D]": (2, 1, 1, D)}  # fmt: skip
SIDES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + p": lambda x, p: x + p,
    "p + x": lambda x, p: p + x,
    "x - p": lambda x, p: x - p,
    "p - x": lambda x, p: p - x,
    "x * p": lambda x, p: x * p,
    "p * x": lambda x, p: p * x,
    "x / p": lambda x, p: x / p,
    "p / x": lambda x, p: p / (x + 2),
    "torch.add(x, p, alpha=3)": lambda x, p: torch.add(x, p, alpha=3),
    "torch.add(p, x, alpha=3)": lambda x, p: torch.add(p, x, alpha=3),
    "torch.sub(x, p, alpha=3)": lambda x, p: torch.sub(x, p, alpha=3),
    "torch.sub(p, x, alpha=3)": lambda x, p: torch.sub(p, x, alpha=3),
    "torch.add(input, other)": lambda x, p: torch.add(input=p, other=x),
    "torch.mul(input, other)": lambda x, p: torch.mul(input=x, other=p),
    "torch.rsub": lambda x, p: torch.rsub(x, p),
    "x.add(p)": lambda x, p: x.add(other=p),
    "x.mul(p)": lambda x, p: x.mul(other=p),
}
ELEMENTWISE: dict[str, Case] = {
    f"{side}, p {shape}": case(lambda m, x, f=f: f(x, m.p).transpose(0, -3), p=SHAPES[shape])
    if len(SHAPES[shape]) == 4
    else case(lambda m, x, f=f: f(x, m.p), p=SHAPES[shape])
    for side, f in SIDES.items()
    for shape in (SHAPES if side in ("x + p", "p - x", "x * p", "p * x") else ["[T, 1]"])
}

INPLACE: dict[str, Case] = {
    "x.add_(p)": case(lambda m, x: inplace(x, lambda y: y.add_(m.p)), p=(D,)),
    "x.add_(p, alpha=2)": case(lambda m, x: inplace(x, lambda y: y.add_(m.p, alpha=2)), p=(T, 1)),
    "x.sub_(p)": case(lambda m, x: inplace(x, lambda y: y.sub_(m.p)), p=()),
    "x.mul_(p)": case(lambda m, x: inplace(x, lambda y: y.mul_(m.p)), p=(T, 1)),
    "x.div_(p)": case(lambda m, x: inplace(x, lambda y: y.div_(m.p)), p=(D,)),
    "x += p": case(lambda m, x: iadd(x, m.p), p=(D,)),
    "x *= p": case(lambda m, x: imul(x, m.p), p=(1, T, D)),
    "x[:, 0] -= p": case(lambda m, x: isub_slice(x, m.p), p=(D,)),
    "x.addcmul_(p, x)": case(lambda m, x: inplace(x, lambda y: y.addcmul_(m.p, x.cos())), p=(D,)),
    "x.masked_fill_(mask, p)": case(lambda m, x: inplace(x, lambda y: y.masked_fill_(x.detach() > 0.1, m.p)), p=()),
    "x.copy_(p)": case(lambda m, x: torch.empty_like(x).copy_(m.p) * x, p=(T, D)),
    "twice, an operation between": case(lambda m, x: iadd(iadd(x, m.p).sin_(), m.p).tanh_(), p=(D,)),
    "activation behind a linear layer": case(lambda m, x: F.relu_(F.linear(x, m.w)), w=(D, D)),
    "activation behind one with a bias": case(lambda m, x: F.relu_(F.linear(x, m.w, m.b)), w=(D, D), b=(D,)),
    "several behind one with a bias": case(
        lambda m, x: F.linear(x, m.w, m.b).mul_(m.b).add_(m.b).relu_(), w=(D, D), b=(D,)
    ),
    "of a view, which is used, too": case(lambda m, x: inplace(x, lambda y: y.view(len(y), -1).mul_(m.p)), p=(T * D,)),
}

PRODUCTS: dict[str, Case] = {
    "x @ w": case(lambda m, x: x @ m.w, w=(D, 4)),
    "x @ vector": case(lambda m, x: x @ m.w, w=(D,)),
    "vector @ x": case(lambda m, x: m.w @ x, w=(T,)),
    "w @ x": case(lambda m, x: m.w @ x, w=(4, T)),
    "w @ x.mT": case(lambda m, x: m.w @ x.mT, w=(4, D)),
    "w @ x.T": case(lambda m, x: (m.w @ x[:, 0].T).T, w=(4, D)),
    "torch.matmul(input, other)": case(lambda m, x: torch.matmul(input=x, other=m.w), w=(D, 4)),
    "x @ heads": case(lambda m, x: x[:, None] @ m.w, w=(2, D, 4)),
    "torch.mm": case(lambda m, x: torch.mm(x[:, 0], m.w), w=(D, 4)),
    "torch.mm, p first": case(lambda m, x: torch.mm(m.w, x[:, 0].T).T, w=(4, D)),
    "torch.mv": case(lambda m, x: torch.mv(x[:, 0], m.w), w=(D,)),
    "torch.bmm": case(lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), w=(1, D, 4)),
    "torch.bmm over heads": case(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), w=(T, D, 4)),
    "torch.bmm over heads, p first": case(
        lambda m, x: torch.bmm(m.w, x.permute(1, 2, 0)).permute(2, 0, 1), w=(T, 4, D)
    ),
    "torch.addmm": case(lambda m, x: torch.addmm(m.b, x[:, 0], m.w), b=(4,), w=(D, 4)),
    "torch.addmm, bias alone": case(lambda m, x: torch.addmm(m.b, x[:, 0], x.new_ones(D, 4)), b=(4,)),
    "torch.addmm, bias [1]": case(lambda m, x: torch.addmm(m.b, x[:, 0], m.w), b=(1,), w=(D, 4)),
    "torch.addmm, bias [1, 4]": case(lambda m, x: torch.addmm(m.b, x[:, 0], m.w), b=(1, 4), w=(D, 4)),
    "torch.addmm, beta and alpha": case(lambda m, x: torch.addmm(m.b, x[:, 0], m.w, beta=2, alpha=3), b=(4,), w=(D, 4)),
    "torch.addmm, x transposed": case(lambda m, x: torch.addmm(m.b, m.w, x[:, 0].T).T, b=(4, 1), w=(4, D)),
    "GPT-2's Conv1D": case(
        lambda m, x: torch.addmm(m.b, x.reshape(-1, D), m.w).view(*x.shape[:2], 4), b=(4,), w=(D, 4)
    ),
    "torch.baddbmm": case(lambda m, x: torch.baddbmm(m.b, x, m.w.expand(len(x), -1, -1)), b=(1, 1, 4), w=(1, D, 4)),
    "torch.einsum": case(lambda m, x: torch.einsum("ntd,dk->nkt", x, m.w), w=(D, 4)),
    "torch.einsum, p first": case(lambda m, x: torch.einsum("hdk,ntd->nhtk", m.w, x), w=(2, D, 4)),
    "torch.einsum, batch last": case(lambda m, x: torch.einsum("hd,ntd->htn", m.w, x).movedim(-1, 0), w=(2, D)),
    "torch.tensordot": case(lambda m, x: torch.tensordot(x, m.w, dims=2), w=(T, D, 4)),
    "torch.outer": case(lambda m, x: torch.outer(x[:, 0, 0], m.w), w=(D,)),
    "F.linear": case(lambda m, x: F.linear(x, m.w, m.b), w=(4, D), b=(4,)),
    "F.linear, keywords": case(lambda m, x: F.linear(input=x, bias=m.b, weight=m.w), w=(4, D), b=(4,)),
    "F.linear with a vector": case(lambda m, x: F.linear(x, m.w), w=(D,)),
    "F.linear of one position with a vector": case(lambda m, x: F.linear(x[:, 0], m.w), w=(D,)),
    "F.linear of the weights with the samples": case(lambda m, x: F.linear(m.w, x[:, 0]).T, w=(4, D)),
    "F.linear, bias alone": case(lambda m, x: F.linear(x, x.new_ones(4, D), m.b), b=(4,)),
    "F.bilinear": case(lambda m, x: F.bilinear(x, x.cos(), m.w, m.b), w=(4, D, D), b=(4,)),
    "F.conv1d over the batch": case(lambda m, x: F.conv1d(x[:, 0].T[None], m.w)[0].T, w=(4, D, 1)),
    "F.conv1d, bias alone": case(lambda m, x: F.conv1d(x, x.new_ones(4, T, 2), m.b), b=(4,)),
    "F.conv1d of an expanded input": case(lambda m, x: F.conv1d(x[:, :1].expand(-1, T, -1), m.w), w=(4, T, 2)),
    "F.layer_norm with one tensor twice": case(lambda m, x: F.layer_norm(x, (D,), m.w, m.w), w=(D,)),
    "F.layer_norm, bias alone": case(lambda m, x: F.layer_norm(x, (D,), None, m.b), b=(D,)),
    "F.group_norm, bias alone": case(lambda m, x: F.group_norm(x, 1, None, m.b), b=(T,)),
    "complex weights": case(
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(m.w), n=D), w=(T, 3, 2)
    ),
    "complex matrix": case(lambda m, x: (torch.fft.rfft(x) @ torch.view_as_complex(m.w)).abs(), w=(3, 4, 2)),
}


def with_token(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([m.token.expand(len(x), -1, -1), x], dim=1) + m.position[:, : x.shape[1] + 1]


RAW: dict[str, Case] = {
    "cls_token and pos_embed": case(with_token, token=(1, 1, D), position=(1, 9, D)),
    "expand": case(lambda m, x: m.p.expand(len(x), -1, -1) * x, p=(1, T, D)),
    "expand, size": case(lambda m, x: m.p.expand(size=(len(x), T, D)) * x, p=(T, D)),
    "expand, a shape": case(lambda m, x: m.p.expand(x.shape) * x, p=(T, D)),
    "expand, more dimensions": case(lambda m, x: m.p.expand(2, len(x), T, D).transpose(0, 1) * x[:, None], p=(D,)),
    "expand a scalar": case(lambda m, x: m.p.expand(len(x)).view(-1, 1, 1) * x, p=()),
    "expand_as": case(lambda m, x: m.p.expand_as(x) * x, p=(1, D)),
    "broadcast_to": case(lambda m, x: torch.broadcast_to(m.p, x.shape) * x, p=(T, 1)),
    "repeat": case(lambda m, x: m.p.repeat(len(x), 1, 1) * x, p=(T, D)),
    "repeat, a shape": case(lambda m, x: m.p.repeat(x.shape[:2] + (1,)) * x, p=(D,)),
    "tile": case(lambda m, x: m.p.tile(len(x), 1, 1) * x, p=(T, D)),
    "repeat_interleave": case(lambda m, x: m.p.repeat_interleave(len(x), dim=0) * x, p=(1, T, D)),
    "torch.cat": case(lambda m, x: torch.cat([x, m.p.expand(len(x), -1, -1), x], 1), p=(1, 2, D)),
    "torch.cat, batch last": case(lambda m, x: torch.cat([x[:, 0].T, m.p.expand(-1, len(x))]).T, p=(2, 1)),
    "torch.stack": case(lambda m, x: torch.stack([x, m.p.expand_as(x), m.q.expand_as(x)], 1), p=(T, D), q=(D,)),
    "ones @ p": case(lambda m, x: (x.new_ones(len(x), 1) @ m.p)[:, None] * x, p=(1, D)),
    "LayerScale": case(lambda m, x: x + m.gamma * x.cos(), gamma=(D,)),
    "temperature": case(lambda m, x: x / m.temperature.exp(), temperature=()),
    "power": case(lambda m, x: (x + 2) ** m.p, p=(D,)),
    "torch.where": case(lambda m, x: torch.where(x.detach() > 0, x, m.p), p=(D,)),
    "torch.where, both": case(lambda m, x: torch.where(x.detach() > 0, m.p, m.q) * x, p=(T, D), q=(1, D)),
    "torch.where, the same twice": case(lambda m, x: torch.where(x.detach() > 0, m.p, m.p * 2) * x, p=(T, D)),
    "torch.maximum": case(lambda m, x: torch.maximum(x, m.p), p=(D,)),
    "torch.lerp": case(lambda m, x: torch.lerp(x, m.p, m.q.sigmoid()), p=(D,), q=(T, 1)),
    "torch.addcmul": case(lambda m, x: torch.addcmul(m.p, x, m.q), p=(D,), q=(T, D)),
    "p[index]": case(lambda m, x: m.p[rank(x)] * x, p=(T, D)),
    "p[index] of one position": case(lambda m, x: m.p[rank(x)[:, 0]][:, None] * x, p=(T, D)),
    "p[:, index]": case(lambda m, x: m.p[:, rank(x)].movedim(1, 0), p=(2, T, D)),
    "p[index, index]": case(lambda m, x: m.p[rank(x), rank(x).flip(1)], p=(T, T, D)),
    "p[index, None]": case(lambda m, x: m.p[rank(x), None, 1:], p=(T, D)),
    "torch.index_select": case(lambda m, x: torch.index_select(m.p, 0, rank(x)[:, 0])[:, None] * x, p=(T, D)),
    "torch.index_select, folded": case(
        lambda m, x: torch.index_select(m.p, 0, rank(x).flatten()).view(x.shape) * x, p=(T, D)
    ),
    "torch.gather": case(lambda m, x: torch.gather(m.p.expand(len(x), -1), 1, rank(x)), p=(1, T)),
    "torch.take": case(lambda m, x: torch.take(m.p, rank(x)), p=(T,)),
    "one-hot @ p": case(lambda m, x: F.one_hot(rank(x), T).to(x.dtype) @ m.p, p=(T, D)),
    "F.embedding": case(lambda m, x: F.embedding(rank(x), m.p), p=(T, D)),
    "attention with a learned bias": case(
        lambda m, x: F.scaled_dot_product_attention(x[:, None], x[:, None].cos(), x[:, None], attn_mask=m.bias),
        bias=(1, T, T),
    ),
    "attention with learned queries": case(
        lambda m, x: F.scaled_dot_product_attention(m.q.expand(len(x), -1, -1), x, x), q=(1, 2, D)
    ),
    "attention with learned queries, not expanded": case(
        lambda m, x: F.scaled_dot_product_attention(m.q, x[:, None], x[:, None]), q=(1, 2, T, D)
    ),
    "attention with learned keys": case(
        lambda m, x: F.scaled_dot_product_attention(x, m.k.expand(len(x), -1, -1), m.v.expand(len(x), -1, -1)),
        k=(1, 2, D), v=(1, 2, D),
    ),
    "distance to prototypes": case(lambda m, x: torch.cdist(x, m.p), p=(4, D)),
    "cosine with prototypes": case(lambda m, x: F.cosine_similarity(x[:, :, None], m.p, dim=-1), p=(4, D)),
    "torch.min over dimensions": case(lambda m, x: (x[:, :, None] - m.p).square().sum(-1).min(-1)[0], p=(4, D)),
    "scatter": case(lambda m, x: x.scatter_add(1, rank(x)[..., None], m.p.expand(len(x), T, 1)), p=(1, 1, 1)),
    "view of a scalar": case(lambda m, x: m.p.view(1, 1, 1) * x, p=()),
}  # fmt: skip


def rank(x: Tensor) -> Tensor:
    """An index for every position of every sample, [N, T] in 0 … T−1."""
    return x.detach().sum(-1).argsort(1)


DERIVED: dict[str, Case] = {
    "W + B A": case(lambda m, x: F.linear(x, m.w + m.b @ m.a), w=(4, D), b=(4, 2), a=(2, D)),
    "chunked": case(
        lambda m, x: torch.cat([F.linear(x, w) * k for k, w in enumerate(m.w.chunk(3), 1)], -1), w=(6, D)
    ),
    "split, one part unused": case(lambda m, x: F.linear(x, m.w.split([4, 2])[0]), w=(6, D)),
    "unbind": case(lambda m, x: sum(F.linear(x, w) for w in m.w.unbind()), w=(3, 4, D)),
    ".t()": case(lambda m, x: F.linear(x, m.w.t()), w=(D, 4)),
    ".T": case(lambda m, x: F.linear(x, m.w.T), w=(D, 4)),
    ".mT": case(lambda m, x: x @ m.w.mT, w=(4, D)),
    "permute and reshape": case(lambda m, x: F.linear(x, m.w.permute(2, 0, 1).reshape(4, D)), w=(1, D, 4)),
    "masked": case(lambda m, x: F.linear(x, m.w * torch.ones(D, D).tril()), w=(D, D)),
    "symmetric": case(lambda m, x: F.linear(x, m.w.triu() + m.w.triu(1).T), w=(D, D)),
    "softmax of parameters": case(lambda m, x: (m.p.softmax(0) * torch.stack([x, x.cos(), x**2], -1)).sum(-1), p=(3,)),
    "normalised weights": case(lambda m, x: F.linear(x, F.normalize(m.w, dim=1)), w=(4, D)),
    "in place on a derived tensor": case(lambda m, x: F.linear(x, m.w.clone().mul_(m.s)), w=(4, D), s=(1, D)),
    "iadd on a derived tensor": case(lambda m, x: F.linear(x, iadd(m.w.clone(), m.s)), w=(4, D), s=(1, D)),
    "concatenated weights": case(lambda m, x: F.linear(x, torch.cat([m.q, m.k])), q=(2, D), k=(3, D)),
    "stacked weights": case(lambda m, x: torch.einsum("hkd,ntd->nthk", torch.stack([m.q, m.k]), x), q=(2, D), k=(2, D)),
    "block diagonal": case(lambda m, x: F.linear(x, torch.block_diag(m.q, m.k)), q=(2, 2), k=(2, 3)),
    "hypernetwork": case(lambda m, x: F.linear(x, F.linear(m.z, m.w).view(4, D)), z=(3,), w=(4 * D, 3)),
    "prompt, repeated": case(
        lambda m, x: torch.cat([F.embedding(torch.arange(2), m.p)[None].repeat(len(x), 1, 1), x], 1), p=(2, D)
    ),
    "relative position bias": case(
        lambda m, x: (
            x @ x.mT + F.embedding(torch.arange(T)[:, None] - torch.arange(T) + T - 1, m.p).permute(2, 0, 1)[:, None]
        ).transpose(0, 1),
        p=(2 * T - 1, 2),
    ),
    "interpolated positions": case(
        lambda m, x: x + F.interpolate(m.p.mT, size=x.shape[1], mode="linear").mT, p=(1, 7, D)
    ),
    "position embedding by index": case(lambda m, x: x + m.p[torch.arange(x.shape[1])], p=(9, D)),
    "derived from another": case(lambda m, x: F.linear(x, (m.w.T @ m.a).T.relu() + m.w), w=(D, D), a=(D, D)),
    "a parameter and what is derived from it": case(lambda m, x: F.linear(F.linear(x, m.w), m.w.T), w=(4, D)),
    "used twice": case(lambda m, x: twice(x, m.w * m.s), w=(D, D), s=()),
    "dropped out": case(lambda m, x: F.linear(x, F.dropout(m.w, 0.5, training=False)), w=(D, D)),
    "bias of a convolution": case(lambda m, x: F.conv1d(x, m.w.view(4, T, 2), m.b[1:]), w=(4 * T * 2,), b=(5,)),
    "weight standardisation": case(
        lambda m, x: F.conv1d(x, (m.w - m.w.mean((1, 2), keepdim=True)) / m.w.std((1, 2), keepdim=True)), w=(4, T, 2)
    ),
    "complex parts": case(
        lambda m, x: torch.einsum("nt,td->nd", x[..., 0].to(torch.complex128), torch.complex(m.re, m.im)).abs(),
        re=(T, D), im=(T, D),
    ),
}  # fmt: skip


def twice(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.linear(x, w).tanh(), w)


TIED: dict[str, Case] = {
    "two linear layers": case(lambda m, x: twice(x, m.w), w=(D, D)),
    "a weight and its transpose": case(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.t()), w=(4, D)),
    "linear and x @ w": case(lambda m, x: F.linear(x, m.w).tanh() @ m.w, w=(4, D)),
    "linear and convolution": case(
        lambda m, x: F.conv1d(F.linear(x, m.w).mT, m.w.view(4, D, 1).transpose(0, 1)), w=(4, D)
    ),
    "linear and pointwise convolution": case(lambda m, x: F.conv1d(F.linear(x, m.w).mT, m.w[..., None]), w=(D, D)),
    "embedding and linear": case(lambda m, x: F.linear(F.embedding(rank(x), m.w) + x, m.w), w=(T, D)),
    "embedding, linear, and a slice": case(
        lambda m, x: F.linear(F.embedding(rank(x), m.w) + x + m.w[0], m.w), w=(T, D)
    ),
    "a bias and a scale": case(lambda m, x: F.linear(x, m.w, m.b) * m.b, w=(D, D), b=(D,)),
    "one layer on two lengths": case(lambda m, x: F.linear(x, m.w).sum(1) + F.linear(x[:, 0], m.w), w=(D, D)),
    "one convolution on two sizes": case(lambda m, x: torch.cat([F.conv1d(x, m.w), F.conv1d(x[..., 1:], m.w)], -1),
                                         w=(4, T, 2)),
    "one norm twice": case(lambda m, x: F.layer_norm(F.layer_norm(x, (D,), m.w, m.b).cos(), (D,), m.w, m.b),
                           w=(D,), b=(D,)),
    "expand and add": case(lambda m, x: torch.cat([m.p.expand(len(x), -1, -1), x], 1) + m.p, p=(1, 1, D)),
}  # fmt: skip

LAYOUTS: dict[str, Case] = {
    **{
        f"{name}, batch folded, samples first: {first}": case(
            lambda m, x, f=f, first=first: unfolded(f(m, folded(x, first)), len(x), first), **parameters
        )
        for first in (True, False)
        for name, f, parameters in [
            ("linear", lambda m, x: F.linear(x, m.w, m.b), {"w": (4, D), "b": (4,)}),
            ("linear with zero weight", lambda m, x: F.linear(x, m.w * 0, m.b), {"w": (4, D), "b": (4,)}),
            ("layer norm", lambda m, x: F.layer_norm(x, (D,), m.w, m.b), {"w": (D,), "b": (D,)}),
            ("scale", lambda m, x: x * m.p, {"p": (D,)}),
            ("shift", lambda m, x: x + m.p, {"p": (D,)}),
            ("matmul", lambda m, x: x @ m.w, {"w": (D, 4)}),
            ("addmm", lambda m, x: torch.addmm(m.b, x, m.w), {"w": (D, 4), "b": (4,)}),
            ("vector", lambda m, x: (x @ m.w)[:, None], {"w": (D,)}),
            ("convolution", lambda m, x: F.conv1d(x[:, None], m.w, m.b), {"w": (4, 1, 2), "b": (4,)}),
            (
                "grouped convolution",
                lambda m, x: F.conv1d(x[..., None], m.w, m.b, groups=D),
                {"w": (D, 1, 1), "b": (D,)},
            ),
            ("group norm", lambda m, x: F.group_norm(x, 1, m.w, m.b), {"w": (D,), "b": (D,)}),
            ("embedding", lambda m, x: F.embedding((x[:, 0] > 0).long(), m.w), {"w": (2, D)}),
            ("index", lambda m, x: m.w[(x[:, 0] > 0).long()], {"w": (2, D)}),
            ("where", lambda m, x: torch.where(x.detach() > 0, x, m.p), {"p": (D,)}),
        ]
    },
    **{
        f"{name}, batch last": case(lambda m, x, f=f: f(m, x.permute(1, 2, 0)).movedim(-1, 0), **parameters)
        for name, f, parameters in [
            ("scale", lambda m, x: x * m.p, {"p": (T, D, 1)}),
            ("w @ x", lambda m, x: m.w @ x, {"w": (4, D)}),
            (
                "batch norm",
                lambda m, x: F.batch_norm(x, x.new_zeros(D), x.new_ones(D), m.w, m.b),
                {"w": (D,), "b": (D,)},
            ),
            ("index", lambda m, x: m.w[:, (x > 0).long()], {"w": (2, 2)}),
            ("expand", lambda m, x: m.p.expand(x.shape) * x, {"p": (T, D, 1)}),
        ]
    },
    **{
        f"{name}, sequence first": case(lambda m, x, f=f: f(m, x.transpose(0, 1)).transpose(0, 1), **parameters)
        for name, f, parameters in [
            ("linear", lambda m, x: F.linear(x, m.w, m.b), {"w": (4, D), "b": (4,)}),
            ("matmul", lambda m, x: x @ m.w, {"w": (D, 4)}),
            ("bmm", lambda m, x: x @ m.w, {"w": (T, D, 4)}),
            ("layer norm", lambda m, x: F.layer_norm(x, (D,), m.w, m.b), {"w": (D,), "b": (D,)}),
            ("positions", lambda m, x: x + m.p, {"p": (T, 1, D)}),
            ("scale by position", lambda m, x: x * m.p, {"p": (T, 1, 1)}),
            ("embedding", lambda m, x: F.embedding((x[..., 0] > 0).long(), m.w), {"w": (2, D)}),
            ("token", lambda m, x: torch.cat([m.p.expand(-1, x.shape[1], -1), x]), {"p": (2, 1, D)}),
            ("repeat", lambda m, x: m.p.repeat(1, x.shape[1], 1) + x, {"p": (T, 1, D)}),
        ]
    },
    "expand, batch folded": case(
        lambda m, x: unfolded(m.p.expand(len(x) * T, -1) * folded(x, True), len(x), True), p=(1, D)
    ),
    "repeat, batch folded": case(
        lambda m, x: unfolded(m.p.repeat(len(x) * T, 1) * folded(x, True), len(x), True), p=(1, D)
    ),
    "windows": case(  # [N, 2 windows, …] folded, as in Swin
        lambda m, x: F.linear(torch.stack([x[:, :2], x[:, 1:]], 1).flatten(0, 1), m.w).view(len(x), -1), w=(4, D)
    ),
    "positions in two dimensions, folded": case(
        lambda m, x: F.linear(x.permute(2, 0, 1).reshape(-1, T), m.w).view(D, len(x), -1).transpose(0, 1), w=(4, T)
    ),
}  # fmt: skip

CASES = ELEMENTWISE | INPLACE | PRODUCTS | RAW | DERIVED | TIED | LAYOUTS


@pytest.mark.parametrize("samples", [1, 3, 5])
@pytest.mark.parametrize(("body", "parameters"), CASES.values(), ids=CASES)
def test_operation_is_exact(body: Body, parameters: dict[str, tuple[int, ...]], samples: int):
    assert_exact(Within(Function(body, **parameters)), torch.randn(samples, T, D))


class Parametrised(nn.Module):
    """Weights that torch's parametrizations make from others, in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(D, 4))
        self.spectral = parametrizations.spectral_norm(nn.Conv1d(T, 4, 2))
        self.orthogonal = parametrizations.orthogonal(nn.Linear(4, 4, bias=False), orthogonal_map="cayley")
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.orthogonal(self.normed(x)).flatten(1), self.spectral(x).flatten(1)], 1)


def test_parametrizations_are_exact():
    assert_exact(Parametrised(), torch.randn(4, T, D))
