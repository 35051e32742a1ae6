"""Some parameters of a linearization alone, as if the others were frozen; what went into a layer and what came back."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ief import directions, gamma, linearize, objectives
from lightning_ief.capture import CaptureError, LinearizedBatch
from lightning_ief.distributed import across
from tests.helpers import Function, flatten, per_sample_jacobian, random_direction, relative_error
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

N, D, C = 9, 5, 3
OBJECTIVE = objectives.CrossEntropy()
X, Y = torch.randn(N, D, dtype=torch.float64), torch.arange(N) % C
NAMES = ["odd", "inner.2.weight", "low", "inner.2.bias"]  # in another order than the model's


def network() -> nn.Module:
    """One parameter for every kind of factor: outer products, dense ones, one by one, through derived tensors."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(D, 30), nn.LayerNorm(30), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, C))

    def forward(m: Function, x: Tensor) -> Tensor:
        return m.inner(x) * m.scale + F.linear(x, m.up @ m.low) + torch.special.i0(m.odd) * x[:, :1]

    return Function.of(body, forward, scale=(C,), up=(C, 1), low=(1, D), odd=(C,), idle=(2,))


def frozen() -> nn.Module:
    """The same with all other parameters frozen."""
    model = network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in NAMES)
    return model


def one(model: nn.Module) -> LinearizedBatch:
    return linearize(model, X, Y, OBJECTIVE)


def stacked(model: nn.Module) -> LinearizedBatch:
    return LinearizedBatch.of([linearize(model, X[part], Y[part], OBJECTIVE) for part in (slice(4), slice(4, N))])


def joined(model: nn.Module) -> LinearizedBatch:
    """Restricted before they are joined; an empty one among them."""
    parts = [linearize(model, X[part], Y[part], OBJECTIVE) for part in (slice(4), slice(4, N))]
    empty = LinearizedBatch([], parts[0].parameters, OBJECTIVE)
    names = [name for name in NAMES if name in parts[0].parameters]
    first, *others = (part.restrict(names) for part in (*parts, empty))
    return LinearizedBatch.of([first, *others])


def answers(lin: LinearizedBatch) -> dict[str, Any]:
    """All that a linearization is asked for, on many ranks by all of them."""
    torch.manual_seed(1)
    drawn = random_direction(dict(frozen().named_parameters()))
    d = {name: drawn[name] for name in lin.parameters}
    targets = [(lin.targets + r) % C for r in (1, 2)]
    hessian, coordinates = lin.hessian_rows()
    sampled, rows = lin.target_rows(targets), lin.jacobian
    cg = directions.natural_gradient(lin, 1e-1, max_rows=1, tolerance=1e-13, max_iterations=500)
    return {
        "dense": rows.to_dense(),
        "gram": rows.gram(),
        "precise": rows.gram(precise=True),
        "norms": rows.row_norms(),
        "matvec": rows.matvec(d),
        "rmatvec": flatten(rows.rmatvec(torch.arange(1.0, N + 1))),
        "sampled": sampled.gram(),
        "hessian": hessian.gram(),
        "coordinates": coordinates,
        "losses": lin.losses,
        "s": lin.logit_gradient_norms,
        "product": flatten(lin.fisher_product(d)),
        "gamma": gamma(lin, d),
        "ief": flatten(directions.ief(lin, 1e-3).form()),
        "cg": flatten(cg),
        "number": torch.tensor(lin.num_logits, dtype=torch.float64),
    }


def assert_same(found: dict[str, Any], truth: dict[str, Any]) -> None:
    errors = {key: relative_error(found[key], value) for key, value in truth.items()}
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("make", [one, stacked, joined])
def test_as_if_the_others_were_frozen(make: Callable[[nn.Module], LinearizedBatch]) -> None:
    model = frozen()
    truth = answers(one(model))
    assert relative_error(truth["dense"], per_sample_jacobian(model, X, Y, OBJECTIVE)) < 1e-10
    lin = make(network()).restrict(NAMES)
    assert list(lin.parameters) == list(one(model).parameters)  # in the order of the model
    assert_same(answers(lin), truth)


