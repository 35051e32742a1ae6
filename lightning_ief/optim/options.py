"""Options that an optimizer has not: refused by name, with what is here instead."""

from collections.abc import Iterable
from difflib import get_close_matches
from inspect import Parameter, signature

from torch.optim import Optimizer

__all__ = ["require_known", "require_known_in_group"]

_IMPLEMENTATION = "It chooses among implementations of torch: remove it."
_MOMENTUM = "There is 'momentum', of two kinds: 'momentum_type'."

_ELSEWHERE = {
    "betas": "'momentum' stands for the first of them, nothing for the second: curvature is that of the batch.",
    "beta1": _MOMENTUM,
    "nesterov": _MOMENTUM,
    "eps": "'damping' or 'relative_damping' say how much curvature may do; a division by zero there is not.",
    "amsgrad": "It belongs to Adam's second moments: remove it.",
    "maximize": "Losses are minimized: change the sign of the objective.",
    "clip_grad_norm": "'max_norm' bounds the length of a step.",
    **dict.fromkeys(("fused", "foreach", "capturable", "differentiable"), _IMPLEMENTATION),
}
"""Options of other optimizers, and what is here instead."""


def require_known(optimizer: type[Optimizer], given: Iterable[str]) -> None:
    """Refuse options that neither an optimizer nor one of its bases names in `__init__`.

    Args:
        optimizer: Its class.
        given: Names of options.

    Raises:
        TypeError: If there is no such option; the message names what is meant, what is here instead, or all there are.

    """
    for option in sorted({*given} - _options_of(optimizer)):
        raise TypeError(_no_such(optimizer, option))


def require_known_in_group(optimizer: type[Optimizer], keys: Iterable[str], shared: Iterable[str]) -> None:
    """Refuse keys of a parameter group that would do nothing; those of other names belong to whoever gave them.

    Args:
        optimizer: Class of the optimizer.
        keys: Of the group.
        shared: Options that groups have.

    Raises:
        TypeError: If a key is misspelt, an option of another optimizer, or one of the optimizer as a whole.

    """
    for key in sorted({*keys} - {*shared, "params", "param_names"}):
        if key in _options_of(optimizer):
            raise TypeError(
                f"{optimizer.__name__}: '{key}' in a parameter group: it holds for all of them, give it to the "
                "optimizer."
            )
        if key in _ELSEWHERE or _meant(optimizer, key):
            raise TypeError(f"In a parameter group: {_no_such(optimizer, key)}")


def _options_of(optimizer: type[Optimizer]) -> set[str]:
    """What an optimizer can be made with: the arguments that it and its bases name, but torch's own."""
    made_by = [vars(cls)["__init__"] for cls in optimizer.__mro__ if "__init__" in vars(cls) and cls is not object]
    named = [each for method in made_by for each in signature(method).parameters.values()]
    collecting = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return {each.name for each in named if each.kind not in collecting} - {"self", "defaults"}


def _meant(optimizer: type[Optimizer], option: str) -> list[str]:
    return get_close_matches(option, sorted(_options_of(optimizer)), 1, 0.85)


def _no_such(optimizer: type[Optimizer], option: str) -> str:
    if option in _ELSEWHERE:
        remedy = _ELSEWHERE[option]
    elif close := _meant(optimizer, option):
        remedy = f"'{close[0]}' may be meant."
    else:
        remedy = f"There are: {', '.join(sorted(_options_of(optimizer) - {'params'}))}."
    return f"{optimizer.__name__}({option}=...): there is no such option. {remedy}"
