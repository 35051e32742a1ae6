"""What is sent, whose buffers count, and who starts the ranks, under each strategy."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from tests.helpers import Configure
from tests.ranks import on_ranks
from tests.training.runs import fit, ief, started

pytestmark = pytest.mark.usefixtures("float64")


class Counting(L.Callback):
    """Fails if DistributedDataParallel sends gradients, or if it does not."""

    def __init__(self, expected: bool) -> None:
        self.expected = expected
        self.sent = 0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        def hook(state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
            self.sent += 1
            return torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(None, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)

    def on_train_end(self, *_: Any) -> None:
        assert (self.sent > 0) == self.expected


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
@pytest.mark.parametrize("configure", [ief, lambda p: torch.optim.SGD(p, lr=0.1)], ids=["ief", "sgd"])
def test_only_ordinary_optimizers_have_gradients_sent(configure: Configure, strategy: str) -> None:
    truth = fit(configure, 12)[0][-1]
    counting = Counting(configure is not ief)
    for found, _ in on_ranks(2, lambda rank: fit(configure, 6, ranks=2, strategy=strategy, callbacks=[counting])):
        assert (found[-1] - truth).norm() < 1e-12 * truth.norm()


class Remembering(nn.Linear):
    """Has a buffer that depends on the samples of a rank."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.register_buffer("total", torch.zeros(()))
        self.noted: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.noted.append(float(self.total))
        self.total += x.detach().sum()
        return super().forward(x)


@pytest.mark.parametrize("configure", [ief, lambda p: torch.optim.SGD(p, lr=0.1)], ids=["ief", "sgd"])
def test_buffers_are_those_of_the_first_rank(configure: Configure) -> None:
    def work(rank: int) -> list[float]:
        net = Remembering()
        fit(configure, 6, ranks=2, net=net)
        return net.noted

    one, other = on_ranks(2, work)
    assert one == other and len(set(one)) >= 12


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", "ddp_fork_find_unused_parameters_true", "ddp_spawn"])
def test_strategies_that_start_ranks_themselves(strategy: str, monkeypatch: Any) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    truth = fit(ief, 12)[0][-1]
    assert (started(strategy) - truth).norm() < 1e-12 * truth.norm()
