"""What the runs of a comparison are given: files, options, and what these digest to."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_ief.experiments.outcomes import Run

__all__ = ["Arguments", "learning_rate", "rounded", "variant"]

_LR = ("model", "init_args", "optimizer", "init_args", "lr")
_ORDER = "--data.init_args.order_seed"
_TIMING = "lightning_ief.callbacks.StepTiming"


@dataclass(frozen=True)
class Arguments:
    """What is alike in the runs of a comparison, and what each optimizer changes.

    Attributes:
        config: The recipe.
        variants: By the name of the optimizer, the file that is laid over the recipe; None for the recipe as it is.
        directory: Folder of the runs.
        options: Options of fit for all runs.
        by_parts: Whether some seeds search and others give the results, of the end of training.
        timed: Whether steps are timed; they are with `by_parts`.
        order_by_seed: Whether the order of the samples is drawn from the seed of the run.

    """

    config: Path
    variants: Mapping[str, Path | None]
    directory: Path
    options: Sequence[str] = ()
    by_parts: bool = False
    timed: bool = False
    order_by_seed: bool = False

    def run(self, name: str, lr: float, seed: int, part: str = "") -> Run:
        """A run.

        Args:
            name: Name of the optimizer.
            lr: Learning rate.
            seed: Seed.
            part: What it is for, `SEARCH`, `RESULT` or both, "".

        Returns:
            The run.

        """
        lr = rounded(lr)
        file = self.variants[name]
        files = [self.config] if file is None else [self.config, file]
        given = [Path(name) for name in re.findall(r"--config[ =](\S+)", " ".join(self.options))]
        options = [*self.options, *self._measuring([*files, *given])]
        alike = [*options, _ORDER] if self.order_by_seed else options
        digest = hashlib.sha256(
            b"\0".join([*(file.read_bytes() for file in (*files, *given)), *map(str.encode, alike)])
        )
        version = f"lr_{lr:.12g}_seed_{seed}"
        logger = "lightning.pytorch.loggers.CSVLogger"
        own = [f"{_ORDER}={seed}"] if self.order_by_seed else []
        return Run(
            name, lr, seed,
            ("fit", *(f"--config={file}" for file in files), f"--seed_everything={seed}", f"--{'.'.join(_LR)}={lr!r}",
             f"--trainer.logger={logger}", f"--trainer.logger.save_dir={self.directory}",
             f"--trainer.logger.name={name}", f"--trainer.logger.version={version}", *own, *options),
            self.directory / name / version, digest.hexdigest()[:16], part,
        )  # fmt: skip

    def _require_batches_are_steps(self, files: Sequence[Path]) -> None:
        asked = [_read(file, ("trainer", "accumulate_grad_batches")) for file in files]
        asked += re.findall(r"--trainer\.accumulate_grad_batches[ =](\S+)", " ".join(self.options))
        if {*map(str, asked)} - {"None", "1"}:
            raise MisconfigurationException(
                "compare: with trainer.accumulate_grad_batches some steps are of several batches, so that neither "
                "steps nor times can be compared. Take a larger batch_size, or the optimizer's own accumulate."
            )

    def _measuring(self, files: Sequence[Path]) -> list[str]:
        """Options that time the steps, unless that is done already, and have a test be one of the last weights."""
        added = []
        if self.by_parts or self.timed:
            self._require_batches_are_steps(files)
            given = " ".join(self.options)
            replaced = re.search(r"--trainer\.callbacks[ =]", given)
            listed = [] if replaced else [c for file in files for c in _read(file, ("trainer", "callbacks")) or []]
            if "StepTiming" not in given + str(listed):
                added += [f"--trainer.callbacks+={_TIMING}", "--trainer.callbacks.print_table=false"]
        if self.by_parts:
            asked = [_read(file, ("test_after_fit",)) for file in files]
            asked += [yaml.safe_load(text) for text in re.findall(r"--test_after_fit[ =](\S+)", " ".join(self.options))]
            if [answer for answer in asked if answer is not None][-1:] == [True]:
                added.append("--test_after_fit=last")
        return added


def variant(config: Path, name: str) -> Path | None:
    """The file that says what an optimizer changes in the recipe.

    Args:
        config: The recipe.
        name: A YAML file, the name of one in the folder that is called as the recipe is, or that of the recipe's own
            optimizer.

    Returns:
        The file; None for the recipe as it is.

    Raises:
        MisconfigurationException: If there is no such file.

    """
    if not config.is_file():
        raise MisconfigurationException(f"compare: there is no recipe {config}.")
    folder = config.with_suffix("")
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise MisconfigurationException(f"compare: there is no {name}.")
        return Path(name)
    if (file := folder / f"{name}.yaml").is_file():
        return file
    optimizer = _read(config, ("model", "init_args", "optimizer", "class_path"))
    if str(optimizer).rpartition(".")[2].lower() == name.lower():
        return None
    known = [path.stem for path in sorted(folder.glob("*.yaml"))]
    raise MisconfigurationException(
        f"compare: '{name}' is neither the recipe's own optimizer ({optimizer}) nor one of {folder}/: {known}."
    )


def learning_rate(config: Path, file: Path | None) -> float:
    """The learning rate that a file gives, or the recipe if there is none.

    Args:
        config: The recipe.
        file: What is laid over it.

    Returns:
        lr.

    Raises:
        MisconfigurationException: If none is given.

    """
    found = _read(file or config, _LR)
    if found is None:
        raise MisconfigurationException(f"compare: {file or config} gives no {'.'.join(_LR)}.")
    return float(found)


def rounded(lr: float) -> float:
    """Twelve digits: factors are round numbers, their products with a learning rate often are not."""
    return float(f"{lr:.12g}")


def _read(path: Path, keys: Sequence[str]) -> Any:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found
