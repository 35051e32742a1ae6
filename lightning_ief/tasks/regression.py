"""Regression for recipes: any network, any optimizer."""

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import SumMetric

from lightning_ief.module import NaturalGradientMixin
from lightning_ief.objectives import LeastSquares
from lightning_ief.tasks.extras import import_extra
from lightning_ief.tasks.loaders import InMemoryDataModule
from lightning_ief.tasks.schedules import Schedule, configured, require_schedule

__all__ = ["DiabetesDataModule", "Regressor"]


class Regressor(NaturalGradientMixin, L.LightningModule):
    """Trains a network to give real values, with least squares.

    Batches are (inputs, targets); inputs are a tensor or a tuple, as the network takes them, and targets have the shape
    of its output. Logs `train/loss` and `val/loss` (mean of ½ ‖z − y‖² per sample) and `val/relative_l2` (‖z − y‖ / ‖y‖
    over all validation samples).

    Args:
        net: The network.
        optimizer: Makes the optimizer from the trainable parameters: one of this package or any of torch; LBFGS, too.
        lr_scheduler: 'linear' or 'cosine', from lr down to 0 over all steps of the run; or makes the learning-rate
            scheduler from the optimizer, which is stepped after each epoch; or None for a constant lr.
        warmup: Share of the run's steps in which lr rises from 0 before that; for 'linear', 'cosine' and None.

    Raises:
        ValueError: If schedule and warm-up do not go together.

    """

    def __init__(
        self, net: nn.Module, optimizer: OptimizerCallable, lr_scheduler: Schedule = None, warmup: float = 0.0
    ) -> None:
        super().__init__()
        require_schedule(lr_scheduler, warmup)
        self.net = net
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup = warmup
        self.objective = LeastSquares()
        self.squared_error = SumMetric()
        self.squared_norm = SumMetric()

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute what the network gives.

        Args:
            *inputs: Its inputs.

        Returns:
            z, of the shape of the targets.

        """
        output: Tensor = self.net(*inputs)
        return output

    def validation_step(self, batch: tuple[Tensor | tuple[Tensor, ...], Tensor], batch_idx: int) -> None:
        """Log `val/loss`, and add to the two norms.

        Args:
            batch: (inputs, targets).
            batch_idx: Number of the batch.

        """
        inputs, targets = batch
        output = self(*inputs) if isinstance(inputs, (tuple, list)) else self(inputs)
        losses = self.objective.losses(output, targets)
        self.squared_error.update(2 * losses)
        self.squared_norm.update(targets.square())
        self.log("val/loss", losses.mean(), batch_size=len(losses))

    def on_validation_epoch_end(self) -> None:
        """Log `val/relative_l2`."""
        relative = (self.squared_error.compute() / self.squared_norm.compute()).sqrt()
        self.log("val/relative_l2", relative, prog_bar=True)
        self.squared_error.reset()
        self.squared_norm.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and, if there is one, the scheduler.

        Returns:
            What Lightning expects.

        """
        return configured(self, self.optimizer, self.lr_scheduler, self.warmup)


class DiabetesDataModule(InMemoryDataModule):
    """A real table that scikit-learn ships: 442 patients, ten measurements, and how diabetes went on within a year.

    Batches are (measurements, progression): float32 [N, 10] and [N, 1], both standardised by mean and standard
    deviation of the training samples. The split depends on `seed` alone. Always guessing the mean has a
    `val/relative_l2` of about 1.

    Args:
        batch_size: N, samples per batch; by default all training samples.
        val_fraction: Share of all samples held out, between 0 and 1.
        seed: Seed of the split and of the order of the training samples.
        num_workers: Processes that load the data; the samples are in memory, so 0 is fastest.
        order_seed: Seed of the order alone, which then leaves the split as it is; `seed` if None.

    Raises:
        ValueError: If an argument is out of range.

    """

    def __init__(
        self,
        batch_size: int = 442,
        val_fraction: float = 0.3,
        seed: int = 0,
        num_workers: int = 0,
        order_seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, order_seed)
        if not 0 < val_fraction < 1:
            raise ValueError(f"DiabetesDataModule(val_fraction={val_fraction}): must be between 0 and 1.")
        self.val_fraction = val_fraction

    def setup(self, stage: str | None = None) -> None:
        """Load, split and standardise the table.

        Args:
            stage: What Lightning is about to do; the split is the same for all.

        """
        need = "DiabetesDataModule takes its table from scikit-learn"
        table = import_extra("sklearn.datasets", "recipes", need).load_diabetes(return_X_y=True, scaled=False)
        measurements, progression = map(torch.from_numpy, table)
        order = torch.randperm(len(progression), generator=torch.Generator().manual_seed(self.seed))
        val, train = order.tensor_split([round(self.val_fraction * len(order))])
        standardised = []
        for columns in (measurements, progression.unsqueeze(1)):
            deviation, mean = torch.std_mean(columns[train], dim=0)
            standardised.append(((columns - mean) / deviation).float())
        self.train_set = TensorDataset(*(columns[train] for columns in standardised))
        self.val_set = TensorDataset(*(columns[val] for columns in standardised))
