"""Tasks: the data modules and models that the recipes name."""

from lightning_ief.tasks.classifier import MLP, Classifier
from lightning_ief.tasks.digits import DigitsDataModule
from lightning_ief.tasks.loaders import InMemoryDataModule
from lightning_ief.tasks.vision import VisionDataModule

__all__ = ["MLP", "Classifier", "DigitsDataModule", "InMemoryDataModule", "VisionDataModule"]
