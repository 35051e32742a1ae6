"""K-FAC against dense Kronecker products, and against the Fisher matrix where it is exact."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ief import KFAC, directions, linearize, objectives
from lightning_ief.capture import Linearization, LinearizedBatch
from lightning_ief.capture.types import CaptureError
from lightning_ief.curvature import sides_of
from lightning_ief.directions.registry import find
from lightning_ief.distributed import GlobalJacobian, across
from tests.curvature.layers import (
    MODELS,
    OBJECTIVE,
    WORDS,
    batch_of,
    damped_kronecker,
    direction,
    factors,
    mlp,
    norms_of,
    places,
    rows_of,
    seen_as,
    sequence,
    turned,
)
from tests.helpers import Function, flatten, per_sample_jacobian, relative_error, weights
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

FISHER = ["improved", "empirical", "sampled"]
LAMBDA = 0.3


def linearized(model: nn.Module, x: Tensor, y: Tensor, objective: Any = OBJECTIVE) -> Linearization:
    return linearize(model, x, y, objective, keep_sides=sides_of(dict(model.named_parameters())))


def targets_of(lin: LinearizedBatch, y: Tensor, fisher: str, samples: int, seed: int) -> list[Tensor]:
    """What is drawn for "sampled"; y itself otherwise."""
    generator = torch.Generator().manual_seed(seed)
    return [lin.sample(generator) for _ in range(samples)] if fisher == "sampled" else [y]


def computed(lin: Linearization, fisher: str, lam: float, samples: int = 2, seed: int = 7, **options: Any) -> Tensor:
    drawn = (samples, torch.Generator().manual_seed(seed)) if fisher == "sampled" else ()
    return flatten(getattr(directions, f"kfac_{fisher}")(lin, lam, *drawn, **options))


@pytest.mark.parametrize("positions", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", FISHER)
@pytest.mark.parametrize("name", MODELS)
def test_the_dense_formula(name: str, fisher: str, positions: Any) -> None:
    model = MODELS[name]()
    x, y = batch_of(model)
    lin = linearized(model, x, y)
    targets = targets_of(lin, y, fisher, 2, 7)
    parts = seen_as(model, x, targets, y, fisher)
    matrices = {layer: damped_kronecker(*factors(*part, positions), LAMBDA) for layer, part in parts.items()}
    expected = direction(model, x, y, fisher, LAMBDA, matrices, targets)
    assert relative_error(computed(lin, fisher, LAMBDA, positions=positions), expected) < 1e-8


def basis(A: Tensor, G: Tensor) -> Tensor:
    """An eigenbasis of A ⊗ G, entries [d_out, d_in] in a row; the unit vectors where A is diagonal."""
    Q = [torch.eye(len(x)) if torch.equal(x, x.diagonal().diag()) else torch.linalg.eigh(x)[1] for x in (G, A)]
    return torch.kron(Q[0].contiguous(), Q[1].contiguous())


def corrected(A: Tensor, G: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """An eigenbasis Q of A ⊗ G and the second moments of rows [N, d_out d_in] in it."""
    Q = basis(A, G)
    return Q, (rows @ Q).square().sum(0)


@pytest.mark.parametrize("positions", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", FISHER)
@pytest.mark.parametrize("name", MODELS)
def test_corrected_eigenvalues_are_those_of_dense_rows(name: str, fisher: str, positions: Any) -> None:
    model = MODELS[name]()
    x, y = batch_of(model)
    lin = linearized(model, x, y)
    targets = targets_of(lin, y, fisher, 2, 7)
    parts, rows = seen_as(model, x, targets, y, fisher), rows_of(model, x, targets, y, fisher)
    at, _ = places(model, parts)
    matrices = {}
    for layer, part in parts.items():
        Q, moments = corrected(*factors(*part, positions), rows[:, at[layer].flatten()])
        matrices[layer] = Q @ (moments + LAMBDA).diag() @ Q.T
    expected = direction(model, x, y, fisher, LAMBDA, matrices, targets)
    found = computed(lin, fisher, LAMBDA, positions=positions, eigenvalue_correction=True)
    assert relative_error(found, expected) < 1e-8


def test_many_positions_go_in_chunks(monkeypatch: Any) -> None:
    model = sequence()
    lin = linearized(model, *batch_of(model))
    expected = computed(lin, "empirical", LAMBDA, eigenvalue_correction=True)
    monkeypatch.setattr("lightning_ief.curvature.kronecker._CHUNK", 100)
    monkeypatch.setattr("lightning_ief.curvature.kronecker._PANEL", 2)
    assert relative_error(computed(lin, "empirical", LAMBDA, eigenvalue_correction=True), expected) < 1e-12


# --- where K-FAC is exact


def deep_linear(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, outputs))


def fisher_of(model: nn.Module, x: Tensor, outputs: int) -> Tensor:
    """F of least squares: Σ of the Jacobians of all outputs, one sample at a time."""
    rows = []
    for n in range(len(x)):
        z = model(x[n : n + 1]).flatten()
        assert len(z) == outputs
        rows += [
            torch.cat([g.flatten() for g in torch.autograd.grad(each, [*model.parameters()], retain_graph=True)])
            for each in z
        ]
    return torch.stack(rows).T @ torch.stack(rows)


def blockwise(model: nn.Module, fisher: Tensor, gradient: Tensor, lam: float) -> Tensor:
    """(F + λI)⁻¹∇L of each layer by itself."""
    at, _ = places(model, {name: None for name, p in model.named_parameters() if p.ndim > 1})
    d = torch.zeros_like(gradient)
    for each in at.values():
        order = each.flatten()
        block = fisher[order[:, None], order] + lam * torch.eye(len(order))
        d[order] = torch.linalg.solve(block, gradient[order])
    return d


def test_improved_is_the_fisher_block_of_deep_linear_least_squares() -> None:
    """With one output, F̃ = F, and the gradients of a layer's outputs over √s are the same for all samples."""
    model, objective = deep_linear(1), objectives.LeastSquares()
    x, y = torch.randn(30, 4), torch.randn(30, 1)
    gradient = per_sample_jacobian(model, x, y, objective).sum(0)
    expected = blockwise(model, fisher_of(model, x, 1), gradient, LAMBDA)
    lin = linearized(model, x, y, objective)
    assert relative_error(computed(lin, "improved", LAMBDA, eigenvalue_correction=True), expected) < 1e-9
    assert relative_error(computed(lin, "empirical", LAMBDA, eigenvalue_correction=True), expected) > 0.1


