"""Many ranks against one process on the concatenated batch, in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ief import directions, linearize, objectives
from lightning_ief.capture.joint import EmptyLinearization, LinearizedBatch
from lightning_ief.distributed import across
from tests.helpers import Function
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

Batch = tuple[Any, Tensor]


def mlp() -> tuple[nn.Module, Batch]:
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9, bias=False), nn.Tanh(), nn.Linear(9, 3))
    return model, (torch.randn(11, 6), torch.randint(3, (11,)))


def sequence() -> tuple[nn.Module, Batch]:
    """An embedding, used again as output layer; attention; a norm; a mean over positions."""
    body = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self: Function, x: Tensor) -> Tensor:
        return self.inner(F.embedding(x, self.words)).mean(1) @ self.words.T * self.scale

    return Function.of(body, forward, words=(7, 8), scale=()), (torch.randint(7, (11, 5)), torch.randint(7, (11,)))


def unused() -> tuple[nn.Module, Batch]:
    """A frozen layer, one that is not used, a convolution."""
    model = nn.ModuleDict({"a": nn.Conv2d(2, 4, 3), "b": nn.Linear(4, 4), "c": nn.Linear(4, 2), "d": nn.Linear(2, 2)})
    model["b"].requires_grad_(False)
    body = lambda self, x: self.inner["c"](self.inner["b"](self.inner["a"](x).tanh().mean((2, 3))))  # noqa: E731
    return Function.of(model, body), (torch.randn(11, 2, 5, 5), torch.randint(2, (11,)))


MODELS = [mlp, sequence, unused]
SPLITS = [(6, 5), (11, 0), (5, 1, 5), (3, 3, 2, 3)]
OBJECTIVE = objectives.CrossEntropy()


def of_rank(batch: Batch, counts: Sequence[int], rank: int) -> Batch:
    inputs, targets = (x.split(list(counts))[rank] for x in batch)
    return inputs, targets


def linearized(model: nn.Module, batch: Batch) -> LinearizedBatch:
    if not len(batch[1]):
        return EmptyLinearization({n: p for n, p in model.named_parameters() if p.requires_grad}, OBJECTIVE)
    return linearize(model, *batch, OBJECTIVE)


def close(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            close(a[name], b[name])
    else:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("balance", [0, 64])  # the updates of gathered layers by slices, and whole
@pytest.mark.parametrize("counts", SPLITS, ids=str)
@pytest.mark.parametrize("make", MODELS)
def test_operator(make: Any, counts: tuple[int, ...], balance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ief.distributed.jacobian._BALANCE", balance)
    model, batch = make()
    whole = linearize(model, *batch, OBJECTIVE)
    v, d = torch.randn(11), {name: torch.randn_like(p) for name, p in whole.parameters.items()}

    def work(rank: int) -> Any:
        lin = across(linearized(model, of_rank(batch, counts, rank)))
        J = lin.jacobian
        first = J.rmatvec(v)
        into = {name: p.detach().clone() for name, p in lin.parameters.items()}
        found = J.gram(), J.gram(precise=True), J.rmatvec(v), J.matvec(d), J.to_dense(), J.row_norms()
        J.add_rmatvec(v, into, dict.fromkeys(into, 0.3), dict.fromkeys(into, 0.9))
        return (*found, into, first, lin.losses, lin.logit_gradient_norms)

    J = whole.jacobian
    updated = {name: 0.9 * p.detach() + 0.3 * J.rmatvec(v)[name] for name, p in whole.parameters.items()}
    truth = J.gram(), J.gram(), J.rmatvec(v), J.matvec(d), J.to_dense(), J.row_norms(), updated, J.rmatvec(v)
    truth = *truth, whole.losses, whole.logit_gradient_norms
    results = on_ranks(len(counts), work)
    for found in results:
        for a, b in zip(found, truth, strict=True):
            close(a, b)
    for a, b in zip(results[0], results[-1], strict=True):  # replicas: the same to the last bit
        assert all(torch.equal(a[k], b[k]) for k in a) if isinstance(a, dict) else torch.equal(a, b)


@pytest.mark.parametrize("counts", SPLITS, ids=str)
@pytest.mark.parametrize("make", MODELS)
def test_directions(make: Any, counts: tuple[int, ...]) -> None:
    model, batch = make()

    def every(lin: LinearizedBatch) -> list[dict[str, Tensor]]:
        return [
            directions.sgd(lin),
            directions.ef(lin, 1e-3),
            directions.ief(lin, 1e-3),
            directions.ief(lin, 0.0),
            directions.natural_gradient(lin, 1e-3),
            directions.natural_gradient(lin, 1e-2, max_rows=1, tolerance=1e-9, max_iterations=200),
        ]

    whole = every(linearize(model, *batch, OBJECTIVE))
    for found in on_ranks(len(counts), lambda rank: every(across(linearized(model, of_rank(batch, counts, rank))))):
        for a, b in zip(found[:-1], whole[:-1], strict=True):
            for name in b:
                torch.testing.assert_close(a[name], b[name], rtol=1e-8, atol=1e-10)
        for name in whole[-1]:
            torch.testing.assert_close(found[-1][name], whole[-1][name], rtol=1e-6, atol=1e-7)
