"""WoodFisher against blocks of a dense Fisher matrix, inverted one by one; and what it leaves of a model."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_ief import objectives
from lightning_ief.curvature import BlockFisher, block_fishers, removed, woodfisher
from tests.curvature.layers import MODELS, OBJECTIVE, batch_of, rows_of
from tests.helpers import Function, per_sample_jacobian, relative_error, trainable

pytestmark = pytest.mark.usefixtures("float64")

WEIGHTS = ["0.weight", "2.weight"]
LAMBDA = 1e-2


def mlp() -> nn.Module:
    return MODELS["mlp"]().eval()


def loader_of(x: Tensor, y: Tensor, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [*zip(x.split(size), y.split(size), strict=True)]


def columns(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Rows by parameter."""
    sizes = {name: p.numel() for name, p in trainable(model).items()}
    return dict(zip(sizes, rows.split([*sizes.values()], dim=1), strict=True))


def naive(w: Tensor, rows: Tensor, b: int, pruned: Tensor) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Of each block its entries, F without λ, and F⁻¹ of those that are not pruned already."""
    for start in range(0, w.numel(), b):
        own = range(start, min(start + b, w.numel()))
        f = torch.zeros(len(own), len(own))
        for g in rows:
            g = torch.where(pruned, 0.0, g)[list(own)]
            f += torch.outer(g, g) / len(rows)
        yield own, f, torch.linalg.inv(f + LAMBDA * torch.eye(len(own)))


def naive_saliency(w: Tensor, rows: Tensor, b: int, pruned: Tensor) -> Tensor:
    found = torch.zeros(w.numel())
    for own, _, inverse in naive(w, rows, b, pruned):
        for i, q in enumerate(own):
            found[q] = w.flatten()[q] ** 2 / (2 * inverse[i, i])
    return found


def naive_values(w: Tensor, rows: Tensor, b: int, pruned: Tensor, going: Tensor, update: str) -> Tensor:
    """The weight without those that go, one block and one entry at a time."""
    found, old = w.flatten().clone(), w.flatten()
    for own, f, inverse in naive(w, rows, b, pruned):
        if update == "summed":
            for i, q in enumerate(own):
                if going[q]:
                    found[list(own)] -= old[q] * inverse[:, i] / inverse[i, i]
        if update == "exact":
            f = f + LAMBDA * torch.eye(len(own))
            stay = [i for i, q in enumerate(own) if not going[q] and not pruned[q]]
            gone = [i for i, q in enumerate(own) if going[q]]
            if stay and gone:
                change = torch.linalg.inv(f[stay][:, stay]) @ f[stay][:, gone] @ old[[own[i] for i in gone]]
                found[[own[i] for i in stay]] += change
    return torch.where(going | pruned, 0.0, found).view(w.shape)


# 20 and 15 entries: blocks that fit, that leave a rest, larger than both; 6 samples, fewer than some blocks, and more.
@pytest.mark.parametrize(
    ("block_size", "samples", "fisher"),
    [(1, 13, "empirical"), (5, 13, "improved"), (7, 6, "empirical"), (7, 13, "improved"), (100, 6, "improved"),
     (100, 45, "empirical")],
)  # fmt: skip
def test_the_dense_formula(block_size: int, samples: int, fisher: Any) -> None:
    model = mlp()
    x, y = batch_of(model, samples=samples)
    rows = columns(model, rows_of(model, x, [y], y, fisher))
    old = {name: model.get_parameter(name).detach().clone() for name in WEIGHTS}
    none = {name: torch.zeros(old[name].numel(), dtype=torch.bool) for name in WEIGHTS}
    saliency = torch.cat([naive_saliency(old[name], rows[name], block_size, none[name]) for name in WEIGHTS])
    going = torch.zeros(35, dtype=torch.bool)
    going[saliency.argsort()[:21]] = True  # 60 % of 20 + 15
    found = block_fishers(model, loader_of(x, y), OBJECTIVE, fisher, block_size=block_size)
    for update in ("summed", "exact", "none"):
        values, masks = removed(old, found, 0.6, LAMBDA, update=update)  # type: ignore[arg-type]
        for name, gone in zip(WEIGHTS, going.split([20, 15]), strict=True):
            assert torch.equal(masks[name].flatten(), ~gone)
            expected = naive_values(old[name], rows[name], block_size, none[name], gone, update)
            assert relative_error(values[name], expected) < 1e-10


@pytest.mark.parametrize(("by_calls", "update"), [(False, "summed"), (True, "exact")])
def test_several_steps(by_calls: bool, update: Any) -> None:
    """Each with rows at the weights of then, without what is pruned; in one call, or one call after the other."""
    model, block_size = mlp(), 7
    x, y = batch_of(model, samples=13)
    reference, pruned = (
        copy.deepcopy(model),
        {name: torch.zeros(n).bool() for name, n in zip(WEIGHTS, [20, 15], strict=False)},
    )
    shares = [0.6 - 0.6 * (1 - t / 3) ** 3 for t in (1, 2, 3)]
    for share in shares:
        rows = columns(reference, rows_of(reference, x, [y], y, "improved"))
        weights = {name: reference.get_parameter(name).detach().clone() for name in WEIGHTS}
        saliency = torch.cat(
            [
                torch.where(pruned[name], -1.0, naive_saliency(weights[name], rows[name], block_size, pruned[name]))
                for name in WEIGHTS
            ]
        )
        gone = torch.zeros(35, dtype=torch.bool)
        gone[saliency.argsort()[: round(share * 35)]] = True
        for name, all_gone in zip(WEIGHTS, gone.split([20, 15]), strict=True):
            values = naive_values(weights[name], rows[name], block_size, pruned[name], all_gone & ~pruned[name], update)
            reference.get_parameter(name).data = values
            pruned[name] = all_gone
    options = {"damping": LAMBDA, "block_size": block_size, "update": update}
    if by_calls:
        for share in shares:
            masks = woodfisher(model, loader_of(x, y), OBJECTIVE, share, **options)
    else:
        masks = woodfisher(model, loader_of(x, y), OBJECTIVE, 0.6, steps=3, **options)
    for name in WEIGHTS:
        layer = model.get_submodule(name[0])
        assert torch.equal(masks[name].flatten(), ~pruned[name])
        assert torch.equal(layer.weight_mask.bool(), masks[name])
        assert relative_error(layer.weight.detach(), reference.get_parameter(name)) < 1e-9
        assert torch.equal(layer.weight_orig, layer.weight)  # zeros also without the mask
        assert torch.equal(layer.bias, reference.get_submodule(name[0]).bias)


@pytest.mark.parametrize("name", ["sequence", "twice", "turned"])
def test_weights_of_all_kinds(name: str) -> None:
    """Embeddings, convolutions, weights of several uses: all of at least two dimensions, by their rows."""
    model = MODELS[name]().eval()
    x, y = batch_of(model, samples=9)
    rows = columns(model, rows_of(model, x, [y], y, "improved"))
    found = block_fishers(model, loader_of(x, y, 4), OBJECTIVE, "improved", block_size=3)
    assert [*found] == [name for name, p in model.named_parameters() if p.ndim > 1]
    for each, fisher in found.items():
        w, none = model.get_parameter(each), torch.zeros(rows[each].shape[1]).bool()
        inverse = torch.cat([x.diagonal() for _, _, x in naive(w, rows[each], 3, none)])
        assert relative_error(fisher.inverse_diagonal(LAMBDA), inverse) < 1e-10


def test_rows_that_are_rescaled_by_hand() -> None:
    """The improved matrix is the empirical one of rows over √s, and a mean over samples, whatever the batches."""
    model = mlp()
    x, y = batch_of(model, samples=11)
    z = model(x).detach().requires_grad_()
    (c,) = torch.autograd.grad(OBJECTIVE.losses(z, y).sum(), z)
    rows = per_sample_jacobian(model, x, y, OBJECTIVE) / c.norm(dim=1, keepdim=True)
    by_hand = BlockFisher(torch.ones(20, dtype=torch.bool), 6)
    by_hand.add(rows[:, :20], 11)
    for size in (1, 4, 11):
        found = block_fishers(model, loader_of(x, y, size), OBJECTIVE, "improved", block_size=6)["0.weight"]
        assert relative_error(found.inverse_diagonal(LAMBDA), by_hand.inverse_diagonal(LAMBDA)) < 1e-12


@pytest.mark.parametrize("samples", [3, 30])
def test_sampled_targets_are_a_mean(samples: int) -> None:
    model = mlp()
    x, y = batch_of(model, samples=samples)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    options = {"num_samples": 2, "block_size": 10}
    found = block_fishers(model, [(x, y)], OBJECTIVE, "sampled", generator=generators[0], **options)["0.weight"]
    drawn = [OBJECTIVE.sample(model(x), y, generators[1]) for _ in range(2)]
    rows = columns(model, rows_of(model, x, drawn, y, "sampled"))["0.weight"]  # over √M
    dense = torch.block_diag(*(rows[:, i : i + 10].T @ rows[:, i : i + 10] / samples for i in (0, 10)))
    assert (
        relative_error(found.inverse_diagonal(LAMBDA), torch.linalg.inv(dense + LAMBDA * torch.eye(20)).diag()) < 1e-10
    )
    v = torch.randn(20)
    assert relative_error(found.product(v), dense @ v) < 1e-12


@pytest.mark.parametrize("update", ["summed", "exact"])
def test_one_weight_of_least_squares(update: Any) -> None:
    """Its exact Fisher matrix is XᵀX/N, and the model at its minimum: what is left is the constrained minimiser."""
    x, y = torch.randn(20, 6), torch.randn(20, 1)
    model = nn.Linear(6, 1, bias=False).eval()
    model.weight.data = torch.linalg.lstsq(x, y).solution.T
    f = BlockFisher(torch.ones(6, dtype=torch.bool), 6)
    f.add(x, 20)
    weights = {"weight": model.weight.detach()}
    values, masks = removed(weights, {"weight": f}, 1 / 6, 0.0, update=update)
    (q,) = (~masks["weight"][0]).nonzero()[:, 0].tolist()
    losses = []
    for each in range(6):
        rest = [i for i in range(6) if i != each]
        solution = torch.linalg.lstsq(x[:, rest], y).solution
        losses.append(float((x[:, rest] @ solution - y).square().sum()))
        if each == q:
            assert relative_error(values["weight"][0, rest], solution[:, 0]) < 1e-10
    assert q == losses.index(min(losses))


def test_many_weights_of_least_squares() -> None:
    """The exact update is the constrained minimiser for all that go; the sum of single ones is not."""
    x, y = torch.randn(20, 6), torch.randn(20, 1)
    w = torch.linalg.lstsq(x, y).solution.T
    f = BlockFisher(torch.ones(6, dtype=torch.bool), 6)
    f.add(x, 20)
    errors = {}
    for update in ("summed", "exact"):
        values, masks = removed({"w": w}, {"w": f}, 0.5, 0.0, update=update)  # type: ignore[arg-type]
        solution = torch.linalg.lstsq(x[:, masks["w"][0]], y).solution[:, 0]
        errors[update] = relative_error(values["w"][0, masks["w"][0]], solution)
    assert errors["exact"] < 1e-10 < 1e-3 < errors["summed"]


def test_independent_ranking() -> None:
    """The same share of each weight, where joint ranking takes others; what is pruned more already stays pruned."""
    model = mlp()
    x, y = batch_of(model, samples=13)
    joint = woodfisher(copy.deepcopy(model), [(x, y)], OBJECTIVE, 0.4, damping=1e-5)
    prune.custom_from_mask(model[0], "weight", torch.arange(20).view(5, 4) >= 10)
    masks = woodfisher(model, [(x, y)], OBJECTIVE, 0.4, ranking="independent", damping=1e-5)
    assert [int((~mask).sum()) for mask in masks.values()] == [10, 6]
    assert not masks["0.weight"].flatten()[:10].any()
    assert [int((~mask).sum()) for mask in joint.values()] != [8, 6]


def test_masks_persist() -> None:
    model = mlp()
    x, y = batch_of(model, samples=13)
    parameter = model[0].weight
    masks = woodfisher(model, loader_of(x, y), OBJECTIVE, 0.5, parameters=["0.weight"])
    assert [*masks] == ["0.weight"] and model[0].weight_orig is parameter and not prune.is_pruned(model[2])
    copied = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        OBJECTIVE.losses(model(x), y).sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
    assert not torch.equal(model(x), copied(x))
    prune.identity(other := mlp()[0], "weight")
    other.load_state_dict(model[0].state_dict())
    assert torch.equal(other(x), model[0](x))
    expected = model(x)
    prune.remove(model[0], "weight")
    assert torch.equal(model(x), expected) and [*model[0].state_dict()] == ["bias", "weight"]


def test_nothing_is_pruned_at_zero() -> None:
    model = mlp()
    old = copy.deepcopy(model)
    masks = woodfisher(model, [batch_of(model, samples=3)], OBJECTIVE, 0.0)
    assert all(mask.all() for mask in masks.values()) and torch.equal(model[0].weight, old[0].weight)


def test_a_loader_is_read_as_far_as_told() -> None:
    model = mlp()
    x, y = batch_of(model, samples=13)
    some, same = (
        block_fishers(model, loader_of(x[:n], y[:n]), OBJECTIVE, batches=batches)["0.weight"]
        for n, batches in ((13, 2), (10, None))
    )
    assert some.samples == 10 and torch.equal(some.inverse_diagonal(LAMBDA), same.inverse_diagonal(LAMBDA))


def test_a_pruned_weight_is_no_reason_for_a_singular_matrix() -> None:
    """Without damping, where what is left is regular."""
    rows, active = torch.randn(9, 5), torch.tensor([True, False, True, True, False])
    fisher = BlockFisher(active, 5)
    fisher.add(rows, 9)
    dense = (rows.T @ rows / 9)[active][:, active]
    assert relative_error(fisher.inverse_diagonal(0.0)[active], torch.linalg.inv(dense).diag()) < 1e-12
    v = torch.randn(5)
    assert relative_error(fisher.product(v)[active], dense @ v[active]) < 1e-12
    assert fisher.product(v)[~active].count_nonzero() == 0


def bad_value(model: nn.Module) -> tuple[Tensor, Tensor]:
    x, y = batch_of(model, samples=4)
    x[2, 1] = torch.nan
    return x, y


REFUSED = {
    "sparsity=1.0: must be at least 0 and less than 1": {"sparsity": 1.0},
    "sparsity=-0.1: must be": {"sparsity": -0.1},
    "block_size=0: must be at least 1": {"block_size": 0},
    "steps=0: must be at least 1": {"steps": 0},
    "batches=0: must be at least 1": {"batches": 0},
    "ranking='global': must be one of 'joint', 'independent'": {"ranking": "global"},
    "update='sum': must be one of 'summed', 'exact', 'none'": {"update": "sum"},
    "fisher='exact': must be": {"fisher": "exact"},
    r"damping \(λ\) must be a finite number": {"damping": -1.0},
    r"damping=0.0: .* \(4 samples, blocks of 7\) is singular": {"damping": 0.0, "block_size": 7},
    r"damping=0.0: .* \(4 samples, blocks of 3\) is singular": {"damping": 0.0, "block_size": 3},
    r"no parameters \['9.weight'\]; there are: 0.weight, 0.bias": {"parameters": ["0.weight", "9.weight"]},
    "gives no batches": {"loader": []},
    "Batch 0 of the loader is no pair": {"loader": [torch.randn(4, 4)]},
    r"Batch 1 of the loader: losses or logit gradients are not finite, samples \[2\]": {"loader": "bad"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_and_nothing_lost(message: str) -> None:
    model = mlp()
    x, y = batch_of(model, samples=4)
    x[:, 0] = 0  # as pixels at the edge are
    before = copy.deepcopy(model.state_dict())
    options = {"sparsity": 0.5, "loader": [(x, y)], **REFUSED[message]}
    if options["loader"] == "bad":
        options["loader"] = [(x, y), bad_value(model)]
    loader, sparsity = options.pop("loader"), options.pop("sparsity")
    with pytest.raises(ValueError, match=message):
        woodfisher(model, loader, OBJECTIVE, sparsity, **options)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not model[0]._forward_pre_hooks


def test_a_later_step_that_fails_takes_back_the_first() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="read once in each: give a DataLoader or a list"):
        woodfisher(model, iter([batch_of(model, samples=9)]), OBJECTIVE, 0.5, steps=2)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_models_that_are_refused() -> None:
    model, loader = mlp(), [batch_of(mlp(), samples=4)]
    with pytest.raises(ValueError, match=r"in training mode.*call model.eval\(\) before"):
        woodfisher(model.train(), loader, OBJECTIVE, 0.5)
    woodfisher(model.eval(), loader, OBJECTIVE, 0.5)
    with pytest.raises(ValueError, match="sparsity=0.3: 51.43 % of these weights are pruned already"):
        woodfisher(model, loader, OBJECTIVE, 0.3)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)).eval()
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"\['0.weight', '1.weight'\] are one parameter"):
        woodfisher(tied, loader, OBJECTIVE, 0.5)
    derived = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))).eval()
    with pytest.raises(ValueError, match="not a weight, but what one is computed from"):
        woodfisher(derived, loader, OBJECTIVE, 0.5)
    read = Function.of(nn.Linear(4, 3), lambda self, x: x @ self.inner.weight.T).eval()
    with pytest.raises(ValueError, match=r"reads \['inner.weight'\] without calling"):
        woodfisher(read, loader, OBJECTIVE, 0.5)
    with pytest.raises(ValueError, match="no trainable weight"):
        woodfisher(nn.LayerNorm(4).eval(), loader, objectives.CrossEntropy(), 0.5)


def test_matrices_that_are_refused() -> None:
    fisher = BlockFisher(torch.ones(4, dtype=torch.bool), 4)
    with pytest.raises(ValueError, match="of no samples"):
        fisher.inverse_diagonal(1.0)
    with pytest.raises(ValueError, match="Rows of 3 entries for a weight of 4"):
        fisher.add(torch.ones(1, 3), 1)
    fisher.add(torch.tensor([[1.0, torch.inf, 0.0, 0.0]]), 1)
    with pytest.raises(ValueError, match="Gradients are not finite"):
        fisher.inverse_diagonal(1.0)
    with pytest.raises(ValueError, match="without entries"):
        BlockFisher(torch.ones(0, dtype=torch.bool), 4)


def test_blocks_go_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, v = torch.randn(30, 23), torch.randn(23)
    found = []
    for n in (3, 30):
        fisher = BlockFisher(torch.ones(23, dtype=torch.bool), 5)
        fisher.add(rows[:n], n)
        whole = fisher.inverse_diagonal(0.1), fisher.solve(v, 0.1)
        monkeypatch.setattr("lightning_ief.curvature.blocks._CHUNK", 60)
        parts = fisher.inverse_diagonal(0.1), fisher.solve(v, 0.1)
        monkeypatch.undo()
        found += [*zip(whole, parts, strict=True)]
    assert all(relative_error(part, whole) < 1e-13 for whole, part in found)


def test_a_matrix_that_is_singular_but_for_rounding() -> None:
    """Cholesky's factorisation goes through for about half of them."""
    for seed in range(20):
        column = torch.randn(40, 1, generator=torch.Generator().manual_seed(seed))
        fisher = BlockFisher(torch.ones(3, dtype=torch.bool), 3)
        fisher.add(torch.cat([column, 2.7 * column, torch.ones(40, 1)], dim=1), 40)
        for asked in (fisher.inverse_diagonal, lambda damping: fisher.solve(torch.ones(3), damping)):  # noqa: B023
            with pytest.raises(ValueError, match="is singular, or too nearly so"):
                asked(0.0)
            with pytest.raises(ValueError, match="is singular, or too nearly so"):
                asked(1e-20)


def test_fewer_rows_than_entries_need_damping() -> None:
    fisher = BlockFisher(torch.ones(5, dtype=torch.bool), 5)
    fisher.add(torch.randn(3, 5), 3)
    for asked in (fisher.inverse_diagonal, lambda damping: fisher.solve(torch.ones(5), damping)):
        with pytest.raises(ValueError, match="damping=0.0: .* is singular"):
            asked(0.0)
