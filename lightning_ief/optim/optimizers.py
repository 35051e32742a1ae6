"""EF, iEF, F̂(M), Gauss-Newton and the natural gradient as optimizers."""

from typing import Any

from lightning_ief.capture import Direction, LinearizedBatch
from lightning_ief.directions.empirical import LeastSquaresProblem, ef, ef_problem, ief, ief_problem
from lightning_ief.directions.fisher import natural_gradient, natural_gradient_problem, require_end, sampled_fisher
from lightning_ief.directions.gauss_newton import gauss_newton, gauss_newton_problem
from lightning_ief.directions.weighted import Weights, weighted
from lightning_ief.distributed import Sync
from lightning_ief.optim.base import DirectionOptimizer, Found, MomentumType, Params

__all__ = ["EF", "IEF", "GaussNewton", "NaturalGradient", "SampledFisher", "Weighted"]


class EF(DirectionOptimizer):
    """Empirical Fisher: d = Jᵀ(JJᵀ + λI)⁻¹ 1 (arXiv 2406.06420, eq. 17 of the author response); see `ef`.

    λ is in the units of squared norms of per-sample gradients of the summed loss. Without a line search EF needs
    `normalize` with a decaying lr: its steps grow without bound as samples are fitted.
    """

    natural_lr = 1.0
    function = staticmethod(ef)
    problem = staticmethod(ef_problem)


class IEF(DirectionOptimizer):
    """Improved empirical Fisher: d = Jᵀ(JJᵀ + λI)⁻¹ s, s_n = ‖∂l_n/∂z_n‖² (arXiv 2406.06420, eq. 19 there); see `ief`.

    With lr = 1, each sample's loss falls at the rate of gradient descent on its own logits.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate η.
        damping: λ, in the units of squared norms of per-sample gradients of the summed loss; the paper's.
        weight_decay: Decoupled weight decay: a step shrinks weights by lr · weight_decay, and lr is near 1 here.
        normalize: Scale each φ to unit norm.
        accumulate: Micro-batches of one exact update.
        sync: On many ranks, between which updates are exact: "global", "local" or a number of neighbours.
        relative_damping: ρ instead: damps iEF's matrix F̃ = JᵀS⁻¹J by ρ times the mean diagonal of S^-½ JJᵀ S^-½.
        absolute_damping: Damps F̃ by this number instead, in the units of F.
        **options: momentum, momentum_type, max_norm, line_search, metric and its own; see `DirectionOptimizer`.

    """

    natural_lr = 1.0
    function = staticmethod(ief)
    problem = staticmethod(ief_problem)

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        damping: float | None = None,
        weight_decay: float = 0.0,
        normalize: bool = False,
        accumulate: int = 1,
        sync: Sync = "global",
        *,
        relative_damping: float | None = None,
        absolute_damping: float | None = None,
        **options: Any,
    ) -> None:
        options |= {"relative_damping": relative_damping, "absolute_damping": absolute_damping}
        super().__init__(params, lr, damping, weight_decay, normalize, accumulate, sync, **options)


