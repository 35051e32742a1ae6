"""Every layer against the truth: one sample at a time, float64, autograd, dense.

A case maps N to a model and its inputs. Sizes are 3 and 5 wherever it can be, and all cases run with N = 1, 3 and 5, so
that N equals a length, a number of features or both.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ief import linearize, objectives
from tests.helpers import assert_exact, assert_jacobian, per_sample_jacobian

pytestmark = pytest.mark.usefixtures("float64")
Case = Callable[[int], tuple[nn.Module, Any]]
T, D = 3, 5  # length, features


class Within(nn.Module):
    """A layer in the middle of a network: its input has a gradient, and its output is not the logits."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.sin(self.scale * x)))


def layer(make: Callable[[], nn.Module], *shape: int) -> Case:
    return lambda n: (Within(make()), torch.randn(n, *shape))


def indexed(make: Callable[[], nn.Module], *shape: int, entries: int = 7) -> Case:
    return lambda n: (make(), torch.randint(0, entries, (n, *shape)))


def settled(norm: nn.Module, *shape: int) -> nn.Module:
    """A norm in evaluation, with statistics that differ from 0 and 1 and with weights that differ from 1 and 0."""
    for _ in range(3):
        norm(3 * torch.randn(4, *shape) + 1)
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm.eval()


class Bilinear(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.form = nn.Bilinear(D, D, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x.cos())


class Steps(nn.Module):
    """A recurrent cell, called once for every step."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Transposed(nn.Module):
    """A layer that may want the sequence first, on samples-first input."""

    def __init__(self, inner: nn.Module, batch_first: bool) -> None:
        super().__init__()
        self.inner = inner
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.batch_first else self.inner(x.transpose(0, 1)).transpose(0, 1)


class Decoder(nn.Module):
    """A decoder layer that attends to another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.inner(x, x[:, 1:].cos(), tgt_mask=causal, tgt_is_causal=True)


class Recurrent(nn.Module):
    """A recurrent layer on samples-first input, whatever it wants itself; its outputs and last states as logits."""

    def __init__(self, rnn: nn.RNNBase, given_state: bool = False) -> None:
        super().__init__()
        self.rnn = rnn
        self.given_state = given_state

    def forward(self, x: Tensor) -> Tensor:
        state = None
        if self.given_state:
            state = x.mean((1, 2)).expand(self.rnn.num_layers, self.rnn.hidden_size, -1).transpose(1, 2).contiguous()
        if not self.rnn.batch_first:
            x = x.transpose(0, 1)
        y, state = self.rnn(x, state)
        y = y if self.rnn.batch_first else y.transpose(0, 1)
        last = state[0] if isinstance(state, tuple) else state
        return torch.cat([y.flatten(1), last.transpose(0, 1).flatten(1)], 1)


class Attention(nn.Module):
    """Attention on samples-first input, whatever it wants itself; keys and values may have other widths."""

    def __init__(
        self, mask: str | None = None, need_weights: bool = False, cross: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)
        self.mask, self.need_weights, self.cross = mask, need_weights, cross
        self.query = nn.Linear(D, 4)
        for name, p in self.attention.named_parameters():
            if "bias" in name:
                nn.init.normal_(p)

    def forward(self, x: Tensor) -> Tensor:
        a = self.attention
        query = self.query(x)
        key, value = (x[:, 1:, : a.kdim], x[:, 1:, -a.vdim :]) if self.cross else (query, query)
        options = {"need_weights": self.need_weights, "average_attn_weights": False}
        if self.mask == "causal":
            options |= {"attn_mask": torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).triu(1)}
        if self.mask == "padding":
            options |= {"key_padding_mask": (x[:, :, 0] > 0.3).index_fill(1, torch.tensor([0]), False)}
        if a.batch_first:
            y, weights = a(query, key, value, **options)
        else:
            y, weights = a(*(t.transpose(0, 1) for t in (query, key, value)), **options)
            y = y.transpose(0, 1)
        return y if weights is None else torch.cat([y.flatten(1), weights.flatten(1)], 1)


