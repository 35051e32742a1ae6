"""Objectives against autograd, for logits with positions and without, mild and extreme."""

import math

import pytest
import torch
from torch import nn

from lightning_ief import objectives
from tests.helpers import relative_error

IGNORED = -100
POSITIONS = torch.tensor([[0, 3], [IGNORED, 1], [IGNORED, IGNORED]])
REAL = torch.linspace(-1, 1, 24).double().view(4, 2, 3)
SOFT = torch.softmax(3 * REAL, -1)
SOFT[1, 0] = 0.0  # counts for nothing
WEIGHTS = [1.0, 0.5, 3.0, 2.0]
HEADS = objectives.WeightedSum(
    [objectives.CrossEntropy(), objectives.Gaussian(), objectives.Huber(0.3), objectives.Poisson()],
    sizes=[3, 2, 2, 1],
    weights=[1.0, 0.5, 2.0, 3.0],
)
COLUMNS = torch.tensor([[2.0, 0.3, -1.0, 0.1, 4.0], [0.0, 2.0, 0.5, 1.5, 0.0]]).double()

# Objective, shape of the logits, targets.
CASES = {
    "cross-entropy": (objectives.CrossEntropy(), (4, 3), torch.tensor([0, 1, 2, 0])),
    "cross-entropy, positions": (objectives.CrossEntropy(), (3, 2, 4), POSITIONS),
    "cross-entropy, weights": (objectives.CrossEntropy(WEIGHTS), (3, 2, 4), POSITIONS),
    "cross-entropy, smoothing": (objectives.CrossEntropy(label_smoothing=0.1), (3, 2, 4), POSITIONS),
    "cross-entropy, both, ignored 0": (
        objectives.CrossEntropy(torch.tensor(WEIGHTS), 0.2, ignore_index=0),
        (3, 2, 4),
        POSITIONS.clamp(min=0),
    ),
    "cross-entropy, ignored 0": (objectives.CrossEntropy(ignore_index=0), (3, 2, 4), POSITIONS.clamp(min=0)),
    "cross-entropy, ignored 255": (
        objectives.CrossEntropy(WEIGHTS, ignore_index=255),
        (3, 2, 4),
        POSITIONS.masked_fill(POSITIONS < 0, 255),
    ),
    "cross-entropy, soft": (objectives.CrossEntropy(), (4, 2, 3), SOFT),
    "cross-entropy, soft, weights": (objectives.CrossEntropy([0.5, 2.0, 1.0], 0.3), (4, 2, 3), SOFT),
    "focal": (objectives.Focal(), (3, 2, 4), POSITIONS),
    "focal, ignored 255": (objectives.Focal(ignore_index=255), (3, 2, 4), POSITIONS.masked_fill(POSITIONS < 0, 255)),
    "focal, weights": (objectives.Focal(0.5, WEIGHTS), (3, 2, 4), POSITIONS),
    "least squares": (objectives.LeastSquares(), (4, 2, 3), REAL),
    "binary": (objectives.BinaryCrossEntropy(), (4, 3), (torch.arange(12).view(4, 3) % 2).double()),
    "binary, weights": (
        objectives.BinaryCrossEntropy([1.0, 0.0, 2.0], pos_weight=[3.0, 2.0, 0.5]),
        (4, 2, 3),
        REAL.abs(),
    ),
    "huber": (objectives.Huber(0.7), (4, 2, 3), REAL),
    "poisson": (objectives.Poisson(), (4, 2, 3), (3 * REAL.abs()).round()),
    "gaussian": (objectives.Gaussian(), (4, 2, 6), REAL),
    "heads": (HEADS, (2, 8), COLUMNS),
}
CONVEX = [name for name, (objective, *_) in CASES.items() if objective.curvature == "hessian" and objective != HEADS]


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


def products(objective, logits, targets):
    """Dense F_n of every sample, [N, C, C], from products with one-hot vectors."""
    eye = torch.eye(logits[0].numel(), dtype=torch.float64)
    columns = [
        objective.hessian_product(logits, targets, e.view(logits.shape[1:]).expand_as(logits)).flatten(1) for e in eye
    ]
    return torch.stack(columns, -1)


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("name", CONVEX)
def test_curvature_is_the_hessian(name, scale):
    objective, shape, targets = CASES[name]
    logits = scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative_error(products(objective, logits, targets), hessian(objective, logits, targets)) < 1e-12


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_hessian_form_and_factor(case, scale):
    objective, logits, targets = case
    logits = scale * logits
    expected = products(objective, logits, targets)
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


