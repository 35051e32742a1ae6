"""Forward mode along several directions at once, against the truth: torch's own forward mode, and J d."""

import sys
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ief import linearize, objectives
from lightning_ief.capture import jvp, push_forward
from lightning_ief.capture.types import CaptureError
from tests.helpers import Function, flatten, per_sample_jacobian, random_direction, relative_error, trainable

N, T, D, C, H = 5, 3, 4, 2, 2
SQUARES = objectives.LeastSquares()

pytestmark = pytest.mark.usefixtures("float64")


def noting(names: list[str]) -> dict[Callable, Callable]:
    """The rules, each of which adds the name of its operation when it was used."""

    def noted(function: Callable, rule: Callable) -> Callable:
        def use(*args, **kwargs):
            found = rule(*args, **kwargs)
            names.append(function.__name__)
            return found

        return use

    return {function: noted(function, rule) for function, rule in jvp.RULES.items()}


def shaped(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)  # made when the file is read


def attention(**options) -> tuple[Callable, tuple[Tensor, ...]]:
    tensors = (shaped(N, H, T, D), shaped(N, H, T + 1, D), shaped(N, H, T + 1, D + 1))
    return (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)), tensors


MASK = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])
OPERATIONS = {
    "linear": (F.linear, (shaped(N, T, D), shaped(C, D), shaped(C))),
    "linear, one row": (F.linear, (shaped(D), shaped(C, D), shaped(C))),
    "linear without bias": (lambda x, w: F.linear(x, w), (shaped(N, D), shaped(C, D))),
    "linear, transposed": (lambda x, w: F.linear(x.mT, w), (shaped(N, D, T), shaped(C, D))),
    "conv1d": (F.conv1d, (shaped(N, D, 7), shaped(C, D, 3), shaped(C))),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1, groups=2),
        (shaped(N, D, 5, 5), shaped(C, D // 2, 3, 3), shaped(C)),
    ),
    "conv3d": (lambda x, w: F.conv3d(x, w, dilation=2), (shaped(N, 2, 4, 4, 4), shaped(C, 2, 2, 2, 2))),
    "embedding": (lambda w: F.embedding(torch.arange(N * T).view(N, T) % 7, w), (shaped(7, D),)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (D,), w, b), (shaped(N, T, D), shaped(D), shaped(D))),
    "layer_norm over two": (
        lambda x, w, b: F.layer_norm(x, (T, D), w, b, 1e-2),
        (shaped(N, T, D), shaped(T, D), shaped(T, D)),
    ),
    "layer_norm without bias": (lambda x, w: F.layer_norm(x, (D,), w), (shaped(N, D), shaped(D))),
    "layer_norm alone": (lambda x: F.layer_norm(x, (D,)), (shaped(N, T, D),)),
    "gelu": (F.gelu, (shaped(N, T, D),)),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), (shaped(N, D),)),
    "scaled_dot_product_attention": attention(),
    "attention, scaled": attention(scale=0.3),
    "attention, causal": attention(is_causal=True),
    "attention, a mask": attention(attn_mask=MASK),
    "attention, a mask for each sample": attention(attn_mask=MASK.expand(N, 1, T, T + 1)),
    "attention, an added mask": attention(attn_mask=shaped(1, H, T, T + 1)),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("function", "tensors"), OPERATIONS.values(), ids=OPERATIONS)
def test_a_rule_is_the_derivative_whatever_changes(function, tensors, count):
    used: list[str] = []
    for subset in range(1, 2 ** len(tensors)):
        at = [j for j in range(len(tensors)) if subset >> j & 1]

        def of_some(*some: Tensor, at: list[int] = at) -> Tensor:
            given = list(tensors)
            for j, x in zip(at, some, strict=True):
                given[j] = x
            return function(*given)

        primals = tuple(tensors[j] for j in at)
        directions = [[torch.randn_like(x) for x in primals] for _ in range(count)]
        output, changes = jvp.by_forward_mode(of_some, primals, directions, noting(used))
        assert len(used) == subset, f"no rule was used for changes of {at}"
        for direction, change in zip(directions, changes, strict=True):
            with sdpa_kernel(SDPBackend.MATH):
                expected, truth = torch.func.jvp(of_some, primals, tuple(direction))
            assert relative_error(output, expected) < 1e-12
            assert relative_error(change, truth) < 1e-12


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_more_scores_than_are_computed_together(masked):
    long = 131  # of these five samples, three at a time
    q, k, v = (torch.randn(N, H, long, D) for _ in range(3))
    mask = torch.rand(N, 1, long, long) < 0.5 if masked else None
    directions = [[torch.randn_like(x) for x in (q, k, v)] for _ in range(2)]
    _, changes = jvp.by_forward_mode(lambda *x: F.scaled_dot_product_attention(*x, mask), (q, k, v), directions)
    for direction, change in zip(directions, changes, strict=True):
        with sdpa_kernel(SDPBackend.MATH):
            _, truth = torch.func.jvp(lambda *x: F.scaled_dot_product_attention(*x, mask), (q, k, v), tuple(direction))
        assert relative_error(change, truth) < 1e-12


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (F.linear, (shaped(N, D), shaped(D))),
        (F.conv1d, (shaped(D, 7), shaped(C, D, 3))),
        (lambda q: F.scaled_dot_product_attention(q, q[:, :1], q[:, :1], enable_gqa=True), (shaped(N, H, T, D),)),
        (lambda q, mask: F.scaled_dot_product_attention(q, q, q, mask), (shaped(N, H, T, D), shaped(T, T))),
        (lambda q: F.scaled_dot_product_attention(q, q, q), (shaped(N, T, D),)),
    ],
)
def test_what_no_rule_covers_is_left_to_torch(function, tensors):
    used: list[str] = []
    directions = [[torch.randn_like(x) for x in tensors] for _ in range(2)]
    _, changes = jvp.by_forward_mode(function, tensors, directions, noting(used))
    assert not used
    for direction, change in zip(directions, changes, strict=True):
        with sdpa_kernel(SDPBackend.MATH):
            assert relative_error(change, torch.func.jvp(function, tensors, tuple(direction))[1]) < 1e-12