def spread(monkeypatch: Any, outputs: int) -> None:
    """Sampled targets z + √C e_c, one for each c: their second moment is exactly that of the normal distribution."""
    number = iter(range(10**6))

    def sample(self: Any, logits: Tensor, targets: Tensor, generator: Any = None) -> Tensor:
        c = next(number) % outputs
        return logits + outputs**0.5 * torch.eye(outputs)[c].view(1, *logits.shape[1:])

    monkeypatch.setattr(objectives.LeastSquares, "sample", sample)


def test_sampled_is_the_fisher_block_of_deep_linear_least_squares(monkeypatch: Any) -> None:
    spread(monkeypatch, 2)
    model, objective = deep_linear(2), objectives.LeastSquares()
    x, y = torch.randn(30, 4), torch.randn(30, 2)
    gradient = per_sample_jacobian(model, x, y, objective).sum(0)
    expected = blockwise(model, fisher_of(model, x, 2), gradient, LAMBDA)
    lin = linearized(model, x, y, objective)
    found = computed(lin, "sampled", LAMBDA, samples=2, eigenvalue_correction=True)
    assert relative_error(found, expected) < 1e-8


@pytest.mark.parametrize(("pooled", "exact", "other"), [(False, "expand", "reduce"), (True, "reduce", "expand")])
def test_positions_are_exact_in_the_setting_they_are_made_for(
    pooled: bool, exact: Any, other: Any, monkeypatch: Any
) -> None:
    """A loss for each position: expand; one for the mean over them: reduce (Eschenhagen et al., arXiv 2311.00636)."""
    positions, outputs = 3, 2

    def body(self: Function, x: Tensor) -> Tensor:
        z = self.inner(x)
        return z.mean(1) if pooled else z

    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, outputs, bias=False))
    model, objective = Function.of(inner, body), objectives.LeastSquares()
    x = torch.randn(30, positions, 4)
    y = torch.randn(30, outputs) if pooled else torch.randn(30, positions, outputs)
    size = y[0].numel()
    spread(monkeypatch, size)
    gradient = per_sample_jacobian(model, x, y, objective).sum(0)
    fisher = fisher_of(model, x, size)
    lin = linearized(model, x, y, objective)
    at, _ = places(model, {name: None for name, _ in model.named_parameters()})
    for each, is_exact in ((exact, True), (other, False)):
        found = computed(lin, "sampled", 0.0, samples=size, positions=each)[at["inner.1.weight"].flatten()]
        expected = blockwise(model, fisher, gradient, 0.0)[at["inner.1.weight"].flatten()]
        assert (relative_error(found, expected) < 1e-8) == is_exact


