"""A classifier for recipes: any network, any optimizer."""

from itertools import pairwise

import lightning as L
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_ief.module import NaturalGradientMixin
from lightning_ief.objectives import CrossEntropy
from lightning_ief.tasks.schedules import Schedule, configured, require_schedule

__all__ = ["MLP", "Classifier"]


class MLP(nn.Module):
    """A multi-layer perceptron: linear layers with an activation in between.

    Args:
        widths: Numbers of features from input to output, such as [64, 512, 10].
        activation: Class of the activation between the layers.

    Raises:
        ValueError: If there are fewer than two widths or one is not positive.

    Example:
        >>> import torch
        >>> MLP([64, 32, 10])(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 10])

    """

    def __init__(self, widths: list[int], activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"MLP(widths={widths}): needs at least two positive numbers, input and output.")
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(widths):
            layers += [nn.Linear(d_in, d_out), activation()]
        self.layers = nn.Sequential(*layers[:-1])  # no activation after the logits

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            x: Inputs, [N, ...] with widths[0] features in each sample.

        Returns:
            Logits, [N, widths[-1]].

        """
        logits: Tensor = self.layers(x.flatten(1))
        return logits


class Classifier(NaturalGradientMixin, L.LightningModule):
    """Trains a network to tell classes apart, with cross-entropy.

    Batches are (inputs, targets) with int64 targets [N]. Logs `train/loss`, `val/loss` and `test/loss` (mean
    cross-entropy per sample, in nats), `val/accuracy` and `test/accuracy` (share of samples, 0 to 1).

    The arguments are not in the checkpoint; the config.yaml beside it has them. On the command line give both,
    `--config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt`; in Python repeat them,
    `Classifier.load_from_checkpoint(path, net=..., optimizer=..., num_classes=...)`.

    Args:
        net: The network; maps inputs to logits [N, num_classes].
        optimizer: Makes the optimizer from the trainable parameters: one of this package (IEF, EF, SampledFisher,
            NaturalGradient) or any of torch.
        lr_scheduler: 'linear' or 'cosine', from lr down to 0 over all steps of the run; or makes the learning-rate
            scheduler from the optimizer, which is stepped after each epoch; or None for a constant lr.
        num_classes: Number of classes.
        warmup: Share of the run's steps in which lr rises from 0 before that; for 'linear', 'cosine' and None.

    Raises:
        ValueError: If schedule and warm-up do not go together.

    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        num_classes: int,
        lr_scheduler: Schedule = None,
        warmup: float = 0.0,
    ) -> None:
        super().__init__()
        require_schedule(lr_scheduler, warmup)
        self.net = net
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup = warmup
        self.objective = CrossEntropy()
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            x: Inputs of the network, [N, ...].

        Returns:
            Logits, [N, num_classes].

        """
        logits: Tensor = self.net(x)
        return logits

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `val/loss` and `val/accuracy`.

        Args:
            batch: (inputs, targets).
            batch_idx: Number of the batch.

        """
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `test/loss` and `test/accuracy`.

        Args:
            batch: (inputs, targets).
            batch_idx: Number of the batch.

        """
        self._evaluate(batch, "test", self.test_accuracy)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        inputs, targets = batch
        logits = self(inputs)
        accuracy(logits, targets)
        losses = self.objective.losses(logits, targets)
        self.log(f"{stage}/loss", losses.mean(), batch_size=len(losses))
        self.log(f"{stage}/accuracy", accuracy, batch_size=len(losses), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and, if there is one, the scheduler.

        Returns:
            What Lightning expects.

        """
        return configured(self, self.optimizer, self.lr_scheduler, self.warmup)
