"""The verification of a first batch: nothing escaped the capture, and rows belong to the samples they are said to."""

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_ief.capture.backward import graph_nodes, per_sample
from lightning_ief.capture.types import CaptureError
from lightning_ief.linalg.vectors import norm, power_of_two

if TYPE_CHECKING:  # which calls what is here
    from lightning_ief.capture.linearization import Linearization

__all__ = ["require_announced", "verify_rows"]

# Relative error of a parameter's gradient that verification lets pass, by dtype: far above rounding (some models
# normalise in float32 whatever their dtype), far below rows given to the wrong samples, whose error is about 1.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}

# Multiples of the rounding that the backward pass itself is found to have which verification lets pass.
_ROUNDINGS = 30


def require_announced(linearization: "Linearization") -> None:
    """Refuse what is in the graph but announced no use: the rows of its parameters would silently be zero.

    Args:
        linearization: Model and batch.

    Raises:
        CaptureError: If there is something.

    """
    recorder = linearization.recorder
    used = set(
        chain.from_iterable(
            linearization.ancestors(s) for use in recorder.uses for s in use.plan.sources if s is not None
        )
    )
    names = {id(p): name for name, p in linearization.parameters.items()}
    for node in graph_nodes(linearization.output.grad_fn):
        if node.name() == "CheckpointFunctionBackward":
            raise CaptureError(
                f"{type(linearization.model).__name__} uses activation checkpointing with use_reentrant=True, which "
                "hides its operations until the backward pass: pass use_reentrant=False to checkpoint(), or "
                "gradient_checkpointing_kwargs={'use_reentrant': False} to a model of transformers."
            )
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None and name not in used:
            raise CaptureError(
                f"Parameter '{name}' gets a gradient, but announced no use: it was used through a custom autograd "
                "function, compiled code, or a reference that is not the parameter. Call it through torch functions, "
                "or freeze it with requires_grad_(False)."
            )


def verify_rows(linearization: "Linearization") -> set[str]:
    """Compare Jᵀw with autograd's gradient of Σ w_n l_n for random w, parameter by parameter.

    Random weights, since rows that are split wrongly among samples still have the right sum.

    Args:
        linearization: Model and batch, with its graph.

    Returns:
        The parameters for which that was a proof: gradients that vanish or are not finite say nothing, nor does a
        single sample.

    Raises:
        CaptureError: If they differ.

    """
    generator = torch.Generator().manual_seed(0)
    samples, logits = linearization.num_samples, linearization.logits
    w = torch.randn(samples, dtype=torch.float64, generator=generator).to(logits.device)
    names, parameters = list(linearization.parameters), list(linearization.parameters.values())
    weighted = linearization.logit_gradients * w.view(-1, *(1,) * (logits.ndim - 1))
    # For the range of fp16, the largest becomes about 1 before it is scaled.
    scale = power_of_two(weighted.abs().max())
    if linearization.loss_scale is not None:
        scale = scale / per_sample(linearization.loss_scale, samples)
    w, weighted = w / scale, (weighted / scale).to(logits.dtype)
    given: tuple[Tensor | None, ...] = torch.autograd.grad(
        linearization.output, parameters, weighted, retain_graph=True, allow_unused=True
    )
    unused = {name for name, t in zip(names, given, strict=True) if t is None}
    expected = {
        name: torch.zeros_like(p) if t is None else t for name, t, p in zip(names, given, parameters, strict=True)
    }
    captured = linearization.jacobian.rmatvec(w)
    largest = torch.stack([t.double().norm() for t in expected.values()]).max()
    overflown = linearization.in_fp16 and not torch.isfinite(norm(captured))
    if not torch.isfinite(largest) or overflown:
        return set()
    wrong: dict[str, Tensor] = {}
    proven = unused if samples > 1 else set()
    for name, truth in expected.items():
        tolerance = 0.1 if linearization.autocasts else _TOLERANCE.get(truth.dtype, 0.1)
        size = truth.double().norm()
        error = (captured[name].double() - truth.double()).norm()
        # Gradients that vanish identically (the bias of attention's keys) are rounding error: judge them by the rest.
        if not error <= tolerance * torch.maximum(size, tolerance * largest):
            wrong[name] = error
        elif samples > 1 and size > tolerance * largest:
            proven.add(name)
    # Backward passes of sharded models exchange with other ranks, which may have none to do.
    if wrong and not any(isinstance(module, FSDPModule) for module in linearization.model.modules()):
        rounding = _rounding(linearization, {name: expected[name] for name in wrong}, weighted, generator)
        wrong = {name: error for name, error in wrong.items() if not error <= _ROUNDINGS * rounding[name]}
    if wrong:
        described = [
            f"'{name}' (relative error {float(error / (expected[name].double().norm() + 1e-300)):.1e})"
            for name, error in wrong.items()
        ]
        raise CaptureError(
            f"The captured per-sample gradients do not add up to autograd's for {len(wrong)} of {len(names)} "
            f"parameters: {', '.join(described[:5])}{', …' if len(wrong) > 5 else ''}. Either "
            "samples of the batch influence each other (batch statistics, a loss across samples, the batch folded "
            "into another dimension out of order), or the capture is wrong. Make samples independent, freeze these "
            "parameters, or, if you know better, pass verify=False."
        )
    return proven


def _rounding(
    linearization: "Linearization", expected: Mapping[str, Tensor], cotangent: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """How much of autograd's own gradients is rounding: saturated models lose most digits on the way back.

    A backward pass is linear, however samples are mixed: what two parts of a cotangent give differs from what the whole
    gives by rounding alone. Of half a cotangent, not even that differs, unless a hook or a custom backward pass is no
    linear function; then nothing counts as rounding.

    Args:
        linearization: Model and batch, with its graph.
        expected: Gradients for the cotangent, by name.
        cotangent: Of the logits.
        generator: Source of randomness.

    Returns:
        Norm of the difference, by name.

    """

    def gradients(of: Tensor) -> tuple[Tensor, ...]:
        parameters = [linearization.parameters[name] for name in expected]
        return torch.autograd.grad(linearization.output, parameters, of, retain_graph=True, materialize_grads=True)

    share = torch.rand(len(cotangent), dtype=torch.float64, generator=generator).to(cotangent)
    part = cotangent * share.view(-1, *(1,) * (cotangent.ndim - 1))
    found = zip(expected.items(), gradients(part), gradients(cotangent - part), gradients(cotangent / 2), strict=True)
    rounding = {}
    for (name, whole), first, second, half in found:
        difference = (whole - first - second).double().norm()
        linear = (whole - 2 * half).double().norm() <= 0.1 * difference
        rounding[name] = torch.where(linear, difference, 0.0)
    return rounding
