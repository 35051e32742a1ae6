"""What the solver did in a step of an optimizer of this package."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_ief.optim import DirectionOptimizer

__all__ = ["SolverReport"]


class SolverReport(Callback):
    """Logs what the solve of a step did, on every n-th step.

    * `solver/damping`: λ; `solver/effective_rank`: Σ κ/(κ + λ) over the eigenvalues κ of the matrix that is damped;
      `solver/condition`: the condition of the damped matrix; `solver/damped_share`: the part of what was asked of the
      batch that damping took, ‖b − A d‖/‖b‖. Of directions that are solved for in the space of rows.
    * `solver/fallback`: 1 if the fast solve was too ill-conditioned and a slower one was taken, else 0: samples repeat
      each other, say, or λ is tiny. It tells why steps have become slower, not that they were wrong.
    * `solver/direction_norm`: ‖φ‖; `solver/step_norm`: ‖lr · φ‖, after `max_norm` and a line search;
      `solver/step_share`: the part of lr that a line search took.
    * `solver/slope_before`, `solver/curvature_before`: φᵀ∇L and φᵀHφ of the step before on this batch, which did not
      make it: with momentum of the SPRING kind they cost nothing. Their ratio is the step length that this batch would
      have liked.
    * `solver/skipped`: steps of the run that were skipped so far.

    A report takes the eigenvalues of a matrix of as many rows as the batch has, once every n steps.

    Args:
        every_n_steps: n.

    Raises:
        ValueError: If n is not positive.

    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"SolverReport(every_n_steps={every_n_steps}): must be at least 1.")
        self.every_n_steps = every_n_steps
        self._skipped = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask for a report where it is time for one."""
        for optimizer in _of_this_package(trainer):
            optimizer.reports = trainer.global_step % self.every_n_steps == 0
            optimizer.report = {}
            optimizer.skipped = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log it."""
        for optimizer in _of_this_package(trainer):
            self._skipped += optimizer.skipped is not None
            if optimizer.report:
                found = {f"solver/{name}": value for name, value in optimizer.report.items()}
                pl_module.log_dict(found | {"solver/skipped": float(self._skipped)})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the optimizers as they were."""
        for optimizer in _of_this_package(trainer):
            optimizer.reports = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._skipped = state_dict["skipped"]


def _of_this_package(trainer: pl.Trainer) -> list[DirectionOptimizer]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, DirectionOptimizer)]
