"""Checkpoints of what was trained alone: a few megabytes instead of the whole backbone."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_ief.tasks.hub import MissingError

__all__ = ["TrainableCheckpointMixin", "export_adapter", "trained_weights"]

_KEY = "frozen_parameters"
_STATES = ("state_dict", "current_model_state")  # the second one beside averages, of Lightning's WeightAveraging


class TrainableCheckpointMixin:
    """Keeps frozen parameters out of a LightningModule's checkpoints; stands before LightningModule among the bases.

    They are read from where they came from when the module is made anew. A checkpoint remembers their number and hash,
    so that it is not loaded onto another backbone by mistake.

    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Lightning's flag: what is frozen is missing in checkpoints. `load_state_dict` checks the rest.
        cast(Any, self).strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: leave out frozen parameters.

        Args:
            checkpoint: What is to be saved; changed in place.

        """
        cast(Any, super()).on_save_checkpoint(checkpoint)
        frozen = self._frozen()
        for state in (state for state in _STATES if state in checkpoint):
            checkpoint[state] = {name: value for name, value in checkpoint[state].items() if name not in frozen}
        checkpoint[_KEY] = _fingerprint(frozen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: compare frozen parameters with those that were trained with.

        Args:
            checkpoint: What is to be loaded.

        Raises:
            MisconfigurationException: If they are others.

        """
        cast(Any, super()).on_load_checkpoint(checkpoint)
        saved, here = checkpoint.get(_KEY), _fingerprint(self._frozen())
        if saved is None:  # of a module that saves everything
            return
        if saved != here:
            raise MisconfigurationException(
                f"The checkpoint was trained on another backbone: {saved['count']:,} frozen parameters of hash "
                f"{saved['sha256'][:8]}, here {here['count']:,} of hash {here['sha256'][:8]}. Make the module with the "
                "weights that it was trained with, and in the same precision."
            )
        if _STATES[1] in checkpoint:  # the callback looks for everything
            frozen = {name: parameter.detach() for name, parameter in self._frozen().items()}
            for state in _STATES:
                checkpoint[state] = {**frozen, **checkpoint[state]}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what was trained; frozen parameters may be missing, nothing else may.

        Args:
            state_dict: Tensors by name.
            strict: Whether frozen parameters must be there, too.
            assign: For `torch.nn.Module.load_state_dict`.

        Returns:
            Names of missing and unexpected tensors.

        Raises:
            RuntimeError: If a trained parameter is missing, or a name is unknown.

        """
        found = cast(Any, super()).load_state_dict(state_dict, strict=strict, assign=assign)
        missing = [key for key in found.missing_keys if key not in self._frozen()]
        if missing or found.unexpected_keys:
            raise RuntimeError(
                f"{type(self).__name__}: the checkpoint does not fit what is trained here: missing {missing}, unknown "
                f"{found.unexpected_keys}."
            )
        return found

    def _frozen(self) -> dict[str, nn.Parameter]:
        named = cast(nn.Module, self).named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in named if not parameter.requires_grad}


def export_adapter(module: nn.Module, folder: str | Path) -> Path:
    """Write the adapter of a module as PEFT does, for `peft.PeftModel.from_pretrained(backbone, folder)`.

    Args:
        module: Holds a model of PEFT somewhere.
        folder: Where; made if it does not exist.

    Returns:
        The folder.

    Raises:
        ValueError: If there is no adapter in it.

    """
    adapted = next(
        (part for part in module.modules() if hasattr(part, "peft_config") and hasattr(part, "save_pretrained")), None
    )
    if adapted is None:
        raise ValueError(f"{type(module).__name__} holds no model of PEFT, so that there is no adapter to export.")
    cast(Any, adapted).save_pretrained(str(folder))
    return Path(folder)


def trained_weights(file: Path) -> dict[str, Tensor]:
    """Read the weights of `net` from the checkpoint of a module that trained it in full.

    Args:
        file: The checkpoint.

    Returns:
        Its `state_dict`.

    Raises:
        MissingError: If there is no such file.

    """
    if not file.expanduser().is_file():
        raise MissingError(f"checkpoint_path={file}: there is no such file.")
    state = torch.load(file.expanduser(), map_location="cpu", weights_only=True)["state_dict"]
    return {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}


def _fingerprint(parameters: dict[str, nn.Parameter]) -> dict[str, Any]:
    distinct = {id(parameter): parameter for parameter in parameters.values()}.values()
    # A norm would be the same within 1e-4 for any random weights, and for a backbone and a slightly finetuned one.
    digest = hashlib.sha256()
    for parameter in distinct:
        digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"count": sum(p.numel() for p in distinct), "sha256": digest.hexdigest()}