@pytest.mark.parametrize("empty", [False, True])
def test_on_ranks(empty: bool) -> None:
    truth = answers(one(frozen()))
    mine = [slice(0, 5), slice(5, N), slice(N, N)] if empty else [slice(0, 5), slice(5, N)]

    def work(rank: int) -> Any:
        model, part = network(), mine[rank]
        parameters = dict(model.named_parameters())
        has = len(Y[part])
        local = linearize(model, X[part], Y[part], OBJECTIVE) if has else LinearizedBatch([], parameters, OBJECTIVE)
        whole = across(local)
        columns = torch.cat([torch.full((p.numel(),), name in NAMES) for name, p in parameters.items()])
        dense = whole.jacobian.restrict(NAMES).to_dense()
        return answers(whole.restrict(NAMES)), answers(across(local.restrict(NAMES))), dense, columns

    for first, second, dense, columns in on_ranks(len(mine), work):
        assert_same(first, truth)
        assert_same(second, truth)
        assert relative_error(dense, truth["dense"]) < 1e-10
        assert int(columns.sum()) == dense.shape[1]


def test_caches_are_its_own() -> None:
    whole = one(network()).jacobian
    gram = whole.gram()
    part = whole.restrict(["scale"])
    assert relative_error(part.gram(), part.to_dense() @ part.to_dense().T) < 1e-12
    assert torch.equal(whole.gram(), gram)
    assert relative_error(whole.restrict(whole.like).gram(), gram) < 1e-12
    again = part.restrict(["scale"])
    assert torch.equal(again.gram(), part.gram())


def test_nothing_is_copied() -> None:
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 200))
    lin = linearize(model, torch.randn(2, 200), torch.randn(2, 200), objectives.LeastSquares(), keep_sides=["2.weight"])
    ((_, right, _),) = lin.jacobian.sides("2.weight")
    ((_, same, _),) = lin.restrict(["2.weight"]).jacobian.sides("2.weight")
    assert right.data_ptr() == same.data_ptr()


@pytest.mark.parametrize("names", [["low", "scales"], "scales", []])
def test_unknown_names_are_refused(names: Any) -> None:
    lin = one(network())
    for each in (lin, lin.jacobian, lin.restrict(NAMES), LinearizedBatch([], lin.parameters, OBJECTIVE)):
        with pytest.raises(ValueError, match=r"no parameters \['scales'\]" if names else "No parameter was chosen"):
            each.restrict(names)
    assert lin.restrict("scale").parameters.keys() == {"scale"}
    with pytest.raises(ValueError, match=r"no parameters \['scale'\]"):
        lin.restrict(NAMES).restrict(["scale"])


def test_vectors_of_other_parameters_are_refused() -> None:
    lin = one(network())
    d = random_direction(lin.parameters)
    for ask in (lin.restrict(NAMES).fisher_product, lambda v: gamma(lin.restrict(NAMES), v)):
        with pytest.raises(ValueError, match="different spaces"):
            ask(d)


def test_other_parameters_on_another_rank_are_refused() -> None:
    def work(rank: int) -> None:
        whole = across(linearize(network(), X[rank::2], Y[rank::2], OBJECTIVE))
        with pytest.raises(ValueError, match=r"Only some ranks have rows of \['low', 'odd'\]"):
            whole.jacobian.restrict(["scale", "odd"] if rank else ["scale", "low"])

    on_ranks(2, work)


def test_parameters_that_moved_since() -> None:
    """Rows that are there already are those of before; what would need the graph once more is refused."""
    model = network()
    lin = one(model)
    part, truth = lin.restrict(NAMES), flatten(directions.ief(lin.restrict(NAMES), 1e-3))
    with torch.no_grad():
        model.scale.add_(1.0)
    part.require_unmoved()
    assert torch.equal(flatten(directions.ief(part, 1e-3)), truth)
    for ask in (
        lin.require_unmoved,
        part.hessian_rows,
        lambda: part.target_rows([Y]),
        lambda: gamma(part, random_direction(part.parameters)),
        lambda: one(model).restrict(["scale"]).require_unmoved() or lin.restrict(["scale"]).require_unmoved(),
    ):
        with pytest.raises(CaptureError, match="changed after they had been linearised"):
            ask()


# --- a method of one's own, by layers ---------------------------------------------------------------------------------


def by_layers(lin: LinearizedBatch, damping: float) -> dict[str, Tensor]:
    """Block-diagonal iEF: d_l = J_lᵀ(J_l J_lᵀ + λI)⁻¹ s for each layer l, weight and bias together."""
    layers: dict[str, list[str]] = {}
    for name in lin.parameters:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    found: dict[str, Tensor] = {}
    for names in layers.values():
        found |= lin.jacobian.restrict(names).solve(lin.logit_gradient_norms, damping).form()
    return found


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C))


