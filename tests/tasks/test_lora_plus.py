"""LoRA+ and Muon for the factors B of LoRA: which parameters are B, and the steps that they take."""

import pytest
import torch
from torch import nn

from lightning_ief.tasks import LoRAPlus, MuonAdamW
from lightning_ief.tasks.lora_plus import lora_b

peft = pytest.importorskip("peft")


def adapted(seed: int = 0) -> nn.Module:
    """LoRA of rank 2 on the first layer of two, with the bias of that."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    config = peft.LoraConfig(r=2, target_modules=["0"], bias="lora_only", modules_to_save=["2"])
    return peft.get_peft_model(net, config)


def trained(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def train(net: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 3) -> None:
    for number in range(steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))
        for optimizer in optimizers:
            optimizer.zero_grad()
        net(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def split(net: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    b = [p for name, p in trained(net).items() if "lora_B" in name]
    return b, [p for name, p in trained(net).items() if "lora_B" not in name]


def test_b_is_what_peft_calls_so():
    net = adapted()
    (b,) = lora_b([*trained(net).values()], 2)
    assert b is split(net)[0][0] and b.shape == (5, 2)


def test_steps_are_those_of_adamw_with_two_learning_rates():
    one, two, whole = adapted(), adapted(), adapted()
    train(one, LoRAPlus(trained(one).values(), rank=2, lr=0.01, ratio=4.0, weight_decay=0.1))
    b, others = split(two)
    train(two, torch.optim.AdamW(b, 0.04, weight_decay=0.1), torch.optim.AdamW(others, 0.01, weight_decay=0.1))
    assert all(torch.equal(p, q) for p, q in zip(trained(one).values(), trained(two).values(), strict=True))
    train(whole, torch.optim.AdamW(trained(whole).values(), 0.01, weight_decay=0.1))
    assert not torch.equal(split(one)[0][0], split(whole)[0][0])


def test_a_schedule_moves_both_learning_rates():
    optimizer = LoRAPlus(trained(adapted()).values(), rank=2, lr=0.01, ratio=4.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.02]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_moves_b_alone():
    one, two = adapted(), adapted()
    train(one, MuonAdamW(trained(one).values(), lr=0.02, weight_decay=0.1, lora_rank=2))
    b, others = split(two)
    muon = torch.optim.Muon(b, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    train(two, muon, torch.optim.AdamW(others, 0.02, weight_decay=0.1))
    assert all(torch.equal(p, q) for p, q in zip(trained(one).values(), trained(two).values(), strict=True))


@pytest.mark.parametrize(
    "shapes", [[(2, 6), (5, 3)], [(2, 6), (5, 2), (4, 2)], [(2, 2), (2, 6), (5, 2)], [(6,), (3, 4)]], ids=str
)
def test_what_cant_be_told_apart_is_refused(shapes):
    with pytest.raises(ValueError, match=r"lora_b\(rank=2\): there must be as many .* Give the r of LoRA"):
        LoRAPlus([torch.zeros(shape, requires_grad=True) for shape in shapes], rank=2)


def test_groups_are_refused():
    with pytest.raises(TypeError, match="takes tensors; got dict"):
        LoRAPlus([{"params": [torch.zeros(2, 3)]}], rank=2)
