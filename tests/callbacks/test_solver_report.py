"""What a step reports, against dense formulas; and schedules of options."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import IEF, NaturalGradient, linearize, objectives
from lightning_ief.callbacks import OptionSchedule, SolverReport
from tests.helpers import Classifier, Configure, per_sample_jacobian

pytestmark = pytest.mark.usefixtures("float64")

SAMPLES, N, EPOCHS = 24, 8, 4


class Keeping(Classifier):
    """Keeps what was logged, and the options that each batch saw."""

    def __init__(self, configure: Configure) -> None:
        super().__init__(configure)
        self.logged: list[dict[str, float]] = []
        self.seen: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        self.seen.append({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
        return super().training_step(batch, batch_idx)

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        self.logged.append({name: float(value) for name, value in dictionary.items()})
        super().log_dict(dictionary, *args, **kwargs)


def fit(configure: Configure, *callbacks: Any, **options: Any) -> Keeping:
    torch.manual_seed(3)
    model = Keeping(configure)
    trainer = L.Trainer(
        **{"max_epochs": EPOCHS, **options},
        accelerator="cpu",
        logger=False,
        callbacks=[*callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.randn(SAMPLES, 6), torch.randint(3, (SAMPLES,)))
    trainer.fit(model, DataLoader(data, N))
    return model


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def test_numbers_of_a_step() -> None:
    objective, model = objectives.CrossEntropy(), network()
    x, y = torch.randn(2, 8, 4), torch.arange(8) % 3
    optimizer = IEF(model.parameters(), lr=0.3, relative_damping=0.5, momentum=0.9, max_norm=0.2)
    optimizer.reports = True
    optimizer.step(linearization=linearize(model, x[0], y, objective))
    assert "slope_before" not in optimizer.report  # there was none
    phi = torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()])
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    lin = linearize(model, x[1], y, objective)
    J, s = per_sample_jacobian(model, x[1], y, objective), lin.logit_gradient_norms.clone()
    optimizer.step(linearization=lin)
    A, b = J / s.sqrt()[:, None], s.sqrt()
    K = A @ A.T
    lam = 0.5 * float(K.diagonal().mean())
    kappa, found = torch.linalg.eigvalsh(K), optimizer.report
    d = A.T @ torch.linalg.solve(K + lam * torch.eye(8), b)
    step = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    truth = {
        "fallback": 0.0,
        "damping": lam,
        "effective_rank": float((kappa / (kappa + lam)).sum()),
        "condition": float((kappa[-1] + lam) / (kappa[0] + lam)),
        "damped_share": float((b - A @ d).norm() / b.norm()),
        "direction_norm": float(
            (A.T @ torch.linalg.solve(K + lam * torch.eye(8), b - 0.9 * A @ phi) + 0.9 * phi).norm()
        ),
        "step_norm": float(step.norm()),
        "step_share": 1.0,
        "slope_before": float(J.sum(0) @ phi),
        "curvature_before": float((A @ phi).square().sum()),
    }
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert found[name] == pytest.approx(value, rel=1e-8), name


@pytest.mark.parametrize("samples", [8, 200])
def test_a_fallback_is_told(samples: int) -> None:
    """The slower solve, where samples repeat each other and next to nothing damps; with fewer parameters, too."""
    found = {}
    for damping in (1e-12, 1.0):
        model = network()
        x, y = torch.randn(samples, 4).repeat(2, 1), (torch.arange(samples) % 3).repeat(2)
        optimizer = IEF(model.parameters(), lr=0.1, damping=damping)
        optimizer.reports = True
        optimizer.step(linearization=linearize(model, x, y, objectives.CrossEntropy()))
        found[damping] = optimizer.report["fallback"]
    assert found == {1e-12: 1.0, 1.0: 0.0}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_nth_step_is_reported(accumulate: int) -> None:
    model = fit(lambda p: IEF(p, lr=0.1, relative_damping=1.0, accumulate=accumulate), SolverReport(4))
    steps = EPOCHS * -(-3 // accumulate)
    reports = [each for each in model.logged if "solver/condition" in each]
    assert len(reports) == -(-steps // 4)
    assert all(each["solver/skipped"] == 0 for each in reports)


def test_runs_are_the_same_with_a_report() -> None:
    make = lambda p: NaturalGradient(p, lr=0.1, damping=1.0, momentum=0.5)  # noqa: E731
    weights = [
        nn.utils.parameters_to_vector(fit(make, *callbacks).parameters()) for callbacks in ((), (SolverReport(1),))
    ]
    assert torch.equal(*weights)


def test_options_move() -> None:
    schedules = [
        OptionSchedule("relative_damping", [1.0, 0.01], scale="log"),
        OptionSchedule("momentum", [0.5, 0.9, 0.9], at=[0.0, 0.5, 1.0]),
    ]
    model = fit(lambda p: IEF(p, lr=0.1, relative_damping=7.0, momentum=0.1), *schedules)
    batches = EPOCHS * 3
    assert len(model.seen) == batches
    for number, seen in enumerate(model.seen):
        progress = number / batches
        assert seen["relative_damping"] == pytest.approx(0.01**progress)
        assert seen["momentum"] == pytest.approx(min(0.9, 0.5 + 0.8 * progress))


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"every_n_steps=0\): must be at least 1"):
        SolverReport(0)
    for arguments, problem in (
        ({"values": [1.0]}, "two values or more"),
        ({"values": [1.0, 2.0], "at": [0.5, 1.0]}, "grow from 0, to 1 at most"),
        ({"values": [1.0, 0.0], "scale": "log"}, "'log' for values > 0"),
    ):
        with pytest.raises(ValueError, match=problem):
            OptionSchedule("damping", **arguments)  # type: ignore[arg-type]
    with pytest.raises(
        MisconfigurationException, match=r"IEF has no option 'relative_damping' that is in use; there are"
    ):
        fit(lambda p: IEF(p), OptionSchedule("relative_damping", [1.0, 0.1]))
    with pytest.raises(MisconfigurationException, match=r"needs to know when training ends"):
        fit(lambda p: IEF(p), OptionSchedule("damping", [1.0, 0.1]), max_epochs=-1)