def moments(objective, logits, targets, draws=5_000):
    """Mean [N, C] and second moment [N, C, C] of gradients of drawn targets."""
    many, y = (x.repeat(draws, *(1,) * (x.ndim - 1)) for x in (logits, targets))
    drawn = objective.sample(many, y, torch.Generator().manual_seed(3))
    assert drawn.dtype == targets.dtype and drawn.shape == y.shape
    g = objective.sampled_gradient(many, y, drawn).view(draws, len(logits), -1)
    return g.mean(0), torch.einsum("rni,rnj->nij", g, g) / draws


def test_drawn_targets_have_the_curvature_as_second_moment(case):
    objective, logits, targets = case
    logits, targets = logits[:3] / 2, targets[:3]
    mean, second = moments(objective, logits, targets)
    expected = products(objective, logits, targets)
    assert mean.norm() < 0.06 * expected.diagonal(dim1=1, dim2=2).sum().sqrt()
    assert relative_error(second, expected) < 0.1


def test_what_counts_for_nothing_has_no_gradient_whatever_is_drawn():
    objective, shape, targets = CASES["cross-entropy, ignored 0"]
    logits = torch.zeros(shape, dtype=torch.float64)
    for seed in range(5):
        drawn = objective.sample(logits, targets, torch.Generator().manual_seed(seed))
        gradient = objective.sampled_gradient(logits, targets, drawn)
        assert ((gradient != 0).all(-1) == (targets != 0)).all()


TORCH = {
    "cross-entropy, weights": nn.CrossEntropyLoss(torch.tensor(WEIGHTS).double(), reduction="sum"),
    "cross-entropy, smoothing": nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"),
    "cross-entropy, both, ignored 0": nn.CrossEntropyLoss(
        torch.tensor(WEIGHTS).double(), ignore_index=0, label_smoothing=0.2, reduction="sum"
    ),
    "binary, weights": nn.BCEWithLogitsLoss(
        torch.tensor([1.0, 0, 2]).double(), pos_weight=torch.tensor([3, 2, 0.5]).double(), reduction="sum"
    ),
    "huber": nn.HuberLoss(delta=0.7, reduction="sum"),
    "poisson": nn.PoissonNLLLoss(reduction="sum"),
}


@pytest.mark.parametrize("name", TORCH)
def test_losses_are_those_of_torch(name):
    objective, shape, targets = CASES[name]
    logits = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat = (logits.flatten(0, -2), targets.flatten()) if "cross" in name else (logits, targets)
    expected = TORCH[name](*flat)
    assert relative_error(objective.losses(logits, targets).sum(), expected) < 1e-12
    taken = objectives.as_objective(TORCH[name])
    assert type(taken) is type(objective)
    assert relative_error(taken.losses(logits, targets).sum(), expected) < 1e-12


def test_soft_targets_are_those_of_torch():
    logits = torch.randn(4, 3, dtype=torch.float64)
    q = torch.softmax(torch.randn(4, 3, dtype=torch.float64), -1)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    expected = nn.CrossEntropyLoss(weight, label_smoothing=0.3, reduction="none")(logits, q)
    assert relative_error(objectives.CrossEntropy(weight, 0.3).losses(logits, q), expected) < 1e-12


def test_the_gaussian_is_that_of_torch():
    logits = torch.randn(4, 6, dtype=torch.float64)
    mean, log_variance = logits.chunk(2, -1)
    expected = nn.GaussianNLLLoss(reduction="none")(mean, REAL[:, 0], log_variance.exp()).sum(1)
    assert relative_error(objectives.Gaussian().losses(logits, REAL[:, 0]), expected) < 1e-12


def test_focal_by_hand():
    logits = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    p = logits.softmax(-1)[0, 1]
    expected = -3.0 * (1 - p) ** 1.5 * p.log()
    found = objectives.Focal(1.5, [1.0, 3.0, 1.0]).losses(logits, torch.tensor([1]))
    assert relative_error(found[0], expected) < 1e-12


