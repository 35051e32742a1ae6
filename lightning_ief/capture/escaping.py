"""Parameters with a use that escapes the capture: exact rows by one backward pass for each sample.

A custom autograd function announces no use, nor does a value that is written into a slice. Autograd knows the edge all
the same, and the gradient for the cotangent of one sample alone is that sample's row, through all uses at once. So rows
are autograd's own, whose sum verifies nothing: what is left to be shown is that a sample's logits and rows are the same
whichever samples stand beside it.
"""

import warnings
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_ief.capture.factors import Dense
from lightning_ief.capture.tangents import are_same
from lightning_ief.capture.types import CaptureError
from lightning_ief.linalg.gram import full_precision
from lightning_ief.linalg.scaling import normalised, sample_scale

__all__ = ["another_batch", "one_by_one", "require_independent", "warn_of"]

# Samples of such another batch, where it need not be as large as the first one: its graph is held beside the other's.
_FEW = 8

_named: "WeakKeyDictionary[nn.Module, set[str]]" = WeakKeyDictionary()
"""The parameters that a warning has named, by model."""


def one_by_one(
    output: Tensor, parameters: Mapping[str, Tensor], cotangents: Sequence[Tensor], loss_scale: Tensor | None
) -> dict[str, Dense]:
    """The rows of some parameters, one backward pass for each; the graph is kept.

    Args:
        output: The logits, with their graph.
        parameters: The parameters, by name.
        cotangents: c_r for r = 1 … R, each of the shape of the logits.
        loss_scale: See `pull_back`.

    Returns:
        For each parameter its rows over σ, as `pull_back` has them.

    """
    samples = len(output)
    rows = [p.new_zeros(len(cotangents), samples, *p.shape) for p in parameters.values()]
    for r, cotangent in enumerate(cotangents):
        begun, _ = normalised(cotangent, 1, None if loss_scale is None else sample_scale(loss_scale, samples))
        begun = begun.to(output.dtype)
        for n in range(samples):
            one = torch.zeros_like(begun)  # a new one each time: a backward pass written by hand may write to it
            one[n] = begun[n]
            with full_precision(output.device):
                found = torch.autograd.grad(
                    output, list(parameters.values()), one, retain_graph=True, allow_unused=True
                )
            for into, gradient in zip(rows, found, strict=True):
                if gradient is not None:
                    into[r, n] = gradient.to_dense()
    return {name: Dense(each) for name, each in zip(parameters, rows, strict=True)}


def warn_of(model: nn.Module, parameters: Mapping[str, Tensor], samples: int) -> None:
    """Say what it costs that parameters escape, once a model; once more if others begin to.

    Args:
        model: The model.
        parameters: The parameters, by name.
        samples: N.

    """
    named = _named.setdefault(model, set())
    new = [name for name in parameters if name not in named]
    if not new:
        return
    named.update(new)
    elements = sum(p.numel() for p in parameters.values())
    size = samples * sum(p.numel() * p.itemsize for p in parameters.values())
    listed = ", ".join(f"'{name}'" for name in new[:5]) + (f", … ({len(new)} of them)" if len(new) > 5 else "")
    warnings.warn(
        f"{type(model).__name__} uses parameters {listed} in a way that escapes the capture: in a custom autograd "
        "function, in compiled code, as a value written into a slice, or by a reference that is not the parameter. "
        f"Their gradients are as exact, but slow: one backward pass for each sample, N = {samples} here, on every "
        f"batch; and they are held whole, N · {elements:,} numbers, {size / 2**20:,.1f} MiB. Call them through torch "
        "functions, or freeze them with requires_grad_(False); linearize(..., strict=True), or strict_capture = True "
        "of NaturalGradientMixin, refuses them.",
        RuntimeWarning,
        stacklevel=4,  # whoever calls linearize
    )


def another_batch(samples: int, first: int, drawn: bool) -> tuple[list[int], list[int]]:
    """Choose samples such that every other one stays in its place and has others beside it.

    Args:
        samples: N ≥ 2.
        first: 0 or 1, the first that stays.
        drawn: Whether the forward pass draws random numbers. Then the batch is as large as the first, so that those
            that stay are given the same ones; otherwise it is of another size, which may make no difference either.

    Returns:
        The samples that it is made of, and those that stay.

    """
    size = samples if drawn else min(samples, _FEW)
    indices = [n if n % 2 == first else n + 1 if n + 1 < size else n - 1 for n in range(size)]
    if not drawn and size == samples:
        indices.append(first)
    return indices, [*range(first, size, 2)]


def require_independent(
    model: str, escaping: Sequence[str], logits: Tensor, output: Tensor, kept: Sequence[int], tolerance: float
) -> None:
    """Require that samples have the same logits in another batch.

    Args:
        model: Name of the model's class.
        escaping: Parameters whose rows depend on it.
        logits: z of the batch.
        output: Those of the other one.
        kept: Samples that stand in both, in the same place.
        tolerance: The deviation that is rounding.

    Raises:
        CaptureError: If they have not.

    """
    if output.shape[1:] == logits.shape[1:] and are_same(logits[kept], output[kept], tolerance):
        return
    names = ", ".join(f"'{name}'" for name in escaping[:5]) + (", …" if len(escaping) > 5 else "")
    raise CaptureError(
        f"The logits of a sample in {model} depend on the others of its batch, on their number, or on chance that is "
        f"not torch's, so that there are no per-sample gradients of {names}, a use of which escapes the capture. Make "
        "samples independent, freeze these parameters, or, if you know better, pass verify=False."
    )
