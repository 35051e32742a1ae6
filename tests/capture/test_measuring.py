"""What measuring finds out: packed sequences, an axis that moves, state in plain attributes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_ief import linearize, objectives
from lightning_ief.capture import push_forward
from lightning_ief.capture.types import CaptureError
from tests.helpers import (
    assert_jacobian,
    flatten,
    jacobian_of_graph,
    per_sample_jacobian,
    random_direction,
    relative_error,
    trainable,
)

N, T, D, C = 2, 4, 4, 3
CE = objectives.CrossEntropy()
SQUARES = objectives.LeastSquares()

pytestmark = pytest.mark.usefixtures("float64")


class Packed(nn.Module):
    """Drops the padding in front of its layers and puts it back behind them."""

    def __init__(self, by_index: bool) -> None:
        super().__init__()
        self.a, self.b, self.by_index = nn.Linear(D, 5), nn.Linear(5, C), by_index

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)[mask.flatten().nonzero()[:, 0]] if self.by_index else x[mask]
        hidden = self.b(torch.tanh(self.a(tokens)))
        output = hidden.new_zeros(*mask.shape, C)
        output[mask] = hidden
        return output


def of_lengths(*lengths: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    y = torch.randint(C, mask.shape)
    return (torch.randn(len(lengths), T, D), mask), y.masked_fill(~mask, -100)


@pytest.mark.parametrize("lengths", [(3, 3), (4, 4), (2, 4), (1, 4)])
@pytest.mark.parametrize("by_index", [False, True])
def test_packed_sequences_are_refused_whatever_their_lengths(lengths, by_index):
    with pytest.raises(CaptureError, match="pad"):
        linearize(Packed(by_index), *of_lengths(*lengths), CE)


def test_padded_sequences_with_the_same_masks_are_exact():
    class Padded(Packed):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x))) * mask[..., None]

    model = Padded(False)
    for lengths in ((3, 3), (2, 4), (1, 4)):
        inputs, y = of_lengths(*lengths)
        assert_jacobian(linearize(model, inputs, y, CE), per_sample_jacobian(model, inputs, y, CE))


# Tokens of two and of three samples by the first number; selected ones by the lengths, of which the first one is there
# twice among three: 8, 12 and 6, 8; 6, 9 and 6, 8; 6, 9 and 5, 9.
@pytest.mark.parametrize(("tokens", "lengths"), [(4, (2, 4)), (3, (2, 4)), (3, (4, 1))])
def test_a_mask_beside_flattened_tokens_is_exact(tokens, lengths):
    """Selected tokens that are as many in one pass of the two, or in the other one, are no packed sequences."""

    class Beside(Packed):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            self.level = float(x[mask].mean())
            return self.b(torch.tanh(self.a(x[:, :tokens].flatten(0, 1)))).view(len(x), tokens, C)

    inputs, y = of_lengths(*lengths)
    y = y[:, :tokens]
    model = Beside(False)
    assert_jacobian(linearize(model, inputs, y, CE), per_sample_jacobian(model, inputs, y, CE))


def test_embeddings_of_distinct_ids_are_exact():
    class Distinct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, D), nn.Linear(D, C)

        def forward(self, ids: Tensor) -> Tensor:
            distinct, where = ids.unique(return_inverse=True)
            return self.head(self.table.weight[distinct][where]).sum(1)

    model, refused = Distinct(), 0
    for _ in range(4):
        ids, y = torch.randint(9, (5, 3)), torch.arange(5) % C
        try:
            lin = linearize(model, ids, y, CE)
        except CaptureError:
            refused += 1  # what can't be exact is refused by name
            continue
        assert_jacobian(lin, jacobian_of_graph(lin))
    assert refused < 4


class Turning(nn.Module):
    """Sequences along dimension 1, or along dimension 0 within."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head, self.time_major = nn.Linear(D, 5), nn.Linear(5, C), False

    def forward(self, x: Tensor) -> Tensor:
        if self.time_major:
            return self.head(torch.tanh(self.inner(x.transpose(0, 1)))).cumsum(0).transpose(0, 1)
        return self.head(torch.tanh(self.inner(x))).cumsum(1)


