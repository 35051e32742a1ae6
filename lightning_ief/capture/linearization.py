"""`linearize`: a model on a batch, from one forward pass; and what is known of a model from one batch to the next."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ief.capture.backward import pull_back, survey
from lightning_ief.capture.batch import LinearizedBatch, are_equal
from lightning_ief.capture.escaping import another_batch, one_by_one, require_independent, warn_of
from lightning_ief.capture.factors import Factor, PulledBack
from lightning_ief.capture.jacobian import Block, Blocks, Jacobian, LocalJacobian
from lightning_ief.capture.jvp import by_forward_mode
from lightning_ief.capture.measure import measure, taken
from lightning_ief.capture.messages import (
    flattened,
    mixing_layers,
    no_logits,
    not_by_samples,
    not_shifted,
    wrong_arguments,
)
from lightning_ief.capture.recorder import Recorder, autocast_dtype, flatten_call, tensors_of, version_of
from lightning_ief.capture.snapshot import Snapshot, modes_of
from lightning_ief.capture.tangents import (
    ForwardPass,
    along_each_by_backward_passes,
    along_together_by_forward_mode,
    random_direction,
)
from lightning_ief.capture.types import CaptureError, Derived, Plan, Source
from lightning_ief.capture.verification import require_announced, require_own_graph, verify_rows
from lightning_ief.linalg.gram import sample_dot
from lightning_ief.linalg.scaling import normalised_direction, sample_scale, upcast
from lightning_ief.linalg.vectors import check_same_space, restricted
from lightning_ief.objectives import Objective, as_objective
from lightning_ief.objectives.base import require_tensor
from lightning_ief.objectives.consistency import require_consistent

__all__ = ["Linearization", "linearize", "push_forward"]

# Difference between J d and ⟨∂l/∂z, u⟩ over ‖∂l/∂z‖ ‖u‖ that is rounding, by dtype of the logits.
_FORWARD_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}

_OF_SHARDED = (
    "One backward pass for each sample would find its rows, but collectives in them that gather sharded parameters (of "
    "fully_shard) would not be those of other ranks. "
)

# So many batches are verified at most while some parameters have a gradient of zero, which proves nothing; and so many
# graphs of different structure.
_ATTEMPTS = 10


@dataclass
class _Known:
    """What is known of a model on one kind of batch.

    Attributes:
        plan: Its plan.
        unverified: Parameters whose rows have not been verified yet.
        attempts: How many batches were verified while there were such.
        verified: States (see `_state`) in which rows have been verified.
        switched: Switches of the modules (see `Snapshot`) in which they have. Counted apart, so that structures and
            words that are new on every batch can't hide a switch.
        batches: How many batches were seen.
        next_check: The number of the batch that is verified whatever is known.
        forward_verified: States, and modes of the modules, in which derivatives by forward mode have been found to
            agree with the rows.
        pushed: How many batches were pushed forward without a graph.
        next_graph: The number of the batch that is pushed forward with one whatever is known.
        in_fp16: Whether something is computed in fp16.
        objective: The last objective whose gradient, curvature and sampling were found to be those of its losses.

    """

    plan: Plan
    unverified: set[str]
    attempts: int = 0
    verified: set[int] = field(default_factory=set)
    switched: set[int] = field(default_factory=set)
    batches: int = 0
    next_check: int = 10
    forward_verified: set[int] = field(default_factory=set)
    pushed: int = 0
    next_graph: int = 10
    in_fp16: bool = False
    objective: Objective | None = None

    def is_due(self, state: int, switches: int) -> bool:
        """Whether a batch is to be verified: the first ones, each new state, and the 10th, 100th, 1,000th ... batch."""
        self.batches += 1  # the last of these since what escapes the capture may come later, without a trace
        incomplete = bool(self.unverified) and self.attempts < _ATTEMPTS
        changed = state not in self.verified and len(self.verified) < _ATTEMPTS
        changed |= switches not in self.switched and len(self.switched) < _ATTEMPTS
        return incomplete or changed or self.batches >= self.next_check

    def may_go_without_graph(self, modes: int) -> bool:
        """Whether forward mode is known to be right in these modes; asked once a batch."""
        self.pushed += 1
        if modes not in self.forward_verified or self.pushed < self.next_graph:
            return modes in self.forward_verified
        self.next_graph *= 10
        self.forward_verified.clear()
        return False

    def note(self, proven: set[str], state: int, switches: int) -> None:
        """Note what a verification has proven."""
        self.unverified -= proven
        self.attempts += 1
        self.verified.add(state)
        self.switched.add(switches)
        while self.next_check <= self.batches:
            # More often while something is unproven: a gate that is shut may open.
            self.next_check *= 2 if self.unverified else 10


_plans: "WeakKeyDictionary[nn.Module, dict[Any, _Known]]" = WeakKeyDictionary()


class Linearization(LinearizedBatch):
    """A model at its present parameters θ on one batch.

    It stays valid until the parameters change. Made by `linearize`.

    Attributes:
        model: The model.
        inputs: Its inputs.
        objective: The objective.
        parameters: The trainable parameters, by name.
        output: The logits with their graph.
        recorder: What the forward pass did with the parameters.
        escaping: Parameters with a use that announced nothing, whose rows take a backward pass for each sample.
        autocasts: Dtypes that autocast was at.
        in_fp16: Whether something in it was computed in fp16.
        loss_scale: S of a GradScaler, a scalar, by which backward passes in fp16 are scaled; rows are not.
        keep_sides: Weights of which `Jacobian.sides` are kept.
        checked: Whether the model was measured or its rows were verified on this batch, so that it took longer than
            others do.

    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Tensor,
        objective: Objective,
        output: Tensor,
        recorder: Recorder,
        start: Snapshot,
        versions: list[int],
        known: _Known,
        loss_scale: Tensor | None,
        keep_sides: Collection[str],
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.objective = objective
        self.parameters = dict(recorder.parameters)
        self.output = output
        self.recorder = recorder
        self.loss_scale = loss_scale
        self.keep_sides = keep_sides
        self.checked = False
        self._start = start
        self._versions = versions
        self._parameter_versions = [p._version for p in self.parameters.values()]
        self._all_versions = start.parameter_versions()
        logits = output.detach()
        objective.validate(logits, targets)
        self._tensors = {"logits": (logits, output._version), "targets": (targets, version_of(targets))}
        self._autocast = output.device.type, autocast_dtype(output.device.type)
        self._samples = len(targets)
        self._known = known
        self._released = False
        self._survey = survey(output, recorder.uses, recorder.spans, self.parameters, recorder.derived)
        escaping = {*chain.from_iterable(map(self.ancestors, self._survey.unannounced))}
        self.escaping = [name for name in self.parameters if name in escaping]
        self._state = hash((start.modes, self._survey.structure, len(targets) > 1))
        casts = [use.autocast for use in recorder.uses] + [self._autocast[1]] * bool(escaping)
        self.autocasts = {cast for cast in casts if cast is not None}
        self.in_fp16 = torch.float16 in self.autocasts | {output.dtype, *(p.dtype for p in self.parameters.values())}
        known.in_fp16 |= self.in_fp16

    @property
    def capture_seconds(self) -> float:
        """Time that recording took within the forward pass, on the host."""
        return self.recorder.seconds

    def verify(self, when: bool | None = None, strict: bool = False) -> None:
        """Tell or refuse uses that escape the capture; and, when it is due or asked for, refuse rows that are wrong.

        Args:
            when: See `linearize`.
            strict: See `linearize`.

        Raises:
            CaptureError: If there are such.

        """
        if self._survey.custom:
            require_own_graph(type(self.model).__name__, self._survey.kinds)
        if self.escaping:
            sharded = any(isinstance(module, FSDPModule) for module in self._start.modules)
            if strict or sharded:
                sources = {s for use in self.recorder.uses for s in use.call.sources if s is not None}
                used = {*chain.from_iterable(map(self.ancestors, sources))}
                require_announced(self.escaping, used, _OF_SHARDED if sharded else "")
            warn_of(self.model, {name: self.parameters[name] for name in self.escaping}, self.num_samples)
        if when is False:
            return
        due = self._known.is_due(self._state, self._start.switches) or when
        known = self._known.objective
        if due or (known is not self.objective and (known is None or not are_equal(known, self.objective))):
            self.checked = True
            require_consistent(self.objective, self.logits, self.targets)
            self._known.objective = self.objective
        if not due:
            return
        compare = partial(
            verify_rows,
            jacobian=self.jacobian,
            parameters=self.parameters,
            logit_gradients=self.logit_gradients,
            half=bool(self.autocasts),
            in_fp16=self.in_fp16,
            factor=None if self.loss_scale is None else sample_scale(self.loss_scale, self.num_samples),
            strict=when is True,
        )
        proven = compare(self.output)
        if self.escaping and self.num_samples > 1:
            # Of these rows, which are autograd's own, that proves little: samples get others beside them.
            _require_unchanged(self.model, self.inputs, self._versions)
            drawn, name = self._start.has_drawn, type(self.model).__name__
            for first in (0, 1):
                indices, kept = another_batch(self.num_samples, first, drawn)
                with torch.enable_grad():
                    other = taken(self.inputs, self.num_samples, indices)
                    output = self._again(partial(call_model, self.model, other))
                require_independent(name, self.escaping, self.logits, output, kept, self._tolerance)
                compare(output, kept=kept)
        self._known.note(proven, self._state, self._start.switches)

    def _kept(self, name: str, make: Callable[[], Tensor] | None = None) -> Tensor:
        """A tensor that is made once and handed out: whoever writes to it is told that others read it."""
        if make is not None and name not in self._tensors:
            with torch.inference_mode(False):  # tensors of inference mode have no version
                made = make()
            self._tensors[name] = made, version_of(made)
        found, version = self._tensors[name]
        if version_of(found) != version:
            raise CaptureError(
                f"The {name.replace('_', ' ')} of a linearization were changed in place, so that nothing can be "
                "computed from them any more. Change a copy, .clone(), or read what you need before."
            )
        return found

    @property
    def parts(self) -> tuple["Linearization"]:
        """Itself."""
        return (self,)

    @property
    def logits(self) -> Tensor:  # noqa: D102
        return self._kept("logits")

    @property
    def targets(self) -> Tensor:  # noqa: D102
        return self._kept("targets")

    @property
    def losses(self) -> Tensor:  # noqa: D102
        return self._kept("losses", lambda: self.objective.losses(self.logits, self.targets))

    @property
    def logit_gradients(self) -> Tensor:
        """∂l_n/∂z_n, shape of the logits, detached; float32 at least."""
        return self._kept("logit_gradients", lambda: self.objective.gradient(upcast(self.logits), self.targets))

    @property
    def logit_gradient_norms(self) -> Tensor:  # noqa: D102
        return self._kept(
            "logit_gradient_norms",
            lambda: sample_dot(self.logit_gradients, self.logit_gradients),
        )

    @cached_property
    def jacobian(self) -> Jacobian:
        """J, whose row n is ∇l_n (unscaled); an operator, see `Jacobian`. Costs one backward pass at first use."""
        return self.pullback([self.logit_gradients])

    def backward(self, retain_graph: bool = False) -> None:
        """Compute the Jacobian now, and let the graph go unless it is to be used again.

        Args:
            retain_graph: Keep the graph for further calls of `pullback`.

        """
        self.__dict__["jacobian"] = self.pullback([self.logit_gradients], retain_graph=retain_graph)

    def release(self) -> None:  # noqa: D102
        if "jacobian" not in self.__dict__:
            self.backward()
        _ = self.losses, self.logit_gradient_norms  # while the targets are as they were
        self._released = True
        self._let_go()

    def _let_go(self) -> None:
        """Hold nothing of the graph any more."""
        self.output = self.logits
        self.recorder.uses.clear()
        self.recorder.spans.clear()
        self._survey = self._survey._replace(earliest=frozenset())

    def pullback(self, cotangents: Iterable[Tensor], retain_graph: bool = True) -> Jacobian:
        """Rows (∂z_n/∂θ)ᵀ c_rn for given cotangents, one backward pass for each r.

        Weight gradients are not computed on the way: the backward pass ends at the outputs of the operations in which
        parameters are used. For parameters with a use that escapes the capture, there are N more for each r.

        Args:
            cotangents: c_r for r = 1 … R, each of the shape of the logits.
            retain_graph: Keep the graph for further calls.

        Returns:
            A Jacobian of R·N rows, row r·N + n for cotangent r and sample n.

        Raises:
            CaptureError: If an operation can't be captured exactly.

        """
        if self._released:
            raise CaptureError(
                "The graph of this linearization was let go after the first backward pass. Keep it with "
                "backward(retain_graph=True), or linearize the batch anew."
            )
        self.require_unmoved()
        self._released = not retain_graph
        # A backward pass written by hand may write to what it is given.
        cotangents = [c.clone() if self._survey.custom else c for c in cotangents]
        escaping = {name: self.parameters[name] for name in self.escaping}
        alone = one_by_one(self.output, escaping, cotangents, self.loss_scale) if escaping else {}
        factors, scales = pull_back(
            self.output,
            self.recorder.uses,
            self._survey.earliest,
            cotangents,
            self.num_samples,
            retain_graph,
            self.loss_scale,
            self.keep_sides,
        )
        if escaping and not retain_graph:  # that pass has not been everywhere
            self._let_go()
        by_name: dict[str, list[Factor]] = {name: list(factors.get(name, ())) for name in self.parameters}
        for source, inner in factors.items():
            if isinstance(source, Derived):
                derived = self.recorder.derived[source]
                for name in self.ancestors(source):
                    by_name[name].append(PulledBack(derived, self.parameters[name], inner))
        by_name |= {name: [factor] for name, factor in alone.items()}  # through all uses, the recorded ones as well
        for name, found in by_name.items():
            # Reading memory that is not there ends the process.
            parameter = self.parameters[name]
            gone = parameter.numel() and not parameter.untyped_storage().size()
            if gone and any(factor.tensors() is None for factor in found):
                raise CaptureError(
                    f"The rows of sharded parameter '{name}' are computed from its values, which have gone back to "
                    "their shards by then. Leave it out of fully_shard (ignored_params=), or freeze it."
                )
        block = Block(slice(0, self.num_samples), by_name)
        return LocalJacobian(Blocks([block], self.parameters, self._parameter_versions), scales)

    def ancestors(self, source: Source) -> list[str]:
        """Find the parameters that a recorded tensor is made from.

        Args:
            source: A parameter, or a tensor derived from parameters.

        Returns:
            Their names.

        """
        if isinstance(source, str):
            return [source]
        assert self.recorder.plan is not None
        sources = self.recorder.plan.calls[source.call].sources
        return list(dict.fromkeys(chain.from_iterable(self.ancestors(s) for s in sources if s is not None)))

    def jvp(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Change of the logits along a direction, u_n = (∂z_n/∂θ) d; see `jvps`."""
        return self.jvps([direction])[0]

    def jvps(self, directions: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Changes of the logits along several directions, u_n = (∂z_n/∂θ) d for each d.

        The forward pass runs once more in forward mode, with all directions at once: two products as large as a
        forward pass for each direction, and no graph. Where there is no forward mode, it runs once more for each
        direction, with two backward passes.

        Args:
            directions: K of them, {parameter name: tensor}, an entry for every trainable parameter.

        Returns:
            u, shape [K, N, ...], in float32 at least.

        Raises:
            CaptureError: If the forward pass can't be run again as it was.
            ValueError: If names or shapes of a direction do not fit.

        """
        for direction in directions:
            check_same_space(direction, self.parameters)
        self._require_repeatable()
        scaled = [normalised_direction(direction, self.parameters, self.in_fp16) for direction in directions]
        columns = [direction for direction, _ in scaled]
        name, known = type(self.model).__name__, self._known.forward_verified
        forward = ForwardPass(name, self._replay, self.parameters, self.logits, self._deviation, self._tolerance)
        # The first time with a random direction besides, whose change the rows confirm.
        probe = None
        if self._state not in known:
            probe = normalised_direction(random_direction(self.parameters), self.parameters, self.in_fp16)[0]
        tangents, deviation = along_together_by_forward_mode(forward, columns, probe)
        if tangents is None:
            tangents = along_each_by_backward_passes(forward, columns)
        # A backward pass written by hand may agree with the rows today, and not on another batch.
        elif deviation <= self._tolerance and not self._survey.custom:
            known |= {self._state, self._start.modes}
        return torch.stack([upcast(u) * length for u, (_, length) in zip(tangents, scaled, strict=True)])

    @torch.no_grad()
    def losses_at(self, values: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        self._require_repeatable()
        with _moved(self.parameters, values):
            logits = self._again(partial(call_model, self.model, self.inputs))
        return self.objective.losses(upcast(logits), self.targets)

    def _deviation(self, direction: Mapping[str, Tensor], tangents: Tensor) -> float:
        """Relative difference between the changes of the losses by u and by J d; NaN if J can't be had, or all is 0."""
        if self._released and "jacobian" not in self.__dict__:
            return torch.nan
        error = sample_dot(self.logit_gradients, tangents) - self.jacobian.matvec(direction)
        sizes = self.logit_gradient_norms * sample_dot(tangents, tangents)
        return float(error.norm() / sizes.sum().sqrt())

    @property
    def _tolerance(self) -> float:
        """The deviation that is rounding."""
        return 0.1 if self.autocasts else _FORWARD_TOLERANCE.get(self.logits.dtype, 0.1)

    def _replay(self, *values: Tensor) -> Tensor:
        """Run the forward pass as it was, at other parameters."""
        return self._again(partial(_call_at, self.model, self.parameters, self.inputs, *values))

    def _again(self, run: Callable[[], Tensor]) -> Tensor:
        """Run a forward pass that starts where this one did."""
        kind, dtype = self._autocast
        with self._start.replayed(), torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False):
            return run()

    def _require_repeatable(self) -> None:
        _require_unchanged(self.model, self.inputs, self._versions)
        self.require_unmoved()
        frozen = self._start.parameter_versions() != self._all_versions
        if frozen or modes_of(self.model) != self._start.modes:
            what = "Frozen parameters" if frozen else "The modes (train or eval, or other switches)"
            raise CaptureError(
                f"{what} of {type(self.model).__name__} were changed after a batch had been linearised: its forward "
                "pass can't be run again. Linearize it anew."
            )

    @property
    def num_samples(self) -> int:
        """N."""
        return self._samples

    def require_unmoved(self, names: Iterable[str] | None = None) -> None:  # noqa: D102
        versions = dict(zip(self.parameters, self._parameter_versions, strict=True))
        if any(self.parameters[name]._version != versions[name] for name in (versions if names is None else names)):
            raise CaptureError(
                "The parameters were changed after they had been linearised. Linearize the batch again, or read what "
                "you need of a linearization before they are updated."
            )


def linearize(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    objective: Objective | nn.Module,
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
    verify: bool | None = None,
    strict: bool = False,
    loss_scale: Tensor | None = None,
    keep_sides: Collection[str] = (),
) -> Linearization:
    """Linearise a model on a batch: per-sample losses, logits, and the per-sample Jacobian as an operator.

    One forward pass. The first batch of a model (and of each mode, kind of input and autocast) costs two more, which
    find out where the batch stands in each operation, and, unless switched off, one backward pass for verification:
    Jᵀw from the capture against autograd's gradient of Σ w_n l_n with random w. It is repeated on the next batches,
    ten at most, until every parameter has had a gradient, and there was more than one sample; when a module changes its
    mode or the graph its structure; and on the 10th, 100th, 1,000th ... batch, for what changes without a trace (on the
    20th, 40th, 80th ... while a parameter is unproven). After an error, buffers and random numbers are as they were
    before the call.

    Uses of parameters that escape the capture (custom autograd functions, values written into slices) are looked for on
    every batch. The rows of such parameters are as exact, and found by one backward pass for each sample; a warning
    names them, once a model. Where verification is due, the forward and the backward pass run twice more, on batches in
    which each sample has others beside it: that may change neither its logits nor its rows.

    Args:
        model: The model. Its output is the logits or an object with `.logits`, samples on dimension 0.
        inputs: A tensor, a tuple (positional arguments) or a dict (keyword arguments); tensors in them whose
            dimension 0 has N entries are the batch, all others constants.
        targets: y, what the objective says, samples on dimension 0.
        objective: Turns logits and targets into per-sample losses l_n; L = Σ l_n, sums and not means. A loss of
            torch.nn is taken for one where `objectives.as_objective` knows it.
        parameters: Parameters to differentiate by; all with requires_grad if None.
        verify: Whether to verify the capture on this batch: when that is due, as above, if None. True also takes any
            difference for a wrong capture: no backward passes are run that would tell rounding from it. With False,
            samples that influence each other are not noticed.
        strict: Refuse parameters with a use that escapes the capture.
        loss_scale: S, a scalar: backward passes are scaled by it over N, as a GradScaler has it done for the mean loss,
            so that gradients stay in the range of fp16. What they lead to is not.
        keep_sides: Weights, by name, of which `Jacobian.sides` are kept: what went into a layer and what came back, for
            methods with Kronecker factors. Others keep them only where that is cheaper than their rows.

    Returns:
        The linearization.

    Raises:
        CaptureError: If per-sample gradients can't be captured exactly.
        TypeError: If targets are no tensor, or the objective is none.
        ValueError: If the batch is empty, shapes do not fit, there is no trainable parameter, or none of a name in
            `keep_sides`; or if what an objective of one's own says contradicts its losses.

    Example:
        >>> from lightning_ief import objectives
        >>> model = nn.Linear(3, 2)
        >>> lin = linearize(model, torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), objectives.CrossEntropy())
        >>> lin.losses.shape, lin.jacobian.gram().shape
        (torch.Size([4]), torch.Size([4, 4]))

    """
    if parameters is None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _require_trainable(parameters)
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: set requires_grad on some of them.")
    kept = {*restricted(parameters, keep_sides)} if keep_sides else set[str]()
    require_samples(targets)
    if not isinstance(objective, Objective):
        objective = as_objective(objective)
    start = Snapshot(model)
    mixing = {m for m in start.modules if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None)}
    if mixing:
        raise CaptureError(mixing_layers(model, [name for name, m in model.named_modules() if m in mixing]))
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    try:
        linearization = _linearize(model, inputs, targets, objective, parameters, start, loss_scale, kept)
        linearization.verify(verify, strict)
    except BaseException:
        start.restore()
        raise
    return linearization


