"""Models and data of the Hugging Face hub: from a folder, the cache or the network, and at once an error if from none.

The hub's own libraries try again for half a minute and more where there is no network.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, TypeVar
from unittest import mock
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["MissingError", "load"]

T = TypeVar("T")


class MissingError(MisconfigurationException, FileNotFoundError):
    """A model or data are not there; the command shows the message alone, as of any misconfiguration."""


# Seconds in which the hub must answer.
_PATIENCE = 1.5


def load(loader: Callable[..., T], name: str, *arguments: Any, option: str, kind: str = "model", **options: Any) -> T:
    """Call a function of Hugging Face that takes a folder or the id of something on the hub.

    Args:
        loader: The function, such as `AutoTokenizer.from_pretrained`.
        name: Folder or id.
        *arguments: Further arguments of the function.
        option: What the user gave the name as; for the error.
        kind: 'model' or 'dataset'.
        **options: Options of the function.

    Returns:
        What the function returns.

    Raises:
        MissingError: If it is neither a folder, nor in the cache, nor to be had from the hub.

    """
    from huggingface_hub import constants

    if Path(name).is_dir():
        return loader(name, *arguments, **options)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingError(f"{option}={name}: there is no such folder.")
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
    if not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT):
        return loader(name, *arguments, **options)
    with _offline():  # the cache may have it
        try:
            return loader(name, *arguments, **options)
        except (OSError, ValueError) as error:
            of = " --repo-type dataset" if kind == "dataset" else ""
            folder = name.rpartition("/")[2]
            raise MissingError(
                f"{option}={name} is not in the cache of Hugging Face ({constants.HF_HOME}), and {why}. Where there is "
                f"a network run `hf download {name}{of} --local-dir {folder}`, bring the folder here and name it: "
                f"{option}=PATH/TO/{folder}."
            ) from error


def _answers(url: str) -> bool:
    """Whether there is an answer, of whatever kind, in time."""
    answers: Queue[bool] = Queue()

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=_PATIENCE).close()
        except HTTPError:
            answers.put(True)
        except OSError:
            answers.put(False)
        else:
            answers.put(True)

    # In a thread, since neither looking up the name nor trying one address after the other heeds the timeout.
    Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=_PATIENCE)
    except Empty:
        return False


@contextmanager
def _offline() -> Iterator[None]:
    """As if HF_HUB_OFFLINE had been set before the libraries were imported."""
    from huggingface_hub import constants

    with ExitStack() as stack:
        for module in (constants, sys.modules.get("datasets.config")):
            if module is not None:
                stack.enter_context(mock.patch.object(module, "HF_HUB_OFFLINE", True))
        yield
