"""Losses of torch.nn as objectives, or the line to write instead."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_ief.objectives.base import Objective
from lightning_ief.objectives.elementwise import BinaryCrossEntropy, Huber, LeastSquares, Poisson
from lightning_ief.objectives.softmax import CrossEntropy

__all__ = ["as_objective"]

# What takes the place of a loss, and what the loss is when it is summed, if that is something else.
_TAKEN: dict[type[nn.Module], tuple[Callable[[Any], Objective], str]] = {
    nn.CrossEntropyLoss: (lambda x: CrossEntropy(x.weight, x.label_smoothing, x.ignore_index), ""),
    nn.BCEWithLogitsLoss: (lambda x: BinaryCrossEntropy(x.weight, x.pos_weight), ""),
    nn.MSELoss: (lambda _: LeastSquares(), "twice that"),
    nn.HuberLoss: (lambda x: Huber(x.delta), ""),
    nn.SmoothL1Loss: (lambda x: Huber(x.beta), "that over beta"),
    nn.PoissonNLLLoss: (lambda _: Poisson(), ""),
}

_INSTEAD: dict[type[nn.Module], str] = {
    nn.NLLLoss: "objectives.CrossEntropy(), and have forward return logits, without log_softmax",
    nn.BCELoss: "objectives.BinaryCrossEntropy(), and have forward return logits, without sigmoid",
    nn.L1Loss: "objectives.Huber(delta=...) with a small delta, which has a Fisher matrix where L1Loss has a corner",
    nn.GaussianNLLLoss: "objectives.Gaussian(), and have forward return means and logarithms of variances, "
    "torch.cat([mean, log_variance], dim=-1)",
    nn.KLDivLoss: "objectives.CrossEntropy(), with probabilities as targets and logits from forward",
    nn.MultiLabelSoftMarginLoss: "objectives.BinaryCrossEntropy()",
    nn.SoftMarginLoss: "objectives.BinaryCrossEntropy(), with targets 0 and 1 in the place of −1 and 1",
}

_OWN = (
    "a subclass of objectives.Objective with one method, losses(logits, targets), which returns the loss of each "
    "sample, [N]"
)


def as_objective(given: Any) -> Objective:
    """Take an objective, or a loss of torch.nn with its settings, for an objective.

    The reduction is not taken over: l_n is the sum over everything that sample n holds, and L = Σ l_n, with nothing
    divided by a number of samples, of positions or by a sum of class weights. A warning says so, unless it was "sum".

    Args:
        given: An objective; or CrossEntropyLoss, BCEWithLogitsLoss, MSELoss, HuberLoss, SmoothL1Loss or PoissonNLLLoss
            (log_input=True) of torch.nn.

    Returns:
        The objective.

    Raises:
        TypeError: If it is something else; names what to write.

    Warns:
        UserWarning: If the loss would have been scaled otherwise.

    Example:
        >>> as_objective(nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")).label_smoothing
        0.1

    """
    if isinstance(given, Objective):
        return given
    kind = type(given)
    if given is None:
        raise TypeError(
            "There is no objective. Write self.objective = objectives.CrossEntropy() in __init__, or another."
        )
    if isinstance(given, type):
        raise TypeError(f"The objective is the class {given.__name__}. Write {given.__name__}(), with parentheses.")
    if kind in _TAKEN and not (kind is nn.PoissonNLLLoss and not given.log_input):
        make, factor = _TAKEN[kind]
        objective = make(given)
        if factor or given.reduction != "sum":
            name, factor = type(objective).__name__, f" (the loss of torch is {factor})" if factor else ""
            warnings.warn(
                f"torch.nn.{kind.__name__} is taken as objectives.{name}: the loss of a sample is the sum over all "
                f"that it holds{factor}, L the sum over samples, whatever its reduction={given.reduction!r} says. "
                f"Write objectives.{name}(...) to say that yourself.",
                UserWarning,
                stacklevel=3,
            )
        return objective
    if kind is nn.PoissonNLLLoss:
        line = "objectives.Poisson(), and have forward return the logarithm of the rate"
    else:
        line = _INSTEAD.get(kind, _OWN)
    raise TypeError(
        f"The objective is {_described(given)}, which gives no loss of each sample in logit space. Write {line}."
    )


def _described(given: Any) -> str:
    name = getattr(given, "__name__", None)
    if callable(given) and isinstance(name, str):
        return f"the function {name}"
    return f"a {type(given).__name__}"
