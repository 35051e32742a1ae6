"""K-FAC against that of curvlinops (Dangel et al., arXiv 2501.19183), on models that both know."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ief import directions, linearize, objectives
from lightning_ief.curvature import KFACCurvature, sides_of
from tests.helpers import flatten, per_sample_jacobian, relative_error

curvlinops = pytest.importorskip("curvlinops")

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVE = objectives.CrossEntropy()
N, LAMBDA = 60, 0.3


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "no bias": (lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 2, padding=1, stride=2),
            nn.Tanh(),
            nn.Conv2d(3, 4, 2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        (2, 3, 3),
    ),
    "positions": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), Mean(), nn.Linear(4, 3)),
        (3, 4),
    ),
}


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    return make(), torch.randn(N, *shape), torch.randint(3, (N,))


def operator(kind: Any, model: nn.Module, x: Tensor, y: Tensor, positions: str) -> Any:
    return kind(
        model, nn.CrossEntropyLoss(reduction="sum"), [*model.parameters()], [(x, y)], fisher_type="empirical",
        kfac_approx=positions, separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip


@pytest.mark.parametrize("positions", ["expand", "reduce"])
@pytest.mark.parametrize("name", MODELS)
def test_kfac(name: str, positions: Any) -> None:
    """The factors, and the direction with factored damping."""
    model, x, y = case(name)
    K = operator(curvlinops.KFACLinearOperator, model, x, y, positions)
    lin = linearize(model, x, y, OBJECTIVE, keep_sides=sides_of(dict(model.named_parameters())))
    states: dict[str, dict[str, Any]] = {name: {} for name in lin.keep_sides}
    KFACCurvature("empirical", positions).direction(lin, LAMBDA, states=states)
    K.compute_kronecker_factors()
    for layer, state in states.items():
        module = layer.removesuffix(".weight")
        for found, theirs in (
            (state["kfac_inputs"], K._input_covariances[module]),
            (N * state["kfac_gradients"], K._gradient_covariances[module]),
        ):
            assert relative_error(found.tril(), theirs.tril()) < 1e-10
    gradient = per_sample_jacobian(model, x, y, OBJECTIVE).sum(0)
    inverse = curvlinops.KFACInverseLinearOperator(K, damping=LAMBDA, use_heuristic_damping=True)
    found = flatten(directions.kfac_empirical(lin, LAMBDA, positions=positions))
    assert relative_error(found, inverse @ gradient) < 1e-8


@pytest.mark.parametrize("positions", ["expand", "reduce"])
@pytest.mark.parametrize("name", MODELS)
def test_corrected_eigenvalues(name: str, positions: Any) -> None:
    model, x, y = case(name)
    K = operator(curvlinops.EKFACLinearOperator, model, x, y, positions)
    lin = linearize(model, x, y, OBJECTIVE, keep_sides=sides_of(dict(model.named_parameters())))
    gradient = per_sample_jacobian(model, x, y, OBJECTIVE).sum(0)
    size = len(gradient)
    expected = torch.linalg.solve(K @ torch.eye(size) + LAMBDA * torch.eye(size), gradient)
    found = directions.kfac_empirical(lin, LAMBDA, positions=positions, eigenvalue_correction=True)
    assert relative_error(flatten(found), expected) < 1e-8