def push_forward(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    objective: Objective | nn.Module,
    directions: Sequence[Mapping[str, Tensor]],
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
) -> tuple[Tensor, Tensor]:
    """The logits of a batch, and their changes along directions that are there already, from one forward pass.

    There is no graph and no Jacobian: a forward pass, and two products as large as one for each direction, all
    directions at once. The first batch of a model (and of each mode and kind of input) is linearised, and what forward
    mode finds is verified against its rows. So is every batch of a model without forward mode.

    Args:
        model: The model, as for `linearize`.
        inputs: Its inputs.
        targets: y, what the objective says, samples on dimension 0.
        objective: The objective.
        directions: K of them, {parameter name: tensor}, an entry for every trainable parameter.
        parameters: Parameters to differentiate by; all with requires_grad if None.

    Returns:
        z, shape [N, ...], and u_n = (∂z_n/∂θ) d for each d, shape [K, N, ...].

    Raises:
        CaptureError: If the model can't be linearised, or its logits have no derivative along a direction.
        ValueError: If the batch is empty, shapes do not fit, or there is no trainable parameter.

    """
    if parameters is None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _require_trainable(parameters)
    require_samples(targets)
    objective = as_objective(objective)
    known = _plans.get(model, {}).get(_kind(model, parameters, inputs, len(targets)))
    start = Snapshot(model)
    if known is not None and known.may_go_without_graph(start.modes):
        call = partial(_call_at, model, parameters, inputs)
        values = [p.detach() for p in parameters.values()]
        scaled = [normalised_direction(direction, parameters, known.in_fp16) for direction in directions]
        try:
            logits, tangents = by_forward_mode(call, values, [list(d.values()) for d, _ in scaled])
        except (NotImplementedError, RuntimeError, ValueError):
            start.restore()
        else:
            if start.has_other_tensors:  # which are of forward mode
                start.restore()
                linearization = linearize(model, inputs, targets, objective, parameters=parameters)
                return linearization.logits, linearization.jvps(directions)
            objective.validate(logits, targets)
            changes = [upcast(u) * length for u, (_, length) in zip(tangents.detach(), scaled, strict=True)]
            return logits.detach(), torch.stack(changes)
    linearization = linearize(model, inputs, targets, objective, parameters=parameters)
    return linearization.logits, linearization.jvps(directions)