@pytest.mark.parametrize("samples", [T, T + 1])
def test_an_axis_that_moves_is_noticed(samples):
    model, refused = Turning(), 0
    for turned in (False, False, True, True):
        model.time_major = turned
        x, y = torch.randn(samples, T, D), torch.randn(samples, T, C)
        try:
            lin = linearize(model, x, y, SQUARES)
        except CaptureError:
            assert turned
            refused += 1
        else:
            assert_jacobian(lin, per_sample_jacobian(model, x, y, SQUARES))
    assert refused == (2 if samples == T else 0)


def test_words_that_differ_on_every_batch_hide_no_switch():
    model = Turning()
    for number in range(16):
        model.word, model.time_major = f"batch {number}", number > 12
        x, y = torch.randn(T, T, D), torch.randn(T, T, C)
        if model.time_major:
            with pytest.raises(CaptureError, match="add up"):
                linearize(model, x, y, SQUARES)
        else:
            assert_jacobian(linearize(model, x, y, SQUARES), per_sample_jacobian(model, x, y, SQUARES))


class Carrying(nn.Module):
    """Carries a hidden state from batch to batch, and counts, in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.u, self.head = nn.Linear(D, 5), nn.Linear(5, 5), nn.Linear(5, C)
        self.state, self.seen = None, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        before = x.new_zeros(len(x), 5) if self.state is None else self.state
        hidden = torch.tanh(self.a(x) + self.u(before))
        self.state = hidden.detach()
        return self.head(hidden) / self.seen


def test_state_in_plain_attributes_is_that_of_one_forward_pass():
    model = Carrying()
    plain = copy.deepcopy(model)
    for _ in range(4):
        x, y = torch.randn(N, D), torch.randn(N, C)
        logits = plain(x)
        lin = linearize(model, x, y, SQUARES)
        assert relative_error(lin.logits, logits.detach()) == 0
        assert model.seen == plain.seen and torch.equal(model.state, plain.state)
        d = random_direction(lin.parameters)
        change = (lin.jvp(d) * lin.logit_gradients).sum(1)
        assert relative_error(change, jacobian_of_graph(lin) @ flatten(d)) < 1e-10
        assert model.seen == plain.seen and torch.equal(model.state, plain.state)
    for _ in range(3):  # without a graph
        x = torch.randn(N, D)
        d = random_direction(trainable(model))
        logits, _ = push_forward(model, x, torch.randn(N, C), SQUARES, [d])
        assert relative_error(logits, plain(x).detach()) < 1e-12
        assert model.seen == plain.seen and relative_error(model.state, plain.state) < 1e-12
        copy.deepcopy(model)  # a wrapper of forward mode could be used, but neither copied nor saved
        x = torch.randn(N, D)
        assert relative_error(model(x).detach(), plain(x).detach()) < 1e-12


class Holding(nn.Module):
    """Holds its state in a tuple, a list or a dict, in an inner one of which it also counts."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.u, self.head, self.kind = nn.Linear(D, 5), nn.Linear(5, 5), nn.Linear(5, C), kind
        self.held = {"tuple": (), "list": [], "dict": {}}[kind]
        self.counts = {"of": [0]}
        self.same = self.counts["of"]

    def forward(self, x: Tensor) -> Tensor:
        self.counts["of"][0] += 1
        held = [*self.held.values()] if self.kind == "dict" else [*self.held]
        before = held[0] if held and len(held[0]) == len(x) else x.new_zeros(len(x), 5)
        hidden = torch.tanh(self.a(x) + self.u(before))
        if self.kind == "tuple":
            self.held = (hidden.detach(),)
        elif self.kind == "list":
            self.held[:] = [hidden.detach()]
        else:
            self.held["hidden"] = hidden.detach()
        return self.head(hidden) / self.same[0]

    def state(self) -> Tensor:
        return self.held["hidden"] if self.kind == "dict" else self.held[0]


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_state_in_containers_is_that_of_one_forward_pass(kind):
    model = Holding(kind)
    model(torch.randn(6, D))
    plain, held, counts = copy.deepcopy(model), model.held, model.counts

    def assert_as_in(plain: Holding) -> None:
        assert model.counts == plain.counts and model.same is model.counts["of"]
        assert relative_error(model.state(), plain.state()) < 1e-12

    for _ in range(3):
        x, y = torch.randn(6, D), torch.randn(6, C)
        logits = plain(x).detach()
        lin = linearize(model, x, y, SQUARES)
        assert torch.equal(lin.logits, logits)
        assert_as_in(plain)
        d = random_direction(lin.parameters)
        change = (lin.jvp(d) * lin.logit_gradients).sum(1)
        assert relative_error(change, jacobian_of_graph(lin) @ flatten(d)) < 1e-10
        assert_as_in(plain)
    for _ in range(3):  # without a graph
        x = torch.randn(6, D)
        directions = [random_direction(trainable(model)) for _ in range(2)]
        logits, _ = push_forward(model, x, torch.randn(6, C), SQUARES, directions)
        assert relative_error(logits, plain(x).detach()) < 1e-12
        assert_as_in(plain)
        copy.deepcopy(model)  # no wrapper of forward mode is left
        assert relative_error(model(x).detach(), plain(x).detach()) < 1e-12
    with pytest.raises(ValueError, match="Logits of shape"):
        linearize(model, torch.randn(6, D), torch.randn(5, C), SQUARES)
    assert_as_in(plain)  # put back after an error
    assert model.counts is counts and (model.held is held or kind == "tuple")


