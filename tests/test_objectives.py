"""Objectives against autograd, for logits with positions and without, mild and extreme."""

import math

import pytest
import torch

from lightning_ief import objectives
from tests.helpers import relative_error

IGNORED = -100
CASES = {
    "cross-entropy": (objectives.CrossEntropy(), (4, 3), torch.tensor([0, 1, 2, 0])),
    "cross-entropy, positions": (
        objectives.CrossEntropy(),
        (3, 2, 4),
        torch.tensor([[0, 3], [IGNORED, 1], [IGNORED, IGNORED]]),
    ),
    "least squares": (objectives.LeastSquares(), (4, 2, 3), torch.linspace(-1, 1, 24).double().view(4, 2, 3)),
    "binary": (objectives.BinaryCrossEntropy(), (4, 3), (torch.arange(12).view(4, 3) % 2).double()),
}


@pytest.fixture(params=CASES)
def case(request):
    objective, shape, targets = CASES[request.param]
    return objective, torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), targets


def hessian(objective, logits, targets):
    """Dense ∇²_z l_n of every sample, [N, C, C], from autograd."""

    def loss(z, y):
        return objective.losses(z[None], y[None])[0]

    blocks = [torch.func.hessian(lambda z, y=y: loss(z, y))(z) for z, y in zip(logits, targets, strict=True)]
    size = logits[0].numel()
    return torch.stack([block.reshape(size, size) for block in blocks])


def test_gradient(case):
    objective, logits, targets = case
    z = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(objective.losses(z, targets).sum(), z)
    assert relative_error(objective.gradient(logits, targets), expected) < 1e-12


@pytest.mark.parametrize("gap", [1.0, 15.0, 25.0, 40.0])
@pytest.mark.parametrize(
    "kind", [objectives.CrossEntropy(), objectives.BinaryCrossEntropy()], ids=["softmax", "binary"]
)
def test_gradient_in_float32_of_samples_that_are_almost_fitted(kind, gap):
    """1 − p is below float32's resolution of p, and still has all its digits."""
    logits = torch.tensor([[gap, -0.25, 0.5], [-gap, -gap + 1.0, gap]])
    targets = torch.tensor([0, 2])
    if isinstance(kind, objectives.BinaryCrossEntropy):
        targets = torch.nn.functional.one_hot(targets, 3).float()
    found, expected = kind.gradient(logits, targets), kind.gradient(logits.double(), targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_hessian_form_and_factor(case, scale):
    objective, logits, targets = case
    logits = scale * logits
    expected = hessian(objective, logits, targets)
    u = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    form = torch.einsum("ni,nij,nj->n", u.flatten(1), expected, u.flatten(1))
    assert (objective.hessian_form(logits, targets, u) - form).abs().max() < 1e-12 * form.max()
    product = torch.einsum("nij,nj->ni", expected, u.flatten(1))
    assert relative_error(objective.hessian_product(logits, targets, u).flatten(1), product) < 1e-12
    columns, coordinates = zip(*objective.hessian_factor(logits, targets), strict=True)
    a, c = torch.stack(columns).flatten(2), torch.stack(coordinates)
    assert relative_error(torch.einsum("rni,rnj->nij", a, a), expected) < 1e-10
    assert relative_error(torch.einsum("rn,rni->ni", c, a), objective.gradient(logits, targets).flatten(1)) < 1e-10


def test_cross_entropy_factor_has_independent_columns():
    """One column less than there are classes: with as many, the rows of a Gram would depend on each other."""
    z = torch.tensor([[2.0, -1.0, 0.5, 0.1]], dtype=torch.float64)
    columns = torch.stack([a[0] for a, _ in objectives.CrossEntropy().hessian_factor(z, torch.tensor([1]))])
    assert columns.shape == (3, 4)
    assert torch.linalg.matrix_rank(columns) == 3


@pytest.mark.parametrize("target", [0, 1])
def test_cross_entropy_factor_of_a_saturated_sample(target):
    """A probability that underflows, for the target and for another class: still finite, still the gradient."""
    z = torch.tensor([[0.0, -600.0, -1.0]], dtype=torch.float64)
    y = torch.tensor([target])
    pairs = list(objectives.CrossEntropy().hessian_factor(z, y))
    gradient = sum(c[:, None] * a for a, c in pairs)
    assert all(math.isfinite(float(c)) and torch.isfinite(a).all() for a, c in pairs)
    assert relative_error(gradient, objectives.CrossEntropy().gradient(z, y)) < 1e-10


def test_cross_entropy_over_one_class_is_refused():
    with pytest.raises(ValueError, match="one class"):
        objectives.CrossEntropy().validate(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