def _linearize(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    start: Snapshot,
    loss_scale: Tensor | None,
    keep_sides: Collection[str],
) -> Linearization:
    samples, known = len(targets), _plans.setdefault(model, {})
    key = _kind(model, parameters, inputs, samples)
    if key not in known:
        if (problem := flattened([*tensors_of(inputs)], samples)) is not None:
            raise ValueError(problem)
        warn_of_targets(inputs, targets)
    entry, call, versions = known.get(key), partial(call_model, model), _versions(inputs)
    if entry is None:
        entry = _Known(measure(parameters, inputs, samples, call, start.replayed), set(parameters))
    output, recorder = _recorded(model, parameters, inputs, entry.plan, samples)
    if recorder.stale:
        # The forward pass took another way than when it was measured: measure again, and run it again the same.
        _require_unchanged(model, inputs, versions)
        start.require_unwritten()
        start.restore()
        entry = _Known(measure(parameters, inputs, samples, call, start.replayed), set(parameters))
        output, recorder = _recorded(model, parameters, inputs, entry.plan, samples)
        if recorder.stale:
            raise CaptureError(
                f"The forward pass of {type(model).__name__} does not repeat: {recorder.stale}. Its operations must be "
                "the same when it runs again with the same random numbers of torch, also on fewer samples: one that "
                "depends on other chance or on the number of samples can't be captured."
            )
    if output.shape[:1] != (samples,):
        raise ValueError(not_by_samples(output, samples))
    if not output.requires_grad:
        raise ValueError(
            f"The logits of {type(model).__name__} do not depend on its trainable parameters (or were computed under "
            "torch.no_grad())."
        )
    found = Linearization(
        model, inputs, targets, objective, output, recorder, start, versions, entry, loss_scale, keep_sides
    )
    found.checked = known.get(key) is not entry
    known[key] = entry
    return found