# --- averages over a run


def run(optimizer: KFAC, model: nn.Module, steps: range, split: Any = None, samples: int = 40) -> Tensor:
    """Weights after some steps, each of a batch or of its two parts."""
    for step in steps:
        x, y = batch_of(model, step, samples)
        for part in (slice(0, samples),) if split is None else (slice(0, split), slice(split, samples)):
            optimizer.step(linearization=linearized(model, x[part], y[part]))
    return weights(model)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("fisher", FISHER)
@pytest.mark.parametrize("name", ["mlp", "sequence"])
def test_a_run_is_that_of_dense_averages(name: str, fisher: Any, correction: bool) -> None:
    """Bias-corrected averages of batches of several sizes; decompositions at 0, 2, 4, 5; moments turned into each."""
    model, decay, every, lr = MODELS[name](), 0.8, 4, 0.05
    optimizer = KFAC(model.parameters(), lr=lr, damping=LAMBDA, fisher=fisher, decay=decay, every=every, seed=3,
                     eigenvalue_correction=correction)  # fmt: skip
    averages: dict[str, list[Tensor]] = {}
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    moments: dict[str, Tensor] = {}
    weight = 0.0
    for step in range(6):
        samples = (40, 50)[step % 2]
        x, y = batch_of(model, step, samples)
        lin = linearized(model, x, y)
        targets = targets_of(lin, y, fisher, 1, (3 * 0x9E3779B97F4A7C15 + step) % 2**63)
        weight = decay * weight + 1 - decay
        parts, rows = seen_as(model, x, targets, y, fisher), rows_of(model, x, targets, y, fisher)
        at, _ = places(model, parts)
        matrices = {}
        for layer, part in parts.items():
            A, G = factors(*part, "expand")
            old = averages.get(layer, [torch.zeros_like(A), torch.zeros_like(G)])
            averages[layer] = [decay * a + (1 - decay) * b for a, b in zip(old, (A, G / samples), strict=True)]
            if step in (0, 2, 4, 5):
                A, G = (each / weight for each in averages[layer])
                Q = basis(A, G)
                if layer in moments:
                    before = bases[layer][2]  # type: ignore[misc]
                    turned_ = Q.T @ before @ moments[layer].diag() @ before.T @ Q
                    moments[layer] = turned_.diagonal()
                bases[layer] = A, G, Q  # type: ignore[assignment]
            A, G, Q = bases[layer]  # type: ignore[misc]
            new = (rows[:, at[layer].flatten()] @ Q).square().sum(0) / samples
            moments[layer] = decay * moments.get(layer, 0.0) + (1 - decay) * new
            matrices[layer] = damped_kronecker(A, samples * G, LAMBDA)
            if correction:
                matrices[layer] = Q @ (samples * moments[layer] / weight + LAMBDA).diag() @ Q.T
        before_step = weights(model)
        expected = lr * direction(model, x, y, fisher, LAMBDA, matrices, targets)
        optimizer.step(linearization=lin)
        assert relative_error(before_step - weights(model), expected) < 1e-8


