"""Muon as one optimizer for a whole network: torch's own for matrices, AdamW beside it for what is none."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_ief.tasks.lora_plus import lora_b

__all__ = ["MuonAdamW"]


class MuonAdamW(Optimizer):
    """Muon for matrices, AdamW for biases, scales, convolutions and whatever else has not two dimensions.

    The steps are those of torch.optim.Muon and torch.optim.AdamW; steps of Muon are scaled to the length of AdamW's
    (`adjust_lr_fn="match_rms_adamw"`, Liu et al., arXiv 2502.16982), so that one lr serves both. Each kind is a
    parameter group: a scheduler moves both learning rates by the same factor.

    Args:
        params: The parameters, tensors.
        lr: Learning rate of both.
        momentum: μ of Muon, with Nesterov's look ahead.
        betas: β₁ and β₂ of AdamW.
        weight_decay: Of both, decoupled.
        adamw_multiple: What AdamW's learning rate is multiplied by.
        embeddings: Numbers of rows of the matrices that AdamW moves, too: tokens of a vocabulary, positions, classes.
        lora_rank: r of LoRA: Muon moves the factors B, [d_out, r], alone, and AdamW all the rest. All matrices if None.

    Raises:
        ModuleNotFoundError: If this torch has no Muon.
        TypeError: If parameters are given as groups.
        ValueError: If the factors of LoRA can't be told apart.

    Example:
        >>> net = torch.nn.Linear(3, 2)
        >>> [len(group["params"]) for group in MuonAdamW(net.parameters(), lr=1e-3).param_groups]
        [1, 1]

    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        adamw_multiple: float = 1.0,
        embeddings: Sequence[int] = (),
        lora_rank: int | None = None,
    ) -> None:
        muon: Any = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise ModuleNotFoundError(
                f"MuonAdamW takes torch.optim.Muon, which torch {torch.__version__} has not: pip install 'torch>=2.9'."
            )
        params = [*params]
        if strange := [type(p).__name__ for p in params if not isinstance(p, Tensor)]:
            raise TypeError(f"MuonAdamW(params): takes tensors, and makes the groups itself; got {strange[0]}.")
        matrices = [p for p in params if p.ndim == 2] if lora_rank is None else lora_b(params, lora_rank)
        matrices = [p for p in matrices if len(p) not in embeddings]
        others = [p for p in params if not any(p is each for each in matrices)]
        self._parts: list[Optimizer] = []
        if matrices:
            options = {"momentum": momentum, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            self._parts.append(muon(matrices, lr, **options))
        if others:
            self._parts.append(AdamW(others, lr * adamw_multiple, betas, weight_decay=weight_decay))
        super().__init__([part.param_groups[0] for part in self._parts], {"lr": lr})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of each.

        Args:
            closure: Evaluates the loss anew, with gradients.

        Returns:
            What the closure returns; None without it.

        Raises:
            ValueError: If a group has been added.

        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if len(self.param_groups) > len(self._parts):
            raise ValueError("MuonAdamW makes its groups itself: give it all parameters when it is made.")
        for part, group in zip(self._parts, self.param_groups, strict=True):
            # Those of this optimizer: schedulers change them, and a checkpoint puts others in their place.
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss
