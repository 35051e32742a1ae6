"""EF, iEF, F̂(M) and the natural gradient as optimizers."""

from typing import Any

import torch

from lightning_ief.capture import Direction, LinearizedBatch
from lightning_ief.directions.empirical import ef, ief
from lightning_ief.directions.fisher import natural_gradient, require_end, sampled_fisher
from lightning_ief.distributed import Sync
from lightning_ief.optim.base import DirectionOptimizer, Found, Params

__all__ = ["EF", "IEF", "NaturalGradient", "SampledFisher"]


class EF(DirectionOptimizer):
    """Empirical Fisher: d = Jᵀ(JJᵀ + λI)⁻¹ 1 (arXiv 2406.06420, eq. 17 of the author response).

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate η.
        damping: λ, in the units of squared norms of per-sample gradients of the summed loss.
        weight_decay: Decoupled weight decay.
        normalize: Scale each direction to unit norm; EF needs it, with a decaying lr: its steps grow without bound as
            samples are fitted.
        accumulate: Micro-batches of one exact update.
        sync: On many ranks, between which updates are exact: "global", "local" or a number of neighbours.

    """

    function = staticmethod(ef)

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        damping: float = 1e-7,
        weight_decay: float = 0.0,
        normalize: bool = False,
        accumulate: int = 1,
        sync: Sync = "global",
    ) -> None:
        super().__init__(params, lr, damping, weight_decay, normalize, accumulate=accumulate, sync=sync)


class IEF(DirectionOptimizer):
    """Improved empirical Fisher: d = Jᵀ(JJᵀ + λI)⁻¹ s, s_n = ‖∂l_n/∂z_n‖² (arXiv 2406.06420, eq. 19 there).

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate η; with 1, each sample's loss falls at the rate of gradient descent on its own logits.
        damping: λ, in the units of squared norms of per-sample gradients of the summed loss.
        weight_decay: Decoupled weight decay.
        normalize: Scale each direction to unit norm.
        accumulate: Micro-batches of one exact update.
        sync: On many ranks, between which updates are exact: "global", "local" or a number of neighbours.

    """

    function = staticmethod(ief)

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        damping: float = 1e-7,
        weight_decay: float = 0.0,
        normalize: bool = False,
        accumulate: int = 1,
        sync: Sync = "global",
    ) -> None:
        super().__init__(params, lr, damping, weight_decay, normalize, accumulate=accumulate, sync=sync)


class SampledFisher(DirectionOptimizer):
    """Fisher by sampled targets, F̂(M): d = (ĴᵀĴ/M + λI)⁻¹ ∇L (section 8 of the author response).

    The sampling depends on `seed` and the number of steps taken, which is in the state dictionary: a resumed run draws
    what the uninterrupted one would have drawn.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate η.
        damping: λ > 0, in the units of F, a sum over samples. A few sampled targets say little about the directions
            in which F is small, so that it needs more than EF and iEF do; with float32 gradients, what lies below about
            1e-6 of F's largest eigenvalue is rounding.
        num_samples: M, targets drawn per sample and step; each costs a backward pass.
        weight_decay: Decoupled weight decay.
        normalize: Scale each direction to unit norm; with small λ F̂(M) needs it.
        seed: Seed of the sampling.
        accumulate: Micro-batches of one exact update.
        sync: On many ranks, between which updates are exact: "global", "local" or a number of neighbours.

    Raises:
        ValueError: If an argument is out of range.

    """

    retains_graph = True

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        damping: float = 1.0,
        num_samples: int = 1,
        weight_decay: float = 0.0,
        normalize: bool = False,
        seed: int = 0,
        accumulate: int = 1,
        sync: Sync = "global",
    ) -> None:
        if not damping > 0:
            raise ValueError(f"SampledFisher(damping={damping}): must be > 0.")
        if num_samples < 1:
            raise ValueError(f"SampledFisher(num_samples={num_samples}): must be at least 1.")
        options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "steps": 0}
        options |= {"accumulate": accumulate, "sync": sync}
        super().__init__(params, lr, damping, weight_decay, normalize, **options)

    def direction(self, linearization: LinearizedBatch) -> Direction:  # noqa: D102
        first = self.param_groups[0]
        # Drawn anew from seed and step, so that there is no generator to move between devices or to save.
        generator = torch.Generator(linearization.losses.device)
        generator.manual_seed((first["seed"] * 0x9E3779B97F4A7C15 + first["steps"]) % 2**63)
        return sampled_fisher(linearization, self.shared("damping"), self.shared("num_samples"), generator)

    def _find(self, batch: LinearizedBatch) -> Found:
        found = super()._find(batch)
        # On all ranks alike: those of a group without samples draw no targets.
        self.param_groups[0]["steps"] += 1
        return found


class NaturalGradient(DirectionOptimizer):
    """Natural gradient: d = (F + λI)⁻¹ ∇L with the exact Fisher matrix of the batch.

    For few classes by one backward pass for each logit of a sample; otherwise by conjugate gradients, many passes in
    each step.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate η.
        damping: λ, in the units of F, a sum over samples.
        weight_decay: Decoupled weight decay.
        normalize: Scale each direction to unit norm.
        max_rows: Largest number of logits of a batch, N·C, for which to solve in the space of rows.
        tolerance: Relative residual at which conjugate gradients end.
        max_iterations: Most iterations of conjugate gradients in a step.
        accumulate: Micro-batches of one exact update.
        sync: On many ranks, between which updates are exact: "global", "local" or a number of neighbours.

    """

    retains_graph = True

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        damping: float = 1e-7,
        weight_decay: float = 0.0,
        normalize: bool = False,
        max_rows: int = 20_000,
        tolerance: float = 1e-3,
        max_iterations: int = 100,
        accumulate: int = 1,
        sync: Sync = "global",
    ) -> None:
        require_end("NaturalGradient", tolerance, max_iterations)
        options: dict[str, Any] = {"max_rows": max_rows, "tolerance": tolerance, "max_iterations": max_iterations}
        options |= {"accumulate": accumulate, "sync": sync}
        super().__init__(params, lr, damping, weight_decay, normalize, **options)

    def direction(self, linearization: LinearizedBatch) -> Direction:  # noqa: D102
        options = {name: self.shared(name) for name in ("damping", "max_rows", "tolerance", "max_iterations")}
        return natural_gradient(linearization, **options)
