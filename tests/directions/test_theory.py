"""What the paper proves, as numbers (arXiv 2406.06420)."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_ief import directions, gamma, linearize, objectives
from lightning_ief.directions.fisher import conjugate_gradient_iterates
from lightning_ief.linalg.cg import conjugate_gradients
from lightning_ief.linalg.vectors import cosine
from tests.helpers import flatten, per_sample_jacobian, relative_error

N = 6


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()


@pytest.fixture
def inputs():
    return torch.randn(N, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


CASES = {
    "cross-entropy": (objectives.CrossEntropy(), lambda: torch.arange(N) % 3),
    "least squares": (objectives.LeastSquares(), lambda: torch.linspace(-1, 1, 3 * N, dtype=torch.float64).view(N, 3)),
    "binary": (objectives.BinaryCrossEntropy(), lambda: (torch.arange(3 * N).view(N, 3) % 2).double()),
}


@pytest.fixture(params=CASES)
def lin(request, model, inputs):
    objective, targets = CASES[request.param]
    return linearize(model, inputs, targets(), objective)


def fisher(lin):
    """F = Σ_n J_znᵀ (∇²_z l_n) J_zn, dense, from autograd."""
    parameters = {name: p.detach() for name, p in lin.parameters.items()}

    def logits(parameters, x):
        return torch.func.functional_call(lin.model, parameters, (x[None],))[0]

    total = 0
    for x, z, y in zip(lin.inputs, lin.logits, lin.targets, strict=True):
        jacobian = torch.cat([j.flatten(1) for j in torch.func.jacrev(logits)(parameters, x).values()], dim=1)
        hessian = torch.func.hessian(lambda z, y=y: lin.objective.losses(z[None], y[None])[0])(z)
        total = total + jacobian.T @ hessian @ jacobian
    return total


def test_objective_derivatives(lin):
    z = lin.logits.clone().requires_grad_()
    losses = lin.objective.losses(z, lin.targets)
    assert relative_error(lin.logit_gradients, torch.autograd.grad(losses.sum(), z)[0]) < 1e-12
    u = torch.randn_like(z)
    pairs = list(lin.objective.hessian_factor(lin.logits, lin.targets))
    form = sum((a * u).flatten(1).sum(1).square() for a, _ in pairs)
    assert relative_error(lin.objective.hessian_form(lin.logits, lin.targets, u), form) < 1e-12
    assert relative_error(sum(c[:, None] * a for a, c in pairs), lin.logit_gradients) < 1e-12


def test_ef_lowers_every_loss_alike(lin):
    assert (lin.jacobian.matvec(directions.ef(lin, 0.0)) - 1).abs().max() < 1e-8


def test_ief_lowers_each_loss_by_its_logit_gradient(lin):
    s = lin.logit_gradients.square().sum(1)
    assert relative_error(lin.jacobian.matvec(directions.ief(lin, 0.0)), s) < 1e-8


@pytest.mark.parametrize("damping", [1e-6, 1e-2])
def test_directions_are_their_formulas(lin, damping):
    jacobian = per_sample_jacobian(lin.model, lin.inputs, lin.targets, lin.objective)
    kernel = jacobian @ jacobian.T + damping * torch.eye(N)
    s = lin.logit_gradients.square().sum(1)
    assert (
        relative_error(flatten(directions.ef(lin, damping)), jacobian.T @ torch.linalg.solve(kernel, 0 * s + 1)) < 1e-8
    )
    assert relative_error(flatten(directions.ief(lin, damping)), jacobian.T @ torch.linalg.solve(kernel, s)) < 1e-8
    assert relative_error(flatten(directions.sgd(lin)), jacobian.sum(0)) < 1e-12
    curvature = fisher(lin) + damping * torch.eye(jacobian.shape[1])
    natural = torch.linalg.solve(curvature, jacobian.sum(0))
    assert relative_error(flatten(directions.natural_gradient(lin, damping)), natural) < 1e-7


def test_gamma_is_its_formula(lin):
    d = directions.ief(lin, 1e-3)
    vector = flatten(d)
    expected = (vector @ fisher(lin) @ vector).sqrt() / (vector @ flatten(directions.sgd(lin))).abs()
    assert relative_error(gamma(lin, d), expected) < 1e-10
    assert relative_error(gamma(lin, {name: 1e12 * x for name, x in d.items()}), expected) < 1e-10


def test_gamma_of_a_direction_that_changes_nothing_is_infinite(lin):
    assert gamma(lin, {name: torch.zeros_like(p) for name, p in lin.parameters.items()}) == float("inf")


def test_natural_gradient_has_the_smallest_gamma(lin):
    best = gamma(lin, directions.natural_gradient(lin, 0.0))
    others = [directions.sgd(lin), directions.ef(lin, 1e-9), directions.ief(lin, 1e-9)]
    others.append(directions.sampled_fisher(lin, 1e-3, 2, torch.Generator().manual_seed(0)))
    assert all(best <= gamma(lin, d) * (1 + 1e-9) for d in others)


@pytest.mark.parametrize("damping", [0.0, 1e-7, 1e-4])
def test_natural_gradient_in_single_precision(damping):
    """Rows of a softmax that depend on each other up to rounding, and a nearly fitted batch: noise must not win."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    inputs, targets = torch.randn(32, 20), torch.arange(32) % 10
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        adam.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        adam.step()
    single = linearize(model, inputs, targets, objectives.CrossEntropy())
    double = linearize(copy.deepcopy(model).double(), inputs.double(), targets, objectives.CrossEntropy())
    best = directions.natural_gradient(double, damping)
    d = {name: entry.double() for name, entry in directions.natural_gradient(single, damping).items()}
    assert double.losses.max() > 10 * double.losses.min()
    assert cosine(d, best) > 0.9999
    assert gamma(double, d) < 1.0001 * gamma(double, best)
    assert gamma(double, d) < 0.8 * gamma(double, directions.ief(double, damping))


