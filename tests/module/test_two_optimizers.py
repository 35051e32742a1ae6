"""An optimizer of this package for some parameters, one of torch for the others."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import EF, IEF, SampledFisher, linearize, objectives
from lightning_ief.optim import DirectionOptimizer
from tests.helpers import Classifier, relative_error, weights
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

CE = objectives.CrossEntropy()


def data(samples: int = 22) -> TensorDataset:
    torch.manual_seed(2)
    return TensorDataset(torch.randn(samples, 6), torch.randint(3, (samples,)))


class Two(Classifier):
    """The first layer by one, the last by the other; schedulers of both."""

    def __init__(self, accumulate: int = 1, kind: type[DirectionOptimizer] = IEF) -> None:
        super().__init__(lambda p: None)  # type: ignore[arg-type, return-value]
        self.accumulate, self.kind = accumulate, kind

    def configure_optimizers(self) -> Any:
        own = self.kind(self.net[0].parameters(), lr=0.5, damping=1e-2, accumulate=self.accumulate)
        other = torch.optim.AdamW(self.net[2].parameters(), lr=0.1)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.8) for each in (own, other)]
        return [own, other], [{"scheduler": each, "interval": "step"} for each in schedulers]


def fit(module: Two, size: int = 4, ckpt_path: Any = None, **options: Any) -> L.Trainer:
    options = {"max_epochs": 2, "enable_checkpointing": bool(options.get("callbacks")), **options}
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                        precision="64-true", **options)  # fmt: skip
    trainer.fit(module, DataLoader(data(), size), ckpt_path=ckpt_path, weights_only=False)
    return trainer


def by_hand(kind: type[DirectionOptimizer], size: int) -> Tensor:
    """The same in a loop: autograd's gradient of the mean loss for the one, a frozen rest for the other."""
    net = copy.deepcopy(Two().net)
    own = kind(net[0].parameters(), lr=0.5, damping=1e-2)
    other = torch.optim.AdamW(net[2].parameters(), lr=0.1)
    samples = data()
    for _ in range(2):
        for start in range(0, len(samples), size):
            x, y = samples[start : start + size]
            other.zero_grad()
            CE.losses(net(x), y).mean().backward()
            for p in net[0].parameters():
                p.grad = None
            frozen = {name: p for name, p in net.named_parameters() if name.startswith("0.")}
            own.step(linearization=linearize(net, x, y, CE, parameters=frozen))
            other.step()
            for group in (*own.param_groups, *other.param_groups):
                group["lr"] *= 0.8
    return weights(net)


@pytest.mark.parametrize("kind", [IEF, EF, SampledFisher])
def test_each_steps_as_if_it_were_alone(kind: type[DirectionOptimizer]) -> None:
    module = Two(kind=kind)
    trainer = fit(module)
    assert relative_error(weights(module.net), by_hand(kind, 4)) < 1e-10
    assert trainer.global_step == 12  # updates, each counted once
    assert all(p.grad is None for p in module.parameters())


def test_micro_batches() -> None:
    """Four of them, and two of the same samples together, make the same updates."""
    module = Two(accumulate=2)
    trainer = fit(module, 4)
    assert relative_error(weights(module.net), by_hand(IEF, 8)) < 1e-10
    assert trainer.global_step == 6


def test_three_optimizers_and_a_schedule_over_the_run() -> None:
    """Those of torch get the gradient of the mean loss each; updates of four batches are counted."""

    class Three(Classifier):
        def configure_optimizers(self) -> Any:
            own = IEF(self.net[0].parameters(), lr=0.0, accumulate=4)
            others = [torch.optim.SGD([p], lr=1.0) for p in self.net[2].parameters()]
            self.steps = self.trainer.estimated_stepping_batches
            return [own, *others]

    module = Three(lambda p: None)  # type: ignore[arg-type, return-value]
    net, (x, y) = copy.deepcopy(module.net), data(16)[:]
    CE.losses(net(x), y).mean().backward()
    L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
              enable_checkpointing=False, precision="64-true").fit(module, DataLoader(data(16), 4))  # fmt: skip
    assert module.steps == 1
    for p, before in zip(module.net[2].parameters(), net[2].parameters(), strict=True):
        assert before.grad is not None
        assert relative_error(before.detach() - p.detach(), before.grad) < 1e-10


def test_a_second_optimizer_whose_parameters_are_frozen() -> None:
    module = Two()
    module.net[2].requires_grad_(False)
    before = weights(module.net[2])
    fit(module)
    assert torch.equal(weights(module.net[2]), before)


def test_ranks() -> None:
    """Two ranks with halves of a batch take the steps of one with the whole."""

    def work(rank: int) -> Tensor:
        module = Two()
        order = [at + 2 * rank + k for at in range(0, 20, 4) for k in range(2)]
        own = DataLoader(torch.utils.data.Subset(data(20), order), 2, shuffle=False)
        L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False, max_epochs=1,
                  enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
                  precision="64-true").fit(module, own)  # fmt: skip
        return weights(module.net)

    first, second = on_ranks(2, work)
    alone = Two()
    L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
              enable_checkpointing=False, precision="64-true").fit(alone, DataLoader(data(20), 4))  # fmt: skip
    assert torch.equal(first, second)
    assert relative_error(first, weights(alone.net)) < 1e-9


def test_a_checkpoint_resumes_bit_for_bit(tmp_path: Path) -> None:
    expected, resumed = Two(), Two()
    fit(expected, callbacks=[ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)])
    fit(resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert torch.equal(weights(resumed), weights(expected))


def test_both_skip_a_batch_that_is_not_finite() -> None:
    module = Two()
    broken = data(4)
    broken.tensors[0][1] = float("nan")
    before = weights(module)
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
                  enable_checkpointing=False, precision="64-true").fit(module, DataLoader(broken, 4))  # fmt: skip
    assert torch.equal(weights(module), before)
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: [IEF(net[0].parameters()), EF(net[2].parameters())], "several parameter groups"),
        (lambda net: [IEF(net.parameters()), torch.optim.SGD(net[2].parameters())], "hold the same parameters"),
        (lambda net: [torch.optim.SGD(net[k].parameters()) for k in (0, 2)], "with one of lightning_ief"),
        (lambda net: [IEF(net[0].parameters()), torch.optim.LBFGS(net[2].parameters())], "LBFGS evaluates the loss"),
        (lambda net: [IEF(net[0].parameters(), sync="local"), torch.optim.SGD(net[2].parameters())], "sync='global'"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    class Refused(Two):
        def configure_optimizers(self) -> Any:
            return make(self.net)

    with pytest.raises(MisconfigurationException, match=message):
        fit(Refused())


def test_parameters_of_a_list_are_those_of_the_second() -> None:
    """What neither holds stays as it is."""

    class Partly(Two):
        def configure_optimizers(self) -> Any:
            return [IEF([self.net[0].weight], lr=0.5), torch.optim.SGD([self.net[2].weight], lr=0.1)]

    module = Partly()
    before = copy.deepcopy(module.net)
    fit(module)
    for after, old, moves in zip(module.net.parameters(), before.parameters(), (True, False, True, False), strict=True):
        assert torch.equal(after, old) != moves
    assert isinstance(module.net[0], nn.Linear)
