"""`WeightedSum`: several heads, each with an objective of its own."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_ief.objectives.base import Objective
from lightning_ief.objectives.gaussian import Gaussian
from lightning_ief.objectives.softmax import CrossEntropy, Focal

__all__ = ["WeightedSum"]

_SINGLE = 4  # bytes of float32, which holds whole numbers up to 2²⁴


class WeightedSum(Objective):
    """A weighted sum of the losses of several heads, l_n = Σ_h w_h l_hn.

    The model returns the logits of all heads side by side, [N, ..., ΣC_h], as `torch.cat([a, b], dim=-1)`; the targets
    stand side by side in the same way, [N, ..., ΣT_h]. T_h is 1 for classes (`CrossEntropy`, `Focal`: kept in a column
    of floating point where others are real numbers), C_h / 2 for `Gaussian`, C_h for all others, unless said otherwise.
    F_n has a block w_h F_hn for each head.

    Args:
        objectives: One for each head. Those of your own get their columns of the targets as they are, [N, ..., T_h].
        sizes: C_h, logits of each head.
        weights: w_h > 0; 1 if None.
        target_sizes: T_h, columns of the targets of each head; as above if None.

    Raises:
        ValueError: If there are not as many of each, or one is not positive.

    Example:
        >>> objective = WeightedSum([CrossEntropy(), Gaussian()], sizes=[3, 2], weights=[1.0, 0.5])
        >>> targets = torch.tensor([[2.0, 1.5]])              # class 2, and 1.5
        >>> objective.losses(torch.zeros(1, 5), targets)      # log 3 + ½ · ½ · 1.5²
        tensor([1.6611])

    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        sizes: Sequence[int],
        weights: Sequence[float] | None = None,
        target_sizes: Sequence[int] | None = None,
    ) -> None:
        self.objectives = tuple(objectives)
        self.sizes = list(sizes)
        self.weights = [1.0] * len(self.objectives) if weights is None else [float(w) for w in weights]
        if target_sizes is None:
            target_sizes = [_columns(o, size) for o, size in zip(self.objectives, self.sizes, strict=False)]
        self.target_sizes = list(target_sizes)
        counts = {len(x) for x in (self.objectives, self.sizes, self.weights, self.target_sizes)}
        if len(counts) > 1 or not self.objectives:
            raise ValueError(
                f"WeightedSum of {len(self.objectives)} objectives got {len(self.sizes)} sizes, {len(self.weights)} "
                f"weights and {len(self.target_sizes)} target_sizes: one for each head."
            )
        if min(*self.sizes, *self.target_sizes) < 1 or not all(0 < w < float("inf") for w in self.weights):
            raise ValueError(
                f"WeightedSum(sizes={self.sizes}, weights={self.weights}, target_sizes={self.target_sizes}): must be "
                "positive. Leave a head out that has no weight."
            )

    def validate(self, logits: Tensor, targets: Tensor) -> None:  # noqa: D102
        widths = sum(self.sizes), sum(self.target_sizes)
        if logits.ndim != targets.ndim or (logits.shape[-1], targets.shape[-1]) != widths:
            raise ValueError(
                f"WeightedSum needs logits [N, ..., {widths[0]}] and targets [N, ..., {widths[1]}], heads side by side "
                f"on the last dimension; got logits {tuple(logits.shape)} and targets {tuple(targets.shape)}. "
                "torch.cat([a, b], dim=-1) puts them there, of classes [N] as a[:, None]."
            )
        classes = any(map(_has_classes, self.objectives, self.target_sizes))
        if classes and targets.is_floating_point() and targets.dtype.itemsize < _SINGLE:
            raise TypeError(f"WeightedSum got classes in {targets.dtype}, which rounds them: targets.float().")
        columns = zip(self.objectives, targets.detach().split(self.target_sizes, -1), strict=True)
        # A look that would stall a GPU.
        if targets.device.type == "cpu" and targets.is_floating_point():
            for head, y in columns:
                if _has_classes(head, y.shape[-1]) and bool((y != y.round()).any()):
                    raise ValueError(
                        f"WeightedSum got {float(y[y != y.round()][0]):g} as a class of {type(head).__name__}: are the "
                        "columns of the targets in the order of the heads?"
                    )
        for objective, _, z, y in self.heads(logits, targets):
            objective.validate(z, y)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return torch.stack([w * head.losses(z, y) for head, w, z, y in self.heads(logits, targets)]).sum(0)

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return torch.cat([w * head.gradient(z, y) for head, w, z, y in self.heads(logits, targets)], -1)

    def counted(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return torch.cat([head.counted(z, y) for head, _, z, y in self.heads(logits, targets)], -1)

    def sample(  # noqa: D102
        self, logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        drawn = [head.sample(z, y, generator) for head, _, z, y in self.heads(logits, targets)]
        columns = [
            (y[..., None] if _has_classes(head, size) else y).to(targets.dtype)
            for head, size, y in zip(self.objectives, self.target_sizes, drawn, strict=True)
        ]
        return torch.cat(columns, -1)

    def sampled_gradient(self, logits: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:  # noqa: D102
        pairs = zip(self.heads(logits, targets), self.heads(logits, drawn), strict=True)
        return torch.cat([w**0.5 * head.sampled_gradient(z, y, own) for (head, w, z, y), (*_, own) in pairs], -1)

    def hessian_form(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        heads = zip(self.heads(logits, targets), tangents.split(self.sizes, -1), strict=True)
        return torch.stack([w * head.hessian_form(z, y, u) for (head, w, z, y), u in heads]).sum(0)

    def hessian_product(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        heads = zip(self.heads(logits, targets), tangents.split(self.sizes, -1), strict=True)
        return torch.cat([w * head.hessian_product(z, y, u) for (head, w, z, y), u in heads], -1)

    def hessian_factor(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        first = 0
        for size, (head, w, z, y) in zip(self.sizes, self.heads(logits, targets), strict=True):
            for column, coordinate in head.hessian_factor(z, y):
                whole = torch.zeros_like(logits)
                whole[..., first : first + size] = w**0.5 * column
                yield whole, w**0.5 * coordinate
            first += size

    def heads(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Objective, float, Tensor, Tensor]]:
        """Take logits and targets apart.

        Args:
            logits: z, shape [N, ..., ΣC_h].
            targets: y, shape [N, ..., ΣT_h].

        Yields:
            For each head its objective, w_h, logits and targets.

        """
        columns = targets.split(self.target_sizes, -1)
        for head, w, z, y in zip(self.objectives, self.weights, logits.split(self.sizes, -1), columns, strict=True):
            yield head, w, z, (y.squeeze(-1).round().long() if _has_classes(head, y.shape[-1]) else y)


def _has_classes(objective: Objective, columns: int) -> bool:
    """Whether a head's targets are classes, in one column."""
    return isinstance(objective, CrossEntropy | Focal) and columns == 1


def _columns(objective: Objective, size: int) -> int:
    """How many columns of the targets a head takes, of so many logits."""
    if isinstance(objective, CrossEntropy | Focal):
        return 1
    return size // 2 if isinstance(objective, Gaussian) else size