# --- models -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer in small, on images: every rule, tied weights, a frozen part, a parameter under no_grad."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, D, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.norm = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D)
        self.up, self.down = nn.Linear(D, 3 * D), nn.Linear(3 * D, D)
        self.down.weight = nn.Parameter(torch.randn(D, 3 * D))
        self.frozen = nn.Linear(D, D).requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        with torch.no_grad():
            scale = self.norm.weight * 2
        x = self.frozen(x * scale) + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))
        x = x + F.linear(F.linear(x, self.down.weight.mT).tanh(), self.down.weight)  # a tied layer
        return x[:, 0]


def block(dropout: float = 0.0) -> tuple[nn.Module, Tensor, Tensor]:
    return Block(dropout), torch.randn(N, 3, 4, 4), torch.randn(N, D)


def changes(objective_gradients: Tensor, tangents: Tensor) -> Tensor:
    return (objective_gradients * tangents).flatten(1).sum(1)


def test_all_directions_share_one_forward_pass_that_is_exact():
    model, x, targets = block()
    truth = per_sample_jacobian(model, x, targets, SQUARES)
    directions = [random_direction(trainable(model)) for _ in range(4)]
    push_forward(model, x, targets, SQUARES, directions)  # the first batch is verified
    model.calls = 0
    logits, tangents = push_forward(model, x, targets, SQUARES, directions)
    assert model.calls == 1
    assert relative_error(logits, model(x).detach()) < 1e-12
    for d, u in zip(directions, tangents, strict=True):
        assert relative_error(changes(logits - targets, u), truth @ flatten(d)) < 1e-10
    assert not logits.requires_grad and not tangents.requires_grad


def test_of_some_parameters():
    model, x, targets = block()
    parameters = {name: p for name, p in model.named_parameters() if name.startswith("up.")}
    for name, p in model.named_parameters():
        p.requires_grad_(name in parameters)
    truth = per_sample_jacobian(model, x, targets, SQUARES)
    model.requires_grad_(True)
    d = random_direction(parameters)
    for _ in range(2):  # by way of a linearization, and without one
        logits, (u,) = push_forward(model, x, targets, SQUARES, [d], parameters=parameters)
        assert relative_error(changes(logits - targets, u), truth @ flatten(d)) < 1e-10


@pytest.mark.parametrize("count", [1, 3])
def test_dropout_masks_are_those_of_the_linearization(count):
    model, x, targets = block(dropout=0.5)
    for _ in range(2):
        lin = linearize(model, x, targets, SQUARES)
        directions = [random_direction(lin.parameters) for _ in range(count)]
        before = torch.get_rng_state()
        tangents = lin.jvps(directions)
        assert torch.equal(torch.get_rng_state(), before)
        for d, u in zip(directions, tangents, strict=True):
            assert relative_error(changes(lin.logit_gradients, u), lin.jacobian.matvec(d)) < 1e-10


def test_dropout_draws_once_for_all_directions():
    model, x, targets = block(dropout=0.5)
    directions = [random_direction(trainable(model)) for _ in range(2)]
    push_forward(model, x, targets, SQUARES, directions)
    before = torch.get_rng_state()
    logits, tangents = push_forward(model, x, targets, SQUARES, directions)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    lin = linearize(model, x, targets, SQUARES)
    assert torch.equal(torch.get_rng_state(), after)
    assert relative_error(logits, lin.logits) < 1e-12
    for d, u in zip(directions, tangents, strict=True):
        assert relative_error(changes(lin.logit_gradients, u), lin.jacobian.matvec(d)) < 1e-10