@pytest.mark.parametrize("fisher", FISHER)
@pytest.mark.parametrize("correction", [False, True])
def test_the_first_step_is_along_the_direction_of_its_batch(fisher: Any, correction: bool) -> None:
    model = sequence()
    lin = linearized(model, *batch_of(model))
    optimizer = KFAC(model.parameters(), lr=0.1, damping=LAMBDA, fisher=fisher, eigenvalue_correction=correction)
    expected = 0.1 * computed(lin, fisher, LAMBDA, samples=1, seed=0, eigenvalue_correction=correction)
    before = weights(model)
    optimizer.step(linearization=lin)
    assert relative_error(before - weights(model), expected) < 1e-12


OPTIONS: dict[str, Any] = {"lr": 0.1, "damping": LAMBDA, "momentum": 0.5, "every": 3, "eigenvalue_correction": True,
                           "max_norm": 0.5, "weight_decay": 0.1}  # fmt: skip


@pytest.mark.parametrize("name", ["mlp", "sequence", "turned"])
@pytest.mark.parametrize("positions", ["expand", "reduce"])
def test_micro_batches_are_one_batch(name: str, positions: Any) -> None:
    model, other = MODELS[name](), MODELS[name]()
    expected = run(KFAC(model.parameters(), positions=positions, **OPTIONS), model, range(4))
    optimizer = KFAC(other.parameters(), positions=positions, accumulate=2, **OPTIONS)
    assert relative_error(run(optimizer, other, range(4), split=13), expected) < 1e-9


@pytest.mark.parametrize(
    ("name", "fisher", "empty"),
    [("mlp", "improved", False), ("sequence", "improved", False), ("sequence", "sampled", False),
     ("turned", "empirical", False), ("sequence", "improved", True)],
)  # fmt: skip
def test_ranks_make_the_step_of_one(name: str, fisher: Any, empty: bool) -> None:
    """Also if one of them has no sample, or fewer."""
    samples = 11
    model = MODELS[name]()
    expected = run(KFAC(model.parameters(), fisher=fisher, **OPTIONS), model, range(4), samples=samples)

    def work(rank: int) -> Tensor:
        own = MODELS[name]()
        optimizer = KFAC(own.parameters(), fisher=fisher, **OPTIONS)
        part = slice(rank * samples, None) if empty else slice(rank, None, 2)
        for step in range(4):
            x, y = (each[part] for each in batch_of(own, step, samples))
            none = LinearizedBatch([], dict(own.named_parameters()), OBJECTIVE)
            optimizer.step(linearization=across(linearized(own, x, y) if len(y) else none))
        return weights(own)

    first, second = on_ranks(2, work)
    assert torch.equal(first, second)
    assert relative_error(first, expected) < 1e-9


def test_rows_that_are_scaled_and_then_restricted_on_ranks() -> None:
    model = sequence()
    x, y = batch_of(model, samples=7)
    s = norms_of(model, x, y)

    def work(rank: int) -> Tensor:
        own = sequence()
        lin = across(linearized(own, x[rank::2], y[rank::2]))
        rows = lin.jacobian.scaled(lin.logit_gradient_norms.rsqrt())
        assert isinstance(rows, GlobalJacobian)
        return rows.restrict(["1.weight", "8.weight"]).gram()

    order = torch.cat([torch.arange(7)[0::2], torch.arange(7)[1::2]])
    lin = linearized(model, x[order], y[order])
    J = lin.jacobian.restrict(["1.weight", "8.weight"]).to_dense() / s[order].sqrt()[:, None]
    assert relative_error(on_ranks(2, work)[0], J @ J.T) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fisher", ["improved", "sampled"])
