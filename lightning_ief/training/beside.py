"""Optimizers of torch that train other parameters beside one of this package."""

from collections.abc import Sequence
from inspect import Parameter, signature

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ief.capture import LinearizedBatch
from lightning_ief.directions import sgd
from lightning_ief.optim import DirectionOptimizer

__all__ = ["OtherOptimizers", "evaluates_itself"]


def evaluates_itself(optimizer: Optimizer) -> bool:
    """Whether a step needs a closure that evaluates the loss, as that of torch.optim.LBFGS does."""
    closure = signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


class OtherOptimizers:
    """Gives optimizers of torch the gradient of the mean loss, taken from the rows of a linearization.

    An update is of as many micro-batches as one of the optimizer beside them, of all samples on all ranks. A parameter
    that took no part in the forward pass has a gradient of 0.

    Args:
        optimizers: The optimizers.
        beside: The optimizer of this package.

    Raises:
        MisconfigurationException: If they share parameters, or updates would not be those of one rank.

    """

    def __init__(self, optimizers: Sequence[Optimizer], beside: DirectionOptimizer) -> None:
        self.optimizers = optimizers
        self._num_samples = 0  # since the last update
        name = type(beside).__name__
        if any(isinstance(each, DirectionOptimizer) for each in optimizers):
            raise MisconfigurationException(
                "Two optimizers of lightning_ief: a direction belongs to all parameters together. Give one of them "
                "several parameter groups instead."
            )
        if alone := [type(each).__name__ for each in optimizers if evaluates_itself(each)]:
            raise MisconfigurationException(
                f"{alone[0]} evaluates the loss within its steps, and can't step beside {name}. Train with it alone."
            )
        if beside.sync != "global":
            raise MisconfigurationException(
                f"{name}(sync={beside.sync!r}) beside another optimizer: gradients are those of all ranks. Take "
                "sync='global'."
            )
        held = {id(p) for group in beside.param_groups for p in group["params"]}
        if any(id(p) in held for p in self._trained()):
            raise MisconfigurationException(
                f"{name} and {type(optimizers[0]).__name__} hold the same parameters: give each its own."
            )

    def parameters_of(self, module: pl.LightningModule) -> dict[str, nn.Parameter]:
        """What they train, by name."""
        mine = {id(p) for p in self._trained()}
        return {name: p for name, p in module.named_parameters() if id(p) in mine}

    def add(self, batch: LinearizedBatch) -> None:
        """Add the gradients of a micro-batch, a sum over its samples, to .grad; all ranks call it."""
        batch.ranks.require_whole("Two optimizers need")
        mine = {id(p) for p in self._trained()}
        names = [name for name, p in batch.parameters.items() if id(p) in mine]
        for name, gradient in (sgd(batch.restrict(names)).form() if names else {}).items():
            p = batch.parameters[name]
            p.grad = gradient if p.grad is None else p.grad + gradient
        self._num_samples += len(batch.all_losses)

    def step(self, skip: bool) -> None:
        """Take the steps, unless they are to be skipped; the next micro-batches begin anew."""
        held = [p for each in self.optimizers for group in each.param_groups for p in group["params"]]
        for p in held:
            if p.grad is not None:
                p.grad /= self._num_samples
        for each in self.optimizers:
            if not skip:  # not through Lightning, which would count it as another update of the run
                each.step()
            each.zero_grad()
        self._num_samples = 0

    def _trained(self) -> list[Tensor]:
        groups = [group for each in self.optimizers for group in each.param_groups]
        return [p for group in groups for p in group["params"] if p.requires_grad]