def test_sampled_fisher_tends_to_the_natural_gradient(lin):
    truth = directions.natural_gradient(lin, 0.1)
    errors = []
    for m in (10, 1000):
        d = directions.sampled_fisher(lin, 0.1, m, torch.Generator().manual_seed(0))
        errors.append(relative_error(flatten(d), flatten(truth)))
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 3  # √100 = 10 in the mean


def test_large_damping_turns_ef_into_sgd(lin):
    assert cosine(directions.ef(lin, 1e8), directions.sgd(lin)) > 0.9999
    assert cosine(directions.ef(lin, 1e-9), directions.sgd(lin)) < 0.999


def test_ief_is_the_natural_gradient_for_scalar_least_squares(inputs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    lin = linearize(model, inputs, torch.linspace(-1, 1, N, dtype=torch.float64)[:, None], objectives.LeastSquares())
    assert relative_error(flatten(directions.ief(lin, 0.0)), flatten(directions.natural_gradient(lin, 0.0))) < 1e-7


def test_ief_is_the_natural_gradient_for_attainable_least_squares(inputs):
    """More samples than parameters: J d = s still has a solution if the model can fit the targets."""
    model = nn.Linear(3, 1).double()
    x = inputs[:, :3]
    lin = linearize(model, x, x @ torch.tensor([[1.0], [-2.0], [3.0]]).double() + 4, objectives.LeastSquares())
    assert lin.num_samples > sum(p.numel() for p in model.parameters())
    assert relative_error(flatten(directions.ief(lin, 0.0)), flatten(directions.natural_gradient(lin, 0.0))) < 1e-7


def test_ief_is_gauss_newton_for_one_logit(inputs):
    """Σ_n ∇l_n ∇l_nᵀ / s_n = Σ_n ∇z_n ∇z_nᵀ if z_n is a number, whatever the objective."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    targets = (torch.arange(N) % 2).double()[:, None]
    lin = linearize(model, inputs, targets, objectives.BinaryCrossEntropy())
    rows = per_sample_jacobian(model, inputs, targets, lin.objective)
    of_logits = rows / lin.logit_gradients
    gauss_newton = torch.linalg.pinv(of_logits.T @ of_logits, hermitian=True) @ rows.sum(0)
    assert relative_error(flatten(directions.ief(lin, 0.0)), gauss_newton) < 1e-6


def test_conjugate_gradients_reach_the_natural_gradient(lin):
    for damping in (0.0, 1e-2):
        d = directions.natural_gradient(lin, damping, max_rows=1, tolerance=1e-10)
        assert relative_error(flatten(d), flatten(directions.natural_gradient(lin, damping))) < 1e-6


def test_gamma_falls_along_conjugate_gradients(lin):
    best = gamma(lin, directions.natural_gradient(lin, 0.0))
    gammas = []
    for d, residual in conjugate_gradient_iterates(lin, 0.0):
        if any(x.any() for x in d.values()):
            gammas.append(float(gamma(lin, d)))
        if residual < 1e-9:
            break
    assert len(gammas) > 3
    assert gammas[0] == pytest.approx(float(gamma(lin, directions.sgd(lin))))
    assert all(after < before * (1 + 1e-9) for before, after in pairwise(gammas))
    assert gammas[-1] == pytest.approx(float(best), rel=1e-6)


def test_conjugate_gradients_that_end_early_say_so(lin):
    with pytest.warns(RuntimeWarning, match="after 2 iterations .* residual"):
        d = directions.natural_gradient(lin, 0.0, max_rows=1, max_iterations=2)
    assert gamma(lin, d) < gamma(lin, directions.sgd(lin))


def test_conjugate_gradients_of_a_gradient_that_is_not_finite(inputs):
    inputs[2, 0] = torch.nan
    lin = linearize(nn.Linear(5, 3).double(), inputs, torch.arange(N) % 3, objectives.CrossEntropy())
    assert all(entry.isnan().all() for entry in directions.natural_gradient(lin, 0.0, max_rows=1).values())


def test_conjugate_gradients_of_a_product_that_is_not_finite(lin, monkeypatch):
    monkeypatch.setattr(lin, "fisher_product", lambda v: {name: torch.full_like(x, torch.nan) for name, x in v.items()})
    assert all(entry.isnan().all() for entry in directions.natural_gradient(lin, 0.0, max_rows=1).values())


@pytest.mark.parametrize("entry", [torch.nan, torch.inf, -torch.inf])
def test_conjugate_gradients_end_at_a_product_that_is_not_finite(entry):
    products = iter([torch.tensor([1.0, 2.0]), torch.full((2,), entry)])
    iterates = list(conjugate_gradients(lambda v: {"w": next(products) * v["w"].abs()}, {"w": torch.ones(2)}))
    assert len(iterates) == 3 and torch.tensor(iterates[-1][1]).isnan()


def test_probabilities_of_the_targets_converge():
    """p_n(t) > 1 − 2 / (t + C₀ + 1) under the flow of iEF with cross-entropy.

    f = 1 / (1 − p) grows like ṗ f² = p s f² ≥ p = 1 − 1/f, since s ≥ (1 − p)². So f + log(f − 1) ≥ t + f₀ + log(f₀ − 1)
    and, as log(f − 1) ≤ f − 2, the bound holds with C₀ = f₀ + log(f₀ − 1) + 1.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    inputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    eta, offset = 0.02, None
    for step in range(400):
        lin = linearize(model, inputs, targets, objectives.CrossEntropy())
        f = 1 / -torch.expm1(-lin.losses)
        offset = f + torch.log(f - 1) + 1 if offset is None else offset
        assert (f > (step * eta + offset + 1) / 2 * (1 - 1e-3)).all()
        with torch.no_grad():
            for name, d in directions.ief(lin, 0.0).items():
                lin.parameters[name].sub_(d, alpha=eta)
    assert f.min() > 5
    assert (f < 2 * (step * eta + offset + 1)).all()  # and the bound is no empty one


def test_small_ief_step_lowers_each_loss_by_its_rate(lin):
    d, rate = directions.ief(lin, 0.0), lin.logit_gradients.square().sum(1)
    before, changes = lin.losses, []
    for eta in (1e-3, 1e-4):
        moved = {name: p - eta * d[name] for name, p in lin.parameters.items()}
        after = lin.objective.losses(torch.func.functional_call(lin.model, moved, (lin.inputs,)), lin.targets)
        changes.append(float(((after - before) + eta * rate).detach().abs().max()))
    assert changes[1] < changes[0] / 50  # O(η²): a hundredth


def test_per_sample_linear_convergence():
    # l_n(t) − l_n* ≤ exp(−2mt) (l_n(0) − l_n*), m = 1 for least squares, on a nonlinear model (eq. 16).
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2)).double()
    inputs, targets = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    eta, start = 1e-3, None
    for _ in range(500):
        lin = linearize(model, inputs, targets, objectives.LeastSquares())
        start = lin.losses if start is None else start
        with torch.no_grad():
            for name, d in directions.ief(lin, 0.0).items():
                lin.parameters[name].sub_(d, alpha=eta)
    final = linearize(model, inputs, targets, objectives.LeastSquares()).losses
    assert (final <= start * torch.exp(torch.tensor(-2 * 500 * eta)) * 1.02).all()