def test_resuming_is_bit_for_bit(dtype: torch.dtype, fisher: Any) -> None:
    """From a state that was saved between two decompositions; averages are in full precision."""
    torch.set_default_dtype(dtype)
    model = mlp()
    first = KFAC(model.parameters(), fisher=fisher, **OPTIONS)
    run(first, model, range(4))
    saved = pickle.loads(pickle.dumps((model.state_dict(), first.state_dict())))
    expected = run(first, model, range(4, 9))
    resumed = mlp()
    second = KFAC(resumed.parameters(), fisher=fisher, **OPTIONS)
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert torch.equal(run(second, resumed, range(4, 9)), expected)
    kept = [x for state in second.state.values() for name, x in state.items() if name.startswith("kfac")]
    assert len(kept) > 10 and all(x.dtype == torch.float32 for x in kept if torch.is_tensor(x))


def test_a_copy_goes_on_alike() -> None:
    model = mlp()
    optimizer = KFAC(model.parameters(), accumulate=2, fisher="sampled", **OPTIONS)
    run(optimizer, model, range(2), split=3)
    other, copied = copy.deepcopy((model, optimizer))
    assert torch.equal(run(copied, other, range(2, 4), split=3), run(optimizer, model, range(2, 4), split=3))


@pytest.mark.parametrize("correction", [False, True])
def test_memory_is_as_counted(correction: bool) -> None:
    """2 Σ(d_in² + d_out²), and the eigenvalues; d_in d_out with corrected ones; d_in for an embedding's d_in²."""
    model = sequence()
    optimizer = KFAC(model.parameters(), eigenvalue_correction=correction)
    run(optimizer, model, range(3))
    found = sum(x.numel() for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x))
    layers = [(5, 5), (5, 4), (7, 2), (7, 3)]
    expected = sum(2 * (a * a + g * g) + a + g for a, g in layers) + 2 * WORDS + 2 * 16 + 4
    expected += (sum(a * g for a, g in layers) + WORDS * 4) if correction else 0
    assert found == expected


# --- what is refused, or left alone


def test_a_batch_that_is_not_finite_leaves_no_trace() -> None:
    model, other = mlp(), mlp()
    first, second = KFAC(model.parameters(), **OPTIONS), KFAC(other.parameters(), **OPTIONS)
    run(first, model, range(2))
    x, y = batch_of(model)
    x[3] = torch.nan
    with pytest.warns(RuntimeWarning, match=r"skipped a step: .*samples \[3\]"):
        first.step(linearization=linearized(model, x, y))
    run(first, model, range(2, 5))
    assert torch.equal(weights(model), run(second, other, range(5)))


