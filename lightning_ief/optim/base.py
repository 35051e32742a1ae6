"""The one step that all optimizers of the package share."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ief.capture import Direction, LinearizedBatch
from lightning_ief.capture.batch import ONE_RANK
from lightning_ief.curvature import FisherKind
from lightning_ief.curvature.kronecker import Averages
from lightning_ief.directions.empirical import LeastSquaresProblem, require_one_damping
from lightning_ief.directions.layers import layerwise as solved_by_layers
from lightning_ief.distributed import Sync, mean_over_groups
from lightning_ief.linalg.vectors import check_same_space, norm
from lightning_ief.optim.line_search import best_length
from lightning_ief.optim.metric import KroneckerMetric
from lightning_ief.optim.options import require_known, require_known_in_group

__all__ = ["DirectionOptimizer", "Found", "MomentumType", "Params", "is_power_of_ten"]

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]

MomentumType: TypeAlias = Literal["spring", "heavy-ball"]


class DirectionOptimizer(Optimizer):
    """θ ← (1 − lr · weight_decay) θ − lr · φ, where φ is a direction d of a linearization, or d with momentum.

    The direction belongs to all parameters of the optimizer together, so that all options but lr and weight_decay hold
    for all groups. They stand in the parameter groups, where schedules can move them. To add an optimizer, derive from
    this class and name its `function`, or write `direction`; with `problem`, it has momentum of the SPRING kind, too.

    Two kinds of momentum μ: "spring" (SPRING: arXiv 2401.10190), φ ← (H + λI)⁻¹(∇L + λμφ) where H is what λ damps, that
    is, λ pulls towards the step before instead of zero; and "heavy-ball", φ ← the mean of the directions so far with
    weights (1 − μ) μᵗ, bias-corrected. A step that is skipped leaves φ alone.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate η ≥ 0. Losses are summed, so that lr = 1 is the natural scale at any batch size.
        damping: λ ≥ 0; if no damping at all is given, `default_damping`.
        weight_decay: Decoupled weight decay ≥ 0. A step shrinks weights by lr · weight_decay: with lr near 1, the
            0.01 that suits AdamW at lr = 1e-3 would be a thousand times as strong.
        normalize: Scale each φ to unit norm, over all parameters together.
        accumulate: k ≥ 1: micro-batches that one update is made of, exactly that of their samples in one batch. Memory
            grows by the factors of the micro-batches, not by their activations (but where `retains_graph`).
        sync: On many ranks, between which of them updates are exact: "global", all of them; "local", each for itself;
            a number, so many neighbours. Directions of different groups are averaged. NaturalGradientMixin sees to it.
        relative_damping: ρ ≥ 0 instead of λ: a multiple of a mean diagonal, see the direction's function.
        momentum: 0 ≤ μ < 1; 0 for none, and then no memory for it.
        momentum_type: Which kind.
        max_norm: Longest step ‖lr · φ‖, over all parameters together; longer ones are scaled. None for no bound.
        line_search: k ≥ 0: of the learning rates lr · 2⁻ʲ, j = 0 … k, take the one with the smallest loss on the same
            samples, by one forward pass each, without a graph and with the same random numbers. If none lowers the
            loss, parameters stay as they are, with a warning the first time. None for lr as it is.
        metric: "kronecker": what damping pulls towards, M = (Â + I) ⊗ (Ĝ + I) of each layer from averages over the run,
            see `KroneckerMetric`, instead of the identity: d = (H + λM)⁻¹∇L. With much of it, d = M⁻¹∇L/λ, improved
            K-FAC. Batches are then linearised with `keep_sides=optimizer.sides_of(model)`, which NaturalGradientMixin
            sees to. None for the identity.
        fisher: Gradients that Ĝ is of: "improved", each sample's divided by ‖∂l_n/∂z_n‖; "empirical", as they are; or
            "sampled", of sampled targets, one more backward pass in each step.
        metric_decay: Of the averages, per batch that they take in.
        layerwise: Solve for each layer apart, from its own Gram matrix, see `directions.layers.layerwise`.
        metric_every: Steps between two inversions of them; there are more at first. Of the batches between, at most
            twenty are taken in, evenly.
        **defaults: Further options, that a subclass names in its own `__init__`, kept in the parameter groups.

    Raises:
        ValueError: If an argument is out of range, or more than one damping is given.
        TypeError: If there is no such option, or a parameter group has one that holds for all.

    """

    function: "ClassVar[staticmethod[[LinearizedBatch, float], Mapping[str, Tensor]] | None]" = None
    """The direction as a function of a linearization and λ, a staticmethod; None if `direction` is written instead."""

    problem: "ClassVar[staticmethod[..., LeastSquaresProblem] | None]" = None
    """What `function` solves in the space of rows, of the same arguments; None where it solves nothing there."""

    default_damping: ClassVar[float] = 1e-7
    """λ where no damping is given."""

    retains_graph = False
    """Whether `direction` runs backward passes of its own after the first; it then sees finite batches only."""

    reports: bool = False
    """Whether steps note in `report` what they did; takes the eigenvalues of a matrix of all rows."""

    report: dict[str, float]
    """What the last step did, see `SolverReport`; empty if it was skipped, or `reports` is off."""

    observers: "Sequence[Callable[[LinearizedBatch, float], None]]" = ()
    """Called before each step that is taken with its batch and ‖φ‖, on many ranks by all of them."""

    layerwise: bool = False
    """Whether each layer is solved for apart."""

    metric: KroneckerMetric | None = None
    """Of the parameters' space; None for the identity."""

    counters: ClassVar[Mapping[str, int]] = {}
    """What stands in the parameter groups besides options, and where it starts."""

    natural_lr: float | None = None
    """lr with which a step goes to the minimum of the local model, None if unknown; far smaller ones are told."""

    _has_told = False  # that no step length lowers the loss

    _has_leapt = False  # a step was longer than the weights, and the user knows

    _num_steps = 0  # of this process

    skipped: str | None = None
    """Why the last step was skipped; None if it was not."""

    overflowed: bool = False
    """Whether the last step was skipped since gradients or direction were not finite, while the losses were."""

    # A GradScaler leaves it to this class to skip steps, and has no .grad to look at.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        damping: float | None = None,
        weight_decay: float = 0.0,
        normalize: bool = False,
        accumulate: int = 1,
        sync: Sync = "global",
        *,
        relative_damping: float | None = None,
        momentum: float = 0.0,
        momentum_type: MomentumType = "spring",
        max_norm: float | None = None,
        line_search: int | None = None,
        metric: Literal["kronecker"] | None = None,
        fisher: FisherKind = "improved",
        metric_decay: float = 0.95,
        metric_every: int = 20,
        layerwise: bool = False,
        **defaults: Any,
    ) -> None:
        name = type(self).__name__
        require_known(type(self), defaults)
        dampings = {"damping": damping, "relative_damping": relative_damping}
        dampings |= {option: value for option, value in defaults.items() if option.endswith("_damping")}
        if all(value is None for value in dampings.values()):
            dampings["damping"] = self.default_damping
        require_one_damping(name, **dampings)
        for option, value in {"lr": lr, "weight_decay": weight_decay}.items():
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}({option}={value}): must be a finite number ≥ 0.")
        if not 0 <= momentum < 1:
            raise ValueError(f"{name}(momentum={momentum}): must be at least 0 and less than 1.")
        if momentum_type not in ("spring", "heavy-ball"):
            raise ValueError(f"{name}(momentum_type={momentum_type!r}): must be 'spring' or 'heavy-ball'.")
        if momentum and momentum_type == "spring":
            if self.problem is None:
                raise ValueError(
                    f"{name}(momentum={momentum}): SPRING needs a direction that is solved for in the space of rows. "
                    "Take momentum_type='heavy-ball'."
                )
            if not any(dampings.values()):
                raise ValueError(
                    f"{name}(momentum={momentum}): in SPRING damping pulls towards the step before; with 0 it does "
                    "not. Give damping > 0, or momentum_type='heavy-ball'."
                )
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise ValueError(f"{name}(max_norm={max_norm}): must be a finite number > 0, or None.")
        if line_search is not None and line_search < 0:
            raise ValueError(f"{name}(line_search={line_search}): must be at least 0, or None.")
        if accumulate < 1:
            raise ValueError(f"{name}(accumulate={accumulate}): must be at least 1.")
        if isinstance(sync, str) and sync not in ("global", "local") or isinstance(sync, int) and sync < 1:
            raise ValueError(f"{name}(sync={sync!r}): must be 'global', 'local' or a number of ranks, at least 1.")
        if metric not in (None, "kronecker"):
            raise ValueError(f"{name}(metric={metric!r}): must be 'kronecker' or None.")
        if metric is not None and sync != "global":
            raise ValueError(
                f"{name}(metric={metric!r}, sync={sync!r}): averages are those of all ranks, sync='global'."
            )
        if layerwise and (self.problem is None or metric is not None or (momentum and momentum_type == "spring")):
            raise ValueError(
                f"{name}(layerwise=True): goes with directions that are solved for in the space of rows, without a "
                "metric, which has layers anyway, and with momentum_type='heavy-ball'."
            )
        self.layerwise = layerwise
        kronecker = KroneckerMetric(fisher, metric_decay, metric_every)
        self.metric = None if metric is None else kronecker
        if metric is not None and fisher == "sampled":
            self.retains_graph = True
        self.accumulate = accumulate
        self.sync = sync
        self._window: list[LinearizedBatch] = []
        self.report = {}
        options = {"lr": lr, "weight_decay": weight_decay, "normalize": normalize, **defaults, **dampings}
        options |= {"momentum": momentum, "momentum_type": momentum_type}
        options |= {"max_norm": max_norm, "line_search": line_search}
        super().__init__(params, {**options, **self.counters})
        self._warn_of_habits()

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("accumulate", "sync", "metric", "layerwise", "retains_graph")}
        return {**super().__getstate__(), **own, "_window": [], "report": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a version that had fewer options
            for option, value in self.defaults.items():
                group.setdefault(option, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, but for options that would do nothing; keys of other names belong to whoever gave them.

        Args:
            param_group: Its `params`, and options that differ from those of the optimizer.

        Raises:
            TypeError: If an option is misspelt, is one of another optimizer, or belongs to the optimizer as a whole.

        """
        require_known_in_group(type(self), param_group, self.defaults)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The state, and with it the options that this optimizer was made with."""
        found = super().state_dict()
        made_with = {option: self.defaults[option] for option in self._kept_options}
        averages = {} if self._averages is None else {"averages": self._averages.made_of}
        return {**found, "made_with": made_with, **averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; micro-batches that were collected before belong to another one, and are dropped.

        Dampings, momentum and the bound on steps go on where a schedule has taken them, unless this optimizer was made
        with another one: then that holds. Averages of curvature are taken over if they are of the same kind, of the
        same gradients; those of another one are dropped, with a warning.

        Raises:
            ValueError: If it is the state of an optimizer that is not of this package.

        """
        if any("damping" not in group for group in state_dict["param_groups"]):
            raise ValueError(
                f"{type(self).__name__} can't go on from the state of another optimizer, whose options are "
                f"{[*state_dict['param_groups'][0]]}: its lr means something else. Take the weights alone: "
                "model = Module.load_from_checkpoint(path), then trainer.fit(model) without ckpt_path."
            )
        before = state_dict.get("made_with", {})
        new = {o: self.defaults[o] for o in self._kept_options if o in before and self.defaults[o] != before[o]}
        super().load_state_dict(state_dict)
        averages = self._averages
        kept = averages is None or state_dict.get("averages", averages.made_of) == averages.made_of
        if averages is not None and not kept:
            warnings.warn(
                f"{type(self).__name__}: the saved averages are of {state_dict['averages']}, and this optimizer's of "
                f"{averages.made_of}: they begin anew.",
                RuntimeWarning,
                stacklevel=2,
            )
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(new)
            if averages is None:
                continue
            for p, number in zip(group["params"], saved["params"], strict=True):
                if kept:
                    averages.load(self.state[p], state_dict["state"].get(number, {}), p)
                else:
                    averages.forget(self.state[p])
        self._window = []

    @property
    def _kept_options(self) -> list[str]:
        named = ("damping", "momentum", "momentum_type", "max_norm", "line_search")
        return [option for option in self.defaults if option in named or option.endswith("_damping")]

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
        damping, others = self._dampings()
        return self.function(linearization, *damping, **others)

    def _dampings(self) -> tuple[list[float], dict[str, float]]:
        """The damping that is given: λ alone, or another kind by its name."""
        found = {name: self.shared(name) for name in self._kept_options if name.endswith("damping")}
        damping = found.pop("damping")
        return [] if damping is None else [damping], {name: x for name, x in found.items() if x is not None}

    def sides_of(self, model: nn.Module) -> list[str]:
        """What `linearize(..., keep_sides=...)` is to keep for this optimizer; nothing but for a metric and K-FAC."""
        moving = {id(p) for group in self.param_groups for p in group["params"]}
        named = {name: p for name, p in model.named_parameters() if id(p) in moving and p.requires_grad}
        return [] if self._averages is None else self._averages.sides_of(named)

    @property
    def _averages(self) -> Averages | None:
        """What keeps averages of both sides of layers in the state of parameters."""
        return self.metric

    def _generator(self, batch: LinearizedBatch) -> torch.Generator:
        """Random numbers of this step, by the options `seed` and `steps`."""
        first = self.param_groups[0]
        # Drawn anew from seed and step, so that there is no generator to move between devices or to save.
        generator = torch.Generator(batch.losses.device)
        generator.manual_seed((first["seed"] * 0x9E3779B97F4A7C15 + first["steps"]) % 2**63)
        return generator

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
        batch = seen = self._take_window()
        groups = self._groups_by_name(batch)
        counted: Sequence[MutableMapping[str, Any]] = ()
        # What needs the graph must not even try on a batch that is not finite.
        if self.metric is not None and not (self.retains_graph and batch.not_finite):
            batch.ranks.require_whole("A metric needs")
            sided = self.metric.sides_of(batch.parameters)
            batch, counted = self.metric.of(batch, {name: self.state[batch.parameters[name]] for name in sided})
        self.report = {}
        found = self._find(batch)
        self.skipped, self.overflowed = found.problem, found.overflowed
        if found.direction is None:
            warnings.warn(f"{type(self).__name__} skipped a step: {self.skipped}", RuntimeWarning, stacklevel=2)
            if self.metric is not None:
                self.metric.pass_over(counted)
        else:
            self._apply(found.direction, batch, groups, seen)
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
        find = self._beyond_momentum if self._springs else self._by_layers if self.layerwise else self.direction
        direction = Direction.of(find(batch) if batch.ranks is ONE_RANK else mean_over_groups(batch, find))
        if (length := direction.norm_bound) is None:
            check_same_space(direction.form(), batch.parameters)
            length = float(norm(direction))
        # No entry is longer than the whole, so that none overflows either.
        finite = length < min(torch.finfo(p.dtype).max for p in batch.parameters.values())
        problem = self._problem(batch) if length == 0 or not finite else None
        if not finite and problem is None:
            problem = f"the direction is not finite{self._at_loss_scale() or '; raise the damping'}."
        if problem is not None:
            return Found(problem=problem, overflowed=not finite and batch.not_finite is None)
        if self.metric is not None and direction.fell_back and not _are_double(batch.parameters):
            return Found(
                problem="rows in the metric depend on each other too nearly for their precision; raise the damping, or "
                "train in float64."
            )
        if self.reports and direction.fell_back is not None:
            self.report["fallback"] = float(direction.fell_back)
        return Found(direction)

    def _by_layers(self, batch: LinearizedBatch) -> Direction:
        batch.ranks.require_whole("Layers need")
        return solved_by_layers(self._problem_of(batch))

    def _apply(
        self,
        direction: Direction,
        batch: LinearizedBatch,
        groups: Mapping[str, Mapping[str, Any]],
        seen: LinearizedBatch,
    ) -> None:
        """Move the parameters along a direction, each as its group says; `seen` is the batch without a metric."""
        scale, length = 1.0, 0.0
        if momentum := self.shared("momentum"):
            batch.ranks.require_whole("Momentum needs")
            direction, scale = self._with_momentum(direction, batch, momentum)
        watched = self.reports or bool(self.observers)
        if self.shared("normalize") or self.shared("max_norm") is not None or watched:
            known = direction.known_norm
            length = float(norm(direction.form())) if known is None else known
        size = scale * length
        rates = {name: group["lr"] for name, group in groups.items()}
        scale = self._bounded(direction, length, scale, rates)
        self._warn_of_leap(direction, scale, rates, batch)
        alpha = {name: -rate * scale for name, rate in rates.items()}
        decay = {name: rate * groups[name]["weight_decay"] for name, rate in rates.items()}
        share = self._searched(direction, alpha, decay, batch)
        if share is None:
            return
        if self.reports:
            self.report |= {"step_norm": share * self._step_norm(direction, length, scale, rates), "step_share": share}
            self.report |= {"direction_norm": size}
            self.report |= {} if self.problem is None or not batch.num_samples else self._problem_of(batch).report()
        for observe in self.observers:
            observe(seen, size)
        beta = {name: 1 - share * value for name, value in decay.items()}
        direction.add_to(batch.parameters, {name: share * value for name, value in alpha.items()}, beta)

    # --- the length of a step

    def _bounded(self, direction: Direction, length: float, scale: float, rates: Mapping[str, float]) -> float:
        """What a direction of this length is multiplied by, besides its learning rates."""
        if self.shared("normalize") and length > 0:
            scale = 1 / length
        max_norm = self.shared("max_norm")
        if max_norm is not None and (size := self._step_norm(direction, length, scale, rates)) > max_norm:
            scale *= max_norm / size
        return scale

    @staticmethod
    def _step_norm(direction: Direction, length: float, scale: float, rates: Mapping[str, float]) -> float:
        """‖lr · φ‖ for the parameters that move; φ is `scale` times a direction of this length."""
        if len({*rates.values()}) == 1:
            return next(iter(rates.values())) * scale * length
        formed = direction.form()
        return scale * float(norm({name: rate * formed[name] for name, rate in rates.items()}))

    def _warn_of_habits(self) -> None:
        """Say it where weight decay or lr are those of another optimizer."""
        shrinks = max(self.param_groups, key=lambda group: group["lr"] * group["weight_decay"])
        if (share := shrinks["lr"] * shrinks["weight_decay"]) > 1e-3:  # noqa: PLR2004
            warnings.warn(
                f"{type(self).__name__}(lr={shrinks['lr']:g}, weight_decay={shrinks['weight_decay']:g}): each step "
                f"shrinks weights by lr · weight_decay, {share:.2%} of them; AdamW's by 0.001 %, with 0.01 at lr = "
                f"1e-3. weight_decay={1e-5 / shrinks['lr']:.1g} is as much.",
                RuntimeWarning,
                stacklevel=3,
            )
        lr = max(group["lr"] for group in self.param_groups)
        if self.natural_lr is None or any(group["normalize"] for group in self.param_groups):
            return
        if 0 < lr <= 3e-3 * self.natural_lr:
            warnings.warn(
                f"{type(self).__name__}(lr={lr:g}): as small a lr suits AdamW, whose steps are signs. Here lr = "
                f"{self.natural_lr:g} is the natural scale; start from there, or from docs/tuning.md.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _warn_of_leap(
        self, direction: Direction, scale: float, rates: Mapping[str, float], batch: LinearizedBatch
    ) -> None:
        """Say it once where a step is longer than the weights; looked at on the 1st, 10th, 100th … one."""
        self._num_steps += 1
        if self._has_leapt or batch.ranks is not ONE_RANK or not is_power_of_ten(self._num_steps):
            return
        formed = direction.norm_bound is None
        if (length := float(norm(direction.form())) if formed else direction.known_norm) is None:
            return  # in a metric, where it would have to be formed
        size, weights = self._step_norm(direction, length, scale, rates), float(norm(batch.parameters))
        # Weights are small at the start, often on purpose.
        if size > (10 if self._num_steps == 1 else 1) * weights > 0:
            self._has_leapt = True
            warnings.warn(
                f"{type(self).__name__}: a step of length {size:.3g}, where the weights it moves have norm "
                f"{weights:.3g}. Lower lr, raise the damping, or bound steps by max_norm=...",
                RuntimeWarning,
                stacklevel=4,
            )

    def _searched(
        self, direction: Direction, alpha: Mapping[str, float], decay: Mapping[str, float], batch: LinearizedBatch
    ) -> float | None:
        """Which part of the learning rates to take; None if the loss falls at none of them."""
        if (trials := self.shared("line_search")) is None:
            return 1.0
        batch.ranks.require_whole("A line search needs")
        found = best_length(batch, direction.form(), alpha, decay, [2.0**-j for j in range(trials + 1)])
        if found is None:
            self.skipped = f"no learning rate of lr · 2⁻ʲ, j = 0 … {trials}, lowers the loss."
            if not self._has_told:
                warnings.warn(f"{type(self).__name__} skipped a step: {self.skipped}", RuntimeWarning, stacklevel=4)
            self._has_told = True
        return found

    # --- momentum

    @property
    def _springs(self) -> bool:
        return bool(self.shared("momentum")) and self.shared("momentum_type") == "spring"

    def _beyond_momentum(self, batch: LinearizedBatch) -> Direction:
        """What φ is short of: (H + λI)⁻¹(∇L + λμφ) − μφ."""
        batch.ranks.require_whole("Momentum needs")
        problem = self._problem_of(batch)
        known = [self.state[p].get("momentum_buffer") for p in batch.parameters.values()]
        if all(buffer is None for buffer in known):
            return problem.solve()
        named = zip(batch.parameters.items(), known, strict=True)
        buffers = {name: torch.zeros_like(p) if buffer is None else buffer for (name, p), buffer in named}
        along = problem.rows.matvec(buffers)  # A φ
        if self.reports:
            slope, curvature = torch.stack([problem.rhs.double() @ along, along @ along]).tolist()
            self.report |= {"slope_before": slope, "curvature_before": curvature}
        return problem.solve(self.shared("momentum") * along)

    def _problem_of(self, batch: LinearizedBatch) -> LeastSquaresProblem:
        assert self.problem is not None
        damping, others = self._dampings()
        return self.problem(batch, *damping, **others)

    def _with_momentum(self, direction: Direction, batch: LinearizedBatch, momentum: float) -> tuple[Direction, float]:
        """φ up to a factor, and the factor."""
        buffers, springs = {}, self._springs
        for name, p in batch.parameters.items():
            state = self.state[p]
            if "momentum_buffer" not in state:
                state |= {"momentum_buffer": torch.zeros_like(p), "momentum_weight": 0.0}
            state["momentum_weight"] = momentum * state["momentum_weight"] + (1 - momentum)
            buffers[name] = state["momentum_buffer"]
            weight: float = state["momentum_weight"]
        new = 1.0 if springs else 1 - momentum
        direction.add_to(buffers, dict.fromkeys(buffers, new), dict.fromkeys(buffers, momentum))
        return Direction.of(buffers), 1.0 if springs else 1 / weight

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


def is_power_of_ten(number: int) -> bool:
    """Whether a look that is taken ever less often is due: at 1, 10, 100 and so on."""
    return number > 0 and 10 ** (len(str(number)) - 1) == number


def _are_double(parameters: Mapping[str, Tensor]) -> bool:
    return all(p.dtype == torch.float64 for p in parameters.values())


class Found(NamedTuple):
    """A direction, or the problem for which there is none."""

    direction: Direction | None = None
    problem: str | None = None
    overflowed: bool = False
