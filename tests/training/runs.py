"""Runs of the Trainer on one rank or several, of which tests compare the parameters after every batch."""

import os
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_ief import IEF
from tests.helpers import Classifier, Configure


class Watch(L.Callback):
    """Calls a function before every batch; notes the parameters after it, and the warnings of the run."""

    def __init__(self, before: Callable[[L.Trainer, Any, int], None] | None = None) -> None:
        self.before = before
        self.weights: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if self.before:
            self.before(trainer, batch, trainer.current_epoch * trainer.num_training_batches + batch_idx)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.weights.append(nn.utils.parameters_to_vector(module.parameters()).detach().clone())


def data(samples: int = 47) -> TensorDataset:
    torch.manual_seed(2)
    return TensorDataset(torch.randn(samples, 6), torch.randint(3, (samples,)))


def fit(
    configure: Configure,
    batch_size: int,
    before: Callable[[L.Trainer, Any, int], None] | None = None,
    ranks: int = 1,
    loader: Any = None,
    net: nn.Module | None = None,
    kind: type[Classifier] = Classifier,
    ckpt_path: Any = None,
    callbacks: Any = (),
    **options: Any,
) -> tuple[list[Tensor], list[str]]:
    """The parameters after every batch, and the warnings."""
    watch = Watch(before)
    found = data()
    workers = options.pop("workers", 0)
    # Over several ranks, Lightning puts the same sampler there.
    sampler = DistributedSampler(found, 1, 0) if ranks == 1 else None
    options = {
        "max_epochs": 3,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "strategy": "ddp" if ranks > 1 else "auto",
    } | options
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, *callbacks],
        **options,
    )
    loader = (
        loader
        if loader is not None
        else DataLoader(found, batch_size, sampler=sampler, shuffle=sampler is None, num_workers=workers)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(
            kind(configure, net),
            loader,
            DataLoader(found, 20) if "val_check_interval" in options else None,
            ckpt_path=ckpt_path,
        )
    return watch.weights, [str(w.message) for w in caught]


def ief(p: Any) -> torch.optim.Optimizer:
    return IEF(p, lr=0.5, damping=1e-3)


def dealt(found: Any, size: int | None, ranks: int, rank: int, drop_last: bool = False, **options: Any) -> DataLoader:
    return DataLoader(
        found, size, sampler=DistributedSampler(found, ranks, rank, False, drop_last=drop_last), **options
    )


def first(samples: int) -> TensorDataset:
    return TensorDataset(*data()[:samples])


def started(strategy: Any, before: Any = None, configure: Configure = ief, ranks: int = 2) -> Tensor:
    """The parameters after a run of which Lightning starts the ranks, forked or anew."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watch(before)],
    )
    module = Classifier(configure)
    with mock.patch.dict(os.environ):  # Lightning leaves its port there
        trainer.fit(module, DataLoader(data(), 6, shuffle=True))
    return nn.utils.parameters_to_vector(module.parameters()).detach()
