"""What is said of a model that can't be linearised as it stands, and which line to write."""

from collections.abc import Mapping, Sequence
from inspect import signature
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "described",
    "flattened",
    "mixes_samples",
    "mixing_layers",
    "no_logits",
    "not_by_samples",
    "not_shifted",
    "wrong_arguments",
]


def mixes_samples(what: str) -> str:
    """The message for batch normalisation in training.

    Args:
        what: The operation or module in words.

    Returns:
        The message.

    """
    return (
        f"{what} normalises with the statistics of the batch, so that no sample has a gradient of its own. "
        "Put it into eval() (fixed statistics), or replace it: torch.nn.GroupNorm, torch.nn.LayerNorm."
    )


def mixing_layers(model: nn.Module, names: Sequence[str]) -> str:
    """The same for layers of a model, and the line that puts all of them into eval().

    Args:
        model: The model.
        names: Names of its layers, one at least.

    Returns:
        The message.

    """
    first, *more = names
    what = f"{type(model.get_submodule(first)).__name__} '{first}' of {type(model).__name__}"
    if more:
        what += f" (and {len(more)} more: {', '.join(map(repr, more[:3]))}{' …' if more[3:] else ''})"
    shared = commonprefix([name.split(".")[:-1] for name in names])  # of lists, too
    places = [".".join(shared)] if shared else names[:3]
    lines = "; ".join(f"self.{place}.eval()" for place in places)
    return f"{mixes_samples(what)} In Lightning write {lines} in __init__, which Trainer.fit leaves so."


def described(batch: Any) -> str:
    """What a batch is, in words: its class, with its keys or its length."""
    keys = f" with keys {[*batch]}" if isinstance(batch, Mapping) else ""
    length = f" of {len(batch)}" if isinstance(batch, (list, tuple)) else ""
    return f"{type(batch).__name__}{keys}{length}"


def no_logits(output: Any) -> str:
    """The message for a model that returns something else than logits."""
    found = type(output).__name__
    if isinstance(output, Mapping):
        found += f" with keys {[*output]}"
    elif isinstance(output, (tuple, list)):
        found += f" of {[type(x).__name__ for x in output]}"
    elif hasattr(output, "logits"):
        found += f" with .logits of {output.logits!r}"
    return (
        f"The model returned {found}; expected the logits as a tensor, a dict with 'logits', or an object with "
        ".logits: return the logits alone from forward."
    )


def not_by_samples(logits: Tensor, samples: int) -> str:
    """The message for logits whose dimension 0 is not that of the samples."""
    found = (
        f"Logits of shape {tuple(logits.shape)} for {samples} targets: dimension 0 of the logits must be the samples."
    )
    if logits.ndim == 2 and samples and len(logits) % samples == 0:
        positions, classes = len(logits) // samples, logits.shape[1]
        found += (
            f" If these are {positions} positions of each sample, return logits.reshape(-1, {positions}, {classes}) "
            "from forward, and targets [N, T] from unpack_batch: a sample's loss is the sum over its positions."
        )
    return found


def flattened(inputs: Sequence[Tensor], samples: int) -> str | None:
    """The message for targets of all positions as if they were samples; None if the inputs have as many samples."""
    sizes = {len(x) for x in inputs if x.ndim}
    if len(sizes) != 1 or any(samples in x.shape for x in inputs):
        return None
    size = sizes.pop()
    if not 1 < size < samples or samples % size:
        return None
    return (
        f"Targets of {samples} samples for inputs of {size}: where a sample has {samples // size} positions, leave "
        f"them together, logits [{size}, {samples // size}, C] and targets [{size}, {samples // size}], instead of "
        "flattening both. A sample's loss is the sum over its positions."
    )


def not_shifted(inputs: Sequence[Tensor], targets: Tensor, ignored: int = -100) -> str | None:
    """The message for targets that are the tokens of the inputs, where they stand; None if they are not.

    Args:
        inputs: What the model takes.
        targets: y.
        ignored: What marks positions that count for nothing.

    Returns:
        The message.

    """
    if targets.ndim != 2 or targets.dtype != torch.int64 or targets.shape[1] == 1:  # noqa: PLR2004
        return None
    counted = targets != ignored
    tokens = [x for x in inputs if x.shape == targets.shape and not x.is_floating_point()]
    # What is the same in all places, such as a mask of ones, is equal to its shift, too.
    varies = bool(counted.any()) and bool((targets[counted] != targets[counted][0]).any())
    if not varies or not any(bool((x == targets)[counted].all()) for x in tokens):
        return None
    return (
        "The targets are the input's own tokens, each in its own place (where they are not "
        f"{ignored}): a causal language model would learn to copy its input. Labels as transformers takes them are "
        "shifted within its own loss; targets have to be shifted before. Write in unpack_batch: return inputs, "
        "lightning_ief.tasks.next_token_targets(labels, attention_mask). If the targets are shifted already and are an "
        "argument of the model, too, as a decoder's input, shift that argument. Where copying is the task, all is well."
    )


def wrong_arguments(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The message for a model that does not take the arguments it is called with; None if it does."""
    takes = signature(model.forward)
    try:
        takes.bind(*args, **kwargs)
    except TypeError as problem:
        return (
            f"{type(model).__name__}.forward{takes}: {problem}, called with {len(args)} positional and the keyword "
            f"arguments {[*kwargs]}. Several inputs are a tuple, or a dict by name; in Lightning, unpack_batch(batch) "
            "returns ((first, second), targets)."
        )
    return None