def _require_trainable(parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            raise ValueError(
                f"Parameter '{name}' is frozen, so that it can't be linearised by. Leave it out of parameters=, or set "
                "requires_grad_(True)."
            )
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise CaptureError(
                f"Parameter '{name}' has a hook that autograd would run on its gradient, which is never computed here. "
                "Remove it, or do in the forward pass what it does (a mask: F.linear(x, weight * mask)). "
                "wandb.watch(log='gradients') sets such hooks: say log='parameters', or leave it out."
            )


def _versions(inputs: Any) -> list[int]:
    return [version_of(x) for x in tensors_of(inputs)]


def _require_unchanged(model: nn.Module, inputs: Any, versions: list[int]) -> None:
    """Require that inputs are as they were, so that the forward pass can be run on them again."""
    if _versions(inputs) != versions:
        raise CaptureError(
            f"{type(model).__name__} changes its inputs in place, so that its forward pass can't be run again. "
            "Use the out-of-place operation there."
        )


def _recorded(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], inputs: Any, plan: Plan, samples: int
) -> tuple[Tensor, Recorder]:
    with torch.enable_grad(), Recorder(parameters, plan, samples) as recorder:
        output = call_model(model, inputs)
    return output, recorder


def require_samples(targets: Tensor) -> None:
    """Require that a batch is not empty.

    Args:
        targets: y, samples on dimension 0.

    Raises:
        TypeError: If they are no tensor.
        ValueError: If there are no samples.

    """  # noqa: DOC502  # raised by require_tensor
    require_tensor(targets)
    if targets.ndim == 0 or len(targets) == 0:
        raise ValueError(f"Empty batch: targets of shape {tuple(targets.shape)}. Leave such batches out.")


