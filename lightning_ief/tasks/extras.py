"""Packages that are installed by an extra of this one, imported where they are needed."""

from importlib import import_module
from typing import Any

__all__ = ["import_extra"]


def import_extra(module: str, extra: str, need: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: Its name.
        extra: The extra of this package that installs it.
        need: What needs it; for the error.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: If it can't be imported.

    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(f"{need}: pip install 'lightning-ief[{extra}]'.", name=module) from error
