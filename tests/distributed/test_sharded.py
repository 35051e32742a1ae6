"""Parameters sharded by FSDP2, through ModelParallelStrategy: the same weights as one process, in float64."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_ief import EF, IEF, KFAC, NaturalGradient, NaturalGradientMixin, SampledFisher, linearize, objectives
from lightning_ief.capture import LinearizedBatch
from lightning_ief.distributed import GlobalJacobian, across, whole_parameters
from lightning_ief.optim import DirectionOptimizer
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """One-hot rows, an attention block with norms, linear layers; heights that ranks can't share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 17, dropout=0.0, batch_first=True)
        self.out = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.words(x)).mean(1))


class Module(NaturalGradientMixin, L.LightningModule):
    def __init__(self, configure: Callable[[Any], torch.optim.Optimizer], net: type[Net]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = net()
        self.objective = objectives.CrossEntropy()
        self.configure = configure

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.net.words.weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            for part in (self.net.block, self.net.out):
                fully_shard(part, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.configure(self.parameters())


def fit(
    configure: Callable[[Any], torch.optim.Optimizer], batch_size: int, net: type[Net] = Net, **options: Any
) -> dict[str, Tensor]:
    torch.manual_seed(2)
    data = TensorDataset(torch.randint(7, (24, 5)), torch.randint(3, (24,)))
    sampler = DistributedSampler(data, shuffle=False) if dist.is_initialized() else None
    model = Module(configure, net)
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(model, DataLoader(data, batch_size, sampler=sampler))
    return {
        name: p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for name, p in model.named_parameters()
    }


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "ief": lambda p: IEF(p, lr=0.5, damping=1e-2, accumulate=1),
    "ief, micro-batches": lambda p: IEF(p, lr=0.5, relative_damping=0.1, max_norm=0.5, accumulate=2),
    "ef": lambda p: EF(p, lr=0.05, damping=1e-2, normalize=True, weight_decay=0.1),
    "natural_gradient": lambda p: NaturalGradient(p, lr=0.1, damping=1e-2),
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_weights_as_one_process(name: str, ranks: int) -> None:
    alone = fit(OPTIMIZERS[name], 6)
    for found in on_ranks(
        ranks, lambda rank: fit(OPTIMIZERS[name], 6 // ranks, devices=ranks, strategy=ModelParallelStrategy(ranks, 1))
    ):
        for key, truth in alone.items():
            assert (found[key] - truth).norm() / truth.norm() < 1e-11, key


def test_both_ways_are_taken() -> None:
    def work(rank: int) -> set[str]:
        seen: list[GlobalJacobian] = []
        init = GlobalJacobian.__init__
        GlobalJacobian.__init__ = lambda self, *a: (init(self, *a), seen.append(self))[0]
        fit(OPTIMIZERS["ief"], 3, devices=2, strategy=ModelParallelStrategy(2, 1))
        return {name for name in seen[0].like if name not in seen[0].routes.gathers}

    resharded, _ = on_ranks(2, work)
    assert "net.block.linear1.weight" in resharded
    assert "net.out.0.weight" not in resharded


@pytest.mark.parametrize(
    "configure",
    [
        lambda p: SampledFisher(p),
        lambda p: NaturalGradient(p, max_rows=1),
        lambda p: IEF(p, momentum=0.9),
        lambda p: IEF(p, line_search=2),
        lambda p: KFAC(p),
    ],
    ids=["sampled targets", "conjugate gradients", "momentum", "line search", "K-FAC"],
)
def test_whole_directions_are_refused(configure: Any) -> None:
    with pytest.raises(AssertionError, match=r"CaptureError.*sharded. Use IEF, EF or NaturalGradient in row space"):
        on_ranks(2, lambda rank: fit(configure, 3, devices=2, strategy=ModelParallelStrategy(2, 1)))


def test_rows_that_read_parameters_are_refused() -> None:
    class Bessel(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.special.i0(self.words.weight[0, :3])

    def work(rank: int) -> None:
        fit(OPTIMIZERS["ief"], 3, net=Bessel, devices=2, strategy=ModelParallelStrategy(2, 1))

    with pytest.raises(
        AssertionError, match=r"rows of sharded parameter 'net.words.weight' are computed from its values"
    ):
        on_ranks(2, work)


def test_escaping_uses_are_refused() -> None:
    """Backward passes gather shards: ranks of other numbers of samples would wait for one another for ever."""

    class Hiding(Net):
        def forward(self, x: Tensor) -> Tensor:
            padded = torch.zeros(len(x), 4)
            padded[:, :3] = self.words.weight[0, :3]
            return super().forward(x) * padded[:, :3]

    def work(rank: int) -> None:
        fit(OPTIMIZERS["ief"], 3, net=Hiding, devices=2, strategy=ModelParallelStrategy(2, 1))

    with pytest.raises(AssertionError, match=r"'net.words.weight' was used once more.*gather sharded parameters"):
        on_ranks(2, work)


def test_tensor_parallelism_is_refused() -> None:
    def work(rank: int) -> None:
        net = Net()
        parallelize_module(net.out, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
        whole_parameters(net)

    with pytest.raises(AssertionError, match=r"'out.0.weight'.*are DTensors, but not of fully_shard"):
        on_ranks(2, work)


def test_updates_keep_their_precision_under_autocast() -> None:
    def work(rank: int) -> None:
        torch.manual_seed(3)
        net = Net().float()
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(net, mesh=mesh)
        lin = across(
            linearize(
                net, torch.randint(7, (4, 5)), torch.randint(3, (4,)), objectives.CrossEntropy(),
                parameters=whole_parameters(net),
            ),
            parameters=dict(net.named_parameters()),
        )  # fmt: skip
        v, ones = torch.ones(8), dict.fromkeys(lin.parameters, 1.0)
        lin.jacobian.gram()
        found = []
        for enabled in (False, True):
            into = {name: torch.zeros_like(p) for name, p in lin.parameters.items()}
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
                lin.jacobian.add_rmatvec(v, into, ones, ones)
            found.append({name: x.to_local() for name, x in into.items()})
        assert lin.jacobian.routes.gathers < lin.parameters.keys()
        for name, x in found[0].items():
            assert torch.equal(x, found[1][name]), name
            assert x.abs().sum() > 0 or not x.numel(), name

    on_ranks(2, work)


@pytest.mark.parametrize("copied", [True, False])
def test_directions_of_ones_own_may_be_sharded_too(copied: bool) -> None:
    """θ ← (1 − ηw) θ − ηθ, from copies of the parameters and from themselves."""

    class Own(DirectionOptimizer):
        def direction(self, linearization: LinearizedBatch) -> dict[str, Tensor]:
            return {name: p.detach().clone() if copied else p for name, p in linearization.parameters.items()}

    def work(rank: int) -> None:
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        before = [p.detach().clone() for p in net.parameters()]
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        lin = linearize(
            net, torch.randn(4, 4), torch.randint(3, (4,)), objectives.CrossEntropy(), parameters=whole_parameters(net)
        )
        optimizer = Own(net.parameters(), lr=0.5, damping=0.0, weight_decay=0.5, normalize=False)
        optimizer.step(linearization=across(lin, parameters=dict(net.named_parameters())))
        for p, truth in zip(net.parameters(), before, strict=True):
            torch.testing.assert_close(p.full_tensor().detach(), 0.25 * truth)

    on_ranks(2, work)
