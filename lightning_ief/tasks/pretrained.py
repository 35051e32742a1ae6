"""Models of transformers: from pretrained weights, adapted by PEFT."""

import copy
from typing import TYPE_CHECKING, Any

import torch

from lightning_ief.tasks.extras import import_extra
from lightning_ief.tasks.hub import load

if TYPE_CHECKING:  # extras that take seconds to import
    from peft import PeftConfig
    from transformers import PreTrainedModel

__all__ = ["adapted", "pretrained", "require_one"]


def require_one(name: str, model_name_or_path: str | None, config: dict[str, Any] | None) -> None:
    """Require that weights come from one place.

    Args:
        name: Who asks.
        model_name_or_path: Of pretrained weights.
        config: Of random ones.

    Raises:
        ValueError: If both are given, or none.

    """
    if (model_name_or_path is None) == (config is None):
        raise ValueError(
            f"{name}(model_name_or_path={model_name_or_path!r}, config={config!r}): give one of them, the first for "
            "pretrained weights, the second for random ones."
        )


def pretrained(auto: Any, name: str, model_name_or_path: str, **options: Any) -> "PreTrainedModel":
    """Load pretrained weights in float32.

    Args:
        auto: A class of transformers with `from_pretrained`.
        name: Who asks; for errors.
        model_name_or_path: Id on the hub, or a folder.
        **options: For `from_pretrained`.

    Returns:
        The model.

    Raises:
        MissingError: If the weights are not to be had.

    """  # noqa: DOC502  # raised by load

    def from_pretrained(name: str, local_files_only: bool = False, **options: Any) -> "PreTrainedModel":
        # The search for an adapter beside the model has to be told too (transformers 5.23).
        own = {"adapter_kwargs": {"local_files_only": True}} if local_files_only else {}
        return auto.from_pretrained(name, local_files_only=local_files_only, **own, **options)

    return load(
        from_pretrained,
        model_name_or_path,
        option=f"{name}.model_name_or_path",
        dtype=torch.float32,  # not whatever the file has
        **options,
    )


def adapted(net: "PreTrainedModel", adapter: "PeftConfig", task_type: str) -> Any:
    """Put an adapter into a model, whose other weights are frozen.

    Args:
        net: The model.
        adapter: What PEFT is to make; left as it is.
        task_type: What PEFT calls the model's task.

    Returns:
        A `peft.PeftModel`.

    """
    peft = import_extra("peft", "text", "Adapters need peft")
    adapter = copy.copy(adapter)
    adapter.task_type = task_type
    return peft.get_peft_model(net, adapter)
