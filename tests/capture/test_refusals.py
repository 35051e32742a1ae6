"""What can't be captured is refused, in words; and a refusal leaves the model as it was.

Every model here counts its forward passes in a buffer and draws random numbers, so that a trace left behind shows.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from lightning_ief import linearize, objectives
from lightning_ief.capture import rules
from lightning_ief.capture.factors import Dense
from lightning_ief.capture.types import CaptureError
from tests.helpers import Custom, Function, assert_exact, per_sample_jacobian

pytestmark = pytest.mark.usefixtures("float64")
N, T, D, C = 4, 3, 5, 6  # samples, length, features, classes
SQUARES, ENTROPY = objectives.LeastSquares(), objectives.CrossEntropy()


class Watched(nn.Module):
    """A model whose forward passes leave traces."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.passes += 1
        torch.rand(3)
        return self.inner(*args, **kwargs)


def refusal(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    error: type[Exception] = CaptureError,
    objective: objectives.Objective = SQUARES,
    read: bool = False,
    **options: Any,
) -> str:
    """The message with which a model is refused.

    Args:
        model: The model.
        inputs: Its inputs.
        targets: y.
        error: The class of the error.
        objective: The objective.
        read: Whether the refusal may come as late as when the Jacobian is read.
        options: Of `linearize`.

    Returns:
        The message.

    """
    watched = Watched(model)
    buffers = {name: b.clone() for name, b in watched.named_buffers()}
    classes = [type(p) for p in watched.parameters()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with pytest.raises(error) as caught:  # noqa: PT012 - either of the two may raise
        lin = linearize(watched, inputs, targets, objective, **options)
        if read:
            state, buffers = torch.get_rng_state(), {name: b.clone() for name, b in watched.named_buffers()}
            lin.jacobian.gram()
    assert [type(p) for p in watched.parameters()] == classes
    assert all(p.grad is None for p in watched.parameters())
    assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn"
    for name, b in watched.named_buffers():
        assert torch.equal(b, buffers[name]), f"buffer '{name}' changed"
    return str(caught.value)


def has(message: str, *parts: str) -> bool:
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} missing in: {message}"
    return True


def apply(*tensors: Tensor) -> Tensor:
    """Custom.apply through C++ only: nothing announces itself."""
    with torch._C.DisableTorchFunctionSubclass():
        return Custom.apply(*tensors)


def packed(m: nn.Module, x: Tensor) -> Tensor:
    lengths = torch.arange(len(x)) % 2 + 2
    return m.inner(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1][0][0]


def set_first(m: nn.Module, x: Tensor) -> Tensor:
    x = x.sin() * m.s
    x[:, 0] = m.p
    return x


def add_to_first(m: nn.Module, x: Tensor) -> Tensor:
    x = x.sin() * m.s
    x[:, 0].add_(m.p)
    return x


def added_then_changed(m: nn.Module, x: Tensor) -> Tensor:
    x = x.sin() * m.s
    y = x + m.p
    x.mul_(2)
    return y + x


def changed_derived(m: nn.Module, x: Tensor) -> Tensor:
    w = m.w.clone()
    y = F.linear(x, w)
    w.mul_(m.s)
    return y * F.linear(x, w)


def positions_first(m: nn.Module, x: Tensor) -> Tensor:
    flat = x.transpose(0, 1).flatten(0, 1)
    return (m.p.repeat(len(flat), 1) * flat).view(T, len(x), D).transpose(0, 1)


def samples_in_the_middle(m: nn.Module, x: Tensor) -> Tensor:
    flat = x.unflatten(-1, (D, 1)).transpose(0, 1).reshape(-1, 1)  # t n d
    return F.linear(flat, m.w).view(T, len(x), -1).transpose(0, 1)


def force(m: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.linear(x, m.w).tanh().sum(), x, create_graph=True)
    return gradient


