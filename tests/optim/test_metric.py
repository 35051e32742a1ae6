"""The Kronecker metric, against the matrix M written out."""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import EF, IEF, NaturalGradient, SampledFisher, linearize, objectives
from lightning_ief.capture import LinearizedBatch
from lightning_ief.capture.types import CaptureError
from lightning_ief.distributed import GlobalJacobian, across
from lightning_ief.optim import DirectionOptimizer
from tests.helpers import Classifier, Function, per_sample_jacobian, relative_error, weights
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVE = objectives.CrossEntropy()
DECAY, EVERY = 0.8, 3
N = 8


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def sequence() -> nn.Module:
    """An embedding, and a norm, which has no sides; layers at each position, one without a bias; and a convolution."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(6, 4, padding_idx=1), nn.LayerNorm(4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False),
        nn.Conv1d(3, 2, 2), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def twice() -> nn.Module:
    """A layer of two uses, whose bias has a third."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))

    def body(self: Function, x: Tensor) -> Tensor:
        shared = self.inner[0]
        return self.inner[1](shared(shared(x).tanh()) * shared.bias.exp())

    return Function.of(inner, body)


def batch_of(model: nn.Module, seed: int = 1, samples: int = N) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    words = isinstance(model, nn.Sequential) and isinstance(model[0], nn.Embedding)
    wide = isinstance(model, nn.Sequential) and isinstance(model[0], nn.Unflatten)
    x = torch.randint(6, (samples, 3)) if words else torch.randn(samples, 12 if wide else 4)
    return x, torch.randint(3, (samples,))


