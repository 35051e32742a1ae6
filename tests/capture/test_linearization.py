"""The front door: kinds of inputs and outputs, plans that are used again, forward passes that draw random numbers."""

import copy
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_ief import directions, gamma, linearize, objectives
from lightning_ief.capture.types import CaptureError
from tests.helpers import (
    Function,
    assert_exact,
    assert_jacobian,
    flatten,
    jacobian_of_graph,
    per_sample_jacobian,
    random_direction,
    relative_error,
    trainable,
)

pytestmark = pytest.mark.usefixtures("float64")
N, T, D, C = 4, 3, 5, 6  # samples, length, features, classes
SQUARES = objectives.LeastSquares()


def mlp(**options: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 7, **options), nn.ReLU(inplace=True), nn.Linear(7, C, **options))


# --- inputs, outputs, targets -----------------------------------------------------------------------------------------


def weighted(m: nn.Module, x: Tensor, scale: Tensor, *, mask: Tensor | None = None, factor: float = 1.0) -> Tensor:
    y = F.linear(x * scale, m.w) * factor
    return y if mask is None else y * mask[:, None]


def nested(m: nn.Module, batch: dict) -> SimpleNamespace:
    return SimpleNamespace(logits=F.linear(batch["x"] * batch["more"]["scale"], m.w) + batch["bias"])


X, SCALE, MASK, TABLE = torch.randn(N, D), torch.rand(N, D), torch.rand(N), torch.randn(C)
INPUTS = {
    "tensor": (lambda m, x: F.linear(x, m.w), lambda: X),
    "tuple": (weighted, lambda: (X, SCALE)),
    "list": (weighted, lambda: [X, SCALE]),
    "tuple with a constant": (weighted, lambda: (X, torch.ones(D), )),
    "keywords": (weighted, lambda: {"mask": MASK, "scale": SCALE, "x": X, "factor": 2.0}),
    "a mapping that is no dict": (weighted, lambda: UserDict({"mask": MASK, "scale": SCALE, "x": X})),
    "nested dicts, .logits": (nested, lambda: {"batch": {"x": X, "more": {"scale": SCALE}, "bias": TABLE}}),
    "nested in a tuple": (nested, lambda: ({"x": X, "more": {"scale": SCALE}, "bias": TABLE},)),
}  # fmt: skip


@pytest.mark.parametrize(("body", "inputs"), INPUTS.values(), ids=INPUTS)
def test_kinds_of_inputs(body, inputs):
    given = inputs()
    model = Function(body, w=(C, D))
    plain = dict(given) if isinstance(given, UserDict) else given  # pytree, by which the truth slices, knows dicts only
    converted = _to_double(plain)
    targets = torch.randn(N, C)
    truth = per_sample_jacobian(model, converted, targets, SQUARES)
    wrapped = UserDict(converted) if isinstance(given, UserDict) else converted
    assert_jacobian(linearize(model, wrapped, targets, SQUARES), truth)


def _to_double(x):
    return torch.utils._pytree.tree_map(lambda leaf: leaf.double() if isinstance(leaf, Tensor) else leaf, x)


def test_sequence_logits_with_ignored_targets():
    targets = torch.randint(0, C, (N, T))
    targets[0, 1:] = targets[1] = -100
    lin = assert_exact(mlp(), torch.randn(N, T, D), targets, objectives.CrossEntropy())
    assert lin.losses[1] == 0 and lin.jacobian.row_norms()[1] == 0
    assert (lin.jacobian.row_norms()[[0, 2, 3]] > 0).all()


@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_logit_gradients_are_those_of_autograd(bias: bool):
    model, x, targets = mlp(bias=bias), torch.randn(N, D), torch.randint(0, C, (N,))
    lin = assert_exact(model, x, targets, objectives.CrossEntropy())
    logits = model(x).detach().requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none")
    (gradients,) = torch.autograd.grad(losses.sum(), logits)
    assert relative_error(lin.losses, losses) < 1e-14
    assert relative_error(lin.logits, logits) == 0
    assert relative_error(lin.logit_gradients, gradients) < 1e-14
    assert relative_error(lin.logit_gradient_norms, gradients.square().sum(1)) < 1e-14
    assert lin.num_samples == N
    assert not any(x.requires_grad for x in (lin.losses, lin.logits, lin.logit_gradients))


def test_logits_of_one_number_per_sample():
    assert_exact(Function(lambda m, x: x @ m.w, w=(D,)), torch.randn(N, D))


