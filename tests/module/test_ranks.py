"""Training on several ranks through Lightning, against one process on the same global batches."""

import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_ief import EF, IEF, NaturalGradient, SampledFisher
from tests.helpers import Classifier, Configure
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")


class Logging(Classifier):
    def __init__(self, configure: Configure) -> None:
        super().__init__(configure)
        self.logged: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.logged.append(float(self.trainer.callback_metrics["train/loss"]))


def data(samples: int) -> TensorDataset:
    torch.manual_seed(2)
    return TensorDataset(torch.randn(samples, 6), torch.randint(3, (samples,)))


def fit(configure: Configure, batch_size: int, samples: int, epochs: int = 4, **options: Any) -> dict[str, Any]:
    model = Logging(configure)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = data(samples)
        # Lightning's own sampler would shuffle.
        sampler = DistributedSampler(found, shuffle=False) if dist.is_initialized() else None
        trainer.fit(model, DataLoader(found, batch_size, sampler=sampler))
    return {"weights": {n: p.detach() for n, p in model.named_parameters()}, "logged": model.logged,
            "steps": trainer.global_step}  # fmt: skip


OPTIMIZERS: dict[str, Configure] = {
    "ief": lambda p: IEF(p, lr=0.5, damping=1e-4),
    "ef": lambda p: EF(p, lr=0.05, damping=1e-3, normalize=True, weight_decay=0.1),
    "sampled_fisher": lambda p: SampledFisher(p, lr=0.3, damping=1.0, num_samples=2),
    "natural_gradient": lambda p: NaturalGradient(p, lr=0.1, damping=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_weights_as_one_process(name: str, ranks: int) -> None:
    # 47 samples: the last batch has 5 (2 ranks of 6: one repeated) and 11 = 4 + 4 + 3 (one repeated).
    samples, whole = 47, 12
    alone = fit(OPTIMIZERS[name], whole, samples, 5)
    found = on_ranks(
        ranks,
        lambda rank: fit(OPTIMIZERS[name], whole // ranks, samples, 5, devices=ranks, strategy="ddp"),
    )
    for each in found:
        assert each["steps"] == alone["steps"] == 20
        for key, truth in alone["weights"].items():
            error = (each["weights"][key] - truth).norm() / truth.norm()
            assert error < 3e-12, (key, error)  # one process may solve in the other space, the smaller one
            assert torch.equal(each["weights"][key], found[0]["weights"][key])
        torch.testing.assert_close(each["logged"], alone["logged"], rtol=1e-10, atol=0.0)
