"""What the tests of γ's evaluation and of its callback train."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_ief import IEF, GammaIndicators, NaturalGradientMixin, objectives

NAMES = ["sgd", "ef", "ief", "sampled_fisher", "natural_gradient"]
DAMPINGS = {"sgd": 0.0, "ef": 1e-3, "ief": 1e-2, "sampled_fisher": 0.1, "natural_gradient": 1e-4}
N = 24


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3))


class Plain(L.LightningModule):
    """Automatic optimization, with neither objective nor unpack_batch."""

    def __init__(self, net: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.net = net
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["x"]), batch["y"])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Mixed(NaturalGradientMixin, Plain):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.objective = objectives.CrossEntropy()

    def unpack_batch(self, batch):
        return batch["x"], batch["y"]

    def configure_optimizers(self):
        return IEF(self.parameters(), lr=0.1, damping=1e-2)


class Samples(Dataset):
    """Dictionaries, collated by default_collate; optionally with noise from all generators of random numbers."""

    def __init__(self, size: int = N, noise: bool = False) -> None:
        self.x, self.y = torch.randn(size, 4), torch.randint(3, (size,))
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        noise = 0.1 * (random.random() + np.random.rand() + torch.rand(())) if self.noise else 0.0
        return {"x": self.x[n] + noise, "y": self.y[n]}


class Unpack:
    """An unpack_batch that remembers the batches."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append((batch["x"], batch["y"]))
        return self.seen[-1]


def indicators(**options: Any) -> GammaIndicators:
    """The callback for `Plain`."""
    defaults = {
        "objective": objectives.CrossEntropy(),
        "unpack_batch": Unpack(),
        "batch_size": 8,
        "damping": 1e-3,
        "at_start": False,
    }
    return GammaIndicators(**(defaults | options))


def trainer(*callbacks: Callback, **options: Any) -> L.Trainer:
    quiet = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **(quiet | options))


def fit(
    module: L.LightningModule, *callbacks: Callback, data: Dataset | None = None, val: bool = False, **options: Any
) -> L.Trainer:
    dataset = data or Samples()
    run = trainer(*callbacks, **options)
    run.fit(module, DataLoader(dataset, 6, shuffle=True), DataLoader(dataset, 6) if val else None)
    return run


def logged(run: L.Trainer) -> dict[str, float]:
    metrics = {key: value.item() for key, value in run.callback_metrics.items()}
    return {key: value for key, value in metrics.items() if key.startswith(("gamma", "cosine", "gradient_norm"))}


def rows(batch: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row.tolist()) for row in batch}