def test_a_block_diagonal_method_of_ones_own() -> None:
    lin, rows = linearize(mlp(), X, Y, OBJECTIVE), per_sample_jacobian(mlp(), X, Y, OBJECTIVE)
    blocks = rows.split([D * 8 + 8, 8 * C + C], dim=1)
    s, damping = lin.logit_gradient_norms, 1e-3 * torch.eye(N)
    truth = torch.cat([block.T @ torch.linalg.solve(block @ block.T + damping, s) for block in blocks])
    assert relative_error(flatten(by_layers(lin, 1e-3)), truth) < 1e-10
    for found in on_ranks(
        2, lambda rank: flatten(by_layers(across(linearize(mlp(), X[rank::2], Y[rank::2], OBJECTIVE)), 1e-3))
    ):
        assert relative_error(found, truth) < 1e-10


# --- what went in and what came back ----------------------------------------------------------------------------------


def tied() -> nn.Module:
    """An embedding that is the output layer, too; a convolution; matrices on the right; a weight used twice."""
    torch.manual_seed(0)

    def forward(m: Function, x: Tensor) -> Tensor:
        y = F.embedding(x, m.words, padding_idx=2)
        y = F.conv1d(y.movedim(1, 2), m.kernel, m.bias, padding=1).movedim(2, 1).tanh()
        y = torch.addmm(m.shift, y.flatten(0, 1), m.addmm).unflatten(0, y.shape[:2]).tanh() @ m.matmul
        y = F.linear(F.linear(y, m.twice).tanh(), m.twice)
        return F.linear(y.mean(1) * m.norm, m.words)

    shapes = {"words": (7, 4), "kernel": (4, 4, 3), "bias": (4,), "addmm": (4, 6), "shift": (6,), "matmul": (6, 4)}
    return Function(forward, **shapes, twice=(4, 4), norm=(4,), spare=(4, 4))


TOKENS, NEXT = torch.randint(7, (N, 5)), torch.randint(7, (N,))
KEPT = {"words": 2, "kernel": 1, "addmm": 1, "matmul": 1, "twice": 2, "spare": 0}


def rows_of(sides: list[tuple[Tensor, Tensor, int]], parameter: Tensor) -> Tensor:
    """Rows [R N, P] from both sides: Σ_t leftᵀ right, summed over the uses."""
    total = torch.zeros(1, *parameter.shape)
    for left, right, _ in sides:
        one_hot = left if left.is_floating_point() else F.one_hot(left, len(parameter)).to(right.dtype)
        left, right = torch.broadcast_tensors(one_hot[..., None], right[..., None, :])  # noqa: PLW2901
        total = total + (left * right).sum(2).reshape(-1, *parameter.shape)
    return total.flatten(1)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", KEPT)
def test_rows_from_both_sides(name: str, parts: int) -> None:
    model = tied()
    batches = [
        linearize(model, TOKENS[k::parts], NEXT[k::parts], OBJECTIVE, keep_sides=list(KEPT)) for k in range(parts)
    ]
    lin = LinearizedBatch.of(batches) if parts > 1 else batches[0]
    for rows in (lin.jacobian, lin.hessian_rows()[0], lin.jacobian.restrict([name])):
        sides = rows.sides(name)
        assert len(sides) == KEPT[name]
        truth = rows.restrict([name]).to_dense()
        found = rows_of(sides, lin.parameters[name])
        assert relative_error(found.expand(len(truth), -1), truth) < 1e-12
    plain = linearize(model, TOKENS, NEXT, OBJECTIVE)
    assert relative_error(plain.jacobian.gram().diagonal().sort()[0], lin.jacobian.gram().diagonal().sort()[0]) < 1e-12


def test_what_went_in_is_what_went_in() -> None:
    """Whichever side it is: the scales of gradients belong to what came back."""
    small = (
        (lambda m, x: F.linear(x, m.w) * 1e-9, 1),
        (lambda m, x: x @ m.w * 1e-9, 0),
        (lambda m, x: torch.addmm(torch.zeros(D), x, m.w) * 1e-9, 0),
    )
    for body, side in small:
        model = Function(body, w=(D, D))
        lin = linearize(model, X, torch.randn(N, D), objectives.LeastSquares(), keep_sides="w")
        for each, times in ((lin, 1), (LinearizedBatch.of([lin, lin]), 2)):
            ((left, right, _),) = each.jacobian.sides("w")
            went_in, came_back = (right, left) if side else (left, right)
            assert torch.equal(went_in[0, :, 0], X.repeat(times, 1))
            assert relative_error(came_back[0, :, 0], lin.logit_gradients.repeat(times, 1) * 1e-9) < 1e-12


