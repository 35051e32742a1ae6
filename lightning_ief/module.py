"""The LightningModule mixin: manual optimization by natural-gradient updates, or by any other optimizer."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_ief.capture import Linearization, LinearizedBatch, linearize
from lightning_ief.capture.joint import EmptyLinearization
from lightning_ief.capture.linearization import call_model, require_samples
from lightning_ief.distributed import GlobalLinearization, across, gathered_losses, name_samples, whole_parameters
from lightning_ief.objectives import Objective
from lightning_ief.optim import DirectionOptimizer
from lightning_ief.position import (
    progress_of,
    restore_position,
    restores_position,
    warn_of_repeated,
    without_repeated,
)
from lightning_ief.precision import loss_scale_of, reported_to_scaler, require_precision, require_scaled

__all__ = ["NaturalGradientMixin"]


class NaturalGradientMixin:
    """Trains a LightningModule with an optimizer of this package, or with any other one.

    Put it before `LightningModule` among the bases, set `self.objective`, and return the optimizer from
    `configure_optimizers`. The mixin brings `training_step`, which logs `train/loss` (mean over the samples of the
    batch), and switches to manual optimization. Learning-rate schedulers are stepped as their interval and frequency
    say, ReduceLROnPlateau by its `monitor`. Optimizers that are not of this package get the gradient of the mean loss,
    as always in Lightning, so that a baseline differs in one line.

    A run that resumes from a checkpoint within an epoch goes on with the batches behind those that the checkpoint has
    seen, also on another number of ranks if the batches of all ranks together stay the same. That is the uninterrupted
    run where the order of samples depends on the epoch alone: `DistributedSampler`, which Lightning takes on many ranks
    and which one process may take, too (num_replicas=1, rank=0). Lightning restores no random numbers: of dropout and
    augmentation, a resumed run draws others.

    Attributes:
        objective: Turns logits and targets into per-sample losses.
        verify_capture: Whether to verify the capture, on the first batches of a run and from time to time.
        capture_seconds: Time that recording took within the last forward pass.

    Example:
        >>> import lightning as L
        >>> from lightning_ief import IEF, objectives
        >>> class Classifier(NaturalGradientMixin, L.LightningModule):
        ...     def __init__(self, net):
        ...         super().__init__()
        ...         self.net = net
        ...         self.objective = objectives.CrossEntropy()
        ...     def forward(self, x):
        ...         return self.net(x)
        ...     def configure_optimizers(self):
        ...         return IEF(self.parameters(), lr=1.0, damping=1e-7)
        >>> Classifier(torch.nn.Linear(3, 2)).automatic_optimization
        False

    """

    objective: Objective
    verify_capture: bool = True
    capture_seconds: float = 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "configure_optimizers" in cls.__dict__:
            cls.configure_optimizers = _remember_monitors(cls.__dict__["configure_optimizers"])  # type: ignore[attr-defined]
        order = cls.__mro__
        if pl.LightningModule in order and order.index(pl.LightningModule) < order.index(NaturalGradientMixin):
            raise TypeError(
                f"NaturalGradientMixin must stand before LightningModule: "
                f"class {cls.__name__}(NaturalGradientMixin, LightningModule)."
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._module.automatic_optimization = False
        self._linearization: Linearization | None = None
        self._monitors: list[tuple[Any, _Monitor]] = []  # of schedulers that follow a metric
        self._updated = 0  # batches of all epochs up to the last update

    @property
    def _module(self) -> pl.LightningModule:
        """This object as the LightningModule that it is."""
        return cast(pl.LightningModule, self)

    def unpack_batch(self, batch: Any) -> tuple[Any, Tensor]:
        """Split a batch into what the model takes and what the objective compares with; override for other batches.

        Args:
            batch: What the data loader yields.

        Returns:
            Inputs (a tensor, a tuple of positional or a dict of keyword arguments) and targets.

        Raises:
            TypeError: If the batch is no pair.

        """
        if not isinstance(batch, Sequence) or len(batch) != 2:
            raise TypeError(
                f"Expected a batch (inputs, targets), got {type(batch).__name__}. Override "
                f"{type(self).__name__}.unpack_batch(batch) to return (inputs, targets)."
            )
        inputs, targets = batch
        return inputs, targets

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """One update on one batch; logs `train/loss`.

        Args:
            batch: The batch.
            batch_idx: Its number within the epoch.

        Returns:
            The mean loss, None if the step was skipped.

        Raises:
            MisconfigurationException: If a callback of the mixin is missing.

        """
        callbacks = _callbacks(self._module.trainer)
        if batch_idx == 0 and not any(isinstance(callback, _Hooks) for callback in callbacks):
            raise MisconfigurationException(
                f"{type(self).__name__}.configure_callbacks() dropped those of NaturalGradientMixin: return "
                "[*super().configure_callbacks(), ...]."
            )
        inputs, targets = self.unpack_batch(batch)
        losses = self.optimize(inputs, targets)
        inner = self._optimizer().optimizer
        if not (isinstance(inner, DirectionOptimizer) and inner.pending):
            self._step_schedulers("step", batch_idx + 1)
        if self._module.trainer.is_last_batch:  # before validation, where checkpoints are written
            self._step_schedulers("epoch", self._module.current_epoch + 1)
        if losses is None:
            return None
        loss = losses.mean()
        self._module.log("train/loss", loss, prog_bar=True, batch_size=len(losses))
        return loss

    def optimize(self, inputs: Any, targets: Tensor) -> Tensor | None:
        """Forward, backward and one optimizer step; for a `training_step` of your own.

        On many ranks, each of them calls it with its own part of the batch, and equally often. Samples with which
        `DistributedSampler` has filled up the last batch, so that all ranks have equally many, count once only. A rank
        may have no sample. With the optimizer's accumulate=k, only every k-th call takes a step, and the last of an
        epoch.

        Args:
            inputs: A tensor, a tuple of positional or a dict of keyword arguments of the model.
            targets: y, what the objective says, samples on dimension 0.

        Returns:
            Per-sample losses before the step, of all ranks, shape [N], detached; None if the step was skipped since a
            loss is not finite (a warning says which).

        """
        optimizer = self._optimizer()
        inputs, targets = without_repeated(self._module.trainer, inputs, targets)
        if isinstance(optimizer.optimizer, DirectionOptimizer):
            return self._step_along_direction(optimizer, inputs, targets)
        return self._step_along_gradient(optimizer, inputs, targets)

    def _step_along_direction(self, optimizer: LightningOptimizer, inputs: Any, targets: Tensor) -> Tensor | None:
        inner, trainer = cast(DirectionOptimizer, optimizer.optimizer), self._module.trainer
        mine = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        parameters = {name: p for name, p in self._module.named_parameters() if id(p) in mine}
        whole = whole_parameters(self._module) if trainer.world_size > 1 else {}
        loss_scale = loss_scale_of(trainer, self._module.device)
        seen: LinearizedBatch
        if trainer.world_size > 1 and len(targets) == 0:
            seen = EmptyLinearization(parameters, self.objective)
        else:
            seen = self._linearized(
                inputs, targets, {name: whole.get(name, p) for name, p in parameters.items()}, bool(whole), loss_scale
            )
        if trainer.world_size > 1:
            seen = across(seen, inner.sync, parameters)
        losses = seen.all_losses if isinstance(seen, GlobalLinearization) else seen.losses
        # An incomplete window at the end of an epoch is an update, too, as in Lightning's own accumulation.
        if not inner.collect(seen) and not trainer.is_last_batch:
            return None if seen.not_finite else losses
        with reported_to_scaler(trainer, inner, self._module.device):
            optimizer.step()
        self._updated = progress_of(trainer).total.processed + 1
        # The optimizer has looked already: looking at the losses here would have the host wait for the device.
        return None if inner.skipped and seen.not_finite else losses

    def _linearized(
        self,
        inputs: Any,
        targets: Tensor,
        parameters: dict[str, torch.nn.Parameter],
        sharded: bool,
        loss_scale: Tensor | None,
    ) -> Linearization:
        verify = None if self.verify_capture else False  # when it is due, or never
        if sharded and self.verify_capture:
            # Sharded parameters come and go with collectives: every rank must verify, or none.
            verify = _is_power_of_ten(self._module.trainer.global_step)
        linearization = linearize(
            self._module, inputs, targets, self.objective, parameters=parameters, verify=verify, loss_scale=loss_scale
        )
        require_scaled(linearization, loss_scale)
        self.capture_seconds = linearization.capture_seconds
        self._linearization = linearization
        strategy = self._module.trainer.strategy
        try:
            # Lightning's hooks around the backward pass run there, and call `backward` below. There are no gradients
            # for DistributedDataParallel to reduce.
            with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
                self._module.manual_backward(linearization.losses.sum())
        finally:
            self._linearization = None
        return linearization

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook for the backward pass: to the Jacobian where there is a linearization, else as always.

        Args:
            loss: The loss.
            *args: For `Tensor.backward`.
            **kwargs: For `Tensor.backward`.

        """
        if self._linearization is None:
            loss.backward(*args, **kwargs)
        else:
            optimizer = cast(DirectionOptimizer, self._optimizer().optimizer)
            self._linearization.backward(retain_graph=optimizer.retains_graph)

    def _step_along_gradient(self, optimizer: LightningOptimizer, inputs: Any, targets: Tensor) -> Tensor | None:
        self.capture_seconds = 0.0
        ranks = self._module.trainer.world_size
        if ranks == 1:
            require_samples(targets)
        own = self._losses(inputs, targets) if len(targets) else self._no_loss()
        parts = [own.detach()] if ranks == 1 else gathered_losses(own.detach())
        losses = torch.cat(parts)
        if not bool(torch.isfinite(losses).all()):
            bad = name_samples([~torch.isfinite(x) for x in parts])
            warnings.warn(f"Skipped a training step: losses are not finite, {bad}.", RuntimeWarning, stacklevel=2)
            return None
        optimizer.zero_grad()
        # The mean over all samples, wherever they are: gradients are averaged over the ranks.
        self._module.manual_backward(own.sum() * (ranks / len(losses)))
        optimizer.step()
        return losses

    def _losses(self, inputs: Any, targets: Tensor) -> Tensor:
        logits = call_model(self._module, inputs)
        self.objective.validate(logits.detach(), targets)
        return self.objective.losses(logits, targets)

    def _no_loss(self) -> Tensor:
        """No losses, of which each parameter has a gradient of zero: DistributedDataParallel waits for all of them."""
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        return torch.stack([p.sum() * 0.0 for p in parameters]).sum().expand(0)

    def _optimizer(self) -> LightningOptimizer:
        optimizer: Any = self._module.optimizers()
        if not isinstance(optimizer, LightningOptimizer):
            found = [type(o).__name__ for o in optimizer] if isinstance(optimizer, list) else optimizer
            raise MisconfigurationException(
                f"NaturalGradientMixin trains with one optimizer, configure_optimizers returned {found}. Give one "
                "optimizer several parameter groups instead."
            )
        return optimizer

    def configure_callbacks(self) -> list[Callback]:
        """Lightning's hook, used to check the Trainer before the run; call it with super() if you override it.

        Returns:
            The callback that does what the mixin has to do in hooks of the Trainer.

        Raises:
            MisconfigurationException: If the Trainer is asked for something that has another place here.

        """
        trainer = self._module.trainer
        if trainer.gradient_clip_val:
            raise MisconfigurationException(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips .grad, which natural-gradient updates "
                "don't have. Remove it; to bound the length of updates use the optimizer's normalize=True, or a "
                "smaller lr, or more damping."
            )
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) adds up gradients, from which "
                "the update of the joint batch can't be had. Remove it and give the optimizer accumulate="
                f"{trainer.accumulate_grad_batches}, which makes one exact update of so many batches."
            )
        require_precision(trainer)
        self._monitors.clear()  # those of an earlier run
        own = cast(Any, super()).configure_callbacks()
        callbacks = [own] if isinstance(own, Callback) else list(own)
        if not any(isinstance(callback, _Hooks) for callback in _callbacks(trainer)):
            callbacks.append(_Hooks())
        return callbacks

    def _monitor(self, scheduler: Any) -> "_Monitor | None":
        """Look up what a scheduler follows.

        Returns:
            The metric; None for schedulers that only count.

        Raises:
            MisconfigurationException: If it is a ReduceLROnPlateau that was not told what to follow.

        """
        for known, monitor in self._monitors:
            if known is scheduler:
                return monitor
        if not isinstance(scheduler, ReduceLROnPlateau):
            return None
        if name := getattr(scheduler, "monitor", None):  # LightningCLI's own class
            return _Monitor(name)
        raise MisconfigurationException(
            "ReduceLROnPlateau has no metric to follow: return {'optimizer': ..., 'lr_scheduler': {'scheduler': ..., "
            f"'monitor': 'val/loss'}}}} from {type(self).__name__}.configure_optimizers()."
        )

    def _step_schedulers(self, interval: str, count: int, plateau: bool = False) -> None:
        """Step the learning-rate schedulers of an interval, as automatic optimization would."""
        for config in self._module.trainer.lr_scheduler_configs:
            monitor = self._monitor(config.scheduler)
            if config.interval != interval or (monitor is not None) != plateau or count % config.frequency:
                continue
            metric = None
            if monitor is not None:
                metrics = self._module.trainer.callback_metrics
                metric = metrics.get(monitor.name)
                if metric is None:
                    problem = (
                        f"{type(config.scheduler).__name__} follows '{monitor.name}', which was not logged; there are: "
                        f"{[*metrics]}."
                    )
                    if monitor.strict:
                        raise MisconfigurationException(f"{problem} Log it, or set 'strict': False to skip the step.")
                    warnings.warn(f"{problem} Skipped its step.", RuntimeWarning, stacklevel=2)
                    continue
            self._module.lr_scheduler_step(config.scheduler, metric)


