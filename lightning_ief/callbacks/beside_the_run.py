"""Batches that callbacks linearise beside the run, which stays as it was: with what objective, and at what cost."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Protocol, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ief.capture import preserved_state
from lightning_ief.capture.linearization import call_model
from lightning_ief.capture.messages import described
from lightning_ief.objectives import CrossEntropy, Objective, as_objective

__all__ = ["Unpack", "at_cost_of", "check_objective", "moving_parameters", "reading_of", "require_whole", "undisturbed"]

Unpack: TypeAlias = Callable[[Any], Any]
"""Maps a batch to (inputs, targets)."""


class _Costs(Protocol):
    """What `StepTiming` reads of callbacks that linearise batches beside the run.

    Attributes:
        spent_seconds: How long this process has been at it.

    """

    spent_seconds: float


@contextmanager
def at_cost_of(callback: _Costs) -> Iterator[None]:
    """Count the time of what is done within as this callback's.

    Args:
        callback: Whose it is.

    """
    _wait_for_device()
    start = perf_counter()
    try:
        yield
    finally:
        _wait_for_device()
        callback.spent_seconds += perf_counter() - start


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def check_objective(caller: str, module: pl.LightningModule, objective: Objective | None) -> None:
    """Require that an objective is one, where there is one.

    Args:
        caller: The callback.
        module: The module, which is asked if none was given.
        objective: The objective that was given.

    Raises:
        MisconfigurationException: If it is none of the package, or a loss of torch.nn that can't be taken.

    """
    if objective is None and not hasattr(module, "objective"):
        return
    try:
        as_objective(objective or module.objective)
    except TypeError as error:
        raise MisconfigurationException(
            f"{caller} can't use {type(module).__name__}.objective, give it another: {caller}(objective=...). {error}"
        ) from error


def reading_of(
    caller: str, module: pl.LightningModule, objective: Objective | None, unpack_batch: Unpack | None, batch: Any
) -> tuple[Objective, Unpack]:
    """How to read batches: what was given, else what the module says, else (inputs, classes) with cross-entropy.

    Args:
        caller: The callback.
        module: The module, on the device of the batch.
        objective: The objective that was given.
        unpack_batch: The way to split batches that was given.
        batch: A batch. If nothing else is known, it must be a pair whose targets are classes of the module's logits;
            one line says that cross-entropy is taken.

    Returns:
        The objective, and how to split batches.

    Raises:
        MisconfigurationException: If something is missing, and the batch is another one.

    """
    check_objective(caller, module, objective)
    unpack = unpack_batch or getattr(module, "unpack_batch", None)
    if unpack is None:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            why = f"batches are no pairs: this one is a {described(batch)}"
            raise MisconfigurationException(_missing(caller, "unpack_batch", module, why))
        unpack = _pair
    if objective is not None or hasattr(module, "objective"):
        return as_objective(objective or module.objective), unpack
    inputs, targets = unpack(batch)
    losses = [each for each in module.children() if isinstance(each, nn.CrossEntropyLoss)]
    assumed = as_objective(losses[0]) if len(losses) == 1 else CrossEntropy()
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        kind = targets.dtype if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
        why = f"cross-entropy does not fit: targets are {kind}, no classes"
        raise MisconfigurationException(_missing(caller, "objective", module, why))
    try:
        with torch.no_grad():
            assumed.validate(call_model(module, inputs), targets)
    except (TypeError, ValueError) as error:
        why = f"cross-entropy does not fit: {error}"
        raise MisconfigurationException(_missing(caller, "objective", module, why)) from error
    rank_zero_info(
        f"{caller}: {type(module).__name__} has no objective, and its targets are classes: taken for cross-entropy. "
        f"Say {caller}(objective=...) for another loss."
    )
    return assumed, unpack


def _pair(batch: Sequence[Any]) -> tuple[Any, Any]:
    inputs, targets = batch
    return inputs, targets


def _missing(caller: str, what: str, module: nn.Module, why: str) -> str:
    return (
        f"{caller} needs {what}: {type(module).__name__} has none, so give it to the callback, {caller}({what}=...), "
        f"or derive the module from NaturalGradientMixin ({why})."
    )


def require_whole(caller: str, module: nn.Module, instead: str = "") -> None:
    """Require that no parameter is sharded.

    Args:
        caller: The callback.
        module: The module.
        instead: What else there is.

    Raises:
        MisconfigurationException: If one is.

    """
    if sharded := [name for name, p in module.named_parameters() if isinstance(p, DTensor)]:
        raise MisconfigurationException(
            f"{caller} needs whole parameters, '{sharded[0]}' is sharded. Leave the callback out{instead}."
        )


def moving_parameters(trainer: pl.Trainer, module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the Trainer's optimizers move; all trainable ones if it has none.

    Args:
        trainer: The trainer.
        module: The module.

    Returns:
        These, by name.

    """
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    moving = {id(p) for group in groups for p in group["params"]}
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {name: p for name, p in trainable.items() if id(p) in moving} or trainable


@contextmanager
def undisturbed(trainer: pl.Trainer, module: nn.Module) -> Iterator[None]:
    """Eval mode and the parameters' precision; on exit, modes, buffers and random numbers are as before.

    A layer that changes its parameters in eval mode, as loralib's adapters merge theirs into the weight, has other
    gradients there: it stays in train mode, only what is within it does not.
    """
    modes = [(each, each.training) for each in module.modules()]
    switching = [each for each, mode in modes if mode and type(each).train is not nn.Module.train]
    kept = [(each, p, p.detach().clone()) for each in switching for p in each.parameters(recurse=False)]

    def changed() -> list[nn.Module]:
        return [*dict.fromkeys(each for each, p, before in kept if not torch.equal(p, before))]

    def restore(layers: list[nn.Module]) -> None:
        for each in layers:
            each.train()
        for _, parameter, before in kept:  # there and back is the same up to rounding only
            if not torch.equal(parameter, before):
                parameter.data.copy_(before)  # which graphs of pending batches need not know

    # Rounding by autocast would show in an almost undamped solve.
    full_precision = torch.autocast(trainer.strategy.root_device.type, enabled=False)
    # Data sets may draw random numbers from Python and NumPy too, which preserved_state does not know.
    with isolate_rng(include_cuda=False), preserved_state(module):
        try:
            with trainer.precision_plugin.forward_context(), full_precision:
                module.eval()
                restore(merging := changed())
                for each, _ in modes:
                    each.training = each in merging
                yield
        finally:
            restore(switching)
            for each, mode in modes:
                each.training = mode
