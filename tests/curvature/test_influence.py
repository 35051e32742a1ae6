"""The influence of training samples against P × P matrices, and against leaving samples out and training again."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import directions, influence, linearize, objectives
from lightning_ief.attribution import self_influence
from lightning_ief.curvature import influence_products
from tests.curvature.layers import MODELS, OBJECTIVE, batch_of, rows_of
from tests.helpers import per_sample_jacobian, relative_error

pytestmark = pytest.mark.usefixtures("float64")

FISHER = ["empirical", "improved", "sampled", None]
LAMBDA = 0.3


def loader_of(x: Tensor, y: Tensor, size: int) -> Any:
    return DataLoader(TensorDataset(x, y), batch_size=size)


def truth(model: nn.Module, q: Tensor, rows: Tensor, b: Tensor, lam: float = LAMBDA, share: float = 1.0) -> Tensor:
    """J_q (RᵀR/c + λI)⁻¹ J_bᵀ, P × P."""
    fisher = rows.T @ rows / share
    return q @ torch.linalg.solve(fisher + lam * torch.eye(len(fisher)), b.T)


@pytest.mark.parametrize("fisher", FISHER)
@pytest.mark.parametrize("name", MODELS)
def test_a_block_is_that_of_dense_matrices(name: str, fisher: Any) -> None:
    model = MODELS[name]()
    (x, y), (u, v) = batch_of(model, 1, 9), batch_of(model, 2, 4)
    query, block = linearize(model, u, v, OBJECTIVE), linearize(model, x, y, OBJECTIVE)
    generator = torch.Generator().manual_seed(5)
    drawn = [block.sample(generator) for _ in range(2)]
    q, b = per_sample_jacobian(model, u, v, OBJECTIVE), per_sample_jacobian(model, x, y, OBJECTIVE)
    rows = (
        torch.zeros_like(b) if fisher is None else rows_of(model, x, drawn if fisher == "sampled" else [y], y, fisher)
    )
    for share in (1.0, 0.25):
        products = influence_products(query.jacobian, block, fisher, 2, torch.Generator().manual_seed(5))
        assert relative_error(products.influence(LAMBDA, share), truth(model, q, rows, b, share=share)) < 1e-11
        own = influence_products(None, block, fisher, 2, torch.Generator().manual_seed(5))
        assert relative_error(own.influence(LAMBDA, share), truth(model, b, rows, b, share=share)) < 1e-11


@pytest.mark.parametrize("fisher", ["empirical", "improved", None])
@pytest.mark.parametrize("accumulate", [1, 2, 10])
def test_of_a_loader(fisher: Any, accumulate: int) -> None:
    """Eleven samples in batches of 4, 4 and 3: each block stands for all samples; in one block, F is that of all."""
    model = MODELS["sequence"]()
    (x, y), queries = batch_of(model, 1, 11), batch_of(model, 2, 3)
    options = {"fisher": fisher, "accumulate": accumulate, "progress": False}
    found = influence(model, loader_of(x, y, 4), queries, OBJECTIVE, LAMBDA, **options)
    q, expected = per_sample_jacobian(model, *queries, OBJECTIVE), []
    starts = range(0, 11, 4 * accumulate)
    for block in (slice(start, min(start + 4 * accumulate, 11)) for start in starts):
        b = per_sample_jacobian(model, x[block], y[block], OBJECTIVE)
        rows = torch.zeros_like(b) if fisher is None else rows_of(model, x[block], [y[block]], y[block], fisher)
        expected.append(truth(model, q, rows, b, share=len(b) / 11))
    assert relative_error(found, torch.cat(expected, 1)) < 1e-11
    own = self_influence(model, loader_of(x, y, 4), OBJECTIVE, LAMBDA, **options)
    same = influence(model, loader_of(x, y, 4), (x, y), OBJECTIVE, LAMBDA, **options).diagonal()
    assert relative_error(own, same) < 1e-11


def test_rows_add_up_to_what_the_directions_do() -> None:
    model = MODELS["mlp"]()
    (x, y), (u, v) = batch_of(model, 1, 9), batch_of(model, 2, 4)
    block, query = linearize(model, x, y, OBJECTIVE), linearize(model, u, v, OBJECTIVE)
    of = {
        "improved": directions.ief(block, absolute_damping=LAMBDA),
        "empirical": directions.ef(block, LAMBDA),
    }
    for fisher, d in of.items():
        found = influence(
            model,
            [(x, y)],
            (u, v),
            OBJECTIVE,
            LAMBDA,
            fisher=fisher,
            progress=False,  # type: ignore[arg-type]
        )
        assert relative_error(found.sum(1), query.jacobian.matvec(d)) < 1e-10


def test_much_damping_leaves_products_of_gradients() -> None:
    model = MODELS["mlp"]()
    (x, y), queries = batch_of(model, 0, 9), batch_of(model, 1, 4)
    plain = influence(model, [(x, y)], queries, OBJECTIVE, 1.0, fisher=None, progress=False)
    for fisher in FISHER[:3]:
        found = influence(model, [(x, y)], queries, OBJECTIVE, 1e9, fisher=fisher, progress=False)  # type: ignore[arg-type]
        assert relative_error(1e9 * found, plain) < 1e-6


# --- leaving samples out


def minima(x: Tensor, y: Tensor, keep: Tensor, classes: int, lam: float) -> Tensor:
    """The minima of Σ_n keep_bn l_n + λ/2 ‖θ‖² by Newton's method, [B, C, P]; of one class, of least squares."""
    count, size = len(keep), classes * x.shape[1]
    w = torch.zeros(count, classes, x.shape[1])
    for _ in range(12):
        z = torch.einsum("np,bcp->bnc", x, w)
        p = z.softmax(2) if classes > 1 else z
        error = p - (F.one_hot(y, classes) if classes > 1 else y)
        curvature = torch.diag_embed(p) - p[..., None] * p[..., None, :] if classes > 1 else torch.ones(*z.shape, 1)
        gradient = torch.einsum("bn,bnc,np->bcp", keep, error, x) + lam * w
        hessian = torch.einsum("bn,bncd,np,nq->bcpdq", keep, curvature, x, x).reshape(count, size, size)
        w = w - torch.linalg.solve(hessian + lam * torch.eye(size), gradient.flatten(1)).view_as(w)
    assert gradient.abs().max() < 1e-10
    return w


