"""Folders of runs: the files in them, and names to tell them apart."""

import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["existing", "experiment", "metrics_of", "named"]


def metrics_of(run: Path) -> Path:
    """The metrics.csv of a run.

    Args:
        run: Its folder, or that file.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If it is not there.

    """
    hint = " A run is a folder in which Lightning's CSVLogger wrote metrics.csv."
    return existing(run / "metrics.csv" if run.is_dir() else run, hint)


def existing(path: Path, hint: str = "") -> Path:
    """Require that a file is there.

    Args:
        path: The file.
        hint: What the error says besides.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If it is not there.

    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}.{hint}")
    return path


def named(runs: Sequence[Path]) -> dict[str, Path]:
    """Names of runs: the last two parts of their folders, or as many as it takes to tell them apart.

    Args:
        runs: Their folders, or their metrics.csv.

    Returns:
        The runs by name, such as quickstart/version_0; one that is given twice once.

    """
    folders = {(run if run.is_dir() else run.parent).resolve(): run for run in runs}
    count = 2
    while len(names := {"/".join(folder.parts[-count:]): run for folder, run in folders.items()}) < len(folders):
        count += 1
    return names


def experiment(name: str) -> str:
    """What a run is a repetition of: its name without version and seed, ief/lr_0.1 for ief/lr_0.1_seed_0."""
    return re.sub(r"(/version_\d+|_seed_-?\d+)$", "", name)
