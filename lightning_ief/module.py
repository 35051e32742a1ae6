"""The LightningModule mixin: manual optimization by natural-gradient updates, or by any other optimizer."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any, Literal, overload

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from lightning_ief.capture import Linearization, LinearizedBatch, linearize
from lightning_ief.capture.batch import name_samples
from lightning_ief.capture.linearization import call_model, require_samples, warn_of_targets
from lightning_ief.capture.messages import described
from lightning_ief.distributed import across, gathered_losses, whole_parameters
from lightning_ief.objectives import Objective, as_objective
from lightning_ief.objectives.base import require_tensor
from lightning_ief.optim import DirectionOptimizer
from lightning_ief.optim.base import is_power_of_ten
from lightning_ief.training.beside import OtherOptimizers, evaluates_itself
from lightning_ief.training.grad_scaler import grad_scaler_of, loss_scale_of, reported_to_scaler, require_scaled
from lightning_ief.training.hooks import TrainingHooks
from lightning_ief.training.refusals import require_model, require_supported_options, warn_of_idle_loss
from lightning_ief.training.repeated_samples import without_repeated
from lightning_ief.training.schedulers import Schedulers

__all__ = ["NaturalGradientMixin"]


class NaturalGradientMixin(LightningModule):
    """Trains a LightningModule with an optimizer of this package, or with any other one.

    Derive from it, alone or before other LightningModules, set `self.objective`, and return the optimizer from
    `configure_optimizers`. The mixin brings `training_step`, which logs `train/loss` (mean over the samples of the
    batch), and switches to manual optimization. Learning-rate schedulers are stepped as their interval and frequency
    say, ReduceLROnPlateau by its `monitor`, whoever wrote `training_step`; those that it steps itself are left to it.
    With accumulate=k a step is an update, and `trainer.estimated_stepping_batches` counts these in
    `configure_optimizers`, which is called twice then. Optimizers that are not of this package get the gradient of the
    mean loss, as always in Lightning, so that a baseline differs in one line; those that evaluate the loss several
    times in a step, such as torch.optim.LBFGS, do so on the same batch.

    Beside one optimizer of this package, others of torch may train parameters of their own, by the gradient of the mean
    loss, which is taken from the same rows: `configure_optimizers` returns both. They step together, or skip together.

    A run that resumes from a checkpoint within an epoch goes on with the batches behind those that the checkpoint has
    seen, also on another number of ranks if the batches of all ranks together stay the same. That is the uninterrupted
    run where the order of samples depends on the epoch alone: `DistributedSampler`, which Lightning takes on many ranks
    and which one process may take, too (num_replicas=1, rank=0). Lightning restores no random numbers: of dropout and
    augmentation, a resumed run draws others.

    Attributes:
        objective: Turns logits and targets into per-sample losses. A loss of torch.nn is taken for one where
            `objectives.as_objective` knows it, with its weights and without its reduction.
        verify_capture: Whether to verify the capture, on the first batches of a run and from time to time.
        strict_capture: Whether to refuse parameters with a use that escapes the capture. Their rows are as exact, but
            take one backward pass for each sample; a warning names them.
        capture_seconds: Time that recording took within the last forward pass.
        capture_checks: How often the model was measured or rows were verified on the present batch, which took longer
            for that reason.

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
    strict_capture: bool = False
    capture_seconds: float = 0.0
    capture_checks: int = 0  # a number: switches of a module are its modes, which may not change on the way

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "configure_optimizers" in cls.__dict__:
            configure = cls.configure_optimizers

            @wraps(configure)
            def configure_optimizers(self: NaturalGradientMixin) -> Any:
                return self._schedulers.configured(self, configure)

            cls.configure_optimizers = configure_optimizers  # type: ignore[assignment]
        if "configure_callbacks" in cls.__dict__:
            own = cls.configure_callbacks

            @wraps(own)
            def configure_callbacks(self: NaturalGradientMixin) -> list[Callback]:
                return self._with_hooks(own(self))

            cls.configure_callbacks = configure_callbacks  # type: ignore[method-assign]
        if "training_step" in cls.__dict__:
            own_step = cls.training_step

            @wraps(own_step)
            def training_step(self: NaturalGradientMixin, *args: Any, **kwargs: Any) -> Any:
                found = own_step(self, *args, **kwargs)
                if self._hooks.optimized and not self._hooks.told_of_loss:
                    self._hooks.told_of_loss = warn_of_idle_loss(self, found)
                return found

            cls.training_step = training_step  # type: ignore[method-assign]
        if "on_train_epoch_end" in cls.__dict__:
            ends = cls.on_train_epoch_end

            @wraps(ends)
            def on_train_epoch_end(self: NaturalGradientMixin) -> None:
                self._hooks.ends_epoch, outer = True, self._hooks.ends_epoch
                ends(self)
                self._hooks.ends_epoch = outer
                if not outer:
                    self._hooks.end_epoch(self.trainer, self)

            cls.on_train_epoch_end = on_train_epoch_end  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self._schedulers = Schedulers()
        self._hooks = TrainingHooks(self._schedulers)
        self._beside: OtherOptimizers | None = None
        self._capture_gradients: Callable[[], None] | None = None  # instead of autograd's backward pass

    def __getattr__(self, name: str) -> Any:
        if name in ("_schedulers", "_hooks"):
            raise AttributeError(
                f"{type(self).__name__}.__init__ did not call that of NaturalGradientMixin: write super().__init__() "
                "there, not LightningModule.__init__(self)."
            )
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "objective":
            value = as_objective(value)
        super().__setattr__(name, value)

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
                f"Expected a batch (inputs, targets), got {described(batch)}. Override "
                f"{type(self).__name__}.unpack_batch(batch) to return (inputs, targets); several inputs are a tuple, "
                "or a dict by name."
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

        """
        inputs, targets = self.unpack_batch(batch)
        losses = self.optimize(inputs, targets)
        if losses is None:
            return None
        loss = losses.mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(losses))
        return loss

    @overload
    def optimize(self, inputs: Any, targets: Tensor) -> Tensor | None: ...

    @overload
    def optimize(
        self, inputs: Any, targets: Tensor, *, return_logits: Literal[True]
    ) -> tuple[Tensor | None, Tensor | None]: ...

    def optimize(
        self, inputs: Any, targets: Tensor, *, return_logits: bool = False
    ) -> Tensor | None | tuple[Tensor | None, Tensor | None]:
        """Forward, backward and one optimizer step; for a `training_step` of your own.

        On many ranks, each of them calls it with its own part of the batch, and equally often. Samples with which
        `DistributedSampler` has filled up the last batch, so that all ranks have equally many, count once only. A rank
        may have no sample. With the optimizer's accumulate=k, only every k-th call takes a step, and the last of an
        epoch.

        Args:
            inputs: A tensor, a tuple of positional or a dict of keyword arguments of the model.
            targets: y, what the objective says, samples on dimension 0.
            return_logits: Whether to return the logits, too, for metrics.

        Returns:
            Per-sample losses before the step, of all ranks, shape [N], detached; None if the step was skipped since a
            loss is not finite (a warning says which). With `return_logits`, a pair of these and z before the step, of
            this rank's samples that count, shape [N, ...], detached; None if it has none.

        Raises:
            TypeError: If the objective is none, or the targets are no tensor.

        """  # noqa: DOC502  # raised by as_objective and require_tensor
        first = not self._hooks.optimized
        if first:
            require_model(self)
            self.objective = self.objective  # a loss of torch.nn that the class has is taken for an objective
            self._hooks.optimized = True
        if self._hooks not in self.trainer.callbacks:  # type: ignore[attr-defined]
            self._hooks.attach_to(self.trainer, self)
        require_tensor(targets)
        if self.trainer.world_size > 1:
            inputs, targets = without_repeated(self.trainer, inputs, targets)
        optimizer, others = self._optimizers()
        self._hooks.kept_logits = [] if return_logits else None
        if isinstance(optimizer.optimizer, DirectionOptimizer):
            losses = self._step_along_direction(optimizer, optimizer.optimizer, others, inputs, targets)
        else:
            if first:  # as linearize does
                warn_of_targets(inputs, targets)
            losses = self._step_along_gradient(optimizer, inputs, targets)
        kept, self._hooks.kept_logits = self._hooks.kept_logits, None
        return losses if kept is None else (losses, kept[0] if kept else None)

    def _step_along_direction(
        self,
        optimizer: LightningOptimizer,
        inner: DirectionOptimizer,
        others: OtherOptimizers | None,
        inputs: Any,
        targets: Tensor,
    ) -> Tensor | None:
        mine = {id(p) for group in inner.param_groups for p in group["params"] if p.requires_grad}
        parameters = {name: p for name, p in self.named_parameters() if id(p) in mine}
        if others is not None:
            parameters |= others.parameters_of(self)
        scaler = grad_scaler_of(self.trainer) if self._hooks.scales_gradients else None
        loss_scale = None if scaler is None else loss_scale_of(scaler, self.device)
        seen: LinearizedBatch
        if self.trainer.world_size == 1:
            seen = self._linearized(inner, inputs, targets, parameters, loss_scale)
            losses = seen.losses
        else:
            seen = self._linearized_on_ranks(inner, inputs, targets, parameters, loss_scale)
            losses = seen.all_losses
        if others is not None:
            others.add(seen)
        # An incomplete window at the end of an epoch is an update, too, as in Lightning's own accumulation.
        if not inner.collect(seen) and not self.trainer.is_last_batch:
            return None if seen.not_finite else losses
        with nullcontext() if scaler is None else reported_to_scaler(scaler, inner, self.device):
            optimizer.step()
        if others is not None:
            others.step(skip=inner.skipped is not None)
        if inner.accumulate > 1:
            self._hooks.note_update(self.trainer)
        # The optimizer has looked already: looking at the losses here would have the host wait for the device.
        return None if inner.skipped and seen.not_finite else losses

    def _linearized_on_ranks(
        self,
        inner: DirectionOptimizer,
        inputs: Any,
        targets: Tensor,
        parameters: dict[str, torch.nn.Parameter],
        loss_scale: Tensor | None,
    ) -> LinearizedBatch:
        whole = whole_parameters(self)
        own: LinearizedBatch
        if len(targets) == 0:
            own = LinearizedBatch([], parameters, self.objective)
        else:
            # Sharded parameters come and go with collectives: every rank must verify, or none.
            steps = self.trainer.global_step - self._hooks.first_step
            verify = steps == 0 or is_power_of_ten(steps) if whole else None
            whole = {name: whole.get(name, p) for name, p in parameters.items()}
            own = self._linearized(inner, inputs, targets, whole, loss_scale, verify)
        return across(own, inner.sync, parameters)

    def _linearized(
        self,
        inner: DirectionOptimizer,
        inputs: Any,
        targets: Tensor,
        parameters: dict[str, torch.nn.Parameter],
        loss_scale: Tensor | None,
        verify: bool | None = None,  # None: when it is due
    ) -> Linearization:
        """Forward pass, and backward pass to the rows of the Jacobian."""
        found = linearize(
            self,
            inputs,
            targets,
            self.objective,
            parameters=parameters,
            verify=verify if self.verify_capture else False,
            strict=self.strict_capture,
            loss_scale=loss_scale,
            keep_sides=inner.sides_of(self),
        )
        if found.in_fp16:
            require_scaled(found, loss_scale)
        self.capture_seconds = found.capture_seconds
        self.capture_checks += found.checked
        if self._hooks.kept_logits is not None:
            self._hooks.kept_logits.append(found.logits)
        self._capture_gradients = partial(found.backward, retain_graph=inner.retains_graph)
        strategy = self.trainer.strategy
        try:
            # Lightning's hooks around the backward pass run there, and call `backward` below. There are no gradients
            # for DistributedDataParallel to reduce.
            with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
                self.manual_backward(found.losses.sum())
        finally:
            self._capture_gradients = None
        return found

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook for the backward pass: to the Jacobian where there is a linearization, else as always.

        Args:
            loss: The loss.
            *args: For `Tensor.backward`.
            **kwargs: For `Tensor.backward`.

        """
        if self._capture_gradients is None:
            loss.backward(*args, **kwargs)
        else:
            self._capture_gradients()

    def _step_along_gradient(self, optimizer: LightningOptimizer, inputs: Any, targets: Tensor) -> Tensor | None:
        self.capture_seconds = 0.0
        ranks = self.trainer.world_size
        if ranks == 1:
            require_samples(targets)
        own = self._losses(inputs, targets) if len(targets) else self._no_losses()
        parts = [own.detach()] if ranks == 1 else gathered_losses(own.detach())
        losses = torch.cat(parts)
        if not bool(torch.isfinite(losses).all()):
            bad = name_samples([~torch.isfinite(x) for x in parts])
            warnings.warn(f"Skipped a training step: losses are not finite, {bad}.", RuntimeWarning, stacklevel=2)
            return None
        first = [own]

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            found = first.pop() if first else self._losses(inputs, targets)
            # The mean over all samples, wherever they are: gradients are averaged over the ranks.
            loss = found.sum() * (ranks / len(losses))
            self.manual_backward(loss)
            return loss.detach()

        if evaluates_itself(optimizer.optimizer):
            if ranks > 1:
                raise MisconfigurationException(
                    f"{type(optimizer.optimizer).__name__} evaluates the loss within its steps, each rank that of its "
                    f"own samples alone: {ranks} ranks would take different steps. Train on one."
                )
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        return losses

    def _losses(self, inputs: Any, targets: Tensor) -> Tensor:
        logits = call_model(self, inputs)
        if self._hooks.kept_logits is not None:
            self._hooks.kept_logits.append(logits.detach())
        self.objective.validate(logits.detach(), targets)
        return self.objective.losses(logits, targets)

    def _no_losses(self) -> Tensor:
        """Losses of no sample, shape [0], by which every parameter has a gradient: DistributedDataParallel waits."""
        return torch.cat([p.flatten()[:0] for p in self.parameters() if p.requires_grad])

    def _optimizers(self) -> tuple[LightningOptimizer, OtherOptimizers | None]:
        """The optimizer that steps along directions, or else the only one; and those of torch beside it."""
        found: Any = self.optimizers()
        if isinstance(found, LightningOptimizer):
            return found, None
        own = [each for each in found if isinstance(each.optimizer, DirectionOptimizer)]
        if not own:
            raise MisconfigurationException(
                f"NaturalGradientMixin trains with one optimizer, or with one of lightning_ief and others beside it; "
                f"configure_optimizers returned {[type(each).__name__ for each in found]}. Give one optimizer several "
                "parameter groups instead."
            )
        others = [each.optimizer for each in found if each is not own[0]]
        if self._beside is None or self._beside.optimizers != others:
            if self._hooks.scales_gradients:
                raise MisconfigurationException(
                    "Two optimizers and a GradScaler: the gradients of the second one are not scaled. Take "
                    "precision='bf16-mixed'."
                )
            self._beside = OtherOptimizers(others, own[0].optimizer)
        return own[0], self._beside

    def on_train_epoch_end(self) -> None:
        """Lightning's hook, behind which schedulers of epochs follow what it has logged."""
        super().on_train_epoch_end()
        if not self._hooks.ends_epoch:
            self._hooks.end_epoch(self.trainer, self)

    def configure_callbacks(self) -> list[Callback]:
        """Lightning's hook, used to check the Trainer before the run; one that overrides it need not call it.

        Returns:
            The callback that does what the mixin has to do in hooks of the Trainer.

        Raises:
            MisconfigurationException: If the Trainer is asked for something that has another place here.

        """
        return self._with_hooks(super().configure_callbacks())

    def _with_hooks(self, found: Sequence[Callback] | Callback) -> list[Callback]:
        require_supported_options(self.trainer, self)
        self._schedulers.forget()
        callbacks = [found] if isinstance(found, Callback) else list(found)
        present = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, unknown to type checkers
        return callbacks if self._hooks in [*present, *callbacks] else [*callbacks, self._hooks]