def left_out(x: Tensor, y: Tensor, queries: tuple[Tensor, Tensor], objective: Any) -> tuple[Tensor, nn.Module]:
    """By how much each query's loss rises without each sample, [Q, N]; and the model of all samples."""
    keep = torch.cat([torch.ones(1, len(x)), 1 - torch.eye(len(x))])
    classes = 3 if isinstance(objective, objectives.CrossEntropy) else 1
    w = minima(x, y, keep, classes, 1.0)
    losses = torch.stack([objective.losses(queries[0] @ each.T, queries[1]) for each in w], 1)
    model = nn.Linear(x.shape[1], classes, bias=False)
    with torch.no_grad():
        model.weight.copy_(w[0])
    return losses[:, 1:] - losses[:, :1], model


def problem(objective: Any) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    x, u = torch.randn(150, 3), torch.randn(6, 3)
    true = torch.randn(3, 3 if isinstance(objective, objectives.CrossEntropy) else 1)
    if isinstance(objective, objectives.CrossEntropy):
        y, v = (torch.distributions.Categorical(logits=each @ true).sample() for each in (x, u))
    else:
        y, v = (each @ true + torch.randn(len(each), 1) for each in (x, u))
    return x, y, (u, v)


def test_least_squares_without_a_sample() -> None:
    """F̃ is the Hessian where there is one output; what is left is the second order, leverages of about P/N."""
    objective = objectives.LeastSquares()
    x, y, queries = problem(objective)
    actual, model = left_out(x, y, queries, objective)
    found = influence(model, [(x, y)], queries, objective, 1.0, fisher="improved", progress=False)
    assert torch.corrcoef(torch.stack([found.flatten(), actual.flatten()]))[0, 1] > 0.999
    assert relative_error(found, actual) < 0.06
    # The parameters move by H⁻¹∇l_n/(1 − h_n) exactly, h_n the leverage: l_q then changes by a square that is known.
    hessian = x.T @ x + torch.eye(3)
    h = torch.einsum("np,np->n", x, torch.linalg.solve(hessian, x.T).T)
    steps = torch.linalg.solve(hessian, (x * (model(x).detach() - y)).T) / (1 - h)
    exact = found / (1 - h) + (queries[0] @ steps).square() / 2
    assert relative_error(exact, actual) < 1e-8


@pytest.mark.parametrize(("fisher", "error", "correlation"), [("sampled", 0.15, 0.99), ("improved", 0.6, 0.95)])
def test_logistic_regression_without_a_sample(fisher: Any, error: float, correlation: float) -> None:
    """F of many sampled targets is the Hessian; iEF's F̃ is another matrix, with the same order of samples, nearly."""
    objective = objectives.CrossEntropy()
    x, y, queries = problem(objective)
    actual, model = left_out(x, y, queries, objective)
    options = {"fisher": fisher, "num_samples": 20 if fisher == "sampled" else 1, "progress": False}
    found = influence(model, loader_of(x, y, 50), queries, objective, 1.0, accumulate=3, **options)
    assert relative_error(found, actual) < error
    assert torch.corrcoef(torch.stack([found.flatten(), actual.flatten()]))[0, 1] > correlation


# --- what does not fit


def test_a_sample_without_a_gradient_has_no_influence() -> None:
    model = MODELS["mlp"]()
    (x, y), queries = batch_of(model, 0, 9), batch_of(model, 1, 4)
    y[2], queries[1][1] = -100, -100
    for fisher in FISHER:
        found = influence(model, [(x, y)], queries, OBJECTIVE, LAMBDA, fisher=fisher, progress=False)  # type: ignore[arg-type]
        assert found[:, 2].abs().max() == 0 == found[1].abs().max() and found.isfinite().all()
        assert found[0, 0] != 0


