"""Directions of many ranks: forming is a collective of its own name."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_ief import IEF, SampledFisher, directions, gamma, linearize, objectives
from lightning_ief.capture import CaptureError, Direction, LinearizedBatch
from lightning_ief.distributed import across, whole_parameters
from lightning_ief.indicators import projections
from tests.helpers import flatten, relative_error
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVE = objectives.CrossEntropy()
X, Y = torch.randn(10, 6, dtype=torch.float64), torch.arange(10) % 3


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def part(rank: int, ranks: int = 2) -> Any:
    return linearize(network(), X[rank::ranks], Y[rank::ranks], OBJECTIVE)


KINDS = {
    "sgd": directions.sgd,
    "ef": lambda lin: directions.ef(lin, 1e-3),
    "ief": lambda lin: directions.ief(lin, 1e-3),
    "natural_gradient": lambda lin: directions.natural_gradient(lin, 1e-3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reading_before_forming_is_refused(kind: str) -> None:
    """On one rank alone, while the other goes on: it must not wait for it."""
    truth = flatten(KINDS[kind](linearize(network(), X, Y, OBJECTIVE)))

    def work(rank: int) -> Any:
        d = KINDS[kind](across(part(rank)))
        if rank == 0:
            with pytest.raises(CaptureError, match=r"before all of them had called form\(\) on it"):
                d["0.weight"]
            with pytest.raises(CaptureError, match=r"form\(\)"):
                dict(d)
            assert "0.weight" in d and len(d) == 4 and "not formed" in repr(d)
        return flatten(d.form())

    first, second = on_ranks(2, work)
    assert torch.equal(first, second)
    assert relative_error(first, truth) < 1e-9


@pytest.mark.parametrize("conjugate", [True, False])
def test_other_directions_are_formed(conjugate: bool) -> None:
    def work(rank: int) -> Any:
        lin = across(part(rank))
        if conjugate:
            return flatten(directions.natural_gradient(lin, 1e-1, max_rows=1))
        return flatten(directions.sampled_fisher(lin, 1.0, generator=torch.Generator().manual_seed(0)))

    first, second = on_ranks(2, work)
    assert torch.equal(first, second)


def test_indicators_form_what_they_read() -> None:
    alone = linearize(network(), X, Y, OBJECTIVE)
    truth = gamma(alone, directions.ief(alone, 1e-3)), projections(alone, directions.ef(alone, 0.0)).sum()

    def work(rank: int) -> Any:
        lin = across(part(rank))
        return gamma(lin, directions.ief(lin, 1e-3)), projections(lin, directions.ef(lin, 0.0)).sum()

    for found in on_ranks(2, work):
        torch.testing.assert_close(found, truth, rtol=1e-8, atol=0.0)


def test_ranks_on_their_own_read_as_one_process() -> None:
    def work(rank: int) -> Any:
        d = directions.ief(across(part(rank), "local"), 1e-3)
        return flatten(d) if rank == 0 else None

    found, _ = on_ranks(2, work)
    assert relative_error(found, flatten(directions.ief(part(0), 1e-3))) < 1e-12


def test_reading_after_the_parameters_moved_is_refused() -> None:
    def work(rank: int) -> None:
        lin = across(part(rank))
        lin.parts[0].backward()
        d, formed = directions.ief(lin, 1e-3), directions.ief(lin, 1e-3).form()
        with torch.no_grad():
            lin.parameters["0.bias"].add_(1.0)
        with pytest.raises(CaptureError, match="after the parameters had been changed"):
            d.form()
        with pytest.raises(CaptureError, match="after the parameters had been changed"):
            directions.sgd(lin).form()  # whose operator of all ranks is made only now
        assert flatten(formed).isfinite().all()

    on_ranks(2, work)


def test_whole_directions_of_shards_are_refused() -> None:
    def work(rank: int) -> None:
        net = network()
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        local = linearize(net, X[rank::2], Y[rank::2], OBJECTIVE, parameters=whole_parameters(net))
        d = directions.ief(across(local, parameters=dict(net.named_parameters())), 1e-3)
        assert isinstance(d, Direction) and len(d) == 4
        for read in (d.form, lambda: d["0.weight"], lambda: dict(d)):
            with pytest.raises(CaptureError, match=r"sharded. Use IEF, EF or NaturalGradient in row space"):
                read()
        before = [p.to_local().clone() for p in net.parameters()]
        with torch.no_grad():
            names = dict(net.named_parameters())
            d.add_to(names, dict.fromkeys(names, -0.1), dict.fromkeys(names, 1.0))
        assert any(not torch.equal(a, p.to_local()) for a, p in zip(before, net.parameters(), strict=True))

    on_ranks(2, work)


def test_nothing_that_is_handed_out_is_kept() -> None:
    def work(rank: int) -> None:
        lin = across(part(rank))
        d = flatten(directions.ief(lin, 1e-3).form()).clone()
        lin.jacobian.gram().diagonal().add_(1.0)
        lin.jacobian.gram(precise=True).zero_()
        lin.jacobian.row_norms().zero_()
        for entry in lin.jacobian.rmatvec(torch.ones(10)).values():
            entry.fill_(torch.nan)
        for numbers in (lin.losses, lin.all_losses, lin.logit_gradient_norms):
            numbers.fill_(torch.nan)
        assert torch.equal(flatten(directions.ief(lin, 1e-3).form()), d)
        assert lin.not_finite is None

    on_ranks(2, work)


# --- optimizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(5, 0, 5), (0, 4, 6)], ids=str)
def test_ranks_without_samples_count_their_draws(counts: tuple[int, ...]) -> None:
    """Or they would draw other targets than the rest, once they have samples."""

    def work(rank: int) -> Any:
        model = network()
        optimizer = SampledFisher(model.parameters(), damping=1.0, sync="local")
        for _ in range(2):
            x, y = (each.split(counts)[rank] for each in (X, Y))
            parameters = dict(model.named_parameters())
            local = linearize(model, x, y, OBJECTIVE) if len(y) else LinearizedBatch([], parameters, OBJECTIVE)
            optimizer.step(linearization=across(local, "local"))
        return optimizer.state_dict()

    first, *others = on_ranks(3, work)
    assert first["param_groups"][0]["steps"] == 2
    assert all(each == first for each in others)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_same_linearization_twice_is_refused(sharded: bool) -> None:
    def work(rank: int) -> None:
        net = network()
        if sharded:
            fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        whole = whole_parameters(net) if sharded else dict(net.named_parameters())
        lin = across(
            linearize(net, X[rank::2], Y[rank::2], OBJECTIVE, parameters=whole), parameters=dict(net.named_parameters())
        )
        optimizer = IEF(net.parameters(), lr=0.1, damping=1e-2)
        optimizer.step(linearization=lin)
        with pytest.raises(CaptureError, match=r"changed after they had been linearised. Linearize the batch again"):
            optimizer.step(linearization=lin)

    on_ranks(2, work)
