"""A classifier for recipes: any network, any optimizer."""

from itertools import pairwise

import lightning as L
from lightning.pytorch.cli import LightningCLI, LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_ief.module import NaturalGradientMixin
from lightning_ief.objectives import CrossEntropy

__all__ = ["MLP", "Classifier", "configured"]


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
        lr_scheduler: Makes the learning-rate scheduler from the optimizer; stepped after each epoch.
        num_classes: Number of classes.

    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        num_classes: int,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
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
        return configured(self, self.optimizer, self.lr_scheduler)


def configured(
    module: L.LightningModule, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None
) -> OptimizerLRScheduler:
    """Make what `configure_optimizers` returns, of the parameters that are trained.

    Args:
        module: Whose parameters.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the scheduler from it.

    Returns:
        What Lightning expects.

    """
    made = optimizer([p for p in module.parameters() if p.requires_grad])
    scheduler = None if lr_scheduler is None else lr_scheduler(made)
    found: OptimizerLRScheduler = LightningCLI.configure_optimizers(module, made, scheduler)
    return found