def test_sampled_fisher_takes_one_backward_pass_for_each_sample_of_targets(lin, monkeypatch):
    passes, original = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: passes.append(1) or original(*args, **kwargs))
    forwards = []
    assert lin.jacobian.num_rows == N  # its backward pass is that of the loss
    passes.clear()
    lin.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    directions.sampled_fisher(lin, 1.0, num_samples=5)
    assert len(passes) == 5
    assert forwards == []


def test_sampled_fisher_refuses(lin):
    with pytest.raises(ValueError, match="damping"):
        directions.sampled_fisher(lin, 0.0)
    with pytest.raises(ValueError, match="num_samples"):
        directions.sampled_fisher(lin, 1.0, 0)
    with pytest.raises(ValueError, match="max_iterations"):
        directions.natural_gradient(lin, 0.0, max_rows=2, max_iterations=0)
    with pytest.raises(ValueError, match="damping"):
        directions.natural_gradient(lin, -1.0, max_rows=2)


@pytest.mark.parametrize("damping", [1e-7, 1e-4])
@pytest.mark.parametrize("direction", [directions.ef, directions.ief])
def test_more_samples_than_parameters_in_float32(direction, damping):
    """No more is lost than float32 gradients cost: J has a null space, of which 1/λ-fold nothing may be left."""
    for seed in range(10):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        x, y = torch.randn(120, 5), torch.randint(3, (120,))
        found = flatten(direction(linearize(model, x, y, objectives.CrossEntropy()), damping)).double()
        truth = flatten(direction(linearize(model.double(), x.double(), y, objectives.CrossEntropy()), damping))
        assert relative_error(found, truth) < 2e-4


def test_one_sample_more_than_the_rank_in_float32():
    """Four rows of rank three, which may be close to rank two: how small a pivot is does not tell how singular K is."""
    for seed in range(40):
        torch.manual_seed(seed)
        model, x, y = nn.Linear(3, 2, bias=False), torch.randn(4, 3), torch.arange(4) % 2
        found = flatten(directions.ief(linearize(model, x, y, objectives.CrossEntropy()), 1e-7)).double()
        truth = flatten(directions.ief(linearize(model.double(), x.double(), y, objectives.CrossEntropy()), 1e-7))
        assert relative_error(found, truth) < 1e-5