def one_more_every_time(m: nn.Module, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", None) or itertools.count(1)  # what no snapshot can take back
    for _ in range(next(m.calls)):
        x = x * m.p
    return x


def longer_for_more(m: nn.Module, x: Tensor) -> Tensor:
    y = F.linear(x, m.w)
    return y * m.s if len(x) >= N else y


def mixed(m: nn.Module, x: Tensor) -> Tensor:
    hidden = F.linear(x, m.w).tanh()
    return F.linear(hidden - hidden.mean(0), m.v)


def normalised(training: bool) -> Callable[..., Tensor]:
    def body(m: nn.Module, x: Tensor) -> Tensor:
        return F.batch_norm(x, torch.zeros(D), torch.ones(D), m.w, m.b, training=training)

    return body


# name: (model, shape of one sample, parts of the message)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "batch norm in training": (
        lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)),
        (D,),
        ("BatchNorm1d 'inner.1'", "statistics of the batch", "eval()", "GroupNorm"),
    ),
    "frozen batch norm in training": (
        lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, affine=False)),
        (D,),
        ("BatchNorm1d 'inner.1'", "eval()"),
    ),
    "batch norm without statistics": (
        lambda: nn.Sequential(nn.Conv2d(T, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)).eval(),
        (T, 2, 2),
        ("BatchNorm2d 'inner.1'", "GroupNorm"),
    ),
    "functional batch norm": (
        lambda: Function(normalised(training=True), w=(D,), b=(D,)),
        (D,),
        ("batch_norm", "'inner.w'", "'inner.b'", "eval()", "LayerNorm"),
    ),
    "mean over the batch between layers": (
        lambda: Function(mixed, w=(D, D), v=(C, D)),
        (D,),
        ("'inner.w'", "samples of the batch influence each other", "verify=False"),
    ),
    "logits minus their mean": (
        lambda: Function(lambda m, x: (lambda z: z - z.mean(0))(F.linear(x, m.w)), w=(C, D)),
        (D,),
        ("'inner.w'", "samples of the batch influence each other"),
    ),
    "attention across the batch": (
        lambda: Function.of(nn.MultiheadAttention(D, 1), lambda m, x: m.inner(x, x, x, need_weights=False)[0]),
        (D,),
        ("inner.inner.",),
    ),
    "product of samples": (
        lambda: Function(lambda m, x: (x * m.p) @ (x * m.p).T @ x, p=(D,)),
        (D,),
        ("'inner.p'",),
    ),
    "sum over the batch in one operation": (
        lambda: Function(lambda m, x: x + torch.einsum("nd,d->d", x, m.p), p=(D,)),
        (D,),
        ("einsum", "'inner.p'", "mixes the samples", "freeze"),
    ),
    "a gradient taken within the forward pass": (
        lambda: Function(force, w=(C, D)),
        (D,),
        ("'inner.w'", "do not add up"),
    ),
    "max_norm": (
        lambda: Function.of(nn.Embedding(7, D, max_norm=0.1), lambda m, x: m.inner((x > 0).long())),
        (T,),
        ("embedding", "'inner.inner.weight'", "max_norm", "freeze"),
    ),
    "scale_grad_by_freq": (
        lambda: Function.of(nn.Embedding(7, D, scale_grad_by_freq=True), lambda m, x: m.inner((x > 0).long())),
        (T,),
        ("embedding", "'inner.inner.weight'", "scale_grad_by_freq", "freeze"),
    ),
    "packed sequences": (
        lambda: Function.of(nn.LSTM(D, C), packed),
        (T, D),
        ("lstm", "'inner.inner.weight_ih_l0'", "pad the sequences", "freeze"),
    ),
    "embedding bag with offsets": (
        lambda: Function.of(
            nn.EmbeddingBag(7, D),
            lambda m, x: m.inner((x > 0).long().flatten()[: len(x) * T - 1], torch.arange(len(x)) * T),
        ),
        (T,),
        ("embedding_bag", "'inner.inner.weight'"),
    ),
    "dropout between the layers of an LSTM that a checkpoint runs again": (
        lambda: Function.of(
            nn.LSTM(D, C, num_layers=2, dropout=0.5, batch_first=True),
            lambda m, x: checkpoint(lambda x: m.inner(x)[0], x, use_reentrant=False),
        ),
        (T, D),
        ("lstm", "'inner.inner.weight_ih_l0'", "draws random numbers", "dropout to 0", "eval()"),
    ),
    "operations that change by chance": (
        lambda: Function(one_more_every_time, p=(D,)),
        (D,),
        ("operations", "chance"),
    ),
    "operations that depend on the number of samples": (
        lambda: Function(longer_for_more, w=(D, D), s=(D,)),
        (D,),
        ("does not repeat", "operation 1 on trainable parameters", "number of samples"),
    ),
    "a row of the parameter for every sample": (
        lambda: Function(lambda m, x: x * m.p[: len(x)], p=(9, D)),
        (D,),
        ("'inner.p'", "one more sample", "freeze"),
    ),
    "a parameter of N rows": (
        lambda: Function(lambda m, x: x * m.p, p=(N, D)),
        (D,),
        (f"runs on {N} samples", "fails with 2", "dimension 0"),
    ),
    "an argument changed in place after its use": (
        lambda: Function(added_then_changed, p=(D,), s=()),
        (T, D),
        ("add", "'inner.p'", "changed in place", "out-of-place"),
    ),
    "a derived weight changed in place between its uses": (
        lambda: Function(changed_derived, w=(C, D), s=()),
        (D,),
        ("changed in place",),
    ),
    "a parameter added to a slice in place": (
        lambda: Function(add_to_first, p=(D,), s=()),
        (T, D),
        ("'inner.p'",),
    ),
    "constants for a batch folded positions first": (
        lambda: Function(positions_first, p=(1, D)),
        (T, D),
        ("'inner.p'", "folded"),
    ),
    "samples in the middle of a folded dimension": (
        lambda: Function(samples_in_the_middle, w=(2, 1)),
        (T, D),
        ("'inner.w'", "folded"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "shape", "parts"), MODELS.values(), ids=MODELS)