# --- which parameters -------------------------------------------------------------------------------------------------


def test_frozen_parameters_are_left_out():
    model = mlp()
    model[0].requires_grad_(False)
    lin = assert_exact(model, torch.randn(N, D))
    assert list(lin.parameters) == list(lin.jacobian.rmatvec(torch.ones(N))) == ["2.weight", "2.bias"]


def test_a_frozen_weight_within_a_derived_one():
    model = Function(lambda m, x: F.linear(x, m.w + m.b @ m.a), w=(C, D), b=(C, 2), a=(2, D))
    model.w.requires_grad_(False)
    assert list(assert_exact(model, torch.randn(N, D)).parameters) == ["b", "a"]


def test_a_chosen_subset_of_parameters():
    model, x, targets = mlp(), torch.randn(N, D), torch.randn(N, C)
    truth = per_sample_jacobian(model, x, targets, SQUARES)
    chosen = {name: p for name, p in model.named_parameters() if name in ("0.weight", "2.bias")}
    lin = linearize(model, x, targets, SQUARES, parameters=chosen)
    columns = dict(zip(trainable(model), truth.split([p.numel() for p in model.parameters()], 1), strict=True))
    assert_jacobian(lin, torch.cat([columns[name] for name in chosen], 1))


def under_no_grad(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = (m.p * x).exp()
    return F.linear(x * scale, m.w)


UNUSED = {
    "not used": lambda m, x: F.linear(x, m.w),
    "under no_grad": under_no_grad,
    "detached": lambda m, x: F.linear(x * m.p.detach(), m.w),
    "data": lambda m, x: F.linear(x * m.p.data, m.w),
    "read only": lambda m, x: F.linear(x, m.w) * m.p.numel() / m.p.shape[0] + bool((m.p > 0).all()),
    "the result not used": lambda m, x: (x * m.p, F.linear(x, m.w))[1],
    "the result detached": lambda m, x: F.linear((x * m.p).detach(), m.w),
}


@pytest.mark.parametrize("body", UNUSED.values(), ids=UNUSED)
def test_a_parameter_without_gradient_has_zero_rows(body):
    lin = assert_exact(Function(body, p=(D,), w=(C, D)), torch.randn(N, D))
    assert lin.jacobian.to_dense()[:, :D].count_nonzero() == 0
    assert lin.jacobian.rmatvec(torch.ones(N))["p"].count_nonzero() == 0


# --- the model stays as it was ----------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Draws random numbers and counts its forward passes, in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(T, affine=True, track_running_stats=True)
        self.spectral = parametrizations.spectral_norm(nn.Linear(D, D))
        self.dropout = nn.Dropout(0.4)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.longer = False

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self.longer:
            x = self.spectral(x)
        return self.dropout(self.spectral(self.norm(x)))


@pytest.mark.parametrize("call", ["first", "second", "another branch"])
def test_linearize_leaves_what_one_forward_pass_leaves(call: str):
    model, x, targets = Stateful(), torch.randn(N, T, D), torch.randn(N, T, D)
    if call != "first":
        linearize(model, x, targets, SQUARES)
    model.longer = call == "another branch"
    plain, state = copy.deepcopy(model), torch.get_rng_state()
    logits = plain(x)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    lin = linearize(model, x, targets, SQUARES)
    assert relative_error(lin.logits, logits) == 0
    assert torch.equal(torch.get_rng_state(), after)
    assert_same_buffers(model, plain)
    assert_jacobian(lin, jacobian_of_graph(lin))
    d = random_direction(lin.parameters)
    before = torch.get_rng_state()
    lin.jvp(d)
    assert_same_buffers(model, plain)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(type(p) is nn.Parameter and p.grad is None for p in model.parameters())


def assert_same_buffers(model: nn.Module, expected: nn.Module) -> None:
    for (name, actual), wanted in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(actual, wanted), name


def test_an_input_changed_in_place_is_changed_once():
    model = Function(lambda m, x: F.linear(x.mul_(2), m.w), w=(C, D))
    x, targets = torch.randn(N, D), torch.randn(N, C)
    truth = per_sample_jacobian(model, x, targets, SQUARES)
    expected = model(x.clone())
    lin = linearize(model, x, targets, SQUARES)
    assert relative_error(lin.logits, expected) == 0
    assert_jacobian(lin, truth)


def test_under_no_grad():
    model, x = mlp(), torch.randn(N, D)
    truth = per_sample_jacobian(model, x, torch.zeros(N, C), SQUARES)
    with torch.no_grad():
        assert_jacobian(linearize(model, x, torch.zeros(N, C), SQUARES), truth)


# --- a plan is measured once and used again ---------------------------------------------------------------------------


class Sequence(nn.Module):
    """A class token, positions, attention, folded positions: everything that has to find the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.position = nn.Parameter(torch.randn(1, 9, D))
        self.scale = nn.Parameter(torch.randn(1, D))
        self.attention = nn.MultiheadAttention(D, 1)
        self.folded = nn.Linear(D, 2)
        self.head = nn.Linear(D, C)
        self.branch = False

    def forward(self, x: Tensor) -> Tensor:
        samples = len(x)
        x = torch.cat([self.token.repeat(samples, 1, 1), x], 1)
        length = x.shape[1]
        x = x + self.position[:, :length]
        x = x.transpose(0, 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        pooled = self.folded(x.flatten(0, 1) * self.scale).view(length, samples, 2).sum((0, 2))
        if self.branch:
            x = x * self.scale
        return self.head(x[0]) * pooled[:, None]


@pytest.mark.parametrize("first", [(4, 3), (1, 3), (1, 1), (4, 4), (3, 2)])
def test_batches_and_lengths_vary(first: tuple[int, int]):
    model = Sequence()
    for samples, length in [first, (4, 5), (1, 5), (5, 5), (5, 1), (1, 1), (6, 5), (2, 7)]:
        assert_exact(model, torch.randn(samples, length, D))


def test_a_plan_is_used_again_without_further_forward_passes():
    model, x = Stateful(), torch.randn(N, T, D)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    linearize(model, x, x, SQUARES)
    first = len(calls)
    linearize(model, x[:2], x[:2], SQUARES)
    assert first > 1 and len(calls) == first + 1


def test_a_stale_plan_is_measured_again():
    model = Sequence()
    for branch in (False, True, True, False):
        model.branch = branch
        assert_exact(model, torch.randn(N, T, D))


def test_a_constant_that_turns_into_a_batch():
    def body(m: nn.Module, x: Tensor, position: Tensor) -> Tensor:
        return x + F.embedding(position, m.p)

    model, x = Function(body, p=(9, D)), torch.randn(N, T, D)
    for position in (torch.arange(T)[None], torch.randint(0, 9, (N, T)), torch.arange(T)[None]):
        assert_exact(model, (x, position))


def test_counts_follow_the_length():
    def body(m: nn.Module, x: Tensor) -> Tensor:
        return (m.p.repeat(x.shape[0] * x.shape[1], 1) * x.flatten(0, 1)).view(x.shape)

    model = Function(body, p=(1, D))
    for samples, length in [(4, 3), (4, 2), (2, 5), (5, 1)]:
        assert_exact(model, torch.randn(samples, length, D))


def test_a_folded_batch_of_length_one():
    """With one position per sample a folded dimension looks plain; with more the plan no longer fits."""
    model = Function(lambda m, x: F.linear(x.flatten(0, 1), m.w).tanh().view(len(x), -1, C), w=(C, D))
    for samples, length in [(4, 1), (4, 3), (4, 1), (2, 3)]:
        assert_exact(model, torch.randn(samples, length, D))


def test_training_and_evaluation_have_plans_of_their_own():
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.BatchNorm1d(D).eval(), nn.Linear(D, C)).eval()
    assert_exact(model, torch.randn(N, D))
    model[1].train()
    lin = linearize(model, torch.randn(N, D), torch.randn(N, C), SQUARES)
    assert_jacobian(lin, jacobian_of_graph(lin))


def test_parameters_may_be_frozen_and_thawed_between_batches():
    model = mlp()
    for frozen in (False, True, False):
        model[0].weight.requires_grad_(not frozen)
        assert_exact(model, torch.randn(N, D))


def test_models_of_one_class_have_plans_of_their_own():
    for width in (3, 7):
        assert_exact(nn.Sequential(nn.Linear(D, width), nn.Linear(width, C)), torch.randn(N, D))


# --- random numbers in the forward pass -------------------------------------------------------------------------------

DROPOUT = {
    "between layers": lambda: nn.Sequential(nn.Linear(D, 7), nn.Dropout(0.5), nn.Linear(7, D), nn.Dropout(0.3)),
    "of channels": lambda: nn.Sequential(nn.Conv1d(T, 8, 2), nn.Dropout1d(0.5), nn.Conv1d(8, 4, 2, groups=4)),
    "of a weight": lambda: Function(lambda m, x: F.linear(x, F.dropout(m.w, 0.5)), w=(C, D)),
    "of a parameter's copies": lambda: Function(
        lambda m, x: torch.cat([F.dropout(m.p.expand(len(x), -1, -1), 0.5), x], 1) * m.g, p=(1, 2, D), g=(D,)
    ),
    "encoder layer": lambda: nn.TransformerEncoderLayer(D, 1, 6, dropout=0.4, batch_first=True),
    "encoder layer, sequence first": lambda: Function.of(
        nn.TransformerEncoderLayer(D, 1, 6, dropout=0.4), lambda m, x: m.inner(x.transpose(0, 1)).transpose(0, 1)
    ),
    "attention": lambda: Function.of(
        nn.MultiheadAttention(D, 1, dropout=0.4, batch_first=True), lambda m, x: m.inner(x, x, x)[0]
    ),
    "within attention with a learned bias": lambda: Function(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.bias[:, : x.shape[1]], dropout_p=0.5),
        bias=(T, 9),
    ),
    "stochastic depth": lambda: Function.of(
        nn.Linear(D, D), lambda m, x: x + m.inner(x) * torch.bernoulli(x.new_full((len(x), 1, 1), 0.5))
    ),
}


@pytest.mark.parametrize("make", DROPOUT.values(), ids=DROPOUT)
def test_rows_belong_to_the_mask_that_was_drawn(make):
    model = make()
    for samples in (3, 5):
        x = torch.randn(samples, T, D)
        lin = linearize(model, x, torch.randn_like(model(x)), SQUARES)
        truth = jacobian_of_graph(lin)
        assert truth.norm() > 0
        assert_jacobian(lin, truth)
        d = random_direction(lin.parameters)  # the derivative along d is that of the same mask
        change = (lin.jvp(d) * lin.logit_gradients).flatten(1).sum(1)
        assert relative_error(change, truth @ flatten(d)) < 1e-10


def test_layer_dropping_by_torchs_generator():
    def body(m: nn.Module, x: Tensor) -> Tensor:
        for _ in range(int(torch.randint(1, 9, ()))):
            x = (x * m.p).tanh()
        return x

    model = Function(body, p=(D,))
    for _ in range(5):
        lin = linearize(model, torch.randn(N, D), torch.randn(N, D), SQUARES)
        assert_jacobian(lin, jacobian_of_graph(lin))


# --- several cotangents, derivatives along a direction ----------------------------------------------------------------


class Various(nn.Module):
    """One parameter for every kind of factor: outer products, one-hot rows, dense, per operation, pulled back."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, D)
        self.shared = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.grouped = nn.Conv1d(T, 2 * T, 2, groups=T)
        self.low, self.up = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(D, 2))
        self.unused = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(2 * T * (D - 1), C)

    def forward(self, index: Tensor) -> Tensor:
        x = self.norm(self.shared(self.shared(self.table(index)).tanh()))
        x = F.linear(x, self.shared.weight + self.up @ self.low).tanh()
        return self.head(self.grouped(x).flatten(1))