def test_a_loss_that_is_not_finite_leaves_no_trace() -> None:
    """Though what went in and came back is finite: a residual of 1e25 over its own size."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model, objective = nn.Linear(4, 1), objectives.LeastSquares()
    optimizer = KFAC(model.parameters())
    x, y = torch.randn(6, 4), torch.randn(6, 1)
    optimizer.step(linearization=linearized(model, x, y, objective))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    y[2] = 1e25
    with pytest.warns(RuntimeWarning, match=r"skipped a step: .*samples \[2\]"):
        optimizer.step(linearization=linearized(model, x, y, objective))
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(before[number][key])) for key, x in state.items())


def test_gradients_that_overflow_poison_no_average() -> None:
    """Losses are finite, gradients in fp16 are not: the step is skipped, and the next one is as if it had not been."""
    torch.set_default_dtype(torch.float32)
    model = mlp()
    optimizer = KFAC(model.parameters(), lr=0.1)
    x, y = batch_of(model)
    for scale, skipped in ((2.0**30, True), (8.0, False), (2.0**30, True), (8.0, False)):
        with torch.autocast("cpu", torch.float16):
            lin = linearize(
                model, x, y, OBJECTIVE, loss_scale=torch.tensor(scale), keep_sides=optimizer.sides_of(model)
            )
            if skipped:
                with pytest.warns(RuntimeWarning, match="skipped a step"):
                    optimizer.step(linearization=lin)
            else:
                optimizer.step(linearization=lin)
        assert (optimizer.skipped is not None) == skipped == optimizer.overflowed
    tensors = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    assert tensors and all(x.isfinite().all() for x in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("correction", [False, True])
def test_a_step_within_autocast_is_the_step_outside(dtype: torch.dtype, correction: bool) -> None:
    """As Lightning takes it in mixed precision: what the backward pass has left is not rounded again."""
    torch.set_default_dtype(torch.float32)
    steps = []
    for within in (True, False):
        model = sequence()
        optimizer = KFAC(model.parameters(), lr=0.1, damping=LAMBDA, eigenvalue_correction=correction)
        lin = linearized(model, *batch_of(model))
        lin.backward()
        before = weights(model)
        with torch.autocast("cpu", dtype, enabled=within):
            optimizer.step(linearization=lin)
        steps.append(weights(model) - before)
    assert torch.equal(*steps)


@pytest.mark.parametrize("correction", [False, True])
def test_weights_in_half_precision(correction: bool) -> None:
    """Averages are in full precision: a step is that of the same weights in float64, but for rounding."""
    torch.set_default_dtype(torch.float32)
    model = mlp().bfloat16()
    exact = mlp().double()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    steps = []
    for own, dtype in ((model, torch.bfloat16), (exact, torch.float64)):
        optimizer = KFAC(own.parameters(), lr=1e3, eigenvalue_correction=correction)  # beyond rounding of weights
        x, y = batch_of(own)
        before = weights(own).double()
        optimizer.step(linearization=linearized(own, x.bfloat16().to(dtype), y))
        steps.append(weights(own).double() - before)
    assert relative_error(*steps) < 3e-2


def test_the_gradient_of_half_precision_is_not_rounded_before_it_is_solved_for() -> None:
    """Where it is divided by small numbers: but for the rounding of d it is that of the same sides in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)).bfloat16()
    x, y, lam = torch.randn(64, 20).bfloat16(), torch.randint(5, (64,)), 1e-5
    lin = linearized(model, x, y)
    d, s = directions.kfac_improved(lin, lam), lin.logit_gradient_norms
    for layer in ("0", "2"):
        ((g, a, _),) = lin.jacobian.sides(f"{layer}.weight")
        g, a = g.double().flatten(0, 2), torch.cat([a, torch.ones_like(a[..., :1])], 3).double().flatten(0, 2)
        A, G = a.T @ a / 64, (g / s[:, None]).T @ g
        pi = (A.diagonal().mean() / G.diagonal().mean()).sqrt()
        left, right = G + lam**0.5 / pi * torch.eye(len(G)), A + pi * lam**0.5 * torch.eye(len(A))
        expected = torch.linalg.solve(right, torch.linalg.solve(left, g.T @ a).T).T
        found = torch.cat([d[f"{layer}.weight"], d[f"{layer}.bias"][:, None]], 1).double()
        assert relative_error(found, expected) < 5e-3