def test_models_that_are_refused(make: Callable[[], nn.Module], shape: tuple[int, ...], parts: tuple[str, ...]):
    torch.manual_seed(0)
    model, x = make(), torch.randn(N, *shape)
    targets = torch.randn_like(model(x).detach())
    message = refusal(model, x, targets)
    assert has(message, *parts)
    assert model(x).shape == targets.shape


ESCAPING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "custom autograd function": (
        lambda: Function(lambda m, x: apply(x, m.w), w=(C, D)),
        (D,),
        ("'inner.w'", "announced no use", "requires_grad_(False)"),
    ),
    "custom autograd function beside an ordinary use": (
        lambda: Function(lambda m, x: apply(x, m.w) + F.linear(x, m.w), w=(C, D)),
        (D,),
        ("'inner.w'", "used once more", "requires_grad_(False)"),
    ),
    "a parameter written into a slice": (
        lambda: Function(set_first, p=(D,), s=()),
        (T, D),
        ("'inner.p'", "announced no use", "requires_grad_(False)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "shape", "parts"), ESCAPING.values(), ids=ESCAPING)
def test_models_with_escaping_uses_are_refused_where_that_is_asked_for(
    make: Callable[[], nn.Module], shape: tuple[int, ...], parts: tuple[str, ...]
):
    torch.manual_seed(0)
    model, x = make(), torch.randn(N, *shape)
    targets = torch.randn_like(model(x).detach())
    for verify in (None, True, False):
        assert has(refusal(model, x, targets, strict=True, verify=verify), *parts)
    with pytest.warns(RuntimeWarning, match="escapes the capture"):
        assert_exact(model, x, targets)


# --- verification -----------------------------------------------------------------------------------------------------


@pytest.fixture
def wrong_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule for torch.mul that gives each sample its neighbour's row: the sum is right, the split is not."""
    right = rules._rules[torch.Tensor.mul]

    def wrong(operation, input, other):
        for argument, factor in right(operation, input, other):
            yield argument, Dense(factor.values.roll(1, dims=1))

    monkeypatch.setitem(rules._rules, torch.Tensor.mul, wrong)


def scaled() -> nn.Module:
    return Function(lambda m, x: F.linear(x.mul(m.scale), m.w), scale=(D,), w=(C, D))


@pytest.mark.usefixtures("wrong_split")
def test_rows_of_the_wrong_samples_are_caught():
    x, targets = torch.randn(N, D), torch.randn(N, C)
    message = refusal(scaled(), x, targets)
    assert has(message, "1 of 2 parameters", "'inner.scale'", "relative error", "verify=False")
    assert "'inner.w'" not in message


@pytest.mark.usefixtures("wrong_split")
def test_verify_false_switches_it_off():
    model, x, targets = scaled(), torch.randn(N, D), torch.randn(N, C)
    jacobian = linearize(model, x, targets, SQUARES, verify=False).jacobian
    truth = per_sample_jacobian(model, x, targets, SQUARES)
    assert not torch.allclose(jacobian.to_dense(), truth)
    found, expected = (F.normalize(rows[:, :D]) for rows in (jacobian.to_dense(), truth))
    assert torch.allclose(found, expected.roll(1, 0))  # up to their lengths, those of their neighbours
    assert torch.allclose(jacobian.to_dense()[:, D:], truth[:, D:])


def test_verification_is_not_satisfied_with_one_sample():
    """One sample can't influence others: the next batch is verified instead."""
    model = Function(
        lambda m, x: F.linear((lambda h: h - h.mean(0) / 2)(F.linear(x, m.w).tanh()), m.v), w=(D, D), v=(C, D)
    )
    linearize(model, torch.randn(1, D), torch.randn(1, C), SQUARES)
    with pytest.raises(CaptureError, match="'w'"):
        linearize(model, torch.randn(N, D), torch.randn(N, C), SQUARES)


def test_verification_is_not_satisfied_with_gradients_of_zero():
    """Behind a head that starts at zero every gradient vanishes: nothing is verified as long as it does."""
    model = Function(mixed, w=(D, D), v=torch.zeros(C, D))
    x, targets = torch.randn(N, D), torch.randn(N, C)
    linearize(model, x, targets, SQUARES)
    nn.init.normal_(model.v)
    with pytest.raises(CaptureError, match="'w'"):
        linearize(model, x, targets, SQUARES)


def cancelling(change: Callable[[Tensor], Tensor] = lambda h: h) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, in float32, whose backward pass loses five digits; a change of what lies before comes on top."""
    model = Function(
        lambda m, x: F.linear((lambda h: 1e5 * h - 99999 * h)(change(F.linear(x, m.w))), m.v), w=(D, D), v=(C, D)
    )
    return model.float(), torch.randn(N, D).float(), torch.randn(N, C).float()


def test_rounding_of_the_backward_pass_is_no_wrong_capture():
    """As in models that have diverged: autograd's own gradient is off by more than is let pass elsewhere."""
    model, x, targets = cancelling()
    lin = linearize(model, x, targets, SQUARES)
    truth = per_sample_jacobian(model.double(), x.double(), targets.double(), SQUARES)
    w = torch.randn(N)
    found = torch.cat([entry.flatten() for entry in lin.jacobian.rmatvec(w).values()]).double()
    assert 1e-3 < (found - w @ truth).norm() / (w @ truth).norm() < 0.1


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_samples_that_mix_a_little_are_caught(share: float):
    model = Function(
        lambda m, x: F.linear(share * F.linear(x, m.w).roll(1, 0) + F.linear(x, m.w), m.v), w=(D, D), v=(C, D)
    )
    message = refusal(model.float(), torch.randn(N, D).float(), torch.randn(N, C).float())
    assert has(message, "'inner.w'", "samples of the batch influence each other")


def test_samples_that_mix_behind_rounding_are_caught():
    assert has(refusal(*cancelling(lambda h: h + h.roll(1, 0))), "'inner.w'", "influence each other")


def test_a_backward_pass_that_is_not_linear_is_no_rounding():
    """Whose gradient is clipped for the batch together."""

    def clipped(h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(lambda g: g / g.norm())
        return h

    assert has(refusal(*cancelling(clipped)), "'inner.w'", "do not add up")


def test_a_refused_model_can_be_mended():
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, C))
    x, targets = torch.randn(N, D), torch.randn(N, C)
    with pytest.raises(CaptureError, match="BatchNorm1d '1'"):
        linearize(model, x, targets, SQUARES)
    model[1].eval()
    assert_exact(model, x, targets)


# --- parameters -------------------------------------------------------------------------------------------------------


class Special(nn.Parameter):
    """A parameter of a class of its own."""


def test_parameters_of_another_class():
    model = nn.Linear(D, C)
    model.bias = Special(torch.randn(C))
    message = refusal(model, torch.randn(N, D), torch.randn(N, C), TypeError)
    assert has(message, "'inner.bias'", "Special", "requires_grad_(False)")


def test_complex_parameters():
    model = Function(lambda m, x: (x * m.p).abs(), p=torch.randn(D, dtype=torch.complex128))
    message = refusal(model, torch.randn(N, D), torch.randn(N, D), TypeError)
    assert has(message, "'inner.p'", "complex", "view_as_complex", "requires_grad_(False)")


def test_uninitialised_parameters():
    message = refusal(nn.LazyLinear(C), torch.randn(N, D), torch.randn(N, C), TypeError)
    assert has(message, "'inner.weight'", "UninitializedParameter")


def test_no_trainable_parameter():
    model = nn.Linear(D, C).requires_grad_(False)
    message = refusal(model, torch.randn(N, D), torch.randn(N, C), ValueError)
    assert has(message, "Watched", "no trainable parameter", "requires_grad")


def test_logits_that_do_not_depend_on_parameters():
    def body(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.linear(x, m.w)

    message = refusal(Function(body, w=(C, D)), torch.randn(N, D), torch.randn(N, C), ValueError)
    assert has(message, "do not depend on its trainable parameters", "no_grad")


def test_parameters_updated_before_the_rows_are_read():
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, C))
    x, targets = torch.randn(N, D), torch.randn(N, C)
    linearize(model, x, targets, SQUARES)
    lin = linearize(model, x, targets, SQUARES)
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises((CaptureError, RuntimeError), match="were changed after they had been linearised"):
        lin.jacobian.gram()


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [torch.zeros(0, C), torch.zeros(())])
def test_empty_batches(targets: Tensor):
    message = refusal(nn.Linear(D, C), torch.randn(0, D), targets, ValueError)
    assert has(message, "Empty batch", str(tuple(targets.shape)))


