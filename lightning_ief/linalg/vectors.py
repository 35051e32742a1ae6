"""Dictionaries of tensors, keyed by parameter name, as vectors of one space; and large tensors, sample by sample.

A direction is such a mapping. All sums are accumulated in float64.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["SMALL", "address", "check_same_space", "chunks", "cosine", "dot", "norm", "restricted"]

Entry = TypeVar("Entry")

SMALL = 2**16
"""Elements up to which fewer operations matter more than copies."""

# Elements that are looked at together where a copy, or one in float64, is not to have the size of the whole.
_TOGETHER = 2**21


def chunks(count: int, each: int) -> Iterator[slice]:
    """Cut a dimension into parts, so that what is computed of one part at a time stays small.

    Args:
        count: Size of the dimension.
        each: Elements that stand at each of its indices.

    Yields:
        The parts, in order: all of it where that is little, one index at least.

    Example:
        >>> [*chunks(5, 2**20)]
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]

    """
    size = max(1, _TOGETHER // max(1, each))
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


def address(x: Tensor) -> int:
    """Address of the memory that a tensor looks at, its views alike; of a sharded one, that of its shard."""
    return (x.to_local() if isinstance(x, DTensor) else x).untyped_storage().data_ptr()


def check_same_space(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Require that two vectors have the same entries, with the same shapes.

    Args:
        a: A vector.
        b: A vector.

    Raises:
        ValueError: If names are missing on one side or the shapes of an entry differ.

    """
    if a.keys() != b.keys():
        raise ValueError(
            f"The two vectors live in different spaces: only in the first: {sorted(a.keys() - b.keys())}; "
            f"only in the second: {sorted(b.keys() - a.keys())}."
        )
    for name, entry in a.items():
        if entry.shape != b[name].shape:
            raise ValueError(
                f"Entry '{name}' has shape {tuple(entry.shape)} in one vector and {tuple(b[name].shape)} in the other."
            )


def restricted(a: Mapping[str, Entry], names: Iterable[str]) -> dict[str, Entry]:
    """Some entries of a vector.

    Args:
        a: The vector.
        names: Which ones, in any order.

    Returns:
        These entries, in the order of the vector.

    Raises:
        ValueError: If there is no entry of a name, or no name.

    """
    wanted = {names} if isinstance(names, str) else {*names}
    if unknown := sorted(wanted - a.keys()):
        raise ValueError(f"There are no parameters {unknown}; there are {[*a]}.")
    if not wanted:
        raise ValueError(f"No parameter was chosen; there are {[*a]}.")
    return {name: entry for name, entry in a.items() if name in wanted}


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Inner product of two vectors.

    Args:
        a: A vector.
        b: A vector with the same entries.

    Returns:
        float64 scalar.

    Raises:
        ValueError: If the entries differ, or there are none.

    Example:
        >>> dot({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 2.0])})
        tensor(3., dtype=torch.float64)

    """
    check_same_space(a, b)
    if not a:
        raise ValueError("A vector without entries has no inner product.")
    return torch.stack([torch.sum(x.double() * b[name].double()) for name, x in a.items()]).sum()


def norm(a: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm over all entries.

    Args:
        a: A vector.

    Returns:
        float64 scalar.

    """
    return torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in a.values()]).norm()


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Cosine of the angle between two vectors.

    Args:
        a: A vector.
        b: A vector with the same entries.

    Returns:
        float64 scalar; NaN if one of them is zero (the angle is undefined).

    """
    return dot(a, b) / (norm(a) * norm(b))
