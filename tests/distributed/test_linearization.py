"""Many ranks against one process on the concatenated batch, in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ief
from lightning_ief import directions, linearize, objectives
from lightning_ief.capture import CaptureError, Jacobian, LinearizedBatch
from lightning_ief.distributed import across
from lightning_ief.indicators import gamma, gammas, gradient_norm_imbalance, projections
from tests.capture.test_escaping import Custom
from tests.helpers import Function, per_sample_jacobian, relative_error
from tests.ranks import on_ranks

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*escapes the capture:RuntimeWarning"),
]

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


def escaping() -> tuple[nn.Module, Batch]:
    """Parameters whose use escapes the capture, one of which announces another, among some that do not."""

    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = Custom.apply(self.inner(x).tanh(), self.w)
        return F.linear(hidden + F.linear(x, self.w), self.v) * Custom.apply(self.a, self.b).sum()

    inner = nn.Linear(6, 6)
    return Function.of(inner, forward, w=(4, 6), v=(3, 4), a=(2, 2), b=(2, 2)), (
        torch.randn(11, 6),
        torch.randint(3, (11,)),
    )


MODELS = [mlp, sequence, unused]
SPLITS = [(6, 5), (11, 0), (5, 1, 5), (3, 3, 2, 3)]
OBJECTIVE = objectives.CrossEntropy()


def of_rank(batch: Batch, counts: Sequence[int], rank: int) -> Batch:
    inputs, targets = (x.split(list(counts))[rank] for x in batch)
    return inputs, targets


def linearized(model: nn.Module, batch: Batch) -> LinearizedBatch:
    if not len(batch[1]):
        return LinearizedBatch([], {n: p for n, p in model.named_parameters() if p.requires_grad}, OBJECTIVE)
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
@pytest.mark.parametrize("make", [*MODELS, escaping])
def test_operator(make: Any, counts: tuple[int, ...], balance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ief.distributed.routes._BALANCE", balance)
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


def test_escaping_uses_are_the_slow_truth_on_ranks() -> None:
    model, batch = escaping()
    truth = per_sample_jacobian(model, *batch, OBJECTIVE)
    assert linearize(model, *batch, OBJECTIVE).escaping == ["w", "a", "b"]
    for found in on_ranks(2, lambda rank: across(linearized(model, of_rank(batch, (7, 4), rank))).jacobian.to_dense()):
        assert relative_error(found, truth) < 1e-10


@pytest.mark.parametrize("counts", SPLITS, ids=str)
@pytest.mark.parametrize("make", [*MODELS, escaping])
def test_directions(make: Any, counts: tuple[int, ...]) -> None:
    model, batch = make()

    def every(lin: LinearizedBatch) -> list[dict[str, Tensor]]:
        found = [
            directions.sgd(lin),
            directions.ef(lin, 1e-3),
            directions.ief(lin, 1e-3),
            directions.ief(lin, 0.0),
            directions.natural_gradient(lin, 1e-3),
            directions.natural_gradient(lin, 0.3, max_rows=1, tolerance=1e-9, max_iterations=200),
        ]
        return [dict(direction.form()) for direction in found]

    def indicators_of(lin: LinearizedBatch, found: list[dict[str, Tensor]]) -> list[Tensor]:
        return [gammas(lin, found), gradient_norm_imbalance(lin), projections(lin, found[2]), gamma(lin, found[1])]

    def work(rank: int) -> Any:
        lin = across(linearized(model, of_rank(batch, counts, rank)))
        return every(lin), indicators_of(lin, whole)

    alone = linearize(model, *batch, OBJECTIVE)
    whole = every(alone)
    truth = indicators_of(alone, whole)
    for found, values in on_ranks(len(counts), work):
        for value, true in zip(values, truth, strict=True):
            torch.testing.assert_close(value, true, rtol=1e-9, atol=1e-12)
        for a, b in zip(found[:-1], whole[:-1], strict=True):
            for name in b:
                torch.testing.assert_close(a[name], b[name], rtol=1e-8, atol=1e-10)
        for name in whole[-1]:
            torch.testing.assert_close(found[-1][name], whole[-1][name], rtol=1e-6, atol=1e-7)


def agree(model: nn.Module, parts: list[Batch], tolerance: float) -> None:
    """Assert that K, Jᵀv and an update on ranks are those of one process."""
    whole = LinearizedBatch.of([linearize(model, *part, OBJECTIVE) for part in parts]).jacobian
    v = torch.randn(whole.num_rows, dtype=torch.float64)
    K, d = whole.gram(), whole.rmatvec(v)

    def work(rank: int) -> Any:
        J = across(linearized(model, parts[rank])).jacobian
        found = J.gram(), J.gram(precise=True), J.rmatvec(v)
        into = {name: torch.zeros_like(p) for name, p in J.like.items()}
        J.add_rmatvec(v, into, dict.fromkeys(into, 1.0), dict.fromkeys(into, 0.0))
        return (*found, into)

    results = on_ranks(len(parts), work)
    size = K.diagonal().sqrt()
    for gram, precise, *directions_ in results:
        assert ((gram - K) / size / size[:, None]).abs().max() < tolerance
        assert ((precise - K) / size / size[:, None]).abs().max() < tolerance
        for direction in directions_:
            for name, entry in d.items():
                # To the rounding of the largest entry in the dtype of the parameter.
                scale = max(tolerance, 2 * torch.finfo(entry.dtype).eps) * entry.abs().max().double()
                assert (direction[name].double() - entry.double()).abs().max() <= scale, name
    for found in results[1:]:
        assert torch.equal(found[0], results[0][0])
        assert all(torch.equal(found[2][name], results[0][2][name]) for name in d)


@pytest.mark.parametrize("balance", [0, 64])
@pytest.mark.parametrize("bucket", [5, 2**22])
@pytest.mark.parametrize("make", MODELS)
def test_small_buckets(make: Any, bucket: int, balance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("exchange.BUCKET", "routes.BUCKET", "gram.BUCKET", "routes._BALANCE"):
        value = balance if place.endswith("BALANCE") else bucket
        monkeypatch.setattr(f"lightning_ief.distributed.{place}", value)
    monkeypatch.setattr("lightning_ief.distributed.gram._PANEL", 4)
    model, batch = make()
    agree(model, [of_rank(batch, (4, 1, 6), k) for k in range(3)], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [*MODELS, escaping])
def test_lower_precision(make: Any, dtype: torch.dtype) -> None:
    model, (x, y) = make()
    model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    if make is mlp and dtype == torch.float32:  # parts of two precisions
        model[0].double()
        model[1] = nn.Sequential(nn.Tanh(), Cast(dtype))
        x = x.double()
    agree(model, [of_rank((x, y), (4, 1, 6), k) for k in range(3)], 2e-6)


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def test_lengths_differ_between_ranks() -> None:
    model, (x, y) = sequence()
    parts = [(x[:4], y[:4]), (x[4:9, :3], y[4:9]), (x[9:, :1], y[9:])]
    agree(model, parts, 1e-12)


def test_a_parameter_unused_on_some_ranks() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 30), nn.Linear(6, 30), nn.Linear(30, 3)

        def forward(self, x: Tensor, first: bool) -> Tensor:
            return self.c(self.a(x) if first else self.b(x).tanh())

    model, (x, y) = Branches(), (torch.randn(9, 6), torch.randint(3, (9,)))
    agree(model, [({"x": x[:6], "first": True}, y[:6]), ({"x": x[6:], "first": False}, y[6:])], 1e-12)


def test_memory_that_is_shared_in_other_shapes() -> None:
    class Shared(nn.Module):
        """The bias is registered before the weight; one input is seen with and without positions."""

        def __init__(self) -> None:
            super().__init__()
            self.bias, self.weight = nn.Parameter(torch.randn(9)), nn.Parameter(torch.randn(9, 6))
            self.flat, self.each, self.out = nn.Linear(18, 9), nn.Linear(6, 9), nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            first = F.linear(x[:, 0], self.weight, self.bias)
            return self.out((first + self.flat(x.flatten(1)) + self.each(x).sum(1)).tanh())

    agree(Shared(), [(torch.randn(n, 3, 6), torch.randint(3, (n,))) for n in (2, 1)], 1e-12)


@pytest.mark.parametrize("samples", [4, 300], ids=["gathered", "re-sharded"])
def test_inputs_that_were_written_after_the_gram_matrix_are_refused(samples: int) -> None:
    """As on one rank: what re-sharded rows are made of is read again for Jᵀv."""
    model = nn.Sequential(nn.Linear(60, 2), nn.Tanh(), nn.Linear(2, 2))

    def work(rank: int) -> tuple[bool, bool]:
        x = torch.randn(samples, 60)
        J = across(linearized(model, (x, torch.randint(2, (samples,))))).jacobian
        J.gram()
        x.zero_()
        with pytest.raises(CaptureError, match="was changed in place after the batch had been linearised"):
            J.rmatvec(torch.ones(2 * samples))
        return isinstance(J, Jacobian), "0.weight" in J.routes.gathers

    assert on_ranks(2, work) == [(True, samples == 4)] * 2


@pytest.mark.parametrize("optimizer", ["IEF", "NaturalGradient", "SampledFisher"])
def test_a_group_without_samples(optimizer: str) -> None:
    model, batch = mlp()
    inputs, targets = batch
    alone = {"IEF": directions.ief, "NaturalGradient": directions.natural_gradient}.get(optimizer)

    def step(rank: int) -> dict[str, Tensor]:
        part = of_rank(batch, (6, 0, 5), rank)
        made = getattr(lightning_ief, optimizer)(model.parameters(), lr=1.0, damping=1e-2, sync="local")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        made.step(linearization=across(linearized(model, part), "local"))
        return {name: before[name] - p.detach() for name, p in model.named_parameters()}

    results = on_ranks(3, step)
    for name, entry in results[0].items():
        assert all(torch.equal(found[name], entry) for found in results)
    if alone is not None:
        parts = [alone(linearize(model, *of_rank((inputs, targets), (6, 5), k), OBJECTIVE), 1e-2) for k in range(2)]
        for name, entry in results[0].items():
            torch.testing.assert_close(entry, (parts[0][name] + parts[1][name]) / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["IEF", "NaturalGradient", "SampledFisher"])
def test_a_rank_whose_gradients_are_zero(optimizer: str) -> None:
    model = nn.Linear(4, 3, bias=False)
    batch = torch.cat([torch.randn(3, 4), torch.zeros(2, 4)]), torch.randint(3, (5,))

    def step(rank: int) -> Tensor:
        made = getattr(lightning_ief, optimizer)(model.parameters(), lr=1.0, damping=1e-2, sync="local")
        made.step(linearization=across(linearized(model, of_rank(batch, (3, 2), rank)), "local"))
        return model.weight.detach()

    first, second = on_ranks(2, step)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert not torch.equal(first, model.weight)


def test_groups_draw_different_targets() -> None:
    """The same samples in each of three groups; the first draws as one process does."""
    model, (inputs, targets) = mlp()
    alone, generator = linearize(model, inputs, targets, OBJECTIVE), torch.Generator().manual_seed(3)
    expected = [alone.sample(generator) for _ in range(2)]

    def draw(rank: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        lin = across(linearize(model, inputs, targets, OBJECTIVE), "local")
        return [lin.sample(generator) for _ in range(2)]

    first, *others = on_ranks(3, draw)
    assert all(torch.equal(a, b) for a, b in zip(first, expected, strict=True))
    drawn = [*first, *(each for other in others for each in other)]
    assert len({tuple(each.tolist()) for each in drawn}) == 6


@pytest.mark.parametrize("sync", ["global", "local"])
@pytest.mark.parametrize("when", [1, 10])
def test_ranks_with_other_parameters_are_refused(sync: str, when: int) -> None:
    def work(rank: int) -> list[tuple[int, bool]]:
        refused = []
        model, batch = mlp()
        for number in range(1, 12):
            if number == when:
                with torch.no_grad():
                    model[0].weight.add_(0.1 * torch.randn_like(model[0].weight).mul_(rank))
            try:
                across(linearized(model, of_rank(batch, (6, 5), rank)), sync)
            except ValueError as error:
                refused.append((number, "'0.weight' differs between ranks" in str(error)))
        return refused

    expected = [(1, True), (10, True)] if when == 1 else [(10, True)]
    assert on_ranks(2, work) == [expected, expected]


def centred(w: Tensor) -> Tensor:
    return w - w.mean()


def larger(w: Tensor) -> Tensor:
    """By a million, around the same sum as before: the difference is small against the one, large against the other."""
    return centred(w) * 1e6 + w.mean()


OTHER = {
    "in another order": lambda w: w.flip(0),
    "with the same sum": lambda w: centred(torch.randn_like(w)) + w.mean(),
    "larger by far": larger,
    "a little off": lambda w: w * 1.01,
    "not finite": lambda w: w.log(),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("other", OTHER)
def test_all_ranks_refuse_alike(other: str, which: int) -> None:
    """Otherwise one of them would wait for the others."""
    model, batch = mlp()

    def work(rank: int) -> str:
        if rank == which:
            with torch.no_grad():
                model[0].weight.copy_(OTHER[other](model[0].weight))
        with pytest.raises(ValueError, match="differs between ranks 0 and 1") as error:
            across(linearized(model, of_rank(batch, (6, 5), rank)))
        return str(error.value)

    assert len({*on_ranks(2, work)}) == 1


def test_each_model_is_compared() -> None:
    """The second one has the names of the first; its parameters are other ones on rank 1."""
    model, batch = mlp()

    def work(rank: int) -> None:
        across(linearized(model, of_rank(batch, (6, 5), rank)))
        second, _ = mlp()
        torch.manual_seed(rank)
        second[0].reset_parameters()
        with pytest.raises(ValueError, match="'0.weight' differs between ranks 0 and 1"):
            across(linearized(second, of_rank(batch, (6, 5), rank)))

    on_ranks(2, work)


def test_rounding_is_no_difference() -> None:
    """Neither of an entry nor of a parameter that consists of nothing else, such as the bias of keys."""
    model, batch = mlp()

    def work(rank: int) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 1e-7 * rank)
            model[0].bias.copy_(torch.randn(9)).mul_(1e-9 * rank)
        across(linearized(model, of_rank(batch, (6, 5), rank)))

    on_ranks(2, work)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[4].bias.requires_grad_(False), r"other parameters, \['4.bias'\]: build the same"),
        (lambda m: m.append(nn.Linear(3, 3)), r"\['5.bias', '5.weight'\]"),
        (lambda m: m.__setitem__(4, nn.Linear(9, 4)), r"\['4.bias', '4.weight'\]"),
    ],
)
def test_ranks_with_other_models_are_refused(change: Any, message: str) -> None:
    def work(rank: int) -> None:
        torch.manual_seed(0)
        model, batch = mlp()
        if rank:
            change(model)
        with pytest.raises(ValueError, match=message):
            across(linearized(model, of_rank(batch, (6, 5), rank)))

    on_ranks(2, work)