def test_rows_of_several_cotangents_are_those_of_each():
    model, index = Various(), torch.randint(0, 7, (N, T))
    lin = linearize(model, index, torch.randn(N, C), SQUARES)
    cotangents = [torch.randn(N, C) for _ in range(3)]
    parameters = list(model.parameters())
    truth = torch.stack([
        torch.cat([
            g.flatten()
            for g in torch.autograd.grad(model(index[n : n + 1])[0] @ c[n], parameters, materialize_grads=True,
                                         allow_unused=True)
        ])
        for c in cotangents
        for n in range(N)
    ])  # fmt: skip
    jacobian = lin.pullback(cotangents)
    v, d = torch.randn(3 * N), random_direction(lin.parameters)
    assert jacobian.num_rows == 3 * N
    assert relative_error(jacobian.to_dense(), truth) < 1e-10
    assert relative_error(jacobian.gram(), truth @ truth.T) < 1e-10
    assert relative_error(jacobian.row_norms(), truth.norm(dim=1)) < 1e-10
    assert relative_error(flatten(jacobian.rmatvec(v)), v @ truth) < 1e-10
    assert relative_error(jacobian.matvec(d), truth @ flatten(d)) < 1e-10
    for r, c in enumerate(cotangents):  # one by one, and from the same graph
        assert relative_error(lin.pullback([c]).to_dense(), truth[r * N : (r + 1) * N]) < 1e-10


