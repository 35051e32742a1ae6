"""Bytes that ranks send in a step: counted, derived by the formula of docs/ranks.md, and seen by the kernel."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("psutil")  # which the reports of the benchmarks need

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import contestants
from benchmarks.ranks import MODELS, Model, Rows, bytes_per_step, derive, derived_table, layer
from benchmarks.ranks_measure import Round, train
from benchmarks.workloads import Batch
from lightning_ief import IEF
from lightning_ief.capture import LinearizedBatch
from lightning_ief.capture.factors import Outer, outer
from lightning_ief.capture.jacobian import Block, Blocks, LocalJacobian
from lightning_ief.distributed import GlobalJacobian, across, exchange
from tests.distributed.test_linearization import linearized, of_rank
from tests.helpers import Function
from tests.ranks import on_ranks

EIGHT = 8  # bytes of a float64
Case = tuple[nn.Module, Any, list[Rows]]


def perceptron(counts: Sequence[int]) -> Case:
    """Wide layers are gathered, the last one is re-sharded; biases share their layer's output gradient."""
    model = nn.Sequential(nn.Linear(60, 70), nn.Tanh(), nn.Linear(70, 2), nn.Tanh(), nn.Linear(2, 2))
    sizes = enumerate(((70, 60), (2, 70), (2, 2)))
    rows = [p for i, (o, d) in sizes for p in layer(str(i), o, d, max(counts), 1, EIGHT)]
    return model, (torch.randn(sum(counts), 60), torch.randint(2, (sum(counts),))), rows


def sequence(counts: Sequence[int]) -> Case:
    """Words, and a layer at every position."""
    body = nn.Linear(16, 12)

    def forward(self: Function, x: Tensor) -> Tensor:
        return self.inner(F.embedding(x, self.words)).mean(1)

    words = Rows(40 * 16, 40, {"indices": 5 * 8, "gradients": 5 * 16 * EIGHT}, positions=5)
    model = Function.of(body, forward, words=(40, 16))
    batch = torch.randint(40, (sum(counts), 5)), torch.randint(12, (sum(counts),))
    return model, batch, [words, *layer("0", 12, 16, max(counts), 5, EIGHT)]


def stepped(lin: LinearizedBatch, model: nn.Module, **options: Any) -> None:
    IEF(model.parameters(), lr=1e-3, damping=1.0, **options).step(linearization=lin)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "counts", [(6, 6), (11, 1), (0, 12), (7, 0, 5), (3, 3, 3, 3), (260, 280), (170, 190, 180)], ids=str
)
@pytest.mark.parametrize("make", [perceptron, sequence])
def test_counted_as_derived(make: Any, counts: tuple[int, ...]) -> None:
    model, batch, rows = make(counts)

    def work(rank: int) -> list[Any]:
        found: list[Any] = []
        for _ in range(2):  # every step sends the same
            lin = across(linearized(model, of_rank(batch, counts, rank)))
            stepped(lin, model)
            found.append(lin.ranks.world.sent)
        return [*found, lin.jacobian.routes.gathers, lin.jacobian.routes.sliced]

    expected = bytes_per_step(rows, counts, itemsize=EIGHT)
    found = on_ranks(len(counts), work)
    assert [each[:2] for each in found] == [[total] * 2 for total in expected]
    gathered, sliced = found[0][2:]
    assert 0 < len(gathered) < len(list(model.parameters()))  # both ways are taken
    assert bool(sliced) == (sum(counts) > 100)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("sync", "group"), [("local", 1), (2, 2), ("global", 4)], ids=str)
def test_groups(sync: Any, group: int) -> None:
    counts = (4, 2, 3, 3)
    model, batch, rows = perceptron(counts)

    def work(rank: int) -> int:
        lin = across(linearized(model, of_rank(batch, counts, rank)), sync)
        stepped(lin, model, sync=sync)
        return lin.ranks.world.sent + (lin.ranks.exchange.sent if lin.ranks.exchange is not lin.ranks.world else 0)

    assert on_ranks(4, work) == bytes_per_step(rows, counts, group, EIGHT)


@pytest.mark.usefixtures("float64")
def test_micro_batches_send_their_factors_once() -> None:
    """One window of two micro-batches sends what one batch of their samples does."""
    counts = (3, 3)
    model, batch, rows = perceptron((6, 6))

    def work(rank: int) -> int:
        optimizer = IEF(model.parameters(), lr=1e-3, damping=1.0, accumulate=2)
        lins = [across(linearized(model, of_rank(x, counts, rank))) for x in halves]
        for lin in lins:
            optimizer.step(linearization=lin)
        return sum(lin.ranks.world.sent for lin in lins)

    halves = list(zip(*(x.split(6) for x in batch), strict=True))
    assert on_ranks(2, work) == bytes_per_step(rows, (6, 6), itemsize=EIGHT)


# --- many ranks, played by this process: all of them hold the same samples


