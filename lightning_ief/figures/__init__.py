"""Figures of what a run has logged."""

from lightning_ief.figures.callback import TrainingFigures
from lightning_ief.figures.training import draw_training

__all__ = ["TrainingFigures", "draw_training"]