class Added(torch.autograd.Function):
    """Without forward mode."""

    @staticmethod
    def forward(ctx, x):
        return x + 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Straight(torch.autograd.Function):
    """With a forward mode that is not the derivative its backward pass has."""

    @staticmethod
    def forward(x):
        return x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 0 * tangent


def filled(m: nn.Module, x: Tensor) -> Tensor:
    buffer = torch.zeros(len(x), C)
    buffer[:, 0] = F.linear(x, m.w)[:, 1].tanh()  # in place, which vmap refuses
    return buffer + F.linear(x, m.w)


WITHOUT = {
    "no forward mode": lambda m, x: Added.apply(F.linear(x, m.w).tanh()),
    "another derivative": lambda m, x: Straight.apply(F.linear(x, m.w)).tanh() * F.linear(x, m.w),
    "in place": filled,
    "data-dependent": lambda m, x: F.linear(x, m.w).tanh() * float(F.linear(x, m.w).sum().detach()),
}


@pytest.mark.parametrize("body", WITHOUT.values(), ids=WITHOUT)
def test_models_without_forward_mode_take_another_way(body):
    model, x, targets = Function(body, w=(C, D)), torch.randn(N, D), torch.randn(N, C)
    for _ in range(2):
        lin = linearize(model, x, targets, SQUARES)
        directions = [random_direction(lin.parameters) for _ in range(2)]
        for logits, tangents in (
            (lin.logits, lin.jvps(directions)),
            push_forward(model, x, targets, SQUARES, directions),
        ):
            for d, u in zip(directions, tangents, strict=True):
                assert relative_error(changes(logits - targets, u), lin.jacobian.matvec(d)) < 1e-10


def test_after_a_change_of_mode_it_is_verified_anew():
    model = Function(lambda m, x: Straight.apply(F.linear(x, m.w)) if m.training else F.linear(x, m.w), w=(C, D))
    x, targets = torch.randn(N, D), torch.randn(N, C)
    for training in (False, True, False):
        model.train(training)
        lin = linearize(model, x, targets, SQUARES)
        d = random_direction(lin.parameters)
        _, (u,) = push_forward(model, x, targets, SQUARES, [d])
        assert relative_error(changes(lin.logit_gradients, u), lin.jacobian.matvec(d)) < 1e-10


def test_changed_parameters_are_noticed():
    model, x, targets = block()
    lin = linearize(model, x, targets, SQUARES)
    d = random_direction(lin.parameters)
    lin.backward()
    with torch.no_grad():
        lin.parameters["up.weight"].mul_(1.001)
    with pytest.raises(CaptureError, match="parameters were changed"):
        lin.jvps([d, d])


def test_autocast_and_lower_precision():
    model, x, targets = block()
    d = random_direction(linearize(model, x, targets, SQUARES).parameters)
    truth = linearize(model, x, targets, SQUARES).jvps([d])[0]
    model, x, targets = model.float(), x.float(), targets.float()
    d = {name: entry.float() for name, entry in d.items()}
    assert relative_error(linearize(model, x, targets, SQUARES).jvps([d, d])[1], truth) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lin = linearize(model, x, targets, SQUARES)
        assert relative_error(lin.jvps([d, d])[1].double(), truth) < 0.05


@pytest.mark.parametrize("has_one", [True, False])
def test_torch_compiles_derivatives_only_where_one_is_missing(has_one, monkeypatch):
    """Half a second for each process otherwise, as soon as it enters forward mode."""
    loaded: list[bool] = []

    def load() -> None:
        loaded.append(True)
        monkeypatch.setitem(sys.modules, jvp._DECOMPOSITIONS, jvp)

    monkeypatch.delitem(sys.modules, jvp._DECOMPOSITIONS, raising=False)
    monkeypatch.setattr(forward_ad, "_maybe_load_decompositions", load)
    model, x, y = nn.Sequential(nn.Linear(D, 3), nn.LayerNorm(3)), torch.randn(N, D), torch.randn(N, 3)
    lin = linearize(model, x, y, SQUARES)
    d = random_direction(trainable(model))
    truth = per_sample_jacobian(model, x, y, SQUARES) @ flatten(d)
    assert relative_error((lin.jvp(d) * lin.logit_gradients).sum(1), truth) < 1e-12
    assert not loaded and forward_ad._maybe_load_decompositions is load

    def missing(*args):
        if not (loaded and has_one):
            raise NotImplementedError("no derivative yet")
        return jvp.by_forward_mode(*args)

    monkeypatch.setattr("lightning_ief.capture.tangents.by_forward_mode", missing)
    for _ in range(2):
        assert relative_error((lin.jvp(d) * lin.logit_gradients).sum(1), truth) < 1e-12
    assert len(loaded) == (1 if has_one else 2)  # asked again, it is there already
