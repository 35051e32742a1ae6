"""Muon with AdamW: the steps of both, learning rates that move together, and what is resumed."""

import copy
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn

from lightning_ief.tasks import MLP, Classifier, DigitsDataModule
from lightning_ief.tasks.muon import MuonAdamW

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def train(net: nn.Module, steps: int, *optimizers, skip: int = 0) -> None:
    """Train on batches that depend on their number alone, from the batch after those that are skipped."""
    for number in range(skip, skip + steps):
        x = torch.randn(16, 1, 8, generator=torch.Generator().manual_seed(number))
        for optimizer in optimizers:
            optimizer.zero_grad()
        net(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_steps_are_those_of_muon_on_matrices_and_of_adamw_on_the_rest():
    one, two = network(), network()
    train(one, 3, MuonAdamW(one.parameters(), lr=0.02, adamw_multiple=0.5, weight_decay=0.1))
    matrices = [two[2].weight, two[4].weight]
    others = [p for p in two.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    train(two, 3, muon, torch.optim.AdamW(others, lr=0.01, weight_decay=0.1))
    assert torch.equal(weights(one), weights(two)) and not torch.equal(weights(one), weights(network()))


def test_embeddings_are_moved_by_adamw():
    one, two = network(), network()
    train(one, 3, MuonAdamW(one.parameters(), lr=0.02, embeddings=[8]))  # rows of the first of two matrices
    rest = [p for p in two.parameters() if p is not two[4].weight]
    muon = torch.optim.Muon([two[4].weight], lr=0.02, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    train(two, 3, muon, torch.optim.AdamW(rest, lr=0.02, weight_decay=0.01))
    assert torch.equal(weights(one), weights(two))


def test_a_schedule_moves_both_learning_rates_and_the_steps():
    one, two = network(), network()
    optimizer = MuonAdamW(one.parameters(), lr=0.02, adamw_multiple=0.5)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.0025] == falling.get_last_lr()
    train(one, 2, optimizer)
    train(two, 2, MuonAdamW(two.parameters(), lr=0.005, adamw_multiple=0.5))
    assert torch.equal(weights(one), weights(two))


def test_it_resumes_and_a_schedule_still_moves_it():
    whole, half = network(), network()
    optimizer, first = MuonAdamW(whole.parameters(), lr=0.02), MuonAdamW(half.parameters(), lr=0.02)
    train(whole, 2, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.001
    train(whole, 2, optimizer, skip=2)

    train(half, 2, first)
    resumed = network()
    resumed.load_state_dict(half.state_dict())
    second = MuonAdamW(resumed.parameters(), lr=7.0)
    second.load_state_dict(first.state_dict())
    assert [group["lr"] for group in second.param_groups] == [0.02, 0.02]
    for group in second.param_groups:
        group["lr"] = 0.001
    train(resumed, 2, second, skip=2)
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(("net", "groups"), [(nn.Linear(3, 2, bias=False), 1), (nn.LayerNorm(3), 1)])
def test_one_kind_alone_is_enough(net, groups):
    optimizer = MuonAdamW(net.parameters(), lr=0.1)
    before = weights(net)
    net(torch.randn(4, 3)).square().sum().backward()
    assert len(optimizer.param_groups) == groups
    optimizer.step()
    assert not torch.equal(weights(net), before)


def test_a_closure_is_evaluated_once_with_gradients():
    net = network()
    optimizer, calls = MuonAdamW(net.parameters()), []

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(2, 1, 8)).square().mean()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    assert float(optimizer.step(closure).detach()) == calls[0] and len(calls) == 1


def test_it_trains_a_classifier():
    module = Classifier(MLP([64, 32, 10]), partial(MuonAdamW, lr=0.05), num_classes=10, lr_scheduler="linear")
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DigitsDataModule(batch_size=128))
    assert trainer.callback_metrics["val/accuracy"] > 0.8
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.0, 0.0]  # fallen to the end


def test_a_run_resumes_where_it_was(tmp_path):
    def trained(epochs: int, ckpt_path: str | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        module = Classifier(MLP([64, 16, 10]), partial(MuonAdamW, lr=0.05), num_classes=10)
        trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=tmp_path / str(epochs),
                            enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        trainer.fit(module, DigitsDataModule(batch_size=256), ckpt_path=ckpt_path)
        return weights(module)

    trained(1)
    (saved,) = (tmp_path / "1").rglob("*.ckpt")
    assert torch.equal(trained(2, str(saved)), trained(2))


def test_a_copy_goes_on_alike():
    torch.manual_seed(0)
    net, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    optimizer = MuonAdamW(net.parameters(), lr=0.1)

    def step(own, updates):
        updates.zero_grad()
        own(x).square().sum().backward()
        updates.step()
        return weights(own)

    step(net, optimizer)
    other, copied = copy.deepcopy((net, optimizer))
    assert torch.equal(step(other, copied), step(net, optimizer))


def test_groups_and_an_old_torch_are_refused(monkeypatch):
    with pytest.raises(TypeError, match="takes tensors, and makes the groups itself; got dict"):
        MuonAdamW([{"params": [torch.ones(2, 2)]}])
    optimizer = MuonAdamW([torch.ones(2, 2, requires_grad=True)])
    optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)]})
    with pytest.raises(ValueError, match="give it all parameters when it is made"):
        optimizer.step()
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ModuleNotFoundError, match=r"has not: pip install 'torch>=2.9'"):
        MuonAdamW([torch.ones(2, 2)])