def positions() -> nn.Module:
    """Of a layer, the weight is gathered between ranks and the bias re-sharded."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3))
    return nn.Sequential(nn.Unflatten(1, (3, 4)), *layers)


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "sequence": sequence, "twice": twice}


def norms_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """s."""
    z = model(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(OBJECTIVE.losses(z, y).sum(), z)
    return gradient.square().sum(1)


def moments(model: nn.Module, x: Tensor, y: Tensor, power: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Â and Ĝ of every layer from what hooks see; each sample's output gradients over ‖∂l/∂z‖ to the power."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: calls.append((name, m, args[0].detach(), out)))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Embedding))
    ]
    loss = OBJECTIVE.losses(model(x), y).sum()
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(loss, [out for *_, out in calls])
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for (name, module, inputs, _), gradient in zip(calls, gradients, strict=True):
        if isinstance(module, nn.Embedding):
            gradient = gradient * (inputs != module.padding_idx)[..., None]  # noqa: PLW2901
            inputs = F.one_hot(inputs, len(module.weight)) * (inputs != module.padding_idx)[..., None]  # noqa: PLW2901
            inputs = inputs.to(gradient)  # noqa: PLW2901
        if isinstance(module, nn.Conv1d):
            inputs = F.unfold(inputs[:, :, None], (1, 2)).transpose(1, 2)  # noqa: PLW2901
            gradient = gradient.transpose(1, 2)  # noqa: PLW2901
        a, g = inputs.reshape(N, -1, inputs.shape[-1]), gradient.reshape(N, -1, gradient.shape[-1])
        if getattr(module, "bias", None) is not None:
            a = torch.cat([a, torch.ones_like(a[..., :1])], dim=2)
        g = g / norms_of(model, x, y).pow(power / 2)[:, None, None]
        A, G = (torch.einsum("nti,ntj->ij", side, side) / N for side in (a, g))
        before = found.get(name, (torch.zeros_like(A), torch.zeros_like(G)))
        found[name] = before[0] + A, before[1] + G
    return found


def matrix(model: nn.Module, averages: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """M of all parameters, in their order."""
    starts, total = {}, 0
    for name, p in model.named_parameters():
        starts[name], total = total, total + p.numel()
    M = torch.eye(total)
    for name, sides in averages.items():
        A, G = (side / side.diagonal().mean() + torch.eye(len(side)) for side in sides)
        weight = model.get_parameter(f"{name}.weight").flatten(1)
        at = starts[f"{name}.weight"] + torch.arange(weight.numel()).view(weight.shape)
        if f"{name}.bias" in starts:
            at = torch.cat([at, starts[f"{name}.bias"] + torch.arange(len(weight))[:, None]], dim=1)
        # The rows of an embedding are what goes in.
        whole = torch.kron(A, G) if isinstance(model.get_submodule(name), nn.Embedding) else torch.kron(G, A)
        M[at.flatten()[:, None], at.flatten()] = whole
    return M


def linearized(optimizer: DirectionOptimizer, model: nn.Module, x: Tensor, y: Tensor) -> LinearizedBatch:
    return linearize(model, x, y, OBJECTIVE, keep_sides=optimizer.sides_of(model))


@pytest.mark.parametrize("samples", [N, 60])
@pytest.mark.parametrize(("fisher", "power"), [("improved", 1.0), ("empirical", 0.0)])
@pytest.mark.parametrize("name", MODELS)
def test_ief_in_the_metric_is_the_dense_formula(
    name: str, fisher: Any, power: float, samples: int, monkeypatch: Any
) -> None:
    """θ ← θ − η(F̃ + λM)⁻¹∇L, M of averages that are looked at in the steps 0, 2, 3, 5 … of this test."""
    monkeypatch.setattr("tests.optim.test_metric.N", samples)
    model, lr, rho = MODELS[name](), 0.1, 0.3
    optimizer = IEF(model.parameters(), lr=lr, relative_damping=rho, metric="kronecker", fisher=fisher,
                    metric_decay=DECAY, metric_every=EVERY)  # fmt: skip
    averages: dict[str, tuple[Tensor, Tensor]] = {}
    M = torch.zeros(0)
    for step in range(5):
        x, y = batch_of(model, step, samples)
        for layer, new in moments(model, x, y, power).items():
            old = averages.get(layer, tuple(map(torch.zeros_like, new)))
            averages[layer] = tuple(DECAY * a + (1 - DECAY) * b for a, b in zip(old, new, strict=True))  # type: ignore[assignment]
        if step in (0, 2, 3):
            M = matrix(model, averages)
        J, s = per_sample_jacobian(model, x, y, OBJECTIVE), norms_of(model, x, y)
        rows = J / s.sqrt()[:, None]
        mean = torch.einsum("np,pq,nq->n", rows, torch.linalg.inv(M), rows).mean()
        d = torch.linalg.solve(rows.T @ rows + rho * mean * M, J.sum(0))
        before = weights(model)
        optimizer.step(linearization=linearized(optimizer, model, x, y))
        assert relative_error(before - weights(model), lr * d) < 1e-8


def test_much_damping_is_improved_kfac() -> None:
    model = mlp()
    x, y = batch_of(model)
    rho = 1e8
    optimizer = IEF(model.parameters(), lr=rho, relative_damping=rho, metric="kronecker")
    M = matrix(model, moments(model, x, y, 1.0))
    J, s = per_sample_jacobian(model, x, y, OBJECTIVE), norms_of(model, x, y)
    mean = torch.einsum("np,pq,nq->n", J, torch.linalg.inv(M), J).div(s).mean()
    before = weights(model)
    optimizer.step(linearization=linearized(optimizer, model, x, y))
    assert relative_error(before - weights(model), torch.linalg.solve(M, J.sum(0)) / mean) < 1e-6


def dense(make: Any, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The matrix that λ is added to, of other optimizers than iEF."""
    if make is EF:
        J = per_sample_jacobian(model, x, y, OBJECTIVE)
        return J.T @ J
    p = model(x).softmax(1).detach()
    rows = [per_sample_jacobian(model, x, torch.full_like(y, k), OBJECTIVE) for k in range(3)]
    return sum((J * p[:, k, None]).T @ J for k, J in enumerate(rows))  # type: ignore[return-value]


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("make", [EF, NaturalGradient], ids=["EF", "NaturalGradient"])
def test_other_optimizers_and_momentum_in_the_metric(make: Any, momentum: float) -> None:
    """φ ← (H + λM)⁻¹(∇L + λμMφ), θ ← (1 − η · weight decay) θ − ηφ."""
    model, lr, lam, decay = mlp(), 0.1, 0.3, 0.2
    optimizer = make(model.parameters(), lr=lr, damping=lam, metric="kronecker", metric_decay=0.0, metric_every=1,
                     momentum=momentum, weight_decay=decay)  # fmt: skip
    phi = torch.zeros(len(weights(model)))
    for step in range(4):
        x, y = batch_of(model, step)
        M = matrix(model, moments(model, x, y, 1.0))
        gradient = per_sample_jacobian(model, x, y, OBJECTIVE).sum(0)
        phi = torch.linalg.solve(dense(make, model, x, y) + lam * M, gradient + lam * momentum * M @ phi)
        expected = (1 - lr * decay) * weights(model) - lr * phi
        optimizer.step(linearization=linearized(optimizer, model, x, y))
        assert relative_error(weights(model), expected) < 1e-9


