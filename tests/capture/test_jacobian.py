"""What the operator hands out is the reader's own: nothing that is written to it changes a later answer."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ief import directions, linearize, objectives
from lightning_ief.capture import Jacobian, LinearizedBatch
from tests.helpers import Function, flatten, relative_error

pytestmark = pytest.mark.usefixtures("float64")

N, D, C = 4, 5, 3
OBJECTIVE = objectives.CrossEntropy()


def network() -> nn.Module:
    """One parameter for every kind of factor: outer products, dense ones, one by one, through derived tensors."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(D, 30), nn.LayerNorm(30), nn.Tanh(), nn.Linear(30, C))

    def forward(m: Function, x: Tensor) -> Tensor:
        return m.inner(x) * m.scale + F.linear(x, m.up @ m.low) + torch.special.i0(m.odd) * x[:, :1]

    return Function.of(body, forward, scale=(C,), up=(C, 1), low=(1, D), odd=(C,))


def linearized() -> LinearizedBatch:
    return linearize(network(), torch.randn(N, D), torch.arange(N) % C, OBJECTIVE)


def stacked() -> LinearizedBatch:
    model = network()
    x, y = torch.randn(N, D), torch.arange(N) % C
    return LinearizedBatch.of([linearize(model, x[k::2], y[k::2], OBJECTIVE) for k in range(2)])


READ: dict[str, Callable[[Jacobian], Tensor]] = {
    "gram": lambda J: J.gram(),
    "precise gram": lambda J: J.gram(precise=True),
    "row_norms": lambda J: J.row_norms(),
    "to_dense": lambda J: J.to_dense(),
    "rmatvec": lambda J: flatten(J.rmatvec(torch.ones(N))),
    "matvec": lambda J: J.matvec({name: torch.ones_like(p) for name, p in J.like.items()}),
}


def written(x: Tensor | dict[str, Tensor]) -> None:
    for each in x.values() if isinstance(x, dict) else [x]:
        each.add_(1.0)
        each.zero_()


WRITE: dict[str, Callable[[Jacobian], None]] = {
    "gram": lambda J: written(J.gram()),
    "damping on its diagonal": lambda J: written(J.gram().diagonal()),
    "precise gram": lambda J: written(J.gram(precise=True)),
    "row_norms": lambda J: written(J.row_norms()),
    "to_dense": lambda J: written(J.to_dense()),
    "rmatvec": lambda J: written(J.rmatvec(torch.eye(N)[0])),
    "matvec": lambda J: written(J.matvec({name: torch.ones_like(p) for name, p in J.like.items()})),
    "coefficients": lambda J: written(J.solve(torch.ones(N), 0.1).coefficients),
    "entries of a direction": lambda J: written(dict(J.solve(torch.eye(N)[0], 0.1))),
}


@pytest.mark.parametrize("write", WRITE.values(), ids=WRITE)
@pytest.mark.parametrize("make", [linearized, stacked])
def test_nothing_that_is_handed_out_is_kept(
    make: Callable[[], LinearizedBatch], write: Callable[[Jacobian], None]
) -> None:
    lin = make()
    jacobian = lin.jacobian
    before = {name: read(jacobian).clone() for name, read in READ.items()}
    d = flatten(directions.ief(lin, 1e-3)).clone()
    write(jacobian)
    for name, read in READ.items():
        assert relative_error(read(jacobian), before[name]) < 1e-14, name
    assert relative_error(flatten(directions.ief(lin, 1e-3)), d) < 1e-14


@pytest.mark.parametrize("name", ["losses", "logit_gradient_norms"])
def test_numbers_of_stacked_batches_are_the_readers_own(name: str) -> None:
    lin = stacked()
    before = getattr(lin, name).clone()
    getattr(lin, name).fill_(torch.nan)
    assert torch.equal(getattr(lin, name), before)
    assert flatten(directions.ief(lin, 1e-3)).isfinite().all()
