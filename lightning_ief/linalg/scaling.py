"""Keeping numbers in range: what a linear map takes is divided by a power of two, what it returns is multiplied by it.

Gradients of nearly fitted samples leave the range of float32 on their way back, their squares soon after; those of fp16
leave it much earlier. A power of two changes no digit.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_ief.linalg.vectors import SMALL, chunks, norm

__all__ = ["normalised", "normalised_direction", "power_of_two", "sample_scale", "times", "upcast", "wide"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype of real numbers, or float32 if that holds more digits."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def upcast(x: Tensor) -> Tensor:
    """A tensor in float32 at least; as it is where nothing changes."""
    return x.to(wide(x.dtype))


def power_of_two(x: Tensor) -> Tensor:
    """The powers of two next above numbers ≥ 0, in float32 at least; 1 for 0."""
    x = upcast(x)
    return torch.frexp(x).exponent.to(x.dtype).exp2()


def sample_scale(loss_scale: Tensor, samples: int) -> Tensor:
    """What a GradScaler has each sample's gradient scaled by: S over N, with N rounded up to a power of two."""
    return loss_scale / 2 ** (samples - 1).bit_length()


def normalised(x: Tensor, kept: int, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bring each slice of a tensor to a size of about 1.

    Args:
        x: Of any shape.
        kept: A slice belongs to each index of so many leading dimensions; 0 for the tensor as a whole.
        factor: A size other than 1, a scalar.

    Returns:
        x over σ, in its dtype, or x itself where all σ are 1; and σ, a power of two for each slice (1 where it is not
        finite), over the factor: shape of the leading dimensions, float64.

    """
    is_small = x.numel() <= SMALL
    # A copy of the absolute values of what is large is spared, for one operation more.
    largest = x.abs().reshape(*x.shape[:kept], -1).amax(-1).double() if is_small else _largest(x, kept)
    scales = power_of_two(largest.nan_to_num_(nan=0.5, posinf=0.5))
    if factor is not None:
        scales = scales / factor
    if is_small:
        return (x / scales.view(*scales.shape, *(1,) * (x.ndim - kept))).to(x.dtype), scales
    # Most often nothing is to be done to what a softmax gives. On other devices the look would stall the device.
    if x.device.type == "cpu" and bool((scales == 1).all()):
        return x, scales
    rows = x.reshape(x.shape[:kept].numel(), -1)
    return times(rows, 1 / scales.view(-1), x.dtype).view(x.shape), scales


def _largest(x: Tensor, kept: int) -> Tensor:
    rows = x.reshape(x.shape[:kept].numel(), -1)
    return torch.linalg.vector_norm(rows, ord=float("inf"), dim=1).double().view(x.shape[:kept])


def times(x: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply each slice of a tensor by a factor, in the precision of the factors, without a copy in it.

    Args:
        x: Shape [N, ...].
        factors: Shape [N].
        dtype: Of the product, which is rounded once.

    Returns:
        Shape of x.

    """
    rows = x.reshape(len(x), -1)
    found = torch.empty_like(rows, dtype=dtype, memory_format=torch.contiguous_format)
    for part in chunks(rows.shape[1], len(rows)):
        found[:, part] = rows[:, part] * factors[:, None]
    return found.view(x.shape)


def normalised_direction(
    direction: Mapping[str, Tensor], parameters: Mapping[str, Tensor], in_fp16: bool
) -> tuple[dict[str, Tensor], Tensor | float]:
    """Give a direction the dtypes of the parameters; in fp16, with a length of about 1.

    Args:
        direction: d, an entry for each parameter.
        parameters: The parameters, by name.
        in_fp16: Whether something is computed in fp16. Elsewhere scaling would cost a copy for nothing.

    Returns:
        The direction over a power of two, and that.

    """
    if not in_fp16:
        return {name: direction[name].to(p.dtype) for name, p in parameters.items()}, 1.0
    length = power_of_two(norm(direction))
    return {name: (direction[name] / length).to(p.dtype) for name, p in parameters.items()}, length