def test_buffers_that_are_assigned_in_forward_mode():
    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(D, C)
            self.register_buffer("mean", torch.zeros(C))

        def forward(self, x: Tensor) -> Tensor:
            output = self.inner(x)
            self.mean = 0.9 * self.mean + 0.1 * output.mean(0).detach()
            return output

    model = Averaging()
    plain = copy.deepcopy(model)
    for _ in range(4):
        x = torch.randn(N, D)
        push_forward(model, x, torch.randn(N, C), SQUARES, [random_direction(trainable(model))])
        plain(x)
        assert torch.equal(model.mean, plain.mean)


@pytest.mark.parametrize("in_list", [False, True])
def test_a_state_that_is_written_to_can_not_be_run_again(in_list):
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(D, C)
            self.total = [(torch.zeros(C),)] if in_list else torch.zeros(C)

        @property
        def sums(self) -> Tensor:
            return self.total[0][0] if in_list else self.total

        def forward(self, x: Tensor) -> Tensor:
            output = self.inner(x) + self.sums
            self.sums.add_(output.sum(0).detach())
            return output

    model = Writing()
    plain = copy.deepcopy(model)
    for _ in range(3):
        x, y = torch.randn(N, D), torch.randn(N, C)
        lin = linearize(model, x, y, SQUARES)
        assert torch.equal(lin.logits, plain(x).detach()) and torch.equal(model.sums, plain.sums)
        with pytest.raises(CaptureError, match="plain attribute of a module"):
            lin.jvp(random_direction(lin.parameters))


@pytest.mark.parametrize("lengths", [(3, 3), (2, 4)])
def test_packed_sequences_of_recurrent_layers_are_refused(lengths):
    class Recurrent(Packed):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, mask.sum(1), batch_first=True, enforce_sorted=False)
            hidden = packed._replace(data=self.b(torch.tanh(self.a(packed.data))))
            return pad_packed_sequence(hidden, batch_first=True, total_length=T)[0]

    with pytest.raises(CaptureError, match="pad"):
        linearize(Recurrent(False), *of_lengths(*lengths), CE)


def test_a_buffer_that_is_filled_by_the_first_forward_pass():
    class Filling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(D, C)
            self.register_buffer("mean", None)

        def forward(self, x: Tensor) -> Tensor:
            output = self.inner(x)
            before = 0.0 if self.mean is None else self.mean
            self.mean = output.detach().mean(0)
            return output + before

    model = Filling()
    plain = copy.deepcopy(model)
    for _ in range(3):
        x, y = torch.randn(N, D), torch.randn(N, C)
        logits = plain(x).detach()
        assert relative_error(linearize(model, x, y, SQUARES).logits, logits) == 0
        assert torch.equal(model.mean, plain.mean)
