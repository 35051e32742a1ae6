"""Models and data of the Hugging Face hub: from a folder, the cache or the network, and at once an error if from none.

The hub's own libraries try again for half a minute and more where there is no network.
"""

from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    import datasets

__all__ = ["MissingError", "load", "load_dataset"]

T = TypeVar("T")


class MissingError(MisconfigurationException, FileNotFoundError):
    """A model or data are not there; the command shows the message alone, as of any misconfiguration."""


# Seconds in which the hub must answer.
_PATIENCE = 1.5


def load(loader: Callable[..., T], name: str, *arguments: Any, option: str, repository: str = "", **options: Any) -> T:
    """Call a function of Hugging Face that takes a folder or the id of a model on the hub, and `local_files_only`.

    Args:
        loader: The function, such as `AutoTokenizer.from_pretrained`.
        name: Folder or id.
        *arguments: Further arguments of the function.
        option: What the user gave the name as; for the error.
        repository: Further options of `hf download`; for the error.
        **options: Options of the function.

    Returns:
        What the function returns.

    Raises:
        MissingError: If it is neither a folder, nor in the cache, nor to be had from the hub.

    """
    why = None if Path(name).is_dir() else _why_not_asked(name, option)
    if why is None:
        return loader(name, *arguments, **options)
    try:
        return loader(name, *arguments, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        raise MissingError(_remedy(name, option, why, repository)) from error


def load_dataset(name: str, config: str, *, option: str) -> "datasets.DatasetDict":
    """Load a configuration of a data set of the hub, from there or from the cache of `datasets`.

    Args:
        name: Its id.
        config: Name of the configuration.
        option: What the user gave the name as; for the error.

    Returns:
        Its splits.

    Raises:
        MissingError: If it is neither in the cache nor to be had from the hub.

    """
    import datasets

    def splits(name: str, local_files_only: bool = False) -> "datasets.DatasetDict":
        if not local_files_only:
            return datasets.load_dataset(name, config)
        # What load_dataset itself turns to, but only after half a minute: it takes no local_files_only, and does not
        # look at that of its DownloadConfig (datasets 5.2).
        from datasets.packaged_modules.cache.cache import Cache

        own_name = name.rpartition("/")[2]
        cached = Cache(repo_id=name, dataset_name=own_name, config_name=config, version="auto", hash="auto")
        cached.download_and_prepare()
        return cached.as_dataset()

    return load(splits, name, option=option, repository=" --repo-type dataset")


def _why_not_asked(name: str, option: str) -> str | None:
    """Why the hub is not asked for this id; None if it is to be asked."""
    from huggingface_hub import constants

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingError(f"{option}={name}: there is no such folder.")
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return None if _answers(constants.ENDPOINT) else f"{constants.ENDPOINT} does not answer"


def _remedy(name: str, option: str, why: str, repository: str) -> str:
    """What to do about a name that is not in the cache, with further options of `hf download`."""
    from huggingface_hub import constants

    folder = name.rpartition("/")[2]
    return (
        f"{option}={name} is not in the cache of Hugging Face ({constants.HF_HOME}), and {why}. Where there is a "
        f"network run `hf download {name}{repository} --local-dir {folder}`, bring the folder here and name it: "
        f"{option}=PATH/TO/{folder}."
    )


def _answers(url: str) -> bool:
    """Whether there is an answer, of whatever kind, in time."""
    answers: Queue[bool] = Queue()

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=_PATIENCE).close()
        except OSError as error:
            answers.put(isinstance(error, HTTPError))
        else:
            answers.put(True)

    # In a thread, since neither looking up the name nor trying one address after the other heeds the timeout.
    Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=_PATIENCE)
    except Empty:
        return False
