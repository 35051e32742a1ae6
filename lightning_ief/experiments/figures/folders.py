"""Folders of runs: the files in them, names to tell them apart, and which goes on where another one ended."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from lightning_ief.experiments.tables import Series, read_metrics

__all__ = ["existing", "experiment", "metrics_of", "named", "read_runs"]

_JOINED = " + "


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
    return re.sub(r"(/version_\d+|_seed_-?\d+)$", "", name.partition(_JOINED)[0])


def read_runs(runs: Mapping[str, Path]) -> dict[str, dict[str, Series]]:
    """What runs logged; those that were resumed as one with the run they went on from, if that is there, too.

    A run was resumed from another one if its config.yaml names a checkpoint in that one's folder. Where no config.yaml
    says anything, as of runs in Python, it is one whose first epoch is not 0, and there must be exactly one run of
    the same experiment that it can go on from.

    Args:
        runs: Their folders, or their metrics.csv, by name.

    Returns:
        Steps and values by column, for each run; a/version_0 + version_1 for two that are one.

    """
    alone = {name: read_metrics(metrics_of(run)) for name, run in runs.items()}
    before = {name: earlier for name in runs if (earlier := _earlier(name, runs, alone))}
    read = {}
    for last in runs:
        parts = [last]
        while (earlier := before.get(parts[0])) and earlier not in parts:
            parts.insert(0, earlier)
        if last in before.values():
            continue  # a part of another one
        name = _JOINED.join([parts[0], *(part.rpartition("/")[2] for part in parts[1:])])
        read[name] = read_metrics(*(metrics_of(runs[part]) for part in parts)) if len(parts) > 1 else alone[last]
    return read


def _earlier(name: str, runs: Mapping[str, Path], read: Mapping[str, Mapping[str, Series]]) -> str | None:
    """The run that a run was resumed from; None if it was not, or that is not clear or not there."""
    first = _first_epoch(read[name])
    if first is None:
        return None
    config = metrics_of(runs[name]).with_name("config.yaml")
    saved = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    if isinstance(saved, dict) and "ckpt_path" in saved:
        if saved["ckpt_path"] is None:
            return None
        checkpoint = Path(saved["ckpt_path"])
        if len(checkpoint.parts) > 1:  # no keyword, such as last
            # Folders that were moved since, or a command in another directory: the last two names have to do.
            within = [parent.parts[-2:] for parent in checkpoint.parents]
            found = [other for other in runs if other != name and _folder(runs[other]).parts[-2:] in within]
            return found[0] if len(found) == 1 else None
    found = []
    for other in runs:
        begun = _first_epoch(read[other])
        if other != name and experiment(other) == experiment(name) and begun is not None and begun < first:
            found += [other] if first <= max(read[other]["epoch"][1]) + 1 else []
    return found[0] if len(found) == 1 else None


def _folder(run: Path) -> Path:
    return metrics_of(run).parent.resolve()


def _first_epoch(metrics: Mapping[str, Series]) -> float | None:
    """The epoch in which a run began; None if it has not trained, as one of `lightning-ief test`."""
    trained = any(not key.startswith(("test", "val")) and key != "epoch" for key in metrics)
    return min(metrics["epoch"][1]) if trained and "epoch" in metrics else None