@pytest.mark.parametrize("gap", [1.0, 15.0, 25.0])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_in_float32_of_samples_that_are_almost_fitted(gamma, gap):
    focal, logits, targets = objectives.Focal(gamma), torch.tensor([[gap, 0.0, -1.0]]), torch.tensor([0])
    found, expected = focal.gradient(logits, targets), focal.gradient(logits.double(), targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    assert (found != 0).all() and torch.isfinite(found).all()


@pytest.mark.parametrize("gap", [1.0, 15.0, 40.0])
def test_weighted_cross_entropy_in_float32_of_samples_that_are_almost_fitted(gap):
    objective = objectives.CrossEntropy([2.0, 1.0, 1.0])
    logits, targets = torch.tensor([[gap, 0.0, -1.0]]), torch.tensor([0])
    found, expected = objective.gradient(logits, targets), objective.gradient(logits.double(), targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("delta", [0.1, 1.0, 5.0])
def test_information_of_hubers_density(delta):
    """∫ ψ² exp(−l) / ∫ exp(−l), by a sum."""
    r = torch.linspace(-300, 300, 3_000_001, dtype=torch.float64)
    density = (-torch.nn.functional.huber_loss(r, torch.zeros_like(r), reduction="none", delta=delta)).exp()
    expected = (r.clamp(-delta, delta).square() * density).sum() / density.sum()
    assert objectives.Huber(delta).information == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("delta", [0.3, 2.0])
def test_targets_drawn_from_hubers_density(delta):
    """Their distance to the logit: its mean is that of the density, also beyond δ, which gradients do not see."""
    r = torch.linspace(0, 100, 1_000_001, dtype=torch.float64)
    density = (-torch.nn.functional.huber_loss(r, torch.zeros_like(r), reduction="none", delta=delta)).exp()
    expected = (r * density).sum() / density.sum()
    z = torch.ones(50_000, 1)
    drawn = objectives.Huber(delta).sample(z, torch.zeros_like(z), torch.Generator().manual_seed(0)) - z
    assert float(drawn.abs().mean()) == pytest.approx(float(expected), rel=0.02)
    assert abs(float(drawn.sign().mean())) < 0.02


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objectives.CrossEntropy(label_smoothing=1.5), "label_smoothing=1.5"),
        (lambda: objectives.CrossEntropy([1.0, -1.0]), "≥ 0"),
        (lambda: objectives.BinaryCrossEntropy(pos_weight=-1.0), "≥ 0"),
        (lambda: objectives.Focal(-1.0), "gamma=-1.0"),
        (lambda: objectives.Huber(0.0), "delta=0.0"),
        (lambda: objectives.WeightedSum([objectives.Huber()], [1, 2]), "2 sizes"),
        (lambda: objectives.WeightedSum([objectives.Huber()], [1], [0.0]), "no weight"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("objective", "logits", "targets", "message"),
    [
        (objectives.CrossEntropy(), (2, 3), torch.zeros(2, dtype=torch.int32), r"targets\.long\(\)"),
        (objectives.CrossEntropy(), (2, 3), torch.randn(2, 3) - 5, "sum of 1"),
        (objectives.CrossEntropy([1.0, 2.0]), (2, 3), torch.zeros(2).long(), r"shape \(2,\)"),
        (objectives.Focal(), (2, 3), torch.ones(2, 3) / 3, "int64"),
        (objectives.BinaryCrossEntropy(torch.ones(2, 3)), (2, 3), torch.ones(2, 3), "broadcast to one sample"),
        (objectives.Poisson(), (2, 1), torch.tensor([[-1.0], [0.0]]), "counts"),
        (objectives.Gaussian(), (2, 2), torch.zeros(2), r"targets\[:, None\]"),
        (HEADS, (2, 7), COLUMNS, r"\[N, ..., 8\]"),
        (HEADS, (2, 8), COLUMNS.bfloat16(), "rounds"),
    ],
)
def test_targets_that_do_not_fit(objective, logits, targets, message):
    with pytest.raises((ValueError, TypeError), match=message):
        objective.validate(torch.zeros(logits), targets)


@pytest.mark.parametrize("name", ["least squares", "huber", "poisson", "cross-entropy, weights", "heads"])
def test_the_layout_of_logits_does_not_matter(name):
    """Models that end in movedim have logits whose memory is in another order."""
    objective, shape, targets = CASES[name]
    logits = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = logits.movedim(0, -1).contiguous().movedim(-1, 0)
    assert not moved.is_contiguous()
    for (a, x), (b, y) in zip(
        objective.hessian_factor(moved, targets), objective.hessian_factor(logits, targets), strict=True
    ):
        assert torch.equal(a, b) and torch.equal(x, y)


def test_soft_targets_that_count_for_nothing_do_so_in_samples():
    soft = SOFT.clone()
    soft[0, 0] = 0.0
    drawn = objectives.CrossEntropy().sample(torch.randn(4, 2, 3).double(), soft, torch.Generator().manual_seed(0))
    assert drawn.sum(-1).tolist() == (soft.sum(-1) > 0).double().tolist()


def test_samples_have_the_dtype_of_the_targets():
    logits = torch.zeros(3, 2)
    assert objectives.LeastSquares().sample(logits, torch.zeros(3, 2, dtype=torch.float16)).dtype == torch.float16


def test_settings_and_targets_that_can_not_be():
    with pytest.raises(ValueError, match="weight"):
        objectives.CrossEntropy([float("inf"), 1.0])
    with pytest.raises(ValueError, match="weight"):
        objectives.BinaryCrossEntropy(float("inf"))
    swapped = COLUMNS.clone()
    swapped[0, 0] = 1.4
    with pytest.raises(ValueError, match="1.4 as a class of CrossEntropy"):
        HEADS.validate(torch.randn(2, 8).double(), swapped)