@pytest.mark.parametrize("way", ["before", "gain"])
def test_a_bias_that_is_not_added_to_the_output_is_not_the_layers(way: str) -> None:
    """What it is called does not matter."""

    def body(name: str) -> Any:
        def forward(self: Function, x: Tensor) -> Tensor:
            b = getattr(self, name)
            return F.linear(x + b, self.weight) if way == "before" else 0.05 * F.linear(x, self.weight) + b

        return forward

    torch.manual_seed(0)
    x, y = torch.randn(9, 3), torch.arange(9) % 3
    found = []
    for name in ("bias", "shift"):
        torch.manual_seed(1)
        model = Function(body(name), weight=(3, 3), **{name: (3,)})
        found.append(flatten(directions.kfac_improved(linearized(model, x, y), 0.1)))
    assert torch.equal(*found)


@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-22, 1e-24])
def test_gradients_whose_squares_are_hardly_numbers(size: float) -> None:
    """π² is beyond float32, π is not."""
    exact = mlp()
    x, y = batch_of(exact)[0], torch.zeros(len(batch_of(exact)[0]), 3)
    found = []
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(exact).to(dtype)
        lin = linearized(model, x.to(dtype), y.to(dtype), Tiny(size))
        found.append(flatten(directions.kfac_empirical(lin, 1.0)).double() / size)
    assert relative_error(*found) < 1e-5


class Tiny(objectives.LeastSquares):
    """Gradients of ± a size, whatever the logits: those of linear losses."""

    def __init__(self, size: float) -> None:
        self.size = size

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:
        ones = torch.ones_like(logits)
        ones[::2, 0] = -1
        return self.size * ones

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits * self.gradient(logits, targets)).sum(1)


def test_a_run_without_correction_goes_on_with_it_where_nothing_is_finite() -> None:
    model = mlp()
    optimizer = KFAC(model.parameters(), lr=0.1)
    x, y = batch_of(model)
    optimizer.step(linearization=linearized(model, x, y))
    corrected = KFAC(model.parameters(), lr=0.1, eigenvalue_correction=True)
    corrected.load_state_dict(optimizer.state_dict())
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        corrected.step(linearization=linearized(model, 1e200 * x, y))
    corrected.step(linearization=linearized(model, x, y))
    assert corrected.skipped is None


@pytest.mark.parametrize("first", [True, False])
def test_an_embedding_used_as_a_matrix_too_is_an_exact_block(first: bool) -> None:
    """Its rows are looked up, and mixed."""

    def body(self: Function, x: Tensor) -> Tensor:
        uses = [lambda: F.embedding(x, self.weight), lambda: F.one_hot(x, 5).to(self.weight).cumsum(1) @ self.weight]
        one, other = (use() for use in (uses if first else uses[::-1]))
        return one.tanh().sum(1) + other.sin().sum(1)

    torch.manual_seed(0)
    model = Function(body, weight=(5, 3))
    x, y = torch.randint(5, (12, 2)), torch.randint(3, (12,))
    rows = rows_of(model, x, [y], y, "improved")
    gradient = per_sample_jacobian(model, x, y, OBJECTIVE).sum(0)
    expected = torch.linalg.solve(rows.T @ rows + LAMBDA * torch.eye(15), gradient)
    assert relative_error(computed(linearized(model, x, y), "improved", LAMBDA), expected) < 1e-9


def test_a_direction_of_a_batch_that_is_not_finite_is_nan() -> None:
    model = sequence()
    x, y = batch_of(model)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    lin = linearize(model, x, y, OBJECTIVE, keep_sides=sides_of(dict(model.named_parameters())), verify=False)
    assert flatten(directions.kfac_improved(lin, 0.1)).isnan().all()


def test_a_bias_that_thaws_starts_its_layer_anew() -> None:
    model = mlp()
    model[0].bias.requires_grad_(False)  # type: ignore[index]
    optimizer = KFAC(model.parameters(), **OPTIONS)

    def step(seed: int) -> None:
        x, y = batch_of(model, seed)
        optimizer.step(linearization=linearize(model, x, y, OBJECTIVE, keep_sides=optimizer.sides_of(model)))

    for seed in range(3):
        step(seed)
    model[0].bias.requires_grad_(True)  # type: ignore[index]
    step(3)
    state = optimizer.state[model.get_parameter("0.weight")]
    assert state["kfac_inputs"].shape == (5, 5) and state["kfac_steps"] == 1


