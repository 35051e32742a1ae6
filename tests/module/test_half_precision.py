"""Updates in half precision, on one rank and on two."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_ief import IEF
from tests.helpers import Classifier
from tests.ranks import on_ranks
from tests.training.runs import data, dealt, first, fit, ief

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_updates_are_as_exact_as_gradients_in_half_precision(precision: str, ranks: int) -> None:
    """The change of the update which errors of the gradients make, to first order.

    d = Jᵀa with a = (K + λI)⁻¹s. Errors E of J and e of s change it by Eᵀa − Jᵀ(K + λI)⁻¹(JEᵀ + EJᵀ)a + Jᵀ(K + λI)⁻¹e.
    Since ‖Jᵀ(K + λI)⁻¹J‖ ≤ 1 and ‖Jᵀ(K + λI)⁻¹‖ ≤ 1/(2√λ), that is at most 2‖E‖‖a‖ + (‖E‖‖d‖ + ‖e‖) / (2√λ).
    """
    torch.set_default_dtype(torch.float32)
    lr, damping = 2.0, 4.0
    model = Classifier(ief)
    net, objective = model.net, model.objective
    inputs, targets = data()[:12]
    if precision == "bf16-true":
        net, inputs = net.bfloat16(), inputs.bfloat16()

    def per_sample(net: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
        rows, s = [], []
        for x, y in zip(inputs.split(1), targets.split(1), strict=True):
            z = net(x)
            rows.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(objective.losses(z, y).sum(), net.parameters())])
            )
            s.append(objective.gradient(z, y).double().square().sum())
        return torch.stack(rows).double(), torch.stack(s).detach()

    J, s = per_sample(deepcopy(net).double(), inputs.double())
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    with torch.autocast("cpu", half, enabled="mixed" in precision):
        rows, norms = per_sample(net, inputs)
    E, e = torch.linalg.matrix_norm(rows - J, 2), (norms - s).norm()
    a = torch.linalg.solve(J @ J.T + damping * torch.eye(12, dtype=torch.float64), s)
    d = J.T @ a
    bound = lr * (2 * E * a.norm() + (E * d.norm() + e) / (2 * damping**0.5))
    assert bound < 0.1 * lr * d.norm()
    start = nn.utils.parameters_to_vector(net.parameters()).detach().double()
    if precision == "bf16-true":  # the step and its sum with the parameters are rounded to 8 bits
        bound = bound + 2**-9 * (start.norm() + 2 * lr * d.norm())

    def work(rank: int) -> list[Tensor]:
        loader = dealt(first(46), 12 // ranks, ranks, rank)
        chosen: dict[str, Any] = {"precision": precision}
        if precision == "16-mixed":
            chosen = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}
        return fit(lambda p: IEF(p, lr=lr, damping=damping), 0, None, ranks, loader, **chosen)[0]

    results = on_ranks(ranks, work)
    for weights in results:
        error = (weights[0].double() - (start - lr * d)).norm()
        assert 1e-5 * lr * d.norm() < error < bound
        assert weights[-1].isfinite().all()
        assert all(torch.equal(ours, other) for ours, other in zip(weights, results[0], strict=True))