@pytest.mark.parametrize("chunk", [1, 50, 2000])
def test_rows_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning_ief.capture.factors._CHUNK", chunk)
    monkeypatch.setattr("lightning_ief.linalg.gram._CHUNK", chunk)
    assert_exact(Various(), torch.randint(0, 7, (N, T)))
    test_rows_of_several_cotangents_are_those_of_each()


class Doubled(torch.autograd.Function):
    """A function that has no forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


JVPS = {
    "forward mode": (lambda: nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, C)), (D,)),
    "attention": (lambda: nn.TransformerEncoderLayer(D, 1, 6, dropout=0.0, batch_first=True), (T, D)),
    "no forward mode": (lambda: Function(lambda m, x: Doubled.apply(F.linear(x, m.w).tanh()), w=(C, D)), (D,)),
    "recurrent": (lambda: Function.of(nn.LSTM(D, C, batch_first=True), lambda m, x: m.inner(x)[0]), (T, D)),
    "tied": (lambda: Function(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.T), w=(C, D)), (D,)),
}


@pytest.mark.parametrize(("make", "shape"), JVPS.values(), ids=JVPS)
def test_jvp_is_the_derivative_of_the_logits(make, shape: tuple[int, ...]):
    model, x = make(), torch.randn(N, *shape)
    lin = linearize(model, x, torch.randn_like(model(x)), SQUARES)
    d = random_direction(lin.parameters)
    u = lin.jvp(d)
    for c in (torch.randn_like(u), torch.randn_like(u)):
        assert relative_error((u * c).flatten(1).sum(1), lin.pullback([c]).matvec(d)) < 1e-10
    step, moved = 1e-5, copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.add_(d[name], alpha=step)
        assert relative_error((moved(x) - lin.logits) / step, u) < 1e-3


# --- the operator -----------------------------------------------------------------------------------------------------


def test_backward_frees_the_graph_and_keeps_the_rows():
    model, x, targets = mlp(), torch.randn(N, D), torch.randn(N, C)
    truth = per_sample_jacobian(model, x, targets, SQUARES)
    lin = linearize(model, x, targets, SQUARES)
    lin.backward()
    assert_jacobian(lin, truth)
    with pytest.raises(CaptureError, match="let go"):
        lin.pullback([lin.logit_gradients])


def test_rmatvec_of_weights_beyond_float32():
    """Tiny gradients meet weights that float32 does not hold; their products are of ordinary size."""
    model, x = mlp().float(), torch.randn(N, D).float()
    model[2].weight.data.mul_(1e-25)
    model[2].bias.data.mul_(1e-25)
    v, targets = torch.randn(N) * 1e45, torch.zeros(N, C).float()
    truth = per_sample_jacobian(copy.deepcopy(model).double(), x.double(), targets.double(), SQUARES)
    lin = linearize(model, x, targets, SQUARES)
    assert relative_error(flatten(lin.jacobian.rmatvec(v)), v @ truth) < 1e-5
    assert flatten(lin.jacobian.rmatvec(0 * v)).count_nonzero() == 0


def test_gradients_beyond_float32():
    """Nearly fitted samples beside wrong ones: gradients of 1e-30, whose squares float32 does not hold."""
    model, x = mlp().float(), torch.randn(N, D).float()
    residual = torch.logspace(-30, 2, N)[:, None].expand(N, C)

    class Residual(objectives.LeastSquares):  # as it is, which no float32 targets could give
        def gradient(self, logits, targets):
            return residual.to(logits.dtype)

    lin = linearize(model, x, torch.zeros(N, C).float(), Residual(), verify=False)
    double = copy.deepcopy(model).double()
    unit = per_sample_jacobian(double, x.double(), double(x.double()).detach() - 1, SQUARES)
    k, expected = lin.jacobian.gram(), (residual[:, :1] * unit) @ (residual[:, :1] * unit).T
    norms = expected.diagonal().sqrt()
    assert ((k - expected) / norms / norms[:, None]).abs().max() < 1e-6
    v = lin.jacobian.solve(torch.ones(N), 0.0).coefficients
    assert relative_error(v * norms, torch.linalg.solve(expected / norms / norms[:, None], 1 / norms)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_jacobian_is_applied_in_place(dtype):
    """θ ← β θ + α Jᵀv equals forming Jᵀv first, with every kind of factor, shared memory and unused parameters."""
    torch.manual_seed(0)
    model, x = Various().to(dtype), torch.randint(0, 7, (N, T))
    lin = linearize(model, x, torch.randn_like(model(x)), SQUARES, verify=dtype == torch.float64)
    v = torch.randn(N)
    formed = lin.jacobian.rmatvec(v)
    alpha = {name: -0.1 * (j + 1) for j, name in enumerate(formed)}
    beta = {name: 1.0 if j % 2 else 0.9 for j, name in enumerate(formed)}
    expected = {n: beta[n] * p.detach().double() + alpha[n] * formed[n].double() for n, p in lin.parameters.items()}
    with torch.no_grad():
        lin.jacobian.add_rmatvec(v, lin.parameters, alpha, beta)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for name, p in lin.parameters.items():
        assert relative_error(p.detach().double(), expected[name]) < tolerance, name


def test_a_parameter_among_the_inputs_is_applied_after_it_was_read():
    """The input of the second operation is a view of a parameter: it must not have changed when it is read."""
    model = Function(lambda m, x: F.linear(m.p.expand(len(x), D), m.w) * x[:, :1], p=(D,), w=(C, D))
    x = torch.randn(N, D)
    lin = linearize(model, x, torch.randn(N, C), SQUARES)
    v = torch.randn(N)
    formed = lin.jacobian.rmatvec(v)
    expected = {name: p.detach() - formed[name] for name, p in lin.parameters.items()}
    with torch.no_grad():
        lin.jacobian.add_rmatvec(v, lin.parameters, dict.fromkeys(formed, -1.0), dict.fromkeys(formed, 1.0))
    assert all(relative_error(p.detach(), expected[name]) < 1e-12 for name, p in lin.parameters.items())


def test_vectors_of_another_space_are_refused():
    lin = linearize(mlp(), torch.randn(N, D), torch.randn(N, C), SQUARES)
    with pytest.raises(ValueError, match=rf"vector of {N} rows, got shape \({N + 1},\)"):
        lin.jacobian.rmatvec(torch.randn(N + 1))
    d = random_direction(lin.parameters)
    with pytest.raises(ValueError, match=r"only in the second: \['0.weight'\]"):
        lin.jacobian.matvec({name: x for name, x in d.items() if name != "0.weight"})
    with pytest.raises(ValueError, match=r"'0.bias' has shape \(1,\)"):
        lin.jacobian.matvec(d | {"0.bias": torch.ones(1)})


def test_the_gram_is_symmetric_float64_and_accurate_for_a_float32_model():
    model, x, targets = mlp().float(), torch.randn(40, D).float(), torch.randn(40, C).float()
    lin = linearize(model, x, targets, SQUARES)
    gram, rows = lin.jacobian.gram(), lin.jacobian.to_dense()
    assert gram.dtype == torch.float64 and torch.equal(gram, gram.T)
    assert relative_error(gram, rows.double() @ rows.double().T) < 1e-7


def test_samples_that_are_not_finite_are_named():
    x = torch.randn(N, D)
    x[2, 1] = float("nan")
    lin = linearize(mlp(), x, torch.randn(N, C), SQUARES)
    assert "samples [2] of the batch" in lin.not_finite
    assert linearize(mlp(), x[:2], torch.randn(2, C), SQUARES).not_finite is None


@pytest.mark.parametrize("objective", [objectives.LeastSquares(), objectives.BinaryCrossEntropy()])
def test_logits_without_a_dimension_of_their_own(objective):
    """[N] is as good as [N, 1]."""

    class Squeezed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).squeeze(1)

    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y = torch.randn(7, 4).double(), (torch.arange(7) % 2).double()
    flat, usual = linearize(Squeezed(inner), x, y, objective), linearize(inner, x, y[:, None], objective)
    assert torch.equal(flat.logit_gradient_norms, usual.logit_gradient_norms)
    for direction in (directions.ief, directions.natural_gradient):
        found, truth = direction(flat, 1e-3), direction(usual, 1e-3)
        assert relative_error(flatten(found), flatten(truth)) < 1e-12
        assert abs(float(gamma(flat, found)) / float(gamma(usual, truth)) - 1) < 1e-12