def test_sampled_targets_in_the_metric() -> None:
    """F̂(M): its rows are those of the sampled targets, and so are the gradients that Ĝ is of, if asked for."""
    model, lam = mlp(), 0.3
    x, y = batch_of(model)
    optimizer = SampledFisher(model.parameters(), lr=0.1, damping=lam, metric="kronecker", fisher="sampled")
    lin = linearized(optimizer, model, x, y)
    drawn = [lin.sample(torch.Generator().manual_seed(seed)) for seed in (0x5DEECE66D, 0)]
    assert not torch.equal(*drawn)
    M = matrix(model, moments(model, x, drawn[0], 0.0))
    J = per_sample_jacobian(model, x, drawn[1], OBJECTIVE)
    d = torch.linalg.solve(J.T @ J + lam * M, per_sample_jacobian(model, x, y, OBJECTIVE).sum(0))
    before = weights(model)
    optimizer.step(linearization=lin)
    assert relative_error(before - weights(model), 0.1 * d) < 1e-9


def run(optimizer: DirectionOptimizer, model: nn.Module, steps: range, split: Any = None) -> Tensor:
    """Weights after some steps, each of a batch or of its two halves."""
    for step in steps:
        x, y = batch_of(model, step)
        for part in (slice(0, N),) if split is None else (slice(0, split), slice(split, N)):
            optimizer.step(linearization=linearized(optimizer, model, x[part], y[part]))
    return weights(model)


@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_are_one_batch(name: str) -> None:
    options: dict[str, Any] = {"lr": 0.1, "relative_damping": 0.3, "momentum": 0.5, "metric": "kronecker"}
    model, other = MODELS[name](), MODELS[name]()
    expected = run(IEF(model.parameters(), **options), model, range(4))
    assert relative_error(run(IEF(other.parameters(), accumulate=2, **options), other, range(4), 3), expected) < 1e-9


