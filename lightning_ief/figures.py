"""The path by which recipes and the saved configurations of runs name the figures' callback."""

from lightning_ief.experiments.figures import TrainingFigures

__all__ = ["TrainingFigures"]