def test_a_batch_of_one():
    assert_exact(nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, C)), torch.randn(1, D))


LOGITS = {
    "sequence first": (lambda m, x: F.linear(x, m.w).transpose(0, 1), (T, N, C)),
    "averaged over the batch": (lambda m, x: F.linear(x, m.w).mean(0), (T, C)),
    "a scalar": (lambda m, x: F.linear(x, m.w).sum(), ()),
    "folded": (lambda m, x: F.linear(x, m.w).flatten(0, 1), (N * T, C)),
}


@pytest.mark.parametrize(("body", "shape"), LOGITS.values(), ids=LOGITS)
def test_logits_without_samples_in_front(body, shape: tuple[int, ...]):
    message = refusal(Function(body, w=(C, D)), torch.randn(N, T, D), torch.randn(N, T, C), ValueError)
    assert has(message, f"shape {shape}", f"{N} targets", "dimension 0 of the logits must be the samples")


def test_fewer_targets_than_samples():
    message = refusal(nn.Linear(D, C), torch.randn(N, D), torch.randn(N - 1, C), ValueError)
    assert has(message, f"shape {(N, C)}", f"{N - 1} targets")


def test_sequence_first_logits_of_a_length_equal_to_the_number_of_samples():
    model = Function(lambda m, x: F.linear(x, m.w).transpose(0, 1), w=(C, D))
    message = refusal(model, torch.randn(N, N, D), torch.randn(N, N, C))
    assert has(message, "'inner.w'")


