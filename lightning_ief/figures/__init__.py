"""Figures of what a run has logged."""

from lightning_ief.figures.callback import TrainingFigures
from lightning_ief.figures.runs import draw_runs
from lightning_ief.figures.training import draw_training

__all__ = ["TrainingFigures", "draw_runs", "draw_training"]
