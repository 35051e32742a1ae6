"""Optimizers that evaluate the loss within their steps: torch's L-BFGS under the mixin."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import NaturalGradientMixin, StepTiming, objectives

SEARCHING = {"max_iter": 4, "line_search_fn": "strong_wolfe"}


class Module(NaturalGradientMixin, L.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.objective = objectives.LeastSquares()
        self.make = optimizer

    def forward(self, x):
        return self.net(x)

    def configure_optimizers(self):
        return self.make(self.parameters())


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return x, x.sin().sum(1, keepdim=True)


def fit(module: Module, epochs: int = 3, **options) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*samples()), batch_size=12))
    return trainer


@pytest.mark.parametrize("options", [SEARCHING, {"max_iter": 3, "lr": 0.1}, {"max_iter": 1}])
def test_lbfgs_makes_the_steps_of_a_loop_by_hand(options):
    module = Module(partial(torch.optim.LBFGS, **options))
    by_hand = Module(None)
    x, y = samples()
    optimizer = torch.optim.LBFGS(by_hand.parameters(), **options)

    def closure():
        optimizer.zero_grad()
        loss = (by_hand(x) - y).square().sum(1).mean() / 2
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    trainer = fit(module)
    for one, other in zip(module.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(losses[-1], rel=1e-6)  # before the step
    assert losses[-1] < losses[0] and trainer.global_step == 3


def test_the_first_forward_pass_is_not_repeated_and_the_step_is_timed():
    """As many as L-BFGS evaluates the loss."""
    module = Module(partial(torch.optim.LBFGS, max_iter=3))
    passes = []
    module.net.register_forward_hook(lambda *_: passes.append(1))
    trainer = fit(module, 1, callbacks=[StepTiming(skip_first=0, print_table=False)])
    (state,) = {id(s): s for s in trainer.optimizers[0].state.values()}.values()
    assert len(passes) == state["func_evals"] > 1
    assert trainer.callback_metrics["timing/step_ms"] > trainer.callback_metrics["timing/backward_ms"] > 0


def test_other_optimizers_evaluate_once():
    passes = []
    module = Module(partial(torch.optim.AdamW, lr=1e-2))
    module.net.register_forward_hook(lambda *_: passes.append(1))
    fit(module, 2)
    assert len(passes) == 2


def test_losses_that_are_not_finite_skip_the_step():
    module = Module(partial(torch.optim.LBFGS, **SEARCHING))
    with torch.no_grad():
        module.net[0].bias.fill_(torch.nan)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.warns(RuntimeWarning, match="losses are not finite"):
        fit(module, 1)
    assert all(torch.equal(a, b) for a, b in zip(before[2:], [*module.parameters()][2:], strict=True))


def test_many_ranks_are_refused(monkeypatch):
    """Each would search along a line with the loss of its own samples."""
    module = Module(partial(torch.optim.LBFGS, **SEARCHING))
    monkeypatch.setattr("lightning_ief.module.gathered_losses", lambda losses: [losses, losses])
    monkeypatch.setattr("lightning_ief.module.without_repeated", lambda trainer, *batch: batch)

    class TwoRanks(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            monkeypatch.setattr(type(trainer), "world_size", 2)

    with pytest.raises(MisconfigurationException, match="LBFGS evaluates the loss within its steps.*Train on one"):
        fit(module, 1, callbacks=[TwoRanks()])