def warn_of_targets(inputs: Any, targets: Tensor) -> None:
    """Warn of targets that are the tokens of the inputs, not shifted; for the first batches.

    Args:
        inputs: What the model takes.
        targets: y.

    """
    if (problem := not_shifted(tensors_of(inputs), targets)) is not None:
        warnings.warn(problem, RuntimeWarning, stacklevel=2)


def logits_of(output: Any) -> Tensor:
    """Take the logits out of what a model returns.

    Args:
        output: A tensor, a dict with "logits", or an object with `.logits`.

    Returns:
        The logits.

    Raises:
        TypeError: If there are none.

    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(no_logits(output))


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def call_model(model: nn.Module, inputs: Any) -> Tensor:
    """Run a model on inputs.

    Args:
        model: The model.
        inputs: A tensor, a tuple (positional arguments) or a dict (keyword arguments).

    Returns:
        The logits.

    Raises:
        TypeError: If the model takes other arguments, or returns no logits.

    """
    args, kwargs = _as_call(inputs)
    # Compiled code shows no operations: within the capture it runs as it was written.
    with torch.compiler.set_stance("force_eager"):
        try:
            return logits_of(model(*args, **kwargs))
        except TypeError as error:
            if (problem := wrong_arguments(model, args, kwargs)) is not None:
                raise TypeError(problem) from error
            raise


@contextmanager
def _moved(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Have parameters hold other values for a while; their versions stay, and so does the graph.

    `_call_at` takes three times as long for a small model, and does not reach parameters that a module keeps in a list.
    """
    moving = restricted(parameters, values) if values else {}
    check_same_space(values, moving)
    kept = {name: p.data for name, p in moving.items()}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data = value


