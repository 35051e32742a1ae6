"""Tasks: the data modules and models that the recipes name."""

from lightning_ief.tasks.adapters import TrainableCheckpointMixin, export_adapter
from lightning_ief.tasks.classifier import MLP, Classifier
from lightning_ief.tasks.derivatives import DerivativeMLP
from lightning_ief.tasks.digits import DigitsDataModule
from lightning_ief.tasks.equations import Equation, EquationDataModule, Heat, Poisson
from lightning_ief.tasks.glue import GlueDataModule
from lightning_ief.tasks.language import LanguageModel, causal_lm, next_token_targets
from lightning_ief.tasks.loaders import InMemoryDataModule
from lightning_ief.tasks.lora_plus import LoRAPlus
from lightning_ief.tasks.muon import MuonAdamW
from lightning_ief.tasks.regression import DiabetesDataModule, Regressor
from lightning_ief.tasks.text import SequenceClassifier, T5Classifier, TextClassifier, TextModel
from lightning_ief.tasks.texts import TextFolderDataModule
from lightning_ief.tasks.vision import VisionDataModule
from lightning_ief.tasks.vit import AdaptedClassifier, timm_lora, timm_vit

__all__ = [
    "MLP",
    "AdaptedClassifier",
    "Classifier",
    "DerivativeMLP",
    "DiabetesDataModule",
    "DigitsDataModule",
    "Equation",
    "EquationDataModule",
    "GlueDataModule",
    "Heat",
    "InMemoryDataModule",
    "LanguageModel",
    "LoRAPlus",
    "MuonAdamW",
    "Poisson",
    "Regressor",
    "SequenceClassifier",
    "T5Classifier",
    "TextClassifier",
    "TextFolderDataModule",
    "TextModel",
    "TrainableCheckpointMixin",
    "VisionDataModule",
    "causal_lm",
    "export_adapter",
    "next_token_targets",
    "timm_lora",
    "timm_vit",
]
