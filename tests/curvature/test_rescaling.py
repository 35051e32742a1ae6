"""Rows of three Fisher matrices, and the diagonal of each, against dense rows one sample at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ief import directions, linearize
from lightning_ief.capture import LinearizedBatch
from lightning_ief.curvature import fisher_rows
from lightning_ief.distributed import across
from tests.curvature.layers import MODELS, OBJECTIVE, batch_of, rows_of
from tests.helpers import flatten, relative_error
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

FISHER = ["improved", "empirical", "sampled"]


def of(name: str, fisher: str, keep: bool = False, samples: int = 9) -> tuple[Any, Tensor]:
    """Rows as an operator, and dense."""
    model = MODELS[name]()
    x, y = batch_of(model, samples=samples)
    sides = [each for each, p in model.named_parameters() if p.ndim > 1] if keep else []
    lin = linearize(model, x, y, OBJECTIVE, keep_sides=sides)
    drawn = [lin.sample(generator) for generator in [torch.Generator().manual_seed(5)] for _ in range(2)]
    rows = fisher_rows(lin, fisher, 2, torch.Generator().manual_seed(5))  # type: ignore[arg-type]
    return rows, rows_of(model, x, drawn if fisher == "sampled" else [y], y, fisher)


@pytest.mark.parametrize("fisher", FISHER)
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_the_matrix(name: str, fisher: str) -> None:
    rows, dense = of(name, fisher)
    assert relative_error(rows.to_dense(), dense) < 1e-12
    assert relative_error(rows.gram(), dense @ dense.T) < 1e-12
    v = torch.randn(len(dense))
    assert relative_error(flatten(rows.rmatvec(v)), dense.T @ v) < 1e-12


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("fisher", FISHER)
@pytest.mark.parametrize("name", MODELS)
def test_the_diagonal(name: str, fisher: str, keep: bool) -> None:
    rows, dense = of(name, fisher, keep)
    assert relative_error(flatten(rows.column_squares()), dense.square().sum(0)) < 1e-12


def test_the_diagonal_a_few_samples_at_a_time(monkeypatch: Any) -> None:
    monkeypatch.setattr("lightning_ief.capture.factors._CHUNK", 30)
    rows, dense = of("sequence", "improved", keep=True)
    assert relative_error(flatten(rows.column_squares()), dense.square().sum(0)) < 1e-12


def test_the_diagonal_of_gradients_beyond_float32() -> None:
    """A sample that is almost learnt: its s is beyond float32, its row over √s is as any other."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = MODELS["mlp"]()
    x, y = batch_of(model, samples=1)
    with torch.no_grad():
        model[2].bias[y[0]] += 60
    lin = linearize(model, x, y, OBJECTIVE, verify=False)
    assert 0 < float(lin.logit_gradient_norms) < 1e-45
    found = fisher_rows(lin, "improved").column_squares()
    model, x = model.double(), x.double()
    z = model(x)
    c = z.detach().softmax(1)  # ∂l/∂z, whose entry of the target would be lost in 1 − p
    c[0, y[0]] = 0.0
    c[0, y[0]] = -c.sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(z, [*model.parameters()], c / c.norm())]).square()
    assert relative_error(flatten(found), expected) < 1e-5


@pytest.mark.parametrize("fisher", FISHER)
@pytest.mark.parametrize("split", [4, 9])
def test_the_diagonal_on_ranks(fisher: str, split: int) -> None:
    """Also if one of them has no sample."""
    model = MODELS["sequence"]()
    x, y = batch_of(model, samples=9)
    expected = None if fisher == "sampled" else rows_of(model, x, [y], y, fisher).square().sum(0)

    def work(rank: int) -> Tensor:
        own = MODELS["sequence"]()
        part = (slice(0, split), slice(split, 9))[rank]
        none = LinearizedBatch([], dict(own.named_parameters()), OBJECTIVE)
        lin = across(linearize(own, x[part], y[part], OBJECTIVE) if len(y[part]) else none)
        rows = fisher_rows(lin, fisher, generator=torch.Generator().manual_seed(5))  # type: ignore[arg-type]
        found = flatten(rows.column_squares())
        if fisher == "sampled":
            assert relative_error(found, rows.to_dense().square().sum(0)) < 1e-12
        return found

    first, second = on_ranks(2, work)
    assert torch.equal(first, second)
    assert expected is None or relative_error(first, expected) < 1e-12


def test_a_sample_that_is_fitted_takes_no_part() -> None:
    model = MODELS["mlp"]()
    x, y = batch_of(model, samples=5)
    ignored = y.clone()
    ignored[2] = -100  # counts for nothing
    lin = linearize(model, x, ignored, OBJECTIVE)
    rows, expected = fisher_rows(lin, "improved").to_dense(), rows_of(model, x, [y], y, "improved")
    expected[2] = 0.0
    assert rows[2].count_nonzero() == 0 and relative_error(rows, expected) < 1e-12


def test_ief_is_made_of_these_rows() -> None:
    model = MODELS["mlp"]()
    x, y = batch_of(model, samples=9)
    lin = linearize(model, x, y, OBJECTIVE)
    rows = fisher_rows(lin, "improved")
    found = flatten(rows.solve(lin.logit_gradient_norms.sqrt(), 0.2))
    assert relative_error(found, flatten(directions.ief(lin, absolute_damping=0.2))) < 1e-12


def test_refused() -> None:
    model = MODELS["mlp"]()
    lin = linearize(model, *batch_of(model, samples=3), OBJECTIVE)
    with pytest.raises(ValueError, match="fisher='exact': must be 'empirical', 'improved' or 'sampled'"):
        fisher_rows(lin, "exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_samples=0 \(M\): must be at least 1"):
        fisher_rows(lin, "sampled", 0)
