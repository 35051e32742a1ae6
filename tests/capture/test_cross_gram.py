"""Inner products of the rows of two batches, against dense rows one sample at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ief import linearize, objectives
from lightning_ief.capture import Jacobian, LinearizedBatch
from lightning_ief.capture.factors import Dense, Outer, PerOperation, PulledBack
from lightning_ief.capture.metric import Kronecker
from lightning_ief.distributed import across
from lightning_ief.linalg import gram
from tests.curvature.layers import MODELS, batch_of
from tests.helpers import Function, per_sample_jacobian, relative_error
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVE = objectives.CrossEntropy()


def positions() -> nn.Module:
    """A layer at each of three positions, without a bias, wide enough to be held by both sides."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Linear(2, 30, bias=False), nn.Tanh(), nn.Linear(30, 30), nn.Flatten(),
        nn.Linear(60, 3),
    )  # fmt: skip


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 9, 2), nn.Tanh(), nn.Conv1d(9, 8, 2, bias=False), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def derived() -> nn.Module:
    """Low-rank adapters, a raw parameter without a rule, and one that is frozen."""
    torch.manual_seed(0)
    inner = nn.Linear(4, 3)
    inner.bias.requires_grad_(False)
    return Function.of(
        inner,
        lambda m, x: m.inner(x) * m.scale + F.linear(x, m.up @ m.low) + torch.hypot(x[:, :3], m.odd),
        scale=(3,),
        up=(3, 1),
        low=(1, 4),
        odd=(3,),
    )


def tied() -> nn.Module:
    """An embedding whose weight makes the logits, too."""
    torch.manual_seed(0)
    return Function.of(nn.Embedding(6, 4), lambda m, x: F.linear(m.inner(x).mean(1), m.inner.weight)[:, :3])


CASES: dict[str, Callable[[], nn.Module]] = {
    **MODELS, "positions": positions, "convolutions": convolutions, "derived": derived, "tied": tied,
}  # fmt: skip


def batch(name: str, model: nn.Module, seed: int, samples: int) -> tuple[Tensor, Tensor]:
    if name == "tied":
        torch.manual_seed(seed)
        return torch.randint(6, (samples, 5)), torch.randint(3, (samples,))
    return batch_of(model, seed, samples)


def two(name: str, sizes: tuple[int, int] = (5, 8)) -> tuple[Jacobian, Jacobian, Tensor, Tensor]:
    """Rows of two batches as operators, and dense."""
    model = CASES[name]()
    batches = [batch(name, model, seed, n) for seed, n in enumerate(sizes)]
    found = [linearize(model, x, y, OBJECTIVE).jacobian for x, y in batches]
    return *found, *(per_sample_jacobian(model, x, y, OBJECTIVE) for x, y in batches)  # type: ignore[return-value]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [(5, 8), (1, 40)])
def test_inner_products_are_those_of_dense_rows(name: str, sizes: tuple[int, int]) -> None:
    """At 1 and 40 samples the two are held in different forms."""
    a, b, dense_a, dense_b = two(name, sizes)
    for precise in (False, True):
        assert relative_error(a.cross_gram(b, precise), dense_a @ dense_b.T) < 1e-12
    assert relative_error(b.cross_gram(a), dense_b @ dense_a.T) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_with_itself_it_is_the_gram_matrix(name: str) -> None:
    _, b, _, _ = two(name)
    assert relative_error(b.cross_gram(b), b.gram()) < 1e-12


def test_all_kinds_of_factors_occur() -> None:
    found = [two(name, (1, 40))[1] for name in CASES]
    kinds = {type(factor) for rows in found for name in rows.like for factor in rows.blocks.of(name)}
    assert kinds == {Dense, Outer, PulledBack, PerOperation}