def played(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives among so many ranks that all hold what this process holds."""

    def all_gather(parts: list[Tensor], x: Tensor, group: Any) -> None:
        for part in parts:
            part.copy_(x)

    def all_to_all(taken: Tensor, given: Tensor, sizes: list[int], given_sizes: list[int], group: Any) -> None:
        taken.copy_(torch.cat([given.split(given_sizes)[0]] * ranks))  # as rank 0, which gets the first columns

    stand_in = SimpleNamespace(
        ProcessGroup=dist.ProcessGroup,
        get_world_size=lambda group=None: ranks,
        get_rank=lambda group=None: 0,
        all_gather=all_gather,
        all_to_all_single=all_to_all,
        all_reduce=lambda x, group: x.mul_(ranks),
        broadcast=lambda x, root, group: None,
    )
    monkeypatch.setattr(exchange, "dist", stand_in)


@pytest.mark.parametrize("ranks", [8, 64, 512])
def test_many_ranks_send_as_derived(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: as for the tables of docs/ranks.md."""
    widths, samples = [40, 50, 6], 2
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 6))
    rows = [p for i in range(2) for p in layer(str(i), widths[i + 1], widths[i], samples)]
    played(ranks, monkeypatch)
    lin = across(linearized(model, (torch.randn(samples, 40), torch.randint(6, (samples,)))))
    # All ranks have the same rows: a damping that makes nothing of it, or K would be computed again in float64.
    IEF(model.parameters(), lr=0.0, damping=1e6).step(linearization=lin)
    assert lin.ranks.world.sent == bytes_per_step(rows, [samples] * ranks)[0]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_cheaper_way_is_taken(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the formulas of docs/ranks.md, on a grid of sizes on both sides of the border; no remainders."""
    played(ranks, monkeypatch)
    taken = set()
    for outputs, inputs, positions, samples in product((24, 72, 264), (24, 72, 264), (1, 7), (1, 4, 16, 64)):
        shape = torch.Size((outputs, inputs))
        factor = outer(torch.randn(1, samples, positions, outputs), torch.randn(1, samples, positions, inputs), shape)
        blocks = Blocks([Block(slice(0, samples), {"w": [factor]})], {"w": torch.empty(shape)}, [0])
        local = LocalJacobian(blocks, torch.ones(1, samples, dtype=torch.float64))
        found = GlobalJacobian(local, exchange.Exchange())
        if isinstance(factor, Outer):
            t, pairs = positions * (outputs + inputs) * 4, positions * samples * ranks
        else:
            t, pairs = shape.numel() * 4, samples * ranks
        update = (ranks - 1) * shape.numel() * 4 / ranks
        sliced = pairs > 64 * 4
        gather = (ranks - 1) * samples * t + sliced * update
        reshard = (ranks - 1) * samples * shape.numel() * 4 / ranks + 2 * update
        assert bool(found.routes.gathers) == (gather <= reshard), (shape, positions, samples)
        assert bool(found.routes.sliced) == (sliced and gather <= reshard)
        taken.add((bool(found.routes.gathers), bool(found.routes.sliced)))
    assert taken == {(True, True), (True, False), (False, False)}


# --- DistributedDataParallel


def wide(rank: int) -> tuple[Batch, nn.Sequential]:
    """A network of which the gradients are much larger than what four samples are made of."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 10))
    torch.manual_seed(rank)
    return Batch((torch.randn(4, 300),), torch.randint(10, (4,))), net


@pytest.mark.parametrize("unused", [False, True], ids=["", "find_unused_parameters"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_nothing_else_is_sent(ranks: int, unused: bool) -> None:
    """What the kernel has sent is what was counted: DistributedDataParallel reduces nothing. With SGD it does."""

    def work(rank: int) -> tuple[Round, Round]:
        found = []
        for name in ("ief", "sgd"):
            batch, net = wide(rank)
            if unused:
                net.append(nn.Identity())
                net[-1].register_parameter("unused", nn.Parameter(torch.ones(7)))
            strategy = DDPStrategy(find_unused_parameters=unused)
            module = contestants.find(name).timed(net)
            found.append(train(module, batch, 1, 3, devices=ranks, strategy=strategy))
        return found[0], found[1]

    rows = [p for i, (o, d) in enumerate(((400, 300), (10, 400))) for p in layer(str(i), o, d, 4)]
    expected = bytes_per_step(rows, [4] * ranks)
    gradients = 2 * (ranks - 1) / ranks * 4 * sum(p.elements for p in rows)
    for (ief, sgd), each in zip(on_ranks(ranks, work), expected, strict=True):
        assert ief.counted == each
        # Messages have headers, barriers count, and a broadcast is passed on.
        assert 0.9 * each < ief.sent < 1.3 * each
        assert sgd.sent > gradients > 10 * ief.sent


# --- the tables of docs/ranks.md


def test_sizes() -> None:
    sizes = {name: sum(p.elements for p in model.parameters) for name, model in MODELS.items()}
    assert [*sizes.values()] == [10_510_346, 86_567_656, 294_912]


def test_cost_of_a_step() -> None:
    """By hand: two linear layers of one position, both gathered; then re-sharded, since they see many positions."""
    step = derive(Model(layer("0", 1000, 2000, 16), 16), 4)
    assert step.rows == 64 and step.gram_bytes == 8 * 64**2
    assert step.gathered_bytes == 64 * (1000 + 2000) * 4
    assert step.sgd_sent == 2 * 3 / 4 * 4 * 2_001_000
    sgd = 3 * 16 * 2_000_000
    assert step.update == 64 * 2_000_000 / sgd
    assert step.solve == 64**3 / 6 / sgd
    assert 16 * 64 / 2 * 3000 / sgd <= step.gram < 16 * 64 / 2 * 4100 / sgd  # without and with the bias
    resharded = derive(Model(layer("0", 100, 200, 16, positions=500), 16), 4)
    assert resharded.gathered_bytes == 0
    assert resharded.update == 1 / 3
    sliced = derive(Model(layer("0", 1000, 2000, 100), 100), 4)  # 400 samples: slices
    assert sliced.gathered_bytes > 0
    assert sliced.update == 1 / 3


@pytest.mark.parametrize("name", MODELS)
def test_tables_of_the_documentation(name: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "ranks.md").read_text(encoding="utf-8")
    table = derived_table(MODELS[name])
    assert f"**{name}**\n\n{table}\n" in text, f"docs/ranks.md should say:\n\n**{name}**\n\n{table}"