def _call_at(model: nn.Module, parameters: Mapping[str, Tensor], inputs: Any, *values: Tensor) -> Tensor:
    """Run a model at other values of some parameters; there is no graph of the rest."""
    at = {id(p): p.detach() for p in model.parameters() if p.requires_grad}
    at.update((id(p), value) for p, value in zip(parameters.values(), values, strict=True))
    # Each place of a parameter once: tie_weights would leave other values in a module that stands in several places.
    named = {
        f"{path}.{name}" if path else name: at[id(p)]
        for path, module in model.named_modules()
        for name, p in module._parameters.items()
        if p is not None and id(p) in at
    }
    args, kwargs = _as_call(inputs)
    with torch.compiler.set_stance("force_eager"):
        return logits_of(torch.func.functional_call(model, named, args, kwargs, tie_weights=False))


def _kind(model: nn.Module, parameters: Mapping[str, nn.Parameter], inputs: Any, samples: int) -> Any:
    """What a plan depends on, as far as it can be seen before the forward pass."""
    leaves, spec = flatten_call(*_as_call(inputs))
    described = tuple(
        (x.ndim, x.dtype, x.shape[:1] == (samples,)) if isinstance(x, Tensor) else repr(x) for x in leaves
    )
    precision = frozenset((p.dtype, autocast_dtype(p.device.type)) for p in parameters.values())
    return model.training, tuple(parameters), precision, repr(spec), described