def test_both_sides_against_rows_as_they_are() -> None:
    model = positions()
    (x, y), (u, v) = batch_of(model, 0, 5), batch_of(model, 1, 8)
    a = linearize(model, x, y, OBJECTIVE, keep_sides=["1.weight"]).jacobian
    b = linearize(model, u, v, OBJECTIVE).jacobian
    assert isinstance(a.blocks.of("1.weight")[0], Outer) and isinstance(b.blocks.of("1.weight")[0], Dense)
    dense = [per_sample_jacobian(model, *each, OBJECTIVE) for each in ((x, y), (u, v))]
    assert relative_error(a.cross_gram(b), dense[0] @ dense[1].T) < 1e-12


@pytest.mark.parametrize("name", ["sequence", "positions", "derived"])
def test_a_few_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in ("lightning_ief.linalg.gram._CHUNK", "lightning_ief.linalg.gram._CACHED"):
        monkeypatch.setattr(chunk, 7)
    monkeypatch.setattr("lightning_ief.capture.factors._CHUNK", 30)
    monkeypatch.setattr("lightning_ief.capture.jacobian.MOST_FLAT", 1)
    a, b, dense_a, dense_b = two(name)
    assert relative_error(a.cross_gram(b), dense_a @ dense_b.T) < 1e-12


