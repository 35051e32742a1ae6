"""The one step that all optimizers of the package share."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ief.capture import LinearizedBatch, RowCombination
from lightning_ief.linalg.vectors import check_same_space, norm

__all__ = ["DirectionOptimizer", "Params", "Sync"]

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]

Sync: TypeAlias = Literal["global", "local"] | int
"""Between which ranks updates are exact: all of them, each for itself, so many neighbours."""


class DirectionOptimizer(Optimizer, ABC):
    """θ ← (1 − lr · weight_decay) θ − lr · d for a direction d of a linearization.

    The direction belongs to all parameters of the optimizer together, so `damping` and `normalize` hold for all groups;
    lr and weight_decay may differ from group to group. To add an optimizer, derive from this class and write
    `direction`.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate η ≥ 0. Losses are summed, so that lr = 1 is the natural scale at any batch size.
        damping: λ ≥ 0.
        weight_decay: Decoupled weight decay ≥ 0.
        normalize: Scale each direction to unit norm, over all parameters together.
        accumulate: k ≥ 1: micro-batches that one update is made of, exactly that of their samples in one batch. Memory
            grows by the factors of the micro-batches, not by their activations (but where `retains_graph`).
        sync: On many ranks, between which of them updates are exact: "global", all of them; "local", each for itself;
            a number, so many neighbours. Directions of different groups are averaged. NaturalGradientMixin sees to it.
        **defaults: Further options of a subclass, kept in the parameter groups.

    Raises:
        ValueError: If an argument is out of range.

    """

    retains_graph = False
    """Whether `direction` runs backward passes of its own after the first; it then sees finite batches only."""

    skipped: str | None = None
    """Why the last step was skipped; None if it was not."""

    overflowed: bool = False
    """Whether the last step was skipped since gradients or direction were not finite, while the losses were."""

    # A GradScaler leaves it to this class to skip steps, and has no .grad to look at.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params,
        lr: float,
        damping: float,
        weight_decay: float,
        normalize: bool,
        *,
        accumulate: int = 1,
        sync: Sync = "global",
        **defaults: Any,
    ) -> None:
        options = {"lr": lr, "damping": damping, "weight_decay": weight_decay}
        for name, value in options.items():
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{type(self).__name__}({name}={value}): must be a finite number ≥ 0.")
        if accumulate < 1:
            raise ValueError(f"{type(self).__name__}(accumulate={accumulate}): must be at least 1.")
        if isinstance(sync, str) and sync not in ("global", "local") or isinstance(sync, int) and sync < 1:
            raise ValueError(
                f"{type(self).__name__}(sync={sync!r}): must be 'global', 'local' or a number of ranks, at least 1."
            )
        self.accumulate = accumulate
        self.sync = sync
        self._window: list[LinearizedBatch] = []
        super().__init__(params, {**options, "normalize": normalize, **defaults})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "accumulate": self.accumulate, "sync": self.sync, "_window": []}

    @property
    def pending(self) -> int:
        """Number of micro-batches that were collected since the last update."""
        return len(self._window)

    def collect(self, linearization: LinearizedBatch) -> bool:
        """Take a micro-batch into the next update.

        Args:
            linearization: The micro-batch, at the present parameters. Its graph is let go unless `retains_graph`.

        Returns:
            Whether there are now as many as one update is made of.

        """
        if self.accumulate > 1 and not self.retains_graph:
            linearization.release()
        self._window.append(linearization)
        return len(self._window) >= self.accumulate

    @abstractmethod
    def direction(self, linearization: LinearizedBatch) -> dict[str, Tensor] | RowCombination:
        """The direction d.

        Args:
            linearization: Model and batch.

        Returns:
            d, {parameter name: tensor}, an entry for each parameter of the linearization; or a combination of rows,
            which is applied without being formed.

        """

    def shared(self, option: str) -> Any:
        """An option that holds for all parameter groups.

        Args:
            option: Its name.

        Returns:
            Its value.

        Raises:
            ValueError: If groups disagree.

        """
        values = [group[option] for group in self.param_groups]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"{type(self).__name__}: the direction belongs to all parameters together, so '{option}' must be the "
                f"same in every parameter group, got {values}."
            )
        return values[0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, linearization: LinearizedBatch | None = None) -> Any:
        """Update the parameters along the direction of a linearization.

        If no direction can be had (a loss is not finite, all gradients are zero), the parameters stay untouched and a
        warning says which samples are to blame.

        Args:
            closure: Called first, as Lightning wants it: its hooks run there.
            linearization: The batch to step on, its parameters those of this optimizer. With `accumulate` = k, the
                parameters move in every k-th call. None to step on what has been collected.

        Returns:
            What the closure returns.

        Raises:
            RuntimeError: If there is no linearization, or it does not know a parameter of this optimizer.
            ValueError: If the direction has other entries than the linearization has parameters.

        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if linearization is not None and not self.collect(linearization):
            return result
        if not self._window:
            name = type(self).__name__
            raise RuntimeError(
                f"{name}.step() needs the linearization of a batch; gradients in .grad are not enough. In Lightning, "
                "derive your module from NaturalGradientMixin and leave training_step to it. In a loop of your own: "
                f"{name.lower()}.step(linearization=linearize(model, inputs, targets, objective))."
            )
        linearization = self._window[0].joined(self._window[1:])
        self._window = []
        names = {id(parameter): name for name, parameter in linearization.parameters.items()}
        unknown = [
            tuple(p.shape)
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad and id(p) not in names
        ]
        if unknown:
            raise RuntimeError(
                f"{type(self).__name__} has parameters of shapes {unknown} that the linearization does not know: they "
                "must be parameters of the linearized model."
            )
        # A solve of J's rows makes NaN of NaN, so that one look at its result is enough; others must not even try. On
        # many ranks, all of them must decide alike: what holds for the gradients of some says nothing.
        self.skipped = linearization.not_finite if self.retains_graph else None
        self.overflowed = False
        if self.skipped is None:
            direction = linearization.agreed(self.direction)
            if isinstance(direction, RowCombination):
                length = direction.norm
            else:
                check_same_space(direction, linearization.parameters)
                length = float(norm(direction))
            # No entry is longer than the whole, so that none overflows either.
            finite = length < min(torch.finfo(p.dtype).max for p in linearization.parameters.values())
            if length == 0 or not finite:
                self.skipped = self._problem(linearization)
                self.overflowed = not finite and linearization.not_finite is None
            if not finite and self.skipped is None:
                self.skipped = f"the direction is not finite{self._scaled() or '; raise the damping'}."
        if self.skipped is not None:
            warnings.warn(f"{type(self).__name__} skipped a step: {self.skipped}", RuntimeWarning, stacklevel=2)
            return result
        scale = 1 / length if self.shared("normalize") and length > 0 else 1.0
        parameters, alpha, beta = {}, {}, {}
        for group in self.param_groups:
            for parameter in filter(lambda p: p.requires_grad, group["params"]):
                name = names[id(parameter)]
                parameters[name] = parameter
                alpha[name], beta[name] = -group["lr"] * scale, 1 - group["lr"] * group["weight_decay"]
        if isinstance(direction, RowCombination):
            direction.add_to(parameters, alpha, beta)
        else:
            for name, parameter in parameters.items():
                parameter.mul_(beta[name]).add_(direction[name], alpha=alpha[name])
        return result

    def _problem(self, linearization: LinearizedBatch) -> str | None:
        """Say why there is no direction, if there is none."""
        if linearization.not_finite:
            return linearization.not_finite
        if not linearization.num_samples:  # those of other ranks are to blame
            return None
        squared = linearization.jacobian.gram().diagonal()
        if 0 < float(squared.sum()) < math.inf:
            return None
        at = (~torch.isfinite(squared)).nonzero().flatten().tolist()
        if at:
            return f"the gradients of samples {at} of the batch are not finite{self._scaled()}."
        return f"the gradients of all {len(squared)} samples of the batch are zero."

    def _scaled(self) -> str:
        """What a GradScaler does about it, if there is one."""
        scale = getattr(self, "grad_scale", None)  # set during the step
        return "" if scale is None else f" at a loss scale of {float(scale):g}, which is lowered now"
