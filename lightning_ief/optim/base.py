"""The one step that all optimizers of the package share."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ief.capture import Direction, LinearizedBatch
from lightning_ief.capture.batch import ONE_RANK
from lightning_ief.distributed import Sync, mean_over_groups
from lightning_ief.linalg.vectors import check_same_space, norm

__all__ = ["DirectionOptimizer", "Found", "Params"]

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]


class DirectionOptimizer(Optimizer):
    """θ ← (1 − lr · weight_decay) θ − lr · d for a direction d of a linearization.

    The direction belongs to all parameters of the optimizer together, so `damping` and `normalize` hold for all groups;
    lr and weight_decay may differ from group to group. To add an optimizer, derive from this class and name its
    `function`, or write `direction`.

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

    function: "ClassVar[staticmethod[[LinearizedBatch, float], Mapping[str, Tensor]] | None]" = None
    """The direction as a function of a linearization and λ, a staticmethod; None if `direction` is written instead."""

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; micro-batches that were collected before belong to another one, and are dropped."""
        super().load_state_dict(state_dict)
        self._window = []

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

        Raises:
            CaptureError: If the parameters have been changed since.
            RuntimeError: If this optimizer moves parameters that the micro-batch does not know.

        """
        if self.accumulate > 1:  # otherwise the step looks at once
            linearization.require_unmoved(self._groups_by_name(linearization))
            if not self.retains_graph:
                linearization.release()
        self._window.append(linearization)
        return len(self._window) >= self.accumulate

    def direction(self, linearization: LinearizedBatch) -> Mapping[str, Tensor]:
        """The direction d.

        Args:
            linearization: Model and batch.

        Returns:
            d, {parameter name: tensor}, an entry for each parameter of the linearization. A `Direction` that is not
            formed is applied without being formed.

        Raises:
            NotImplementedError: If the class has no `function`.

        """
        if self.function is None:
            raise NotImplementedError(
                f"{type(self).__name__} has no direction: set function = staticmethod(...), which takes a "
                "linearization and a damping, or write direction(self, linearization)."
            )
        return self.function(linearization, self.shared("damping"))

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
            linearization: The batch to step on; of more parameters than this optimizer moves, it is restricted to
                these, as if the others were frozen. With `accumulate` = k, the parameters move in every k-th call. None
                to step on what has been collected.

        Returns:
            What the closure returns.

        Raises:
            CaptureError: If the parameters have been changed since they were linearised.
            RuntimeError: If there is no linearization, or this optimizer moves parameters that it does not know.
            ValueError: If the direction has other entries than the linearization has parameters.

        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if linearization is not None and not self.collect(linearization):
            return result
        batch = self._take_window()
        groups = self._groups_by_name(batch)
        found = self._find(batch)
        self.skipped, self.overflowed = found.problem, found.overflowed
        if found.direction is None:
            warnings.warn(f"{type(self).__name__} skipped a step: {self.skipped}", RuntimeWarning, stacklevel=2)
        else:
            self._apply(found.direction, found.length, batch, groups)
        return result

    def _take_window(self) -> LinearizedBatch:
        """The micro-batches that were collected, as one batch; the next ones begin a new window."""
        window, self._window = self._window, []
        if not window:
            name = type(self).__name__
            raise RuntimeError(
                f"{name}.step() needs the linearization of a batch; gradients in .grad are not enough. In Lightning, "
                "derive your module from NaturalGradientMixin and leave training_step to it. In a loop of your own: "
                f"{name.lower()}.step(linearization=linearize(model, inputs, targets, objective))."
            )
        window = [self._own(part) for part in window]
        for part in window:
            part.require_unmoved()
        return LinearizedBatch.of(window) if len(window) > 1 else window[0]

    def _own(self, batch: LinearizedBatch) -> LinearizedBatch:
        """A batch seen by what moves alone: rows of other parameters would take part in the solve."""
        groups = self._groups_by_name(batch)
        return batch if len(groups) == len(batch.parameters) else batch.restrict(groups)

    def _groups_by_name(self, batch: LinearizedBatch) -> dict[str, dict[str, Any]]:
        """The group of each parameter of a batch that moves; all that move must be of the batch."""
        names = {id(parameter): name for name, parameter in batch.parameters.items()}
        moving = [(p, group) for group in self.param_groups for p in group["params"] if p.requires_grad]
        if unknown := [tuple(p.shape) for p, _ in moving if id(p) not in names]:
            raise RuntimeError(
                f"{type(self).__name__} has parameters of shapes {unknown} that the linearization does not know: they "
                "must be parameters of the linearized model."
            )
        groups = {names[id(p)]: group for p, group in moving}
        if not groups:
            raise RuntimeError(
                f"{type(self).__name__} has nothing to move: all of its parameters are frozen. Set requires_grad on "
                "some of them."
            )
        return groups

    def _find(self, batch: LinearizedBatch) -> "Found":
        """The direction of a batch, or the reason why there is none."""
        # A solve of J's rows makes NaN of NaN, so that one look at its result is enough; others must not even try. On
        # many ranks, all of them must decide alike: what holds for the gradients of some says nothing.
        if self.retains_graph and batch.not_finite:
            return Found(problem=batch.not_finite)
        one = batch.ranks is ONE_RANK
        direction = Direction.of(self.direction(batch) if one else mean_over_groups(batch, self.direction))
        if (length := direction.known_norm) is None:
            check_same_space(direction.form(), batch.parameters)
            length = float(norm(direction))
        # No entry is longer than the whole, so that none overflows either.
        finite = length < min(torch.finfo(p.dtype).max for p in batch.parameters.values())
        problem = self._problem(batch) if length == 0 or not finite else None
        if not finite and problem is None:
            problem = f"the direction is not finite{self._at_loss_scale() or '; raise the damping'}."
        if problem is not None:
            return Found(problem=problem, overflowed=not finite and batch.not_finite is None)
        return Found(direction, length)

    def _apply(
        self, direction: Direction, length: float, batch: LinearizedBatch, groups: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Move the parameters along a direction, each as its group says."""
        scale = 1 / length if self.shared("normalize") and length > 0 else 1.0
        alpha = {name: -group["lr"] * scale for name, group in groups.items()}
        beta = {name: 1 - group["lr"] * group["weight_decay"] for name, group in groups.items()}
        direction.add_to(batch.parameters, alpha, beta)

    def _problem(self, batch: LinearizedBatch) -> str | None:
        """Say which samples are to blame for a direction that is zero or not finite, if some are."""
        if batch.not_finite:
            return batch.not_finite
        if not batch.num_samples:  # those of other ranks are to blame
            return None
        norms = batch.jacobian.row_norms()
        if 0 < float(norms.sum()) < math.inf:
            return None
        at = (~torch.isfinite(norms)).nonzero().flatten().tolist()
        if at:
            return f"the gradients of samples {at} of the batch are not finite{self._at_loss_scale()}."
        return f"the gradients of all {len(norms)} samples of the batch are zero."

    def _at_loss_scale(self) -> str:
        """What a GradScaler does about it, if there is one."""
        scale = getattr(self, "grad_scale", None)  # set during the step
        return "" if scale is None else f" at a loss scale of {float(scale):g}, which is lowered now"


class Found(NamedTuple):
    """A direction and its length, or the problem for which there is none."""

    direction: Direction | None = None
    length: float = 0.0
    problem: str | None = None
    overflowed: bool = False