def test_sides_of_all_ranks() -> None:
    lin = linearize(tied(), TOKENS, NEXT, OBJECTIVE, keep_sides=KEPT)
    truth = {name: lin.jacobian.restrict([name]).to_dense() for name in KEPT}

    def work(rank: int) -> Any:
        part = slice(0, 5) if rank == 0 else slice(5, N)
        rows = across(linearize(tied(), TOKENS[part], NEXT[part], OBJECTIVE, keep_sides=KEPT)).jacobian
        sides = {name: rows.sides(name) for name in KEPT}
        with pytest.raises(ValueError, match=r"'norm' are not held"):
            rows.sides("norm")
        return {name: rows_of(each, lin.parameters[name]) for name, each in sides.items()}, rows.gram()

    for found, gram in on_ranks(2, work):
        for name, rows in found.items():
            assert relative_error(rows.expand(N, -1), truth[name]) < 1e-12
        assert relative_error(gram, lin.jacobian.gram()) < 1e-12


def test_a_kronecker_factored_curvature() -> None:
    """A ⊗ G of a layer, from what went in and what came back: its diagonal, one sample after the other."""
    model = mlp()
    lin = linearize(model, X, Y, OBJECTIVE, keep_sides=["0.weight"])
    ((left, right, _),) = lin.jacobian.sides("0.weight")
    gradients, inputs = left[0, :, 0], right[0, :, 0]
    assert torch.equal(inputs, X)
    rows = torch.einsum("no,ni->noi", gradients, inputs).flatten(1)
    assert relative_error(rows, lin.jacobian.restrict(["0.weight"]).to_dense()) < 1e-12
    # Of one sample it is the empirical Fisher matrix itself.
    curvature = torch.kron(torch.outer(gradients[0], gradients[0]), torch.outer(inputs[0], inputs[0]))
    truth = per_sample_jacobian(model, X[:1], Y[:1], OBJECTIVE)[:, : 8 * D]
    assert relative_error(curvature, truth.T @ truth) < 1e-12


def test_where_there_are_no_sides() -> None:
    names = ["inner.1.weight", "inner.4.bias", "low", "odd", "scale"]
    lin = linearize(network(), X, Y, OBJECTIVE, keep_sides=names)
    for name in names:
        with pytest.raises(ValueError, match=rf"'{name}' are not held by what went in.*keep_sides=\['{name}'\]"):
            lin.jacobian.sides(name)
    with pytest.raises(ValueError, match=r"no parameters \['sale'\]"):
        lin.jacobian.sides("sale")
    with pytest.raises(ValueError, match=r"no parameters \['sale'\]; there are \["):
        linearize(network(), X, Y, OBJECTIVE, keep_sides=["sale"])
    small = nn.Conv1d(2, 2, 1)
    plain = linearize(small, torch.randn(3, 2, 40), torch.randn(3, 2, 40), objectives.LeastSquares())
    with pytest.raises(ValueError, match=r"keep_sides=\['weight'\]"):  # added up, since that is cheaper
        plain.jacobian.sides("weight")


def test_batches_that_use_a_weight_otherwise_have_no_common_sides() -> None:
    model = Function(lambda m, x, twice: F.linear(F.linear(x, m.w) if twice else x, m.w), w=(D, D))
    y = torch.randn(N, D)
    parts = [linearize(model, (X, twice), y, objectives.LeastSquares(), keep_sides=["w"]) for twice in (True, False)]
    assert [len(part.jacobian.sides("w")) for part in parts] == [2, 1]
    with pytest.raises(ValueError, match="Several batches must use it alike"):
        LinearizedBatch.of(parts).jacobian.sides("w")


def test_sides_that_were_written_to_are_refused() -> None:
    x = X.clone()
    lin = linearize(mlp(), x, Y, OBJECTIVE, keep_sides=["0.weight"])
    lin.backward()
    x.zero_()
    with pytest.raises(CaptureError, match="changed in place"):
        lin.jacobian.sides("0.weight")


def test_models_are_left_alone() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    lin = linearize(model, X, Y, OBJECTIVE, keep_sides=["0.weight", "2.weight"])
    by_layers(lin, 1e-3)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
