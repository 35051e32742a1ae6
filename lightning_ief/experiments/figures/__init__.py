"""Figures of what runs have logged, and of where directions point."""

from lightning_ief.experiments.figures.callback import TrainingFigures
from lightning_ief.experiments.figures.fields import draw_fields
from lightning_ief.experiments.figures.report import write_report
from lightning_ief.experiments.figures.runs import draw_runs
from lightning_ief.experiments.figures.training import draw_training

__all__ = ["TrainingFigures", "draw_fields", "draw_runs", "draw_training", "write_report"]
