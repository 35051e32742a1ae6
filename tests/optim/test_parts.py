"""An optimizer of some parameters steps on a linearization of all as on that of a model with the others frozen."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_ief import IEF, NaturalGradient, SampledFisher, linearize, objectives
from lightning_ief.capture import CaptureError, LinearizedBatch
from lightning_ief.distributed import across, whole_parameters
from tests.helpers import flatten, small_network, weights
from tests.optim.test_accumulate import OPTIMIZERS
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVE = objectives.CrossEntropy()
X, Y = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3


def body_frozen() -> nn.Sequential:
    model = small_network()
    model[0].requires_grad_(False)
    return model


def batch(model: nn.Module, part: slice = slice(0, 8)) -> LinearizedBatch:
    if len(Y[part]):
        return linearize(model, X[part], Y[part], OBJECTIVE)
    return LinearizedBatch([], {name: p for name, p in model.named_parameters() if p.requires_grad}, OBJECTIVE)


def assert_stepped(found: Tensor, truth: Tensor) -> None:
    """The same weights, with an error that is small against the step."""
    step = (truth - weights(small_network())).norm()
    assert step > 0
    assert (found - truth).norm() < 1e-10 * step


@pytest.mark.parametrize("parts", [[slice(0, 8)], [slice(0, 3), slice(3, 8)]], ids=["one batch", "micro-batches"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_if_the_body_were_frozen(name: str, parts: list[slice]) -> None:
    frozen, model = body_frozen(), small_network()
    for each in (frozen, model):
        optimizer = OPTIMIZERS[name](each[2].parameters(), accumulate=len(parts))
        for _ in range(2):  # F̂(M) draws other targets in the second step
            for part in parts:
                optimizer.step(linearization=batch(each, part))
    assert_stepped(weights(model), weights(frozen))


@pytest.mark.parametrize("sync", ["global", 1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_ranks(name: str, sync: Any) -> None:
    def step(rank: int, model: nn.Sequential) -> Tensor:
        part = [slice(0, 5), slice(5, 8)][rank]
        optimizer = OPTIMIZERS[name](model[2].parameters(), sync=sync)
        optimizer.step(linearization=across(batch(model, part), sync))
        return weights(model)

    for found, truth in on_ranks(2, lambda rank: (step(rank, small_network()), step(rank, body_frozen()))):
        assert_stepped(found, truth)


@pytest.mark.parametrize("counts", [(8, 0), (5, 3)], ids=str)
def test_micro_batches_on_ranks(counts: tuple[int, int]) -> None:
    truth = body_frozen()
    IEF(truth[2].parameters(), damping=1e-3).step(linearization=batch(truth))

    def step(rank: int) -> Tensor:
        model = small_network()
        optimizer = IEF(model[2].parameters(), damping=1e-3, accumulate=2)
        start = sum(counts[:rank])
        for part in (slice(start, start + counts[rank] // 2), slice(start + counts[rank] // 2, start + counts[rank])):
            optimizer.step(linearization=across(batch(model, part)))
        return weights(model)

    for found in on_ranks(2, step):
        assert_stepped(found, weights(truth))


@pytest.mark.parametrize("make", [IEF, NaturalGradient])
def test_parameters_that_are_sharded(make: Any) -> None:
    truth = body_frozen()
    make(truth[2].parameters(), lr=0.5, damping=1e-2).step(linearization=batch(truth))

    def step(rank: int) -> Tensor:
        model = small_network()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = make(model[2].parameters(), lr=0.5, damping=1e-2, accumulate=2)
        parameters = dict(model.named_parameters())
        for part in (slice(0, 2), slice(2, 4)):
            x, y = X[rank::2][part], Y[rank::2][part]
            local = linearize(model, x, y, OBJECTIVE, parameters=whole_parameters(model))
            optimizer.step(linearization=across(local, parameters=parameters))
        return flatten({name: p.full_tensor().detach() for name, p in model.named_parameters()})

    for found in on_ranks(2, step):
        assert_stepped(found, weights(truth))


def test_shards_that_moved_within_a_window_are_noticed() -> None:
    def work(rank: int) -> None:
        model = small_network()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer, parameters = IEF(model[2].parameters(), accumulate=2), dict(model.named_parameters())
        for k in range(2):
            part = slice(2 * k, 2 * k + 2)
            whole = whole_parameters(model)
            local = linearize(model, X[rank::2][part], Y[rank::2][part], OBJECTIVE, parameters=whole)
            local.backward()  # FSDP shards the parameters again
            optimizer.collect(across(local, parameters=parameters))
            if k == 0:
                with torch.no_grad():
                    parameters["2.bias"].to_local().add_(1.0)
        with pytest.raises(CaptureError, match="changed after they had been linearised"):
            optimizer.step()

    on_ranks(2, work)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_head_and_body_apart(accumulate: int) -> None:
    """Two optimizers on one linearization: the second one steps along the rows of before the first step."""
    truth, model = small_network(), small_network()
    for layer, damping in ((2, 1e-3), (0, 1e-1)):
        frozen = small_network()
        frozen[2 - layer].requires_grad_(False)
        IEF(frozen[layer].parameters(), damping=damping).step(linearization=batch(frozen))
        truth[layer].load_state_dict(frozen[layer].state_dict())
    head = IEF(model[2].parameters(), damping=1e-3, accumulate=accumulate)
    body = IEF(model[0].parameters(), damping=1e-1, accumulate=accumulate)
    for part in [slice(0, 8)] if accumulate == 1 else [slice(0, 3), slice(3, 8)]:
        lin = batch(model, part)
        head.step(linearization=lin)
        body.step(linearization=lin)
    assert_stepped(weights(model), weights(truth))
    for optimizer in (head, body):
        with pytest.raises(CaptureError, match="changed after they had been linearised"):
            optimizer.step(linearization=lin)


def test_head_and_body_apart_on_ranks() -> None:
    truth = small_network()
    lin = batch(truth)
    for layer in (2, 0):
        IEF(truth[layer].parameters(), damping=1e-3).step(linearization=lin)

    def step(rank: int) -> Tensor:
        model = small_network()
        lin = across(batch(model, slice(rank * 5, 5 + rank * 3)))
        for layer in (2, 0):
            IEF(model[layer].parameters(), damping=1e-3).step(linearization=lin)
        return weights(model)

    for found in on_ranks(2, step):
        assert_stepped(found, weights(truth))


@pytest.mark.parametrize("make", [SampledFisher, NaturalGradient, lambda p: NaturalGradient(p, max_rows=1)])
def test_what_needs_the_graph_is_refused_after_another_step(make: Any) -> None:
    model = small_network()
    lin, optimizer = batch(model), make(model[0].parameters())
    IEF(model[2].parameters()).step(linearization=lin)
    before = weights(model)
    with pytest.raises(CaptureError, match=r"changed after they had been linearised. Linearize the batch again"):
        optimizer.step(linearization=lin)
    assert torch.equal(weights(model), before)


def test_an_optimizer_of_two_models() -> None:
    model, other = small_network(), small_network()
    optimizer = IEF([*model[2].parameters(), *other.parameters()])
    with pytest.raises(RuntimeError, match=r"shapes \[\(7, 5\).*does not know"):
        optimizer.step(linearization=batch(model))


def test_nothing_to_move_is_refused() -> None:
    model = small_network()
    optimizer = IEF(model[0].parameters())
    model[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match="has nothing to move: all of its parameters are frozen"):
        optimizer.step(linearization=batch(model))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_parameters_that_are_frozen_meanwhile(accumulate: int) -> None:
    """Linearised with them, stepped without them."""
    frozen, model = small_network(), small_network()
    frozen[0].bias.requires_grad_(False)
    for each in (frozen, model):
        optimizer = IEF(each.parameters(), damping=1e-3, accumulate=accumulate)
        for part in [slice(0, 8)] if accumulate == 1 else [slice(0, 3), slice(3, 8)]:
            optimizer.collect(batch(each, part))
            each[0].bias.requires_grad_(False)
        optimizer.step()
    assert_stepped(weights(model), weights(frozen))