def test_a_constant_that_looks_like_a_batch():
    """A mask [T, T] with T = N: it is cut like the batch, and no longer fits."""
    layer = nn.TransformerEncoderLayer(D, 1, C, dropout=0.0, batch_first=True)
    x, mask = torch.randn(N, N, D), torch.zeros(N, N)
    message = refusal(layer, (x, mask), torch.randn(N, N, D))
    assert has(message, f"runs on {N} samples", "fails with 2", "dimension 0")


OUTPUTS = {
    "a dict": (lambda m, x: {"out": F.linear(x, m.w)}, "dict with keys ['out']"),
    "a tuple": (lambda m, x: (F.linear(x, m.w), x), "tuple"),
    ".logits of None": (lambda m, x: SimpleNamespace(logits=None), "None"),
    "None": (lambda m, x: None, "None"),
}


@pytest.mark.parametrize(("body", "found"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_without_logits(body, found: str):
    message = refusal(Function(body, w=(C, D)), torch.randn(N, D), torch.randn(N, C), TypeError)
    assert has(message, found, "expected the logits as a tensor, a dict with 'logits', or")


@pytest.mark.parametrize(
    ("targets", "error", "part"),
    [
        (torch.randn(N), TypeError, "int64"),
        (torch.randn(N, C), ValueError, "probabilities"),
        (torch.zeros(N, 2, dtype=torch.int64), ValueError, f"logits {(N, C)} and targets {(N, 2)}"),
        (torch.full((N,), C), ValueError, f"class {C}"),
    ],
)
def test_targets_that_do_not_fit_the_objective(targets: Tensor, error: type[Exception], part: str):
    assert has(refusal(nn.Linear(D, C), torch.randn(N, D), targets, error, ENTROPY), "CrossEntropy", part)


def test_an_error_of_the_model_comes_through():
    def body(m: nn.Module, x: Tensor) -> Tensor:
        F.linear(x, m.w)
        raise KeyError("of the model itself")

    assert "of the model itself" in refusal(Function(body, w=(C, D)), torch.randn(N, D), torch.randn(N, C), KeyError)


@pytest.mark.usefixtures("wrong_split")
def test_a_rule_that_raises_when_the_rows_are_read(monkeypatch: pytest.MonkeyPatch):
    def broken(operation, input, other):
        raise CaptureError("broken rule")
        yield

    monkeypatch.setitem(rules._rules, torch.Tensor.mul, broken)
    message = refusal(scaled(), torch.randn(N, D), torch.randn(N, C), read=True, verify=False)
    assert message == "broken rule"
