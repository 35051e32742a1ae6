"""Norms of samples' gradients, their noise, and the length of steps, as training goes on."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_ief.callbacks.beside_the_run import (
    at_cost_of,
    check_objective,
    moving_parameters,
    reading_of,
    require_whole,
    undisturbed,
)
from lightning_ief.capture import LinearizedBatch, linearize
from lightning_ief.distributed import across
from lightning_ief.indicators import NoiseScale, gradient_noise, loss_gradient_norm
from lightning_ief.objectives import Objective
from lightning_ief.optim import DirectionOptimizer

__all__ = ["GradientStatistics"]


class GradientStatistics(Callback):
    """Logs what the gradients of a batch's samples are like, and how long the step is, on every n-th step.

    Of a training batch with N samples, L = Σ l_n (sums, not means), and of the parameters that the optimizer moves:

    * `gradients/norm_mean`, `gradients/norm_std`: mean of ‖∇l_n‖, and its standard deviation over the samples.
    * `gradients/loss_norm`: ‖∇L‖. Over N it is the norm of the gradient of the mean loss.
    * `gradients/noise`, `gradients/square`: tr Σ of samples' gradients, and ‖∇L‖² of the mean loss, without bias, see
      `indicators.gradient_noise`; the latter may be negative where noise is larger.
    * `gradients/noise_scale`: tr Σ / ‖∇L‖², the batch size at which noise is as large as the gradient (arXiv
      1812.06162), each averaged over the reports of this epoch so far; inf where the gradient can't be told from noise.
    * `gradients/s_mean`, `gradients/s_variance`: mean and variance over the samples of s_n = ‖∂l_n/∂z_n‖².
    * `gradients/direction_norm`: ‖φ‖, of the direction of this step, with its momentum, before lr and `max_norm`. Of
      optimizers of this package.

    With such an optimizer they are those of the step itself: of the rows that it has, in train mode, of all
    micro-batches and of all ranks that it is exact for. They cost next to nothing where the step has the Gram matrix
    anyway. Skipped steps are left out, and the next one is reported.

    With any other module and optimizer, under automatic and manual optimization, the batch is linearised before the
    step, in eval mode and without autocast (a forward and a backward pass, and the Gram matrix), and the run is left as
    it was; of all ranks together, and of the first of several batches whose gradients are accumulated. A module without
    an objective takes cross-entropy where batches are pairs whose targets are classes, and one line says so.

    A batch of one sample has neither deviations nor noise; these keys are left out there.

    Args:
        every_n_steps: n.
        objective: The objective; the module's own attribute `objective` if None.
        unpack_batch: Maps a batch to (inputs, targets); the module's own method `unpack_batch` if None, or else
            batches are taken for such pairs.

    Raises:
        ValueError: If n is not positive.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GradientStatistics(every_n_steps=100)])  # doctest: +SKIP

    """

    def __init__(
        self,
        every_n_steps: int = 50,
        objective: Objective | None = None,
        unpack_batch: Callable[[Any], Any] | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"GradientStatistics(every_n_steps={every_n_steps}): must be at least 1.")
        self.every_n_steps = every_n_steps
        self.objective = objective
        self.unpack_batch = unpack_batch
        self.spent_seconds = 0.0
        self._noise_scale = NoiseScale(sync_on_compute=False)
        self._present = self._next = 0  # steps before this batch, and before the one that is reported
        self._reading: tuple[Objective, Callable[[Any], Any]] | None = None
        self._found: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the objective, where there is one already.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: 'fit' or another one, for which nothing is needed.

        Raises:
            MisconfigurationException: If it is none of the package.

        """  # noqa: DOC502  # raised by check_objective
        if stage == "fit":
            check_objective("GradientStatistics", pl_module, self.objective)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out which step is the first to be reported, in a resumed run as well."""
        self._next = -(-trainer.global_step // self.every_n_steps) * self.every_n_steps
        self._reading, self._found = None, {}
        if _of_this_package(trainer) is None:
            require_whole("GradientStatistics", pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a mean of the noise."""
        self._noise_scale.reset()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Have the step say what it finds, or linearise the batch."""
        optimizer, self._present = _of_this_package(trainer), trainer.global_step
        is_due = self._present >= self._next
        if optimizer is not None:
            self._no_longer(optimizer)
            if is_due:
                optimizer.observers = [*optimizer.observers, self._observe]
        elif is_due:
            with at_cost_of(self), undisturbed(trainer, pl_module):
                self._take(self._linearized(trainer, pl_module, batch))

    def _linearized(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> LinearizedBatch:
        if self._reading is None:
            self._reading = reading_of("GradientStatistics", module, self.objective, self.unpack_batch, batch)
        objective, unpack = self._reading
        inputs, targets = unpack(batch)
        parameters = moving_parameters(trainer, module)
        found = linearize(module, inputs, targets, objective, parameters=parameters)
        return across(found) if trainer.world_size > 1 else found

    def _observe(self, batch: LinearizedBatch, length: float) -> None:
        self._take(batch)
        self._found["direction_norm"] = length

    def _take(self, batch: LinearizedBatch) -> None:
        norms, s = batch.jacobian.row_norms(), batch.logit_gradient_norms
        self._found = {"norm_mean": norms.mean(), "loss_norm": loss_gradient_norm(batch), "s_mean": s.mean()}
        if len(norms) > 1:
            noise, square = gradient_noise(batch)
            self._noise_scale.update(batch)
            self._found |= {"norm_std": norms.std(), "s_variance": s.var(), "noise": noise, "square": square}
            self._found["noise_scale"] = self._noise_scale.compute()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log it."""
        if not self._found:
            return
        pl_module.log_dict({f"gradients/{name}": value for name, value in self._found.items()})
        self._found = {}
        self._next = (self._present // self.every_n_steps + 1) * self.every_n_steps

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the optimizer as it was."""
        if (optimizer := _of_this_package(trainer)) is not None:
            self._no_longer(optimizer)

    def _no_longer(self, optimizer: DirectionOptimizer) -> None:
        optimizer.observers = [each for each in optimizer.observers if each != self._observe]


def _of_this_package(trainer: pl.Trainer) -> DirectionOptimizer | None:
    return next((each for each in trainer.optimizers if isinstance(each, DirectionOptimizer)), None)
