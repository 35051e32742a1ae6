"""K-FAC as an optimizer."""

from typing import Any

from lightning_ief.capture import Direction, LinearizedBatch
from lightning_ief.curvature import FisherKind, KFACCurvature
from lightning_ief.curvature.kronecker import Positions
from lightning_ief.curvature.rescaling import require_fisher
from lightning_ief.distributed import Sync
from lightning_ief.optim.base import DirectionOptimizer, Found, MomentumType, Params

__all__ = ["KFAC"]


class KFAC(DirectionOptimizer):
    """K-FAC: d = (Â ⊗ N Ĝ + λI)⁻¹∇L by layers, with averages Â and Ĝ over the run; see `KFACCurvature`.

    Batches are linearised with `keep_sides=optimizer.sides_of(model)`, which NaturalGradientMixin sees to. `fisher`
    makes it one of the paper's three (arXiv 2406.06420): "sampled" is its KFAC, "empirical" its eKFAC, "improved" its
    ieKFAC. `direction` takes its batch into the averages; one with a loss that is not finite leaves no trace in them.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate η; 1 is the natural scale.
        damping: λ ≥ 0, 1 if none is given, in the units of F, a sum over samples: N times that of mean losses. 0 is
            refused where a factor is singular.
        weight_decay: Decoupled weight decay: a step shrinks weights by lr · weight_decay, and lr is near 1 here.
        normalize: Scale each φ to unit norm.
        accumulate: Micro-batches of one update, whose factors are those of all their samples; of one length, if they
            are sequences.
        sync: On many ranks "global" alone: averages are those of all ranks.
        fisher: Gradients that Ĝ is of: "improved", each sample's divided by ‖∂l_n/∂z_n‖; "empirical", as they are; or
            "sampled", of sampled targets, one more backward pass for each in a step.
        positions: How positions that share a weight are taken: "expand", each for a sample, or "reduce", their sum.
        eigenvalue_correction: Replace the eigenvalues by second moments in the eigenbasis, as in EKFAC.
        decay: β of the averages, per step; they are bias-corrected.
        every: Steps between two eigendecompositions of the averages; there are more at first.
        num_samples: M, targets drawn per sample and step for "sampled".
        seed: Seed of the sampling, which depends on it and the number of steps taken.
        momentum_type: "heavy-ball" alone.
        **options: momentum, max_norm and line_search; see `DirectionOptimizer`.

    Raises:
        ValueError: If an argument is out of range.

    """

    default_damping = 1.0
    natural_lr = 1.0
    counters = {"steps": 0}

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
        fisher: FisherKind = "improved",
        positions: Positions = "expand",
        eigenvalue_correction: bool = False,
        decay: float = 0.95,
        every: int = 10,
        num_samples: int = 1,
        seed: int = 0,
        momentum_type: MomentumType = "heavy-ball",
        **options: Any,
    ) -> None:
        require_fisher("KFAC", fisher, num_samples)
        if every < 1:
            raise ValueError(f"KFAC(every={every}): must be at least 1.")
        for option, remedy in (
            ("metric", "IEF(metric='kronecker')"),
            ("relative_damping", "KFAC(damping=...)"),
            ("absolute_damping", "KFAC(damping=...)"),
        ):
            if options.get(option) is not None:
                raise ValueError(f"KFAC({option}={options[option]!r}): it has none; take {remedy} instead.")
        if sync != "global":
            raise ValueError(f"KFAC(sync={sync!r}): averages are those of all ranks, sync='global'.")
        self.curvature = KFACCurvature(fisher, positions, eigenvalue_correction, decay)
        self.every = every
        if fisher == "sampled":
            self.retains_graph = True
        options |= {"momentum_type": momentum_type, "num_samples": num_samples, "seed": seed}
        super().__init__(params, lr, damping, weight_decay, normalize, accumulate, sync, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "curvature": self.curvature, "every": self.every}

    @property
    def _averages(self) -> KFACCurvature:
        return self.curvature

    def direction(self, linearization: LinearizedBatch) -> Direction:  # noqa: D102
        parameters = linearization.parameters
        states = {name: self.state[parameters[name]] for name in self.curvature.sides_of(parameters)}
        damping, number = self.shared("damping"), self.shared("num_samples")
        generator = self._generator(linearization)
        return Direction.of(self.curvature.direction(linearization, damping, number, generator, states, self.every))

    def _find(self, batch: LinearizedBatch) -> Found:
        # Before anything is taken into an average; on all ranks alike.
        problem = batch.not_finite
        found = super()._find(batch) if problem is None else Found(problem=problem)
        self.param_groups[0]["steps"] += 1
        return found
