"""Tasks: the data modules and models that the recipes name."""

from lightning_ief.tasks.classifier import MLP, Classifier
from lightning_ief.tasks.digits import DigitsDataModule

__all__ = ["MLP", "Classifier", "DigitsDataModule"]
