"""LoRA+: AdamW with a larger learning rate for the factors B of LoRA, which start from zero."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import AdamW

__all__ = ["LoRAPlus", "lora_b"]


class LoRAPlus(AdamW):
    """LoRA+ (Hayou et al., arXiv 2402.12354): AdamW whose lr is larger for B than for A and whatever else is trained.

    Each kind is a parameter group: a scheduler moves both learning rates by the same factor.

    Args:
        params: The parameters, tensors, those of LoRA among them.
        rank: r of LoRA, by which its factors are told apart: A is [r, d_in], B is [d_out, r].
        lr: Learning rate of A, and of what is no part of LoRA.
        ratio: λ in the paper: that of B over it.
        betas: β₁ and β₂ of AdamW.
        weight_decay: Decoupled.

    Raises:
        TypeError: If parameters are given as groups.
        ValueError: If A and B can't be told apart.

    Example:
        >>> import torch
        >>> a, b, bias = torch.zeros(2, 5), torch.zeros(4, 2), torch.zeros(4)
        >>> [(len(group["params"]), group["lr"]) for group in LoRAPlus([a, b, bias], rank=2, lr=0.01).param_groups]
        [(2, 0.01), (1, 0.16)]

    """

    def __init__(
        self,
        params: Iterable[Any],
        rank: int,
        lr: float = 1e-3,
        ratio: float = 16.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:
        params = [*params]
        b = lora_b(params, rank)
        others = [p for p in params if not any(p is each for each in b)]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": b, "lr": ratio * lr}]
        super().__init__(groups, lr, betas, weight_decay=weight_decay)


def lora_b(params: Sequence[Any], rank: int) -> list[Tensor]:
    """The factors B of LoRA, [d_out, r], among parameters.

    Args:
        params: The parameters, tensors.
        rank: r.

    Returns:
        Those of them that are B.

    Raises:
        TypeError: If they are given as groups.
        ValueError: If there are not as many A, [r, d_in], as B, or one may be both.

    """
    if strange := [type(p).__name__ for p in params if not isinstance(p, Tensor)]:
        raise TypeError(f"lora_b(params): takes tensors; got {strange[0]}.")
    matrices = [p for p in params if p.ndim == 2 and rank in p.shape]
    a, b = ([p for p in matrices if p.shape[side] == rank] for side in (0, 1))
    if not b or len(a) != len(b) or len(a) + len(b) > len(matrices):
        shapes = [tuple(p.shape) for p in params]
        raise ValueError(
            f"lora_b(rank={rank}): there must be as many matrices [{rank}, d_in] as [d_out, {rank}], and none that may "
            f"be both; of the shapes {shapes} {len(a)} and {len(b)} are such. Give the r of LoRA."
        )
    return b