@pytest.mark.parametrize(("name", "split"), [("mlp", 3), ("sequence", 3), ("sequence", 0), ("positions", 4)])
def test_ranks_make_the_step_of_one(name: str, split: int) -> None:
    """Also if one of them has no sample."""
    options: dict[str, Any] = {"lr": 0.1, "relative_damping": 0.3, "momentum": 0.5, "metric": "kronecker"}
    make = MODELS.get(name, positions)
    model = make()
    expected = run(IEF(model.parameters(), **options), model, range(4))

    def work(rank: int) -> Tensor:
        own = make()
        optimizer = IEF(own.parameters(), **options)
        part = (slice(0, split), slice(split, N))[rank]

        def seen(step: int) -> LinearizedBatch:
            x, y = (each[part] for each in batch_of(own, step))
            none = LinearizedBatch([], dict(own.named_parameters()), OBJECTIVE)
            return across(linearized(optimizer, own, x, y) if len(y) else none)

        rows = seen(1).jacobian
        assert isinstance(rows, GlobalJacobian)
        if name == "positions":
            assert "3.weight" in rows.routes.gathers and "3.bias" not in rows.routes.gathers
        if name == "sequence" and split:  # both ways between the ranks are taken
            assert {n in rows.routes.gathers for n in rows.like} == {True, False}
        for step in range(4):
            optimizer.step(linearization=seen(step))
        return weights(own)

    first, second = on_ranks(2, work)
    assert torch.equal(first, second)
    assert relative_error(first, expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resuming_is_bit_for_bit(dtype: torch.dtype) -> None:
    """From a state that was saved between two looks at the averages, which are in full precision."""
    torch.set_default_dtype(dtype)
    options: dict[str, Any] = {"lr": 0.1, "relative_damping": 0.3, "momentum": 0.5, "metric": "kronecker"}
    model = mlp()
    first = IEF(model.parameters(), **options)
    run(first, model, range(4))
    saved = copy.deepcopy((model.state_dict(), first.state_dict()))
    expected = run(first, model, range(4, 9))
    resumed = mlp()
    second = IEF(resumed.parameters(), **options)
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert torch.equal(run(second, resumed, range(4, 9)), expected)
    assert all(x.dtype == torch.float32 for state in second.state.values() for name, x in state.items()
               if name.startswith("kronecker") and torch.is_tensor(x))  # fmt: skip


def test_weights_in_half_precision() -> None:
    """Averages and rows are in full precision: a step is that of the same weights in float64, but for rounding."""
    torch.set_default_dtype(torch.float32)
    model = mlp().bfloat16()
    exact = mlp().double()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    steps = []
    for own, dtype in ((model, torch.bfloat16), (exact, torch.float64)):
        optimizer = IEF(
            own.parameters(), lr=1e3, relative_damping=0.3, metric="kronecker"
        )  # beyond rounding of weights
        x, y = batch_of(own)
        before = weights(own).double()
        optimizer.step(linearization=linearized(optimizer, own, x.bfloat16().to(dtype), y))
        steps.append(weights(own).double() - before)
    assert relative_error(*steps) < 3e-2


def test_a_layer_that_has_lost_its_sides_is_refused() -> None:
    """It would be in the metric in one step, and not in the next."""

    def body(self: Function, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self.plain else torch.einsum("ni,oi->no", x, self.weight)

    model = Function(body, weight=(3, 4))
    model.plain = True  # type: ignore[assignment]
    optimizer = IEF(model.parameters(), lr=0.1, metric="kronecker")
    x, y = batch_of(model)
    optimizer.step(linearization=linearized(optimizer, model, x, y))
    model.plain = False  # type: ignore[assignment]
    with pytest.raises(ValueError, match="The rows of 'weight' are not held by what went in and what came back"):
        optimizer.step(linearization=linearized(optimizer, model, x, y))


def test_a_copy_goes_on_alike() -> None:
    """With sampled targets, for which the graph is kept."""
    options: dict[str, Any] = {"lr": 0.1, "relative_damping": 0.3, "metric": "kronecker", "fisher": "sampled"}
    model = mlp()
    optimizer = IEF(model.parameters(), accumulate=2, **options)
    run(optimizer, model, range(2), 3)
    other, copied = copy.deepcopy((model, optimizer))
    assert torch.equal(run(copied, other, range(2, 4), 3), run(optimizer, model, range(2, 4), 3))


def test_a_batch_that_is_not_finite_leaves_no_trace() -> None:
    model, other = mlp(), mlp()
    options: dict[str, Any] = {"lr": 0.1, "relative_damping": 0.3, "metric": "kronecker", "metric_every": 1}
    first, second = IEF(model.parameters(), **options), IEF(other.parameters(), **options)
    run(first, model, range(2))
    x, y = batch_of(model)
    x[3] = torch.nan
    with pytest.warns(RuntimeWarning, match=r"skipped a step: .*samples \[3\]"):
        first.step(linearization=linearized(first, model, x, y))
    run(second, other, range(2))
    assert torch.equal(weights(model), weights(other))
    assert all(relative_error(first.state[p]["kronecker_inputs"], 0.95 * second.state[q]["kronecker_inputs"]) < 1e-12
               for p, q in zip(model.parameters(), other.parameters(), strict=True) if p.ndim == 2)  # fmt: skip


def test_a_batch_that_is_skipped_uses_up_no_early_look() -> None:
    """The first step after it is in the metric of its own batch, as the first of all is."""
    options: dict[str, Any] = {"lr": 0.1, "relative_damping": 0.3, "metric": "kronecker", "metric_every": 7}
    model, other = mlp(), mlp()
    first, second = IEF(model.parameters(), **options), IEF(other.parameters(), **options)
    x, y = batch_of(model)
    x[0] = torch.nan
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="skipped a step"):
            first.step(linearization=linearized(first, model, x, y))
    run(first, model, range(4))
    run(second, other, range(4))
    assert relative_error(weights(model), weights(other)) < 1e-12


@pytest.mark.parametrize("width", [5, 700])
def test_averages_take_in_every_fifth_batch(width: int) -> None:
    """Of 100 between two looks; the first ones all. The lower triangle is computed, in panels where it is wide."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
    optimizer = IEF(model.parameters(), lr=0.0, relative_damping=1.0, metric="kronecker", metric_decay=DECAY,
                    metric_every=100)  # fmt: skip
    run(optimizer, model, range(22))
    averages = {
        name: tuple(map(torch.zeros_like, each)) for name, each in moments(model, *batch_of(model), 1.0).items()
    }
    for step in (*range(11), 15, 20):
        for layer, new in moments(model, *batch_of(model, step), 1.0).items():
            averages[layer] = tuple(DECAY * a + (1 - DECAY) * b for a, b in zip(averages[layer], new, strict=True))
    for layer, expected in averages.items():
        for found, full in zip(sides_of_state(optimizer, model, layer), expected, strict=True):
            assert relative_error(found.tril(), full.tril()) < 1e-12


def test_gradients_beyond_fp16_poison_no_average() -> None:
    """A GradScaler finds its scale by overflowing: the first steps are skipped, and later ones are taken."""
    torch.set_default_dtype(torch.float32)
    model = mlp()
    optimizer = IEF(model.parameters(), lr=0.1, relative_damping=1.0, metric="kronecker")
    x, y = batch_of(model)
    skipped = []
    for scale in (2.0**30, 8.0, 2.0**30, 8.0):
        with torch.autocast("cpu", torch.float16), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            lin = linearize(
                model, x, y, OBJECTIVE, loss_scale=torch.tensor(scale), keep_sides=optimizer.sides_of(model)
            )
            optimizer.step(linearization=lin)
        skipped.append(optimizer.skipped is not None)
    assert skipped == [True, False, True, False]
    assert all(x.isfinite().all() for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x))


def test_a_sample_that_is_learnt_to_the_last_digit() -> None:
    """Its s of 1e-78 is 0 in float32, its gradient over √s is not."""
    torch.set_default_dtype(torch.float32)
    model = nn.Linear(4, 3)
    x, y = batch_of(model)
    with torch.no_grad():
        x[0] = model.weight[y[0]] / model.weight[y[0]].square().sum() * 300
    optimizer = IEF(model.parameters(), lr=0.1, relative_damping=1.0, metric="kronecker")
    optimizer.step(linearization=linearized(optimizer, model, x, y))
    assert optimizer.skipped is None and weights(model).isfinite().all()


def test_rows_that_float32_does_not_tell_apart_are_refused() -> None:
    """With more of them than parameters and hardly any damping; in float64 the same is a step."""
    for dtype, skipped in ((torch.float32, True), (torch.float64, False)):
        torch.set_default_dtype(dtype)
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        x, y = batch_of(model, samples=64)
        optimizer = IEF(model.parameters(), lr=0.1, metric="kronecker")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step(linearization=linearized(optimizer, model, x, y))
        assert (optimizer.skipped is not None) == skipped
        assert not skipped or "raise the damping, or train in float64" in str(optimizer.skipped)


def test_a_matrix_used_from_both_sides_has_no_metric() -> None:
    model = Function(lambda self, x: F.linear(x, self.weight).tanh() @ self.weight, weight=(3, 3))
    torch.manual_seed(0)
    x, y = torch.randn(N, 3), torch.randint(3, (N,))
    optimizer = IEF(model.parameters(), lr=0.1, relative_damping=1.0, metric="kronecker")
    J, s = per_sample_jacobian(model, x, y, OBJECTIVE), norms_of(model, x, y)
    rows = J / s.sqrt()[:, None]
    d = torch.linalg.solve(rows.T @ rows + rows.square().sum(1).mean() * torch.eye(9), J.sum(0))
    before = weights(model)
    optimizer.step(linearization=linearized(optimizer, model, x, y))
    assert relative_error(before - weights(model), 0.1 * d) < 1e-9


@pytest.mark.parametrize("first", [True, False])
def test_an_embedding_used_as_a_matrix_too_has_no_metric(first: bool) -> None:
    """M is the identity there: its rows are looked up, and mixed."""

    def body(self: Function, x: Tensor) -> Tensor:
        uses = [lambda: F.embedding(x, self.weight), lambda: F.one_hot(x, 5).to(self.weight).cumsum(1) @ self.weight]
        one, other = (use() for use in (uses if first else uses[::-1]))
        return one.tanh().sum(1) + other.sin().sum(1)

    model = Function(body, weight=(5, 3))
    torch.manual_seed(0)
    x, y = torch.randint(5, (N, 2)), torch.randint(3, (N,))
    optimizer = IEF(model.parameters(), lr=0.1, relative_damping=1.0, metric="kronecker")
    J, s = per_sample_jacobian(model, x, y, OBJECTIVE), norms_of(model, x, y)
    rows = J / s.sqrt()[:, None]
    d = torch.linalg.solve(rows.T @ rows + rows.square().sum(1).mean() * torch.eye(15), J.sum(0))
    before = weights(model)
    optimizer.step(linearization=linearized(optimizer, model, x, y))
    assert relative_error(before - weights(model), 0.1 * d) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_within_autocast_is_the_step_outside(dtype: torch.dtype) -> None:
    """As Lightning takes it in mixed precision: what the backward pass has left is not rounded again."""
    torch.set_default_dtype(torch.float32)
    steps = []
    for within in (True, False):
        model = mlp()
        optimizer = IEF(model.parameters(), lr=0.1, relative_damping=0.3, metric="kronecker")
        x, y = batch_of(model)
        lin = linearized(optimizer, model, x, y)
        lin.backward()
        before = weights(model)
        with torch.autocast("cpu", dtype, enabled=within):
            optimizer.step(linearization=lin)
        steps.append(weights(model) - before)
    assert torch.equal(*steps)


def test_a_bias_that_thaws_starts_its_layer_anew() -> None:
    model = mlp()
    model[0].bias.requires_grad_(False)  # type: ignore[index]
    optimizer = IEF(model.parameters(), lr=0.1, relative_damping=1.0, metric="kronecker")
    run(optimizer, model, range(3))
    model[0].bias.requires_grad_(True)  # type: ignore[index]
    run(optimizer, model, range(3, 5))
    state = optimizer.state[model.get_parameter("0.weight")]
    assert state["kronecker_inputs"].shape == (5, 5) and state["kronecker_steps"] == 2


def test_a_batch_in_a_metric_stays_as_it_is() -> None:
    model = mlp()
    x, y = batch_of(model)
    batch = linearize(model, x, y, OBJECTIVE, keep_sides=["0.weight"]).in_metric({})
    for change in (lambda: batch.restrict(["0.weight"]), lambda: LinearizedBatch.of([batch, batch]),
                   lambda: batch.jacobian.restrict(["0.weight"])):  # fmt: skip
        with pytest.raises(ValueError, match=r"before in_metric\(\)"):
            change()


def test_sampled_targets_of_a_batch_that_is_not_finite() -> None:
    model = mlp()
    x, y = batch_of(model)
    x[2] = torch.nan
    optimizer = IEF(model.parameters(), metric="kronecker", fisher="sampled")
    with pytest.warns(RuntimeWarning, match=r"skipped a step: .*samples \[2\]"):
        optimizer.step(linearization=linearized(optimizer, model, x, y))


def test_refused() -> None:
    model = mlp()
    x, y = batch_of(model)
    for options, problem in (
        ({"metric": "fisher"}, "metric='fisher'.*must be 'kronecker' or None"),
        ({"metric": "kronecker", "fisher": "exact"}, "fisher='exact': must be 'empirical', 'improved' or 'sampled'"),
        ({"metric": "kronecker", "metric_decay": 1.0}, "metric_decay=1.0"),
        ({"metric": "kronecker", "metric_every": 0}, "metric_every=0"),
        ({"fisher": "exact"}, "fisher='exact'"),
        ({"metric": "kronecker", "sync": "local"}, "averages are those of all ranks"),
    ):
        with pytest.raises(ValueError, match=problem):
            IEF(model.parameters(), **options)  # type: ignore[arg-type]
    optimizer = IEF(model.parameters(), metric="kronecker")
    with pytest.raises(CaptureError, match=r"needs both sides of \['0.weight', '2.weight'\].*keep_sides=optimizer"):
        optimizer.step(linearization=linearize(model, x, y, OBJECTIVE))
    many = NaturalGradient(model.parameters(), metric="kronecker", max_rows=4)
    with pytest.raises(ValueError, match="conjugate gradients know of no metric.*max_rows of at least 24"):
        many.step(linearization=linearized(many, model, x, y))


def test_training_in_lightning_is_the_loop() -> None:
    """The mixin keeps the sides; a bound on steps and a report know ‖φ‖ and K in the metric."""
    options: dict[str, Any] = {"lr": 0.5, "relative_damping": 0.3, "max_norm": 0.4, "metric": "kronecker"}
    made: list[IEF] = []

    def configure(parameters: Any) -> IEF:
        made.append(IEF(parameters, **options))
        return made[-1]

    x, y = torch.randn(3 * N, 4), torch.randint(3, (3 * N,))
    module, model = Classifier(configure, mlp()), mlp()
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", precision="64-true", logger=False, enable_progress_bar=False,
                        enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(x, y), N))
    optimizer = IEF(model.parameters(), **options)
    optimizer.reports = True
    for part in range(3):
        at = slice(part * N, part * N + N)
        before = weights(model)
        lin = linearized(optimizer, model, x[at], y[at])
        optimizer.step(linearization=lin)
        step = float((weights(model) - before).norm())
        assert step <= 0.4 + 1e-12
        assert optimizer.report["step_norm"] == pytest.approx(step)
    assert torch.equal(weights(module.net), weights(model))
    # λ is ρ times the mean diagonal of S^-½ J M⁻¹Jᵀ S^-½, of the last batch.
    M = matrix(model, {name: sides_of_state(optimizer, model, name) for name in ("0", "2")})
    nn.utils.vector_to_parameters(before, model.parameters())
    J, s = per_sample_jacobian(model, x[at], y[at], OBJECTIVE), norms_of(model, x[at], y[at])
    mean = torch.einsum("np,pq,nq->n", J, torch.linalg.inv(M), J).div(s).mean()
    assert optimizer.report["damping"] == pytest.approx(float(0.3 * mean))


def sides_of_state(optimizer: IEF, model: nn.Module, layer: str) -> tuple[Tensor, Tensor]:
    """Â and Ĝ as the optimizer keeps them."""
    state = optimizer.state[model.get_parameter(f"{layer}.weight")]
    return state["kronecker_inputs"], state["kronecker_gradients"]
