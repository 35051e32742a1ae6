"""Functions of torch that are recorded as the operations they consist of, each of them instead of the whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["COMPOSITE", "attention", "drops_out", "opened"]

# Python functions that consist of plain operations on their weights: their bodies run with the weights still
# announcing, so that each inner operation is recorded instead of the whole.
COMPOSITE = frozenset({F.multi_head_attention_forward})


@contextmanager
def opened() -> Iterator[None]:
    """Let a Python function of `torch.nn.functional` run its body although its arguments are followed."""
    name = "has_torch_function"
    original = getattr(F, name)
    setattr(F, name, lambda _: False)
    try:
        yield
    finally:
        setattr(F, name, original)


def drops_out(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *_: Any, **__: Any
) -> bool:
    """Whether a call of attention draws random numbers, with which its rows could not be computed again."""
    return dropout_p > 0


def attention(
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