class _Monitor(NamedTuple):
    """The metric that a scheduler follows, and whether its absence is an error."""

    name: str
    strict: bool = True


def _remember_monitors(configure: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keep the keys of scheduler dictionaries which Lightning drops, with a warning, under manual optimization."""

    @wraps(configure)
    def configure_optimizers(self: NaturalGradientMixin) -> Any:
        return take(self, configure(self))

    def take(self: NaturalGradientMixin, found: Any) -> Any:
        if isinstance(found, (list, tuple)):
            return type(found)([take(self, each) for each in found])
        if not isinstance(found, dict):
            return found
        scheduler = found.get("scheduler", found.get("lr_scheduler"))
        follows = isinstance(scheduler, ReduceLROnPlateau) or found.get("reduce_on_plateau", False)
        if follows and found.get("monitor") is not None:
            self._monitors.append((scheduler, _Monitor(found["monitor"], found.get("strict", True))))
        dropped = {"monitor", "strict", "reduce_on_plateau"}
        return {key: take(self, value) for key, value in found.items() if key not in dropped}

    return configure_optimizers


class _Hooks(Callback):
    """What the mixin does in hooks of the Trainer, whichever of its own hooks a subclass overrides."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:  # raise now, not after an epoch
            cast(NaturalGradientMixin, pl_module)._monitor(config.scheduler)
        if any(isinstance(optimizer, DirectionOptimizer) for optimizer in trainer.optimizers):
            _require_supported(trainer.strategy)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        cast(NaturalGradientMixin, pl_module)._updated = progress_of(trainer).total.processed
        restore_position(trainer)
        warn_of_repeated(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # All ranks start from the buffers of the first, as with automatic optimization.
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.require_forward_param_sync = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not any(isinstance(o, DirectionOptimizer) and o.pending for o in trainer.optimizers):
            cast(NaturalGradientMixin, pl_module)._step_schedulers("step", batch_idx + 1, plateau=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        cast(NaturalGradientMixin, pl_module)._step_schedulers("epoch", trainer.current_epoch + 1, plateau=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go back to the last update: micro-batches since then are in no checkpoint, and will be seen again."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        since = progress["total"]["processed"] - cast(NaturalGradientMixin, pl_module)._updated
        if since <= 0 or not _accumulates(trainer):
            return
        if restores_position(trainer):
            warnings.warn(
                f"A checkpoint between updates: the {since} micro-batches since the last one will be missing from a "
                "run that resumes from it, since the data loader restores its own position. Save after updates: "
                "ModelCheckpoint(every_n_train_steps=...).",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        for counts in (progress["total"], progress["current"]):
            counts.update({name: count - since for name, count in counts.items()})


def _is_power_of_ten(number: int) -> bool:
    return number == 0 or 10 ** (len(str(number)) - 1) == number


def _accumulates(trainer: pl.Trainer) -> bool:
    """Whether an update is made of several micro-batches."""
    return any(isinstance(o, DirectionOptimizer) and o.accumulate > 1 for o in trainer.optimizers)


def _require_supported(strategy: Strategy) -> None:
    """Refuse strategies under which the optimizers of this package are not exact."""
    name = type(strategy).__name__
    remedy = (
        "Use Trainer(strategy='ddp'), or, where the parameters have to be sharded, fully_shard in configure_model with "
        "Trainer(strategy=ModelParallelStrategy(data_parallel_size=<number of ranks>, tensor_parallel_size=1))."
    )
    if isinstance(strategy, ModelParallelStrategy):
        assert strategy.device_mesh is not None  # made before the module is set up
        if (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
            raise MisconfigurationException(
                f"{name} with tensor_parallel_size={size}: the optimizers of lightning_ief need whole layers. {remedy}"
            )
    elif getattr(strategy.model, "static_graph", False):
        raise MisconfigurationException(
            f"{name}(static_graph=True) waits for gradients; the optimizers of lightning_ief have none. Remove it."
        )
    elif not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise MisconfigurationException(
            f"{name} hides parameters and gradients from the optimizers of lightning_ief. {remedy}"
        )


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, unknown to type checkers