class SampledFisher(DirectionOptimizer):
    """Fisher by sampled targets, F̂(M): d = (ĴᵀĴ/M + λI)⁻¹ ∇L (section 8 of the author response).

    The sampling depends on `seed` and the number of steps taken, which is in the state dictionary: a resumed run draws
    what the uninterrupted one would have drawn.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate η.
        damping: λ > 0, 1 if none is given, in the units of F, a sum over samples. A few sampled targets say little
            about the directions in which F is small, so that it needs more than EF and iEF do; with float32 gradients,
            what lies below about 1e-6 of F's largest eigenvalue is rounding.
        num_samples: M, targets drawn per sample and step; each costs a backward pass.
        weight_decay: Decoupled weight decay: a step shrinks weights by lr · weight_decay, and lr is near 1 here.
        normalize: Scale each direction to unit norm; with small λ F̂(M) needs it.
        seed: Seed of the sampling.
        accumulate: Micro-batches of one exact update.
        sync: On many ranks, between which updates are exact: "global", "local" or a number of neighbours.
        momentum_type: "heavy-ball" alone.
        **options: relative_damping, momentum, max_norm, line_search, metric and its own; see `DirectionOptimizer`.

    Raises:
        ValueError: If an argument is out of range.

    """

    retains_graph = True
    default_damping = 1.0
    natural_lr = 1.0
    counters = {"steps": 0}

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        damping: float | None = None,
        num_samples: int = 1,
        weight_decay: float = 0.0,
        normalize: bool = False,
        seed: int = 0,
        accumulate: int = 1,
        sync: Sync = "global",
        *,
        momentum_type: MomentumType = "heavy-ball",
        **options: Any,
    ) -> None:
        for name, value in (("damping", damping), ("relative_damping", options.get("relative_damping"))):
            if value is not None and not value > 0:
                raise ValueError(f"SampledFisher({name}={value}): must be > 0.")
        if num_samples < 1:
            raise ValueError(f"SampledFisher(num_samples={num_samples}): must be at least 1.")
        options |= {"momentum_type": momentum_type, "num_samples": num_samples, "seed": seed}
        super().__init__(params, lr, damping, weight_decay, normalize, accumulate, sync, **options)

    def direction(self, linearization: LinearizedBatch) -> Direction:  # noqa: D102
        generator = self._generator(linearization)
        dampings = {name: self.shared(name) for name in ("damping", "relative_damping")}
        return sampled_fisher(linearization, num_samples=self.shared("num_samples"), generator=generator, **dampings)

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
        weight_decay: Decoupled weight decay: a step shrinks weights by lr · weight_decay, and lr is near 1 here.
        normalize: Scale each direction to unit norm.
        max_rows: Largest number of logits of a batch, N·C, for which to solve in the space of rows.
        tolerance: Relative residual at which conjugate gradients end.
        max_iterations: Most iterations of conjugate gradients in a step.
        accumulate: Micro-batches of one exact update.
        sync: On many ranks, between which updates are exact: "global", "local" or a number of neighbours.
        **options: relative_damping, momentum, momentum_type, max_norm, line_search; see `DirectionOptimizer`.

    """

    retains_graph = True
    natural_lr = 1.0
    problem = staticmethod(natural_gradient_problem)

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        damping: float | None = None,
        weight_decay: float = 0.0,
        normalize: bool = False,
        max_rows: int = 20_000,
        tolerance: float = 1e-3,
        max_iterations: int = 100,
        accumulate: int = 1,
        sync: Sync = "global",
        **options: Any,
    ) -> None:
        require_end("NaturalGradient", tolerance, max_iterations)
        options |= {"max_rows": max_rows, "tolerance": tolerance, "max_iterations": max_iterations}
        super().__init__(params, lr, damping, weight_decay, normalize, accumulate, sync, **options)

    def direction(self, linearization: LinearizedBatch) -> Direction:  # noqa: D102
        if self.metric is not None and linearization.num_logits > self.shared("max_rows"):
            raise ValueError(
                "NaturalGradient(metric='kronecker'): conjugate gradients know of no metric. Give max_rows of at least "
                f"{linearization.num_logits}."
            )
        names = ("damping", "relative_damping", "max_rows", "tolerance", "max_iterations")
        return natural_gradient(linearization, **{name: self.shared(name) for name in names})

    def _problem_of(self, batch: LinearizedBatch) -> LeastSquaresProblem:
        if batch.num_logits > self.shared("max_rows"):
            raise ValueError(
                "NaturalGradient(momentum_type='spring' or layerwise=True), and what a step reports, need the space of "
                f"rows: raise max_rows to at least {batch.num_logits}, or do without."
            )
        return super()._problem_of(batch)


class GaussNewton(DirectionOptimizer):
    """Gauss-Newton by the Jacobian of the logits alone: d = J_zᵀ(J_z J_zᵀ + λI)⁻¹ ∂l/∂z; see `gauss_newton`.

    One backward pass for each logit of a sample in each step, and a Gram matrix of all of them, 8 (N·C)² bytes.
    λ is in the units of squared derivatives of logits.
    """

    natural_lr = 1.0
    function = staticmethod(gauss_newton)
    problem = staticmethod(gauss_newton_problem)
    retains_graph = True


class Weighted(DirectionOptimizer):
    """A weighted sum of the gradients of samples, d = Jᵀv with v of one's own making; see `directions.weighted`.

    Args:
        params: Parameters or parameter groups.
        weights: Makes v, shape [N], of K = JJᵀ, shape [N, N], and s, shape [N]. By YAML, the path of a function, or of
            a class whose instances are called.
        lr: Learning rate η.
        weight_decay: Decoupled weight decay: a step shrinks weights by lr · weight_decay, and lr is near 1 here.
        normalize: Scale each φ to unit norm.
        accumulate: Micro-batches of one exact update.
        sync: On many ranks, between which updates are exact: "global", "local" or a number of neighbours.
        momentum_type: "heavy-ball" alone.
        **options: momentum, max_norm, line_search; see `DirectionOptimizer`.

    """

    default_damping = 0.0

    def __init__(
        self,
        params: Params,
        weights: Weights,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        normalize: bool = False,
        accumulate: int = 1,
        sync: Sync = "global",
        *,
        momentum_type: MomentumType = "heavy-ball",
        **options: Any,
    ) -> None:
        self.weights = weights
        options["momentum_type"] = momentum_type
        super().__init__(params, lr, 0.0, weight_decay, normalize, accumulate, sync, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "weights": self.weights}

    def direction(self, linearization: LinearizedBatch) -> Direction:  # noqa: D102
        return weighted(linearization, self.weights)
