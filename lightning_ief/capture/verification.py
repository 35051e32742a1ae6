"""Verification: nothing escaped the capture, and rows belong to the samples they are said to."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ief.capture.jacobian import Jacobian
from lightning_ief.capture.types import CaptureError
from lightning_ief.linalg.scaling import normalised, times
from lightning_ief.linalg.vectors import norm

__all__ = ["require_announced", "require_own_graph", "verify_rows"]

# Relative error of a parameter's gradient that verification lets pass, by dtype: far above rounding (some models
# normalise in float32 whatever their dtype), far below rows given to the wrong samples, whose error is about 1.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}

# The same where half precision takes part.
_HALF_TOLERANCE = 0.1

# Multiples of the rounding that the backward pass itself is found to have which verification lets pass; fewer in half
# precision, where it is large.
_ROUNDINGS, _HALF_ROUNDINGS = 30, 10


def require_own_graph(model: str, kinds: Iterable[type]) -> None:
    """Refuse what hides its operations from the graph, and can't be asked for the gradients of some tensors.

    Args:
        model: Name of the model's class.
        kinds: The classes of the graph's nodes.

    Raises:
        CaptureError: If there is such.

    """
    if any(kind.__name__ == "CheckpointFunctionBackward" for kind in kinds):
        raise CaptureError(
            f"{model} uses activation checkpointing with use_reentrant=True, which hides its operations until the "
            "backward pass: pass use_reentrant=False to checkpoint(), or "
            "gradient_checkpointing_kwargs={'use_reentrant': False} to a model of transformers."
        )


def require_announced(escaping: Iterable[str], used: Iterable[str], where: str = "") -> None:
    """Refuse what is in the graph but announced no use: without backward passes of its own, rows would miss it.

    Args:
        escaping: Parameters with an edge into the graph that belongs to no recorded operation.
        used: Parameters that announced a use.
        where: Why backward passes of its own are no way here; a sentence, or nothing.

    Raises:
        CaptureError: If there is something.

    """
    for name in escaping:
        use = (
            "was used once more without announcing that use"
            if name in used
            else "gets a gradient, but announced no use"
        )
        raise CaptureError(
            f"Parameter '{name}' {use}: through a custom autograd function, compiled code, or a reference that is not "
            f"the parameter. {where}Call it through torch functions, or freeze it with requires_grad_(False)."
        )


def verify_rows(
    output: Tensor,
    jacobian: Jacobian,
    parameters: Mapping[str, Tensor],
    logit_gradients: Tensor,
    *,
    half: bool,
    in_fp16: bool,
    factor: Tensor | None,
    strict: bool,
    kept: Sequence[int] | None = None,
) -> set[str]:
    """Compare Jᵀw with autograd's gradient of Σ w_n l_n for random w, parameter by parameter.

    Random weights, since rows that are split wrongly among samples still have the right sum.

    Args:
        output: The logits, with their graph.
        jacobian: J.
        parameters: The parameters, by name.
        logit_gradients: ∂l_n/∂z_n.
        half: Whether autocast to half precision takes part.
        in_fp16: Whether something is computed in fp16.
        factor: What backward passes are to be scaled by for the range of fp16.
        strict: Whether one backward pass must do: no others, which would tell rounding from a wrong capture.
        kept: Where the logits are those of another batch, the samples that stand in it as in that of J, in the same
            places; all of them if None.

    Returns:
        The parameters for which that was a proof: gradients that vanish or are not finite say nothing, nor does a
        single sample.

    Raises:
        CaptureError: If they differ.

    """
    generator = torch.Generator().manual_seed(0)
    samples = len(logit_gradients)
    w = torch.randn(samples, dtype=torch.float64, generator=generator).to(output.device)
    if kept is not None:
        w = torch.zeros_like(w).index_copy(0, index := torch.tensor(kept, device=w.device), w[kept])
    # Largest entries of w_n ∂l_n/∂z_n: the power of two that they ask for is one of the weights, not of a copy.
    largest = torch.linalg.vector_norm(logit_gradients.reshape(samples, -1), ord=float("inf"), dim=1)
    w = w / normalised(largest.double() * w, 0, factor)[1]
    weighted = times(logit_gradients, w, output.dtype)
    if kept is not None:
        weighted = torch.zeros_like(output).index_copy(0, index, weighted[kept])
    given = _gradients(output, parameters, weighted, allow_unused=True)
    unused = {name for name, t in given.items() if t is None}
    expected = {name: torch.zeros_like(parameters[name]) if t is None else t for name, t in given.items()}
    captured = jacobian.rmatvec(w)
    largest = torch.stack([t.double().norm() for t in expected.values()]).max()
    overflown = in_fp16 and not torch.isfinite(norm(captured))
    if not torch.isfinite(largest) or overflown:
        return set()
    wrong: dict[str, Tensor] = {}
    proven = unused if samples > 1 else set()
    for name, truth in expected.items():
        tolerance = _HALF_TOLERANCE if half else _TOLERANCE.get(truth.dtype, _HALF_TOLERANCE)
        size = truth.double().norm()
        error = (captured[name].double() - truth.double()).norm()
        # Gradients that vanish identically (the bias of attention's keys) are rounding error: judge them by the rest.
        # In half precision that would excuse too much, so that their own rounding is measured below.
        vanishing = (tolerance if strict or tolerance < _HALF_TOLERANCE else tolerance**3) * largest
        if not error <= tolerance * torch.maximum(size, vanishing):
            wrong[name] = error
        elif samples > 1 and size > vanishing:
            proven.add(name)
    if wrong and not strict:
        rounding = _rounding(output, parameters, {name: expected[name] for name in wrong}, weighted, generator)
        multiple = _HALF_ROUNDINGS if half else _ROUNDINGS
        wrong = {name: error for name, error in wrong.items() if not error <= multiple * rounding[name]}
    if wrong:
        described = [
            f"'{name}' (relative error {float(error / (expected[name].double().norm() + 1e-300)):.1e})"
            for name, error in wrong.items()
        ]
        raise CaptureError(
            f"The captured per-sample gradients do not add up to autograd's for {len(wrong)} of {len(parameters)} "
            f"parameters: {', '.join(described[:5])}{', …' if len(wrong) > 5 else ''}. Either "
            "samples of the batch influence each other (batch statistics, a loss across samples, the batch folded "
            "into another dimension out of order), or the capture is wrong. Make samples independent, freeze these "
            "parameters, or, if you know better, pass verify=False."
        )
    return proven


def _gradients(output: Tensor, parameters: Mapping[str, Tensor], cotangent: Tensor, **options: Any) -> dict[str, Any]:
    found = torch.autograd.grad(output, list(parameters.values()), cotangent, retain_graph=True, **options)
    return dict(zip(parameters, found, strict=True))


def _rounding(
    output: Tensor,
    parameters: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    cotangent: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """How much of autograd's own gradients is rounding: saturated models lose most digits on the way back.

    A backward pass is linear, however samples are mixed: what two parts of a cotangent give differs from what the whole
    gives by rounding alone. Of half a cotangent, not even that differs, unless a hook or a custom backward pass is no
    linear function; then nothing counts as rounding.

    Args:
        output: The logits, with their graph.
        parameters: The parameters, by name.
        expected: Gradients for the cotangent, of some of the parameters.
        cotangent: Of the logits.
        generator: Source of randomness.

    Returns:
        Norm of the difference, by name.

    """
    asked = {name: parameters[name] for name in expected}
    share = torch.rand(len(cotangent), dtype=torch.float64, generator=generator).to(cotangent)
    part = cotangent * share.view(-1, *(1,) * (cotangent.ndim - 1))
    first, second, half = (
        _gradients(output, asked, each, materialize_grads=True) for each in (part, cotangent - part, cotangent / 2)
    )
    rounding = {}
    for name, whole in expected.items():
        difference = (whole - first[name] - second[name]).double().norm()
        linear = (whole - 2 * half[name]).double().norm() <= 0.1 * difference
        rounding[name] = torch.where(linear, difference, 0.0)
    return rounding
