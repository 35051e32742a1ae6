"""Rows that lie side by side: large ones are computed where they stand, and are what they are one by one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_ief import linearize, objectives
from lightning_ief.capture import LinearizedBatch, factors
from lightning_ief.linalg.gram import OuterProducts
from tests.helpers import relative_error

N, T, D, C = 6, 5, 4, 3
OBJECTIVE = objectives.CrossEntropy()


class Recurrent(nn.Module):
    """Sequences, whose weights have several positions, and a head, whose weight has one."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(D, 2, batch_first=True), nn.Linear(2, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Mixed(nn.Module):
    """Weights in float64 and in float32, one that has no outer products, and one that not every batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(D, 7), nn.Linear(7, C).float()
        self.scale, self.seldom = nn.Parameter(torch.rand(7)), nn.Linear(7, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.wide(x[:, 0]) * self.scale
        h = h + self.seldom(h) if x.mean() > 0 else h
        return self.narrow(h.float())


def batches(model: nn.Module, parts: int) -> LinearizedBatch:
    x, y = torch.randn(N, T, D), torch.arange(N) % C
    x[: N // 2] = x[: N // 2].abs()  # the first part uses all weights, the second one does not
    x[N // 2 :] = -x[N // 2 :].abs()
    pairs = zip(x.chunk(parts), y.chunk(parts), strict=True)
    return LinearizedBatch.of([linearize(model, a, b, OBJECTIVE) for a, b in pairs])


@pytest.mark.parametrize(("make", "rounding"), [(Recurrent, 1e-13), (Mixed, 1e-6)])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("rows", ["one of each sample", "one of each logit"])
@pytest.mark.usefixtures("float64")
def test_large_rows_are_computed_where_they_stand(
    make: Callable[[], nn.Module], rounding: float, parts: int, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = make()
    written = []
    columns = OuterProducts.columns

    def watched(self: OuterProducts, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        written.extend([out] * (out is not None))
        return columns(self, start, stop, out)

    monkeypatch.setattr(OuterProducts, "columns", watched)
    found = {}
    for large in (0, 2**60):
        monkeypatch.setattr(factors, "_LARGE", large)
        torch.manual_seed(1)
        lin = batches(model, parts)
        logit_rows = [torch.eye(C)[c].expand(N, C).to(lin.logits.dtype) for c in range(C)]
        J = lin.jacobian if rows == "one of each sample" else lin.pullback(logit_rows)
        v = torch.randn(J.num_rows)
        d = J.rmatvec(v)
        found[large] = J.gram(), torch.cat([x.flatten().double() for x in d.values()]), J.to_dense(), v
        assert bool(written) == (large == 0)
        written.clear()
    (gram, d, dense, v), (other, *_) = found.values()
    assert relative_error(gram, dense.double() @ dense.double().T) < rounding
    assert relative_error(d, dense.double().T @ v) < rounding
    assert relative_error(gram, other) < rounding