# --- modules of torch.nn ----------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    {},
    {"bias": False},
    {"stride": 2},
    {"padding": 1},
    {"padding": "same"},
    {"padding": "valid"},
    {"dilation": 2},
    {"stride": 2, "padding": 2, "dilation": 2},
    {"groups": 2},
    {"groups": 4, "stride": 2, "bias": False},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect", "bias": False},
]
SIZES = {1: (6,), 2: (6, 5), 3: (5, 3, 4)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def convolution(kind: type[nn.Module], size: tuple[int, ...], kernel: Any, **options: Any) -> Case:
    return layer(lambda: kind(4, 8, kernel, **options), 4, *size)


LAYERS: dict[str, Case] = {
    **{
        f"linear {ndim}-D, bias={bias}": layer(lambda bias=bias: nn.Linear(D, 4, bias=bias), *(2, T)[: ndim - 2], D)
        for ndim in (2, 3, 4)
        for bias in (True, False)
    },
    **{
        f"conv{dims}d {options}": convolution(CONV[dims], SIZES[dims], 2, **options)
        for dims in (1, 2, 3)
        for options in CONVOLUTIONS
    },
    "conv2d with tuples": convolution(nn.Conv2d, (6, 5), (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "conv3d with tuples": convolution(nn.Conv3d, (5, 3, 4), (3, 1, 2), stride=(1, 2, 1), padding=(0, 1, 2)),
    "conv2d depthwise": layer(lambda: nn.Conv2d(D, D, 3, groups=D), D, 4, 4),
    "conv2d pointwise": layer(lambda: nn.Conv2d(D, 2, 1), D, T, T),
    "conv2d channels last": layer(lambda: nn.Conv2d(4, 8, 2, padding=1).to(memory_format=torch.channels_last), 4, 6, 5),
    **{
        f"conv{dims}d transposed {options}": convolution(TRANSPOSED[dims], SIZES[dims], 2, **options)
        for dims in (1, 2, 3)
        for options in ({}, {"bias": False}, {"stride": 2, "padding": 1, "output_padding": 1}, {"groups": 2})
    },
    "bilinear": layer(lambda: Bilinear(True), D),
    "bilinear without bias": layer(lambda: Bilinear(False), D),
    "embedding": indexed(lambda: nn.Embedding(7, D), T),
    "embedding of one index each": indexed(lambda: nn.Embedding(7, D)),
    "embedding, 3-D": indexed(lambda: nn.Embedding(7, D), 2, T),
    "embedding, repeated indices": indexed(lambda: nn.Embedding(2, D), 6, entries=2),
    "embedding, padding_idx": indexed(lambda: nn.Embedding(7, D, padding_idx=1), 6, entries=3),
    "embedding, negative padding_idx": indexed(lambda: nn.Embedding(3, D, padding_idx=-2), 6, entries=3),
    "embedding, sparse": indexed(lambda: nn.Embedding(7, D, sparse=True), T),
    **{
        f"embedding bag, {mode}": indexed(lambda mode=mode: nn.EmbeddingBag(7, D, mode=mode), T)
        for mode in ("sum", "mean", "max")
    },
    "embedding bag, padding_idx": indexed(lambda: nn.EmbeddingBag(7, D, mode="mean", padding_idx=1), 6, entries=3),
    **{
        f"{kind.__name__} {options} on {shape}": layer(
            lambda kind=kind, arguments=arguments, options=options, shape=shape: settled(
                kind(*arguments, **options), *shape
            ),
            *shape,
        )
        for kind, arguments, options, shape in [
            (nn.LayerNorm, (D,), {}, (D,)),
            (nn.LayerNorm, (D,), {}, (T, D)),
            (nn.LayerNorm, (D,), {"bias": False}, (T, D)),
            (nn.LayerNorm, ((T, D),), {}, (T, D)),
            (nn.LayerNorm, ((T, D),), {}, (2, T, D)),
            (nn.GroupNorm, (2, 6), {}, (6,)),
            (nn.GroupNorm, (2, 4), {}, (4, T)),
            (nn.GroupNorm, (2, 4), {}, (4, T, T)),
            (nn.GroupNorm, (1, 4), {"eps": 0.1}, (4, 2, T, T)),
            (nn.RMSNorm, (D,), {}, (D,)),
            (nn.RMSNorm, (D,), {"eps": 0.1}, (T, D)),
            (nn.RMSNorm, ((T, D),), {}, (T, D)),
            (nn.BatchNorm1d, (D,), {}, (D,)),
            (nn.BatchNorm1d, (D,), {}, (D, T)),
            (nn.BatchNorm2d, (D,), {"eps": 0.1}, (D, T, T)),
            (nn.BatchNorm3d, (D,), {}, (D, T, T, 2)),
            (nn.InstanceNorm1d, (D,), {"affine": True}, (D, T)),
            (nn.InstanceNorm2d, (D,), {"affine": True}, (D, T, T)),
            (nn.InstanceNorm2d, (D,), {"affine": True, "track_running_stats": True}, (D, T, T)),
        ]
    },
    "instance norm in training, with statistics": layer(
        lambda: nn.InstanceNorm2d(D, affine=True, track_running_stats=True), D, T, T
    ),
    "prelu, one slope": layer(lambda: nn.PReLU(), D, T),
    "prelu, a slope for every channel": layer(lambda: nn.PReLU(D), D, T),
    "prelu, 2-D": layer(lambda: nn.PReLU(D), D),
}


# --- attention --------------------------------------------------------------------------------------------------------

ATTENTION: dict[str, Case] = {
    **{
        f"{options}, batch_first={batch_first}": layer(
            lambda options=options, batch_first=batch_first: Attention(batch_first=batch_first, **options), T, D
        )
        for batch_first in (True, False)
        for options in [
            {},
            {"bias": False},
            {"need_weights": True},
            {"mask": "causal"},
            {"mask": "padding"},
            {"mask": "causal", "need_weights": True},
            {"add_bias_kv": True},
            {"add_zero_attn": True},
            {"cross": True, "kdim": 3, "vdim": 2},
            {"cross": True, "kdim": 3, "vdim": 2, "bias": False, "need_weights": True},
            {"cross": True, "kdim": 4, "vdim": 4},
        ]
    },
    **{
        f"encoder layer, batch_first={batch_first}, norm_first={norm_first}, training={training}": layer(
            lambda *a, batch_first=batch_first, norm_first=norm_first, training=training: Transposed(
                nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=batch_first, norm_first=norm_first).train(
                    training
                ),
                batch_first,
            ),
            T,
            4,
        )
        for batch_first in (True, False)
        for norm_first in (True, False)
        for training in (True, False)
    },
    "decoder layer": layer(lambda: Decoder(), T, 4),
}

# --- recurrent layers -------------------------------------------------------------------------------------------------

RECURRENT: dict[str, Case] = {
    f"{kind.__name__} {options}, batch_first={batch_first}": layer(
        lambda kind=kind, options=options, batch_first=batch_first: (
            Recurrent(kind(D, T, batch_first=batch_first, **options), given_state=kind is not nn.LSTM)
            if "bidirectional" not in options
            else Recurrent(kind(D, T, batch_first=batch_first, **options))
        ),
        4,
        D,
    )
    for batch_first in (True, False)
    for kind, options in [
        (nn.LSTM, {}),
        (nn.LSTM, {"bias": False}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"proj_size": 2}),
        (nn.GRU, {}),
        (nn.GRU, {"num_layers": 2, "bidirectional": True, "bias": False}),
        (nn.RNN, {}),
        (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}),
    ]
}
RECURRENT |= {
    f"{kind.__name__} on one step at a time": layer(lambda kind=kind: Steps(kind(D, T)), 4, D)
    for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
}

CASES = LAYERS | {f"attention {k}": v for k, v in ATTENTION.items()} | RECURRENT


@pytest.mark.parametrize("samples", [1, 3, 5])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layer_is_exact(case: Case, samples: int):
    model, inputs = case(samples)
    assert_exact(model, inputs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layer_in_float32(case: Case):
    model, x = case(4)
    rounded = x.float() if x.is_floating_point() else x
    model = model.float()
    targets = torch.randn_like(model(rounded).detach())
    exact = copy.deepcopy(model).double()
    truth = per_sample_jacobian(exact, rounded.to(x.dtype), targets.double(), objectives.LeastSquares())
    assert_jacobian(linearize(model, rounded, targets, objectives.LeastSquares()), truth, tolerance=1e-5)