def test_pairs_of_positions_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one sample has more pairs with all others than are allowed."""
    monkeypatch.setattr(gram, "_CHUNK", 20)
    sizes = []
    compute = gram._Inner.compute

    def seen(self: Any, r: int, q: int) -> Tensor:
        sizes.append((found := compute(self, r, q)).numel())
        return found

    monkeypatch.setattr(gram._Inner, "compute", seen)
    terms = [gram.OuterProducts(torch.randn(1, n, 3, 4), torch.randn(1, n, 3, 5), 4) for n in (6, 7)]
    rows = [torch.einsum("nto,nti->noi", term.left[0], term.right[0]).flatten(1) for term in terms]
    found = gram.pairwise_gram(terms[:1], None, terms[1:])
    assert relative_error(found.view(6, 7), rows[0] @ rows[1].T) < 1e-12
    assert max(sizes) <= 20


@pytest.mark.parametrize("form", [gram.pairwise_gram, gram.columns_gram])
@pytest.mark.parametrize("cotangents", [(1, 3), (3, 1), (2, 3)])
@pytest.mark.parametrize("one_hot", [False, True])
def test_forms_with_other_numbers_of_cotangents(form: Any, cotangents: tuple[int, int], one_hot: bool) -> None:
    terms, rows = [], []
    for n, count in zip((3, 4), cotangents, strict=True):
        left = torch.randint(0, 5, (1, n, 2)) if one_hot else torch.randn(1, n, 2, 5)
        terms.append([gram.OuterProducts(left, torch.randn(count, n, 2, 6), 5)])
        dense = F.one_hot(left, 5).double() if one_hot else left
        rows.append(torch.einsum("nto,rnti->rnoi", dense[0], terms[-1][0].right).flatten(2))
    truth = torch.einsum("anp,bmp->anbm", *rows)
    assert relative_error(form(terms[0], None, terms[1]), truth) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "sequence", "positions"])
@pytest.mark.parametrize("counts", [(1, 3), (3, 1)])
def test_several_cotangents(name: str, counts: tuple[int, int]) -> None:
    model = CASES[name]()
    rows, dense = [], []
    for seed, count in enumerate(counts):
        x, y = batch_of(model, seed, 4 + seed)
        lin = linearize(model, x, y, OBJECTIVE)
        others = [torch.randint(3, y.shape) for _ in range(count)]
        rows.append(lin.target_rows(others))
        dense.append(torch.cat([per_sample_jacobian(model, x, each, OBJECTIVE) for each in others]))
    assert relative_error(rows[0].cross_gram(rows[1]), dense[0] @ dense[1].T) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "sequence", "positions", "derived"])
def test_of_some_parameters_of_several_batches_and_scaled(name: str) -> None:
    model = CASES[name]()
    x, y = batch_of(model, 0, 7)
    whole = [linearize(model, x[part], y[part], OBJECTIVE) for part in (slice(0, 3), slice(3, 7))]
    a = LinearizedBatch.of(whole)
    u, v = batch_of(model, 1, 4)
    b = linearize(model, u, v, OBJECTIVE)
    dense = [per_sample_jacobian(model, *each, OBJECTIVE) for each in ((x, y), (u, v))]
    assert relative_error(a.jacobian.cross_gram(b.jacobian), dense[0] @ dense[1].T) < 1e-12
    factors = torch.rand(7) + 0.5
    found = a.jacobian.scaled(factors).cross_gram(b.jacobian.scaled(torch.full((4,), 3.0)))
    assert relative_error(found, 3 * factors[:, None] * (dense[0] @ dense[1].T)) < 1e-12
    names = [*b.parameters][1:]
    some = slice(b.parameters[next(iter(b.parameters))].numel(), None)
    found = a.restrict(names).jacobian.cross_gram(b.restrict(names).jacobian)
    assert relative_error(found, dense[0][:, some] @ dense[1][:, some].T) < 1e-12


def test_gradients_beyond_float32_keep_their_digits() -> None:
    """A sample that is almost learnt: σ is a power of two of its own for each row."""
    torch.set_default_dtype(torch.float32)
    model = MODELS["mlp"]()
    x, y = batch_of(model, samples=4)
    with torch.no_grad():
        model[2].bias[y[0]] += 80
    same = y == y[0]
    a = linearize(model, x, y, OBJECTIVE, verify=False).jacobian
    found = a.cross_gram(a)
    assert 0 < float(found[same][:, same].diagonal().max()) < 1e-45
    assert relative_error(found[same][:, same], a.gram()[same][:, same]) < 1e-5


def test_float32_in_double_precision() -> None:
    """`precise` has the digits of the rows, which are float32."""
    torch.set_default_dtype(torch.float32)
    a, b, _, _ = two("positions", (5, 8))
    found, truth = a.cross_gram(b, precise=True), a.to_dense().double() @ b.to_dense().double().T
    assert relative_error(found, truth) < 1e-6
    assert found.dtype == torch.float64


def test_it_is_the_readers_own() -> None:
    a, b, dense_a, dense_b = two("mlp")
    a.cross_gram(b).zero_()
    assert relative_error(a.cross_gram(b), dense_a @ dense_b.T) < 1e-12


def test_what_has_no_inner_products_is_refused() -> None:
    a, b, _, _ = two("mlp")
    other, *_ = two("mlp")
    with pytest.raises(ValueError, match=r"\['0.weight', .* are not the same parameters"):
        a.cross_gram(other)
    with pytest.raises(ValueError, match=r"different spaces: only in the first: \['0.weight'\]"):
        a.cross_gram(b.restrict(["0.bias", "2.weight", "2.bias"]))
    model = MODELS["mlp"]()
    x, y = batch_of(model, samples=3)
    before = linearize(model, x, y, OBJECTIVE).jacobian
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(ValueError, match="changed between the linearizations of two batches"):
        linearize(model, x, y, OBJECTIVE).jacobian.cross_gram(before)
    model = MODELS["mlp"]()
    lin = linearize(model, x, y, OBJECTIVE, keep_sides=["0.weight"])
    mapped = lin.in_metric({"0.weight": Kronecker(torch.eye(4), torch.eye(5))}).jacobian
    for pair in ((mapped, lin.jacobian), (lin.jacobian, mapped)):
        with pytest.raises(ValueError, match=r"got a MetricJacobian: linearize both batches on one rank"):
            pair[0].cross_gram(pair[1])
    written = linearize(model, moving := x.clone(), y, OBJECTIVE, keep_sides=["0.weight"]).jacobian
    moving.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        lin.jacobian.cross_gram(written)


def _refused(rank: int) -> str:
    model = MODELS["mlp"]()
    x, y = batch_of(model, seed=rank, samples=3)
    lin = linearize(model, x, y, OBJECTIVE)
    with pytest.raises(ValueError, match="got a GlobalJacobian: linearize both batches on one rank") as caught:
        lin.jacobian.cross_gram(across(lin).jacobian)
    return str(caught.value)


def test_rows_of_many_ranks_are_refused() -> None:
    assert len({*on_ranks(2, _refused)}) == 1
