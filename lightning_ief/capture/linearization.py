"""The front door: a batch, seen once, is linearised."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ief.capture.backward import graph_nodes, pull_back
from lightning_ief.capture.factors import PulledBack
from lightning_ief.capture.forward import NoForwardError, Pushforward, by_two_backward_passes
from lightning_ief.capture.fused import by_fused_forward_mode
from lightning_ief.capture.jacobian import Jacobian
from lightning_ief.capture.joint import LinearizedBatch, gamma_terms_of
from lightning_ief.capture.measure import measure
from lightning_ief.capture.recorder import Recorder, flatten_call, tensors_of
from lightning_ief.capture.rules import mixes_samples
from lightning_ief.capture.types import CaptureError, Derived, Plan, Source
from lightning_ief.capture.verification import require_announced, verify_rows
from lightning_ief.linalg.vectors import norm, power_of_two, upcast
from lightning_ief.objectives import Objective

__all__ = ["Linearization", "linearize", "preserved_state", "push_forward"]

# Difference between J d and ⟨∂l/∂z, u⟩ over ‖∂l/∂z‖ ‖u‖ that is rounding, by dtype of the logits.
_FORWARD_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}

# So many batches are verified at most while some parameters have a gradient of zero, which proves nothing.
_ATTEMPTS = 10


@dataclass
class _Known:
    """What is known of a model.

    Attributes:
        plan: Its plan.
        unverified: Parameters whose rows have not been verified yet.
        attempts: How many batches were verified.
        forward_verified: Whether changes of the logits by way of the graph have been found to agree with the rows.
        fused_verified: Modes (train or eval) of the modules in which those by forward mode have.
        in_fp16: Whether something in it is computed in fp16.

    """

    plan: Plan
    unverified: set[str]
    attempts: int = 0
    forward_verified: bool = False
    fused_verified: set[tuple[bool, ...]] = field(default_factory=set)
    in_fp16: bool = False


_plans: "WeakKeyDictionary[nn.Module, dict[Any, _Known]]" = WeakKeyDictionary()


class Snapshot:
    """Buffers and random numbers of a model at one moment, so that a forward pass can be undone or run again.

    Args:
        model: The module whose buffers, and whose devices' generators, are meant.

    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            (module._buffers, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        cuda = torch.cuda.is_initialized()
        self._devices = {p.device for p in model.parameters() if p.device.type == "cuda"} if cuda else set()
        self._random = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in self._devices}

    def restore(self) -> None:
        """Put everything back as it was."""
        self._restore_random()
        for owner, name, buffer, value in self._buffers:
            if not torch.equal(buffer, value):  # writing to a buffer would invalidate graphs that hold it
                with torch.no_grad():
                    buffer.copy_(value)
            owner[name] = buffer

    def _restore_random(self) -> None:
        torch.set_rng_state(self._random[0])
        for device, state in self._random[1].items():
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run a forward pass from this moment, on copies: nothing of the model or the generators changes.

        Yields:
            Nothing.

        """
        present = [owner[name] for owner, name, _, _ in self._buffers]
        with torch.random.fork_rng(devices=self._devices):
            self._restore_random()
            for owner, name, _, value in self._buffers:
                owner[name] = value.clone()
            try:
                yield
            finally:
                for (owner, name, _, _), buffer in zip(self._buffers, present, strict=True):
                    owner[name] = buffer


def preserved_state(model: nn.Module) -> AbstractContextManager[None]:
    """Leave buffers and the state of torch's random number generators as they are.

    Args:
        model: The module whose buffers, and whose devices' generators, are meant.

    Returns:
        A context in which forward passes leave no trace.

    """
    return Snapshot(model).replayed()


class Linearization(LinearizedBatch):
    """A model at its present parameters θ on one batch.

    It stays valid until the parameters change. Made by `linearize`.

    Attributes:
        model: The model.
        inputs: Its inputs.
        targets: y.
        objective: The objective.
        parameters: The trainable parameters, by name.
        logits: z, shape [N, ...], detached.
        output: The same with their graph.
        recorder: What the forward pass did with the parameters.
        autocasts: Dtypes that autocast was at.
        in_fp16: Whether something in it was computed in fp16.
        loss_scale: S of a GradScaler, a scalar, by which backward passes in fp16 are scaled; rows are not.

    """

    loss_scale: Tensor | None = None

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
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.targets = targets
        self.objective = objective
        self.parameters = dict(recorder.parameters)
        self.logits = output.detach()
        self.output = output
        self.recorder = recorder
        self._start = start
        self._versions = versions
        self._parameter_versions = [p._version for p in self.parameters.values()]
        self._known = known
        self._released = False
        self.autocasts = {use.autocast for use in recorder.uses if use.autocast is not None}
        self.in_fp16 = torch.float16 in self.autocasts | {output.dtype, *(p.dtype for p in self.parameters.values())}

    @property
    def capture_seconds(self) -> float:
        """Time that recording took within the forward pass, on the host."""
        return self.recorder.seconds

    @cached_property
    def losses(self) -> Tensor:  # noqa: D102
        return self.objective.losses(self.logits, self.targets)

    @cached_property
    def logit_gradients(self) -> Tensor:
        """∂l_n/∂z_n, shape of the logits, detached; float32 at least."""
        return self.objective.gradient(upcast(self.logits), self.targets)

    @cached_property
    def logit_gradient_norms(self) -> Tensor:  # noqa: D102
        return self.logit_gradients.double().square().reshape(self.num_samples, -1).sum(1)

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
        self._released = True
        self.output = self.logits
        self.recorder.uses.clear()

    def pullback(self, cotangents: Iterable[Tensor], retain_graph: bool = True) -> Jacobian:
        """Rows (∂z_n/∂θ)ᵀ c_rn for given cotangents, one backward pass for each r.

        Weight gradients are not computed on the way: the backward pass ends at the outputs of the operations in which
        parameters are used.

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
        self._released = not retain_graph
        factors, scales = pull_back(
            self.output, self.recorder.uses, list(cotangents), self.num_samples, retain_graph, self.loss_scale
        )
        by_name = {name: list(factors.get(name, ())) for name in self.parameters}
        for source, inner in factors.items():
            if isinstance(source, Derived):
                derived = self.recorder.derived[source]
                for name in self.ancestors(source):
                    by_name[name].append(PulledBack(derived, self.parameters[name], inner))
        for name, found in by_name.items():
            # Reading memory that is not there ends the process.
            parameter = self.parameters[name]
            gone = parameter.numel() and not parameter.untyped_storage().size()
            if gone and any(factor.tensors() is None for factor in found):
                raise CaptureError(
                    f"The rows of sharded parameter '{name}' are computed from its values, which have gone back to "
                    "their shards by then. Leave it out of fully_shard (ignored_params=), or freeze it."
                )
        return Jacobian(by_name, self.parameters, scales)

    def target_rows(self, targets: Iterable[Tensor]) -> Jacobian:  # noqa: D102
        return self.pullback(self.objective.gradient(upcast(self.logits), each) for each in targets)

    def hessian_rows(self) -> tuple[Jacobian, Tensor]:  # noqa: D102
        pairs = list(self.objective.hessian_factor(upcast(self.logits), self.targets))
        return self.pullback(column for column, _ in pairs), torch.stack([c for _, c in pairs]).flatten()

    def gamma_terms(self, directions: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:  # noqa: D102
        tangents = self.jvps(directions)
        return gamma_terms_of(self.objective, self.logits, self.targets, self.logit_gradients, tangents)

    def fisher_product(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        rows = self.pullback([self.objective.hessian_product(upcast(self.logits), self.targets, self.jvp(v))])
        return rows.rmatvec(torch.ones(rows.num_rows, dtype=torch.float64, device=self.logits.device))

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
        """Change of the logits along a direction, u_n = (∂z_n/∂θ) d.

        For many directions, each found from the one before: by way of the graph of the forward pass while that is
        there, one backward pass shared by all directions, and two products as large as a forward pass for each.
        Otherwise, or where a kernel has no second derivative, the forward pass runs once more with forward-mode
        derivatives, or with two backward passes where there are none.

        Args:
            direction: d, {parameter name: tensor}, an entry for every trainable parameter.

        Returns:
            u, shape of the logits.

        Raises:
            CaptureError: If the forward pass can't be run again as it was.

        """
        direction, length = _within_range(direction, self.parameters, self.in_fp16)
        if not self._released and self._pushforward is not None:
            try:
                return upcast(self._pushforward(direction)) * length
            except NoForwardError:
                self._pushforward = None
        return upcast(self._forward_again(direction)) * length

    def jvps(self, directions: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Changes of the logits along several directions that are there already, u_n = (∂z_n/∂θ) d for each d.

        The forward pass runs once more, in forward mode, with all directions at once: two products as large as a
        forward pass for each direction, and no graph. Where that can't be done, as by `jvp` one by one.

        Args:
            directions: K of them, {parameter name: tensor}, an entry for every trainable parameter.

        Returns:
            u, shape [K, N, ...].

        Raises:
            CaptureError: If the forward pass can't be run again as it was.

        """
        scaled = [_within_range(direction, self.parameters, self.in_fp16) for direction in directions]
        with suppress(CaptureError):  # the inputs may have been changed, and the graph be there
            if (tangents := self._fused([direction for direction, _ in scaled])) is not None:
                return torch.stack([upcast(u) * length for u, (_, length) in zip(tangents, scaled, strict=True)])
        return torch.stack([self.jvp(direction) for direction in directions])

    @cached_property
    def _pushforward(self) -> Pushforward | None:
        ancestors = {source: self.ancestors(source) for source in self.recorder.derived}
        with suppress(NoForwardError):
            push = Pushforward(self.output, self.recorder.uses, self.recorder.derived, ancestors, self.parameters)
            # A custom backward pass may detach something; it may also do so where it is not reached today.
            if self._custom or not self._known.forward_verified:
                probe = self._probe()
                agrees, proven = self._agrees(probe, push(probe))
                if not agrees:
                    return None
                self._known.forward_verified |= proven
            return push
        return None

    @property
    def _custom(self) -> bool:
        """Whether a backward pass written by hand takes part in the graph."""
        return any(isinstance(node, BackwardCFunction) for node in graph_nodes(self.output.grad_fn))

    def _probe(self) -> dict[str, Tensor]:
        """A random direction."""
        generator = torch.Generator().manual_seed(0)
        drawn = {
            name: torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
            for name, p in self.parameters.items()
        }
        return _within_range(drawn, self.parameters, self.in_fp16)[0]

    def _agrees(self, direction: Mapping[str, Tensor], tangents: Tensor) -> tuple[bool, bool]:
        """Whether u changes each loss as J d says, in so far as J can be had; and whether that proves something."""
        if self._released and "jacobian" not in self.__dict__:
            return True, False
        gradients, tangents = (x.double().reshape(self.num_samples, -1) for x in (self.logit_gradients, tangents))
        error = (gradients * tangents).sum(1) - self.jacobian.matvec(direction)
        tolerance = 0.1 if self.autocasts else _FORWARD_TOLERANCE.get(self.logits.dtype, 0.1)
        found, allowed = float(error.norm()), tolerance * float((gradients.norm(dim=1) * tangents.norm(dim=1)).norm())
        return not found > allowed, found <= allowed

    def _fused(self, directions: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
        """Run the forward pass once more, in forward mode; None if there is none, or not the same forward pass."""
        self._require_repeatable()
        known, modes = self._known.fused_verified, _modes(self.model)
        # The first time with a random direction besides, whose change the rows confirm.
        probes = [] if modes in known else [self._probe()]
        columns = [list(d.values()) for d in (*directions, *probes)]
        try:
            logits, tangents = self._by_forward_mode(columns)
        except (NotImplementedError, RuntimeError, ValueError):
            return None
        agrees, proven = self._agrees(probes[0], tangents[-1]) if probes else (True, False)
        if not self._is_same(logits) or not agrees:
            return None
        if proven and not self._released and not self._custom:
            known.add(modes)
        return tangents[: len(directions)].detach()

    def _by_forward_mode(self, columns: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        try:
            return by_fused_forward_mode(self._replay, self._values, columns)
        except (NotImplementedError, RuntimeError, ValueError):
            if len(columns) == 1:
                raise
        # What vmap over the directions refuses, such as writing to a part of a constant tensor: one by one.
        passes = [by_fused_forward_mode(self._replay, self._values, [column]) for column in columns]
        return passes[0][0], torch.cat([tangents for _, tangents in passes])

    def _forward_again(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Run the forward pass once more, with derivatives."""
        if (tangents := self._fused([direction])) is not None:
            return tangents[0]
        problem: Exception | None = None
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            try:
                output, change = by_two_backward_passes(self._replay, self._values, list(direction.values()))
            except (NotImplementedError, RuntimeError) as error:
                problem = error
            else:
                if self._is_same(output):
                    if self._agrees(direction, change.detach())[0]:
                        return change.detach()
                    problem = CaptureError("a custom backward pass hides what it depends on.")
        if problem is not None:
            raise CaptureError(
                f"The logits of {type(self.model).__name__} have no derivative along a direction: {problem} Without "
                "it there is no γ; the Jacobian, and all directions but those of conjugate gradients, can be had."
            ) from problem
        raise CaptureError(
            f"The forward pass of {type(self.model).__name__} does not repeat with the same random numbers: set the "
            "dropout within attention to 0, or use eval()."
        )

    @property
    def _values(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters.values()]

    def _replay(self, *values: Tensor) -> Tensor:
        """Run the forward pass as it was, at other parameters."""
        with self._start.replayed():
            return _call_at(self.model, self.parameters, self.inputs, *values)

    def _require_repeatable(self) -> None:
        _require_unchanged(self.model, self.inputs, self._versions)
        if [p._version for p in self.parameters.values()] != self._parameter_versions:
            raise CaptureError(
                "The parameters were changed after they had been linearised. Read everything you need of a "
                "linearization before the parameters are updated."
            )

    def _is_same(self, output: Tensor) -> bool:
        scale = self.logits.abs().max().float()
        return bool(((output.detach() - self.logits).abs().max().float() <= 1e-2 * scale) | ~torch.isfinite(scale))


def linearize(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    objective: Objective,
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
    verify: bool = True,
    loss_scale: Tensor | None = None,
) -> Linearization:
    """Linearise a model on a batch: per-sample losses, logits, and the per-sample Jacobian as an operator.

    One forward pass. The first batch of a model (and of each mode and kind of input) costs two more, which find out
    where the batch stands in each operation, and, unless switched off, one backward pass for verification: Jᵀw from
    the capture against autograd's gradient of Σ w_n l_n with random w. It is repeated on the next batches, ten at most,
    until every parameter has had a gradient, and there was more than one sample. After an error, buffers and random
    numbers are as they were before the call.

    Args:
        model: The model. Its output is the logits or an object with `.logits`, samples on dimension 0.
        inputs: A tensor, a tuple (positional arguments) or a dict (keyword arguments); tensors in them whose
            dimension 0 has N entries are the batch, all others constants.
        targets: y, what the objective says, samples on dimension 0.
        objective: Turns logits and targets into per-sample losses l_n; L = Σ l_n, sums and not means.
        parameters: Parameters to differentiate by; all with requires_grad if None.
        verify: Whether to verify the capture on the first batches.
        loss_scale: S, a scalar: backward passes are scaled by it over N, as a GradScaler has it done for the mean loss,
            so that gradients stay in the range of fp16. What they lead to is not.

    Returns:
        The linearization.

    Raises:
        CaptureError: If per-sample gradients can't be captured exactly.
        ValueError: If the batch is empty, shapes do not fit, or there is no trainable parameter.

    Example:
        >>> from lightning_ief import objectives
        >>> model = nn.Linear(3, 2)
        >>> lin = linearize(model, torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), objectives.CrossEntropy())
        >>> lin.losses.shape, lin.jacobian.gram().shape
        (torch.Size([4]), torch.Size([4, 4]))

    """
    if parameters is None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: set requires_grad on some of them.")
    require_samples(targets)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            name = next(name for name, each in model.named_modules() if each is module)
            raise CaptureError(mixes_samples(f"{type(module).__name__} '{name}' of {type(model).__name__}"))

    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    known = _plans.setdefault(model, {})
    start = Snapshot(model)
    try:
        linearization, entry = _linearize(model, inputs, targets, objective, parameters, known, start)
        linearization.loss_scale = loss_scale
        entry.in_fp16 |= linearization.in_fp16
        if verify and entry.unverified and entry.attempts < _ATTEMPTS:
            entry.unverified -= verify_rows(linearization)
            entry.attempts += len(targets) > 1
    except BaseException:
        start.restore()
        raise
    return linearization


def push_forward(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    objective: Objective,
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
    require_samples(targets)
    known = _plans.get(model, {}).get(_kind(model, parameters, inputs, len(targets)))
    if known is not None and _modes(model) in known.fused_verified:
        start, call = Snapshot(model), partial(_call_at, model, parameters, inputs)
        values = [p.detach() for p in parameters.values()]
        scaled = [_within_range(direction, parameters, known.in_fp16) for direction in directions]
        try:
            logits, tangents = by_fused_forward_mode(call, values, [list(d.values()) for d, _ in scaled])
        except (NotImplementedError, RuntimeError, ValueError):
            start.restore()
        else:
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
    known: dict[Any, _Known],
    start: Snapshot,
) -> tuple[Linearization, _Known]:
    samples = len(targets)
    key = _kind(model, parameters, inputs, samples)
    entry, call, versions = known.get(key), partial(call_model, model), _versions(inputs)
    fresh = entry is None
    if entry is None:
        entry = _Known(measure(parameters, inputs, samples, call, start.replayed), set(parameters))
    output, recorder = _recorded(model, parameters, inputs, entry.plan)
    if _stale(recorder, samples):
        # The forward pass took another way than when it was measured: measure again, and run it again the same.
        _require_unchanged(model, inputs, versions)
        start.restore()
        entry, fresh = _Known(measure(parameters, inputs, samples, call, start.replayed), set(parameters)), True
        output, recorder = _recorded(model, parameters, inputs, entry.plan)
        if problem := _stale(recorder, samples):
            raise CaptureError(
                f"The forward pass of {type(model).__name__} does not repeat: {problem}. Its operations must be the "
                "same when it runs again with the same random numbers of torch, also on fewer samples: one that "
                "depends on other chance or on the number of samples can't be captured."
            )
    if output.shape[:1] != (samples,):
        raise ValueError(
            f"Logits of shape {tuple(output.shape)} for {samples} targets: dimension 0 of the logits must be the "
            "samples."
        )
    if not output.requires_grad:
        raise ValueError(
            f"The logits of {type(model).__name__} do not depend on its trainable parameters (or were computed under "
            "torch.no_grad())."
        )
    objective.validate(output.detach(), targets)
    linearization = Linearization(model, inputs, targets, objective, output, recorder, start, versions, entry)
    if fresh:
        require_announced(linearization)
        known[key] = entry
    return linearization, entry


def _versions(inputs: Any) -> list[int]:
    return [x._version for x in tensors_of(inputs)]


def _require_unchanged(model: nn.Module, inputs: Any, versions: list[int]) -> None:
    """Require that inputs are as they were, so that the forward pass can be run on them again."""
    if _versions(inputs) != versions:
        raise CaptureError(
            f"{type(model).__name__} changes its inputs in place, so that its forward pass can't be run again. "
            "Use the out-of-place operation there."
        )


def _recorded(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], inputs: Any, plan: Plan
) -> tuple[Tensor, Recorder]:
    with torch.enable_grad(), Recorder(parameters, plan) as recorder:
        output = call_model(model, inputs)
    return output, recorder


def _stale(recorder: Recorder, samples: int) -> str | None:
    """Say what differs between this forward pass and the plan."""
    if recorder.stale:
        return recorder.stale
    for use in recorder.uses:
        for leaf, dimension in zip(use.leaves, use.plan.inputs, strict=True):
            if dimension is not None and not dimension.fits(leaf.shape[dimension.dim], samples):
                return f"{use.plan.describe()} got an argument of shape {tuple(leaf.shape)}"
    return None


def require_samples(targets: Tensor) -> None:
    """Require that a batch is not empty.

    Args:
        targets: y, samples on dimension 0.

    Raises:
        ValueError: If there are no samples.

    """
    if targets.ndim == 0 or len(targets) == 0:
        raise ValueError(f"Empty batch: targets of shape {tuple(targets.shape)}. Leave such batches out.")


def logits_of(output: Any) -> Tensor:
    """Take the logits out of what a model returns.

    Args:
        output: A tensor, or an object with `.logits`.

    Returns:
        The logits.

    Raises:
        TypeError: If there are none.

    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        found = type(output).__name__ + ("" if logits is output else f" with .logits of {logits!r}")
        raise TypeError(f"The model returned {found}; expected the logits as a tensor, or an object with .logits.")
    return logits


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

    """
    args, kwargs = _as_call(inputs)
    # Compiled code shows no operations: within the capture it runs as it was written.
    with torch.compiler.set_stance("force_eager"):
        return logits_of(model(*args, **kwargs))


def _call_at(model: nn.Module, parameters: Iterable[str], inputs: Any, *values: Tensor) -> Tensor:
    """Run a model at other values of some parameters; there is no graph of the rest."""
    at = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    at.update(zip(parameters, values, strict=True))
    args, kwargs = _as_call(inputs)
    with torch.compiler.set_stance("force_eager"):
        return logits_of(torch.func.functional_call(model, at, args, kwargs))


def _within_range(
    direction: Mapping[str, Tensor], parameters: Mapping[str, Tensor], in_fp16: bool
) -> tuple[dict[str, Tensor], Tensor | float]:
    """In the dtypes of the parameters; in fp16, over its norm, rounded to a power of two, which comes second."""
    if not in_fp16:
        return {name: direction[name].to(p.dtype) for name, p in parameters.items()}, 1.0
    length = power_of_two(norm(direction))
    return {name: (direction[name] / length).to(p.dtype) for name, p in parameters.items()}, length


def _modes(model: nn.Module) -> tuple[bool, ...]:
    return tuple(module.training for module in model.modules())


def _kind(model: nn.Module, parameters: Mapping[str, nn.Parameter], inputs: Any, samples: int) -> Any:
    """What a plan depends on, as far as it can be seen before the forward pass."""
    leaves, spec = flatten_call(*_as_call(inputs))
    described = tuple(
        (x.ndim, x.dtype, x.shape[:1] == (samples,)) if isinstance(x, Tensor) else repr(x) for x in leaves
    )
    return model.training, tuple(parameters), repr(spec), described
