"""The figures as a callback."""

import warnings
from importlib.util import find_spec
from pathlib import Path

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_ief.experiments.figures.training import draw_training

__all__ = ["TrainingFigures"]


class TrainingFigures(Callback):
    """Draws γ ratios and loss over training when a fit ends, from what the run's CSVLogger wrote.

    The figures go to `figures/` beside its metrics.csv; see `draw_training`. Draws nothing in a fast_dev_run, which
    logs nothing.

    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check, before training starts, that the figures can be drawn.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: What the trainer is about to do; only "fit" is checked.

        Raises:
            MisconfigurationException: If there is no CSVLogger.
            ModuleNotFoundError: If matplotlib is missing.

        """
        if stage != "fit" or self._is_dry(trainer):
            return
        if find_spec("matplotlib") is None:
            raise ModuleNotFoundError("TrainingFigures draws with matplotlib: pip install 'lightning-ief[plots]'.")
        if self._logger(trainer) is None:
            found = [type(logger).__name__ for logger in trainer.loggers]
            raise MisconfigurationException(
                f"TrainingFigures draws from the file of a CSVLogger, the Trainer's loggers are {found}. Add one: "
                "Trainer(logger=[CSVLogger('runs'), ...])."
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw."""
        logger = self._logger(trainer)
        if logger is None or self._is_dry(trainer) or not trainer.is_global_zero:
            return
        logger.save()  # it writes in blocks: what is left of the last one
        metrics = Path(logger.log_dir, logger.experiment.NAME_METRICS_FILE)
        if not metrics.is_file():
            warnings.warn(f"TrainingFigures: nothing was logged to {metrics}, so nothing is drawn.", stacklevel=2)
            return
        draw_training(metrics, metrics.parent / "figures")

    @staticmethod
    def _logger(trainer: L.Trainer) -> CSVLogger | None:
        return next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)

    @staticmethod
    def _is_dry(trainer: L.Trainer) -> bool:
        return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # Lightning sets it where mypy can't see
