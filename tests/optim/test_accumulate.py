"""One update of several micro-batches: that of all their samples in one batch, in float64."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ief import EF, IEF, NaturalGradient, SampledFisher, directions, gamma, linearize, objectives
from lightning_ief.capture import LinearizedBatch
from lightning_ief.distributed import across
from tests.distributed.test_linearization import MODELS, OBJECTIVE, close, linearized, of_rank
from tests.module.test_ranks import fit
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

Make = Callable[..., Any]
OPTIMIZERS: dict[str, Make] = {
    "ief": lambda p, **o: IEF(p, lr=0.5, damping=1e-4, **o),
    "ef": lambda p, **o: EF(p, lr=0.05, damping=1e-3, normalize=True, weight_decay=0.1, **o),
    "sampled_fisher": lambda p, **o: SampledFisher(p, lr=0.3, damping=1.0, num_samples=2, **o),
    "natural_gradient": lambda p, **o: NaturalGradient(p, lr=0.1, damping=1e-2, **o),
    "conjugate gradients": lambda p, **o: NaturalGradient(
        p, lr=0.1, damping=1.0, max_rows=1, tolerance=1e-13, max_iterations=500, **o
    ),
}


@pytest.mark.parametrize("counts", [(6, 5), (4, 4, 3), (9, 1, 1)], ids=str)
@pytest.mark.parametrize("make", MODELS)
def test_stacked_rows_are_those_of_one_batch(make: Any, counts: tuple[int, ...]) -> None:
    model, batch = make()
    whole = linearize(model, *batch, OBJECTIVE)
    parts = [linearize(model, *of_rank(batch, counts, k), OBJECTIVE) for k in range(len(counts))]
    lin = LinearizedBatch.of(parts)
    v, d = torch.randn(11), {name: torch.randn_like(p) for name, p in whole.parameters.items()}
    for found, truth in ((lin.jacobian, whole.jacobian), (lin.hessian_rows()[0], whole.hessian_rows()[0])):
        w = v.repeat(truth.cotangents)
        close(found.gram(), truth.gram())
        close(found.gram(precise=True), truth.gram())
        close(found.matvec(d), truth.matvec(d))
        close(found.rmatvec(w), truth.rmatvec(w))
        close(found.to_dense(), truth.to_dense())
    cotangents = [torch.randn_like(whole.logits) for _ in range(2)]
    close(lin.pullback(cotangents).gram(), whole.pullback(cotangents).gram())
    close(lin.jvps([d]), whole.jvps([d]))
    close(lin.hessian_rows()[1], whole.hessian_rows()[1])
    close(lin.fisher_product(d), whole.fisher_product(d))
    close(lin.losses, whole.losses)
    close(gamma(lin, d), gamma(whole, d))
    targets = [whole.sample(torch.Generator().manual_seed(r)) for r in range(2)]
    assert all(torch.equal(lin.sample(torch.Generator().manual_seed(r)), target) for r, target in enumerate(targets))
    close(lin.target_rows(targets).gram(), whole.target_rows(targets).gram())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_weights_as_large_batches(name: str) -> None:
    # 46 samples: batches of 12, 12, 12, 10 against 4 · 3, 4 · 3, 4 · 3, 4 + 4 + 2; epochs end in an update.
    alone = fit(OPTIMIZERS[name], 12, 46, 5)
    found = fit(lambda p: OPTIMIZERS[name](p, accumulate=3), 4, 46, 5)
    assert found["steps"] == alone["steps"] == 20
    for key, truth in alone["weights"].items():
        assert (found["weights"][key] - truth).norm() / truth.norm() < 1e-12


def test_an_incomplete_window_ends_with_the_epoch() -> None:
    alone = fit(OPTIMIZERS["ief"], 12, 20, 2)
    found = fit(lambda p: OPTIMIZERS["ief"](p, accumulate=3), 4, 20, 2)  # 3 micro-batches, then 2
    assert found["steps"] == alone["steps"] == 4
    for key, truth in alone["weights"].items():
        assert (found["weights"][key] - truth).norm() / truth.norm() < 1e-12


def test_micro_batches_on_ranks() -> None:
    alone = fit(OPTIMIZERS["ief"], 12, 48, 3)
    for found in on_ranks(
        2, lambda rank: fit(lambda p: OPTIMIZERS["ief"](p, accumulate=2), 3, 48, 3, devices=2, strategy="ddp")
    ):
        assert found["steps"] == alone["steps"] == 12
        for key, truth in alone["weights"].items():
            assert (found["weights"][key] - truth).norm() / truth.norm() < 1e-12


def test_graphs_are_let_go() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    optimizer = IEF(model.parameters(), accumulate=3)
    kept = []
    for _ in range(2):
        lin = linearize(model, torch.randn(4, 6), torch.randint(3, (4,)), objectives.CrossEntropy())
        kept.append(weakref.ref(lin.output))
        optimizer.step(linearization=lin)
    del lin
    assert [ref() for ref in kept] == [None, None]
    assert optimizer.pending == 2


def test_a_loss_that_is_not_finite_skips_the_whole_window() -> None:
    model = nn.Linear(6, 3)
    optimizer = IEF(model.parameters(), accumulate=2)
    before = model.weight.detach().clone()
    x = torch.randn(4, 6)
    broken, y = x.index_fill(0, torch.tensor([1]), torch.nan), torch.tensor([0, 1, 2, 0])
    optimizer.step(linearization=linearize(model, broken, y, objectives.CrossEntropy()))
    with pytest.warns(RuntimeWarning, match=r"samples \[1\] of the batch \(of 8\)"):
        optimizer.step(linearization=linearize(model, x, y, objectives.CrossEntropy()))
    assert torch.equal(model.weight, before)
    assert optimizer.pending == 0


@pytest.mark.parametrize("option", [{"accumulate": 0}, {"sync": 0}, {"sync": "all"}])
def test_options_out_of_range(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        IEF([nn.Parameter(torch.ones(2))], **option)


def test_groups_of_ranks_average_their_exact_updates() -> None:
    model, batch = MODELS[0]()
    counts = (4, 2, 2, 3)

    def step(optimizer: Any, lin: Any) -> dict[str, Any]:
        before = {name: p.detach().clone() for name, p in lin.parameters.items()}
        optimizer.step(linearization=lin)
        return {name: before[name] - p.detach() for name, p in model.named_parameters()}

    def work(sync: Any) -> Callable[[int], Any]:
        return lambda rank: step(
            IEF(model.parameters(), lr=1.0, damping=1e-3, sync=sync),
            across(linearized(model, of_rank(batch, counts, rank)), sync),
        )

    for sync, groups in ((2, (6, 5)), ("local", counts), (1, counts)):
        each = [
            directions.ief(linearize(model, *of_rank(batch, groups, g), OBJECTIVE), 1e-3) for g in range(len(groups))
        ]
        mean = {name: sum(d[name] for d in each) / len(groups) for name in each[0]}
        for found in on_ranks(4, work(sync)):
            for name in mean:
                torch.testing.assert_close(found[name], mean[name], rtol=1e-9, atol=1e-11)


def test_copies_keep_their_options() -> None:
    optimizer = copy.deepcopy(IEF([nn.Parameter(torch.ones(2))], accumulate=3, sync="local"))
    assert (optimizer.accumulate, optimizer.sync, optimizer.pending) == (3, "local", 0)