def test_refused() -> None:
    model = mlp()
    x, y = batch_of(model)
    for options, problem in (
        ({"fisher": "exact"}, "fisher='exact': must be 'empirical', 'improved' or 'sampled'"),
        ({"positions": "mean"}, "positions='mean': must be 'expand' or 'reduce'"),
        ({"decay": 1.0}, "decay=1.0: must be at least 0 and less than 1"),
        ({"every": 0}, r"KFAC\(every=0\): must be at least 1"),
        ({"num_samples": 0}, r"num_samples=0 \(M\): must be at least 1"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"sync": "local"}, "averages are those of all ranks"),
        ({"metric": "kronecker"}, r"KFAC\(metric='kronecker'\): it has none; take IEF"),
        ({"relative_damping": 0.1}, r"it has none; take KFAC\(damping=...\)"),
        ({"momentum": 0.5, "momentum_type": "spring"}, "Take momentum_type='heavy-ball'"),
    ):
        with pytest.raises(ValueError, match=problem):
            KFAC(model.parameters(), **options)  # type: ignore[arg-type]
    for act in (
        lambda lin: KFAC(model.parameters()).step(linearization=lin),
        lambda lin: directions.kfac_empirical(lin, 0.1),
    ):
        with pytest.raises(CaptureError, match=r"K-FAC needs both sides of \['0.weight', '2.weight'\].*keep_sides="):
            act(linearize(model, x, y, OBJECTIVE))
    with pytest.raises(ValueError, match="damping"):
        directions.kfac_empirical(linearized(model, x, y), -1.0)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("fisher", FISHER)
def test_no_damping_where_the_curvature_is_singular(fisher: str, correction: bool) -> None:
    """Behind a softmax, gradients sum to zero."""
    model = mlp()
    lin = linearized(model, *batch_of(model))
    with pytest.raises(ValueError, match=r"K-FAC needs damping > 0 for '2.weight', got 0: its curvature is singular"):
        computed(lin, fisher, 0.0, eigenvalue_correction=correction)


def test_no_damping_of_an_exact_block_by_sampled_targets() -> None:
    torch.manual_seed(0)
    model = Function(lambda self, x: (x * self.gain.exp()) @ self.weight, gain=(4,), weight=(4, 1))
    objective = objectives.LeastSquares()
    lin = linearized(model, torch.randn(30, 4), torch.randn(30, 1), objective)
    with pytest.raises(ValueError, match=r"damping > 0 for the exact block of \['gain'\]"):
        computed(lin, "sampled", 0.0)


def test_without_damping_it_is_the_natural_gradient_of_one_linear_layer() -> None:
    torch.manual_seed(0)
    model, objective = nn.Linear(4, 1), objectives.LeastSquares()
    lin = linearized(model, torch.randn(30, 4), torch.randn(30, 1), objective)
    expected = flatten(directions.natural_gradient(lin, 0.0))
    assert relative_error(computed(lin, "improved", 0.0), expected) < 1e-9


def test_a_layer_that_has_lost_its_sides_is_refused() -> None:
    model = turned()
    optimizer = KFAC(model.parameters(), **OPTIONS)
    run(optimizer, model, range(1))
    body = model.body
    model.body = lambda self, x: torch.einsum("ni,io->no", x, self.weight) + self.shift  # type: ignore[assignment]
    x, y = batch_of(model)
    with pytest.raises(ValueError, match="The rows of 'weight' are not held by what went in and what came back"):
        optimizer.step(linearization=linearized(model, x, y))
    model.body = body


def test_names() -> None:
    assert [find(f"kfac_{fisher}").label for fisher in FISHER] == ["ieKFAC", "eKFAC", "KFAC"]