def test_without_damping() -> None:
    """A regular K has a limit, one of samples that depend on each other has none."""
    model = MODELS["mlp"]()
    (x, y), queries = batch_of(model, 0, 5), batch_of(model, 1, 4)
    found = influence(model, [(x, y)], queries, OBJECTIVE, 0.0, progress=False)
    q, b = (per_sample_jacobian(model, *each, OBJECTIVE) for each in (queries, (x, y)))
    assert (
        relative_error(
            found, q @ b.T @ torch.linalg.inv(b @ b.T) * linearize(model, x, y, OBJECTIVE).logit_gradient_norms
        )
        < 1e-8
    )
    twice = loader_of(x[[0, 1, 2, 3, 0, 0]], y[[0, 1, 2, 3, 0, 0]], 4)
    with pytest.raises(
        ValueError, match=r"Training samples 4 to 5: K \+ λI of 2 rows is singular .* damping=0 .* larger"
    ):
        influence(model, twice, queries, OBJECTIVE, 0.0, progress=False)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no batch": ({"training": []}, ValueError, "There are no training samples"),
    "no sample": ({"training": [(torch.zeros(0, 4).double(), torch.zeros(0).long())]}, ValueError, "Empty batch"),
    "no query": ({"queries": (torch.zeros(0, 4).double(), torch.zeros(0).long())}, ValueError, "Empty batch"),
    "damping below 0": ({"damping": -1.0}, ValueError, r"damping=-1.0 \(λ\): must be a finite number"),
    "damping nan": ({"damping": float("nan")}, ValueError, "must be a finite number"),
    "sampled without damping": ({"damping": 0.0, "fisher": "sampled"}, ValueError, "damping=0 .* must be positive"),
    "nothing without damping": ({"damping": 0.0, "fisher": None}, ValueError, "fisher=None: F .* must be positive"),
    "unknown matrix": ({"fisher": "exact"}, ValueError, "influence: fisher='exact': must be"),
    "no targets drawn": ({"fisher": "sampled", "num_samples": 0}, ValueError, r"num_samples=0 \(M\)"),
    "no batch in a block": ({"accumulate": 0}, ValueError, "accumulate=0: a block must be made of at least one batch"),
    "no pair": ({"training": [torch.zeros(3, 4)]}, TypeError, r"Training batch 0 must be \(inputs, targets\)"),
    "queries of another kind": ({"queries": {"x": 1}}, TypeError, "The batch of queries must be"),
    "targets of another kind": ({"queries": (torch.randn(2, 4).double(), torch.randn(2))}, TypeError, "dtype int64"),
    "not finite": (
        {"training": [(torch.full((2, 4), torch.nan, dtype=torch.float64), torch.zeros(2).long())]},
        ValueError,
        r"Training batch 0: losses or logit gradients are not finite, samples \[0, 1\]",
    ),
    "in random order": (
        {"training": DataLoader(TensorDataset(torch.zeros(4, 4), torch.zeros(4).long()), shuffle=True)},
        ValueError,
        r"draws its samples at random \(RandomSampler\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = MODELS["mlp"]()
    given: dict[str, Any] = {
        "training": [batch_of(model, 0, 5)], "queries": batch_of(model, 1, 2), "damping": 0.1, "progress": False,
    }  # fmt: skip
    with pytest.raises(kind, match=message):
        influence(model, objective=OBJECTIVE, **(given | changed))


def test_a_model_that_moves_between_batches_is_refused() -> None:
    model = MODELS["mlp"]()

    def moving() -> Any:
        for seed in range(2):
            yield batch_of(model, seed, 4)
            with torch.no_grad():
                model[0].weight.mul_(2.0)

    with pytest.raises(ValueError, match="changed between the linearizations"):
        influence(model, moving(), batch_of(model, 7, 2), OBJECTIVE, 0.1, progress=False)


def test_some_parameters_alone() -> None:
    model = MODELS["mlp"]()
    (x, y), queries = batch_of(model, 0, 6), batch_of(model, 1, 3)
    head = {"2.weight": model[2].weight, "2.bias": model[2].bias}
    found = influence(model, [(x, y)], queries, OBJECTIVE, LAMBDA, fisher="empirical", parameters=head, progress=False)
    q, b = (per_sample_jacobian(model, *each, OBJECTIVE)[:, 25:] for each in (queries, (x, y)))
    assert relative_error(found, truth(model, q, b, b)) < 1e-11


def test_the_progress_bar_can_be_switched_off(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    shown: list[bool] = []

    def track(sequence: Any, *args: Any, disable: bool, **options: Any) -> Any:
        shown.append(not disable)
        return sequence

    monkeypatch.setattr("lightning_ief.attribution.track", track)
    model = MODELS["mlp"]()
    for progress in (True, False):
        influence(model, [batch_of(model, 0, 5)], batch_of(model, 1, 2), OBJECTIVE, 0.1, progress=progress)
    assert shown == [True, False]
    monkeypatch.undo()
    influence(model, [batch_of(model, 0, 5)], batch_of(model, 1, 2), OBJECTIVE, 0.1, progress=False)
    assert capsys.readouterr().out == ""
