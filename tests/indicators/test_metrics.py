"""The indicators as metrics: means and deviations over batches, reset, checkpoints, several processes."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lightning_ief import directions, gamma, linearize, objectives
from lightning_ief.capture import Linearization
from lightning_ief.indicators import (
    CosineSimilarity,
    Gamma,
    GradientNormImbalance,
    GradientNorms,
    LogitGradientNorms,
    LossGradientNorm,
    NoiseScale,
    Projections,
    RelativeGamma,
    UpdateNorm,
    gradient_noise,
    gradient_norm_imbalance,
    loss_gradient_norm,
)
from lightning_ief.linalg.vectors import cosine, norm
from tests.helpers import per_sample_jacobian, relative_error


def batches(count: int = 4, samples: int = 5) -> Iterator[Linearization]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for _ in range(count):
        inputs, targets = torch.randn(samples, 4, dtype=torch.float64), torch.randint(3, (samples,))
        yield linearize(model, inputs, targets, objectives.CrossEntropy())


def ief(lin: Linearization) -> dict[str, torch.Tensor]:
    return directions.ief(lin, 1e-3)


CASES = {
    "Gamma": (Gamma, lambda lin: (lin, ief(lin)), lambda lin: gamma(lin, ief(lin))),
    "RelativeGamma": (
        RelativeGamma,
        lambda lin: (lin, ief(lin), directions.sgd(lin)),
        lambda lin: gamma(lin, ief(lin)) / gamma(lin, directions.sgd(lin)),
    ),
    "GradientNormImbalance": (GradientNormImbalance, lambda lin: (lin,), gradient_norm_imbalance),
    "CosineSimilarity": (
        CosineSimilarity,
        lambda lin: (ief(lin), directions.sgd(lin)),
        lambda lin: cosine(ief(lin), directions.sgd(lin)),
    ),
    "LossGradientNorm": (LossGradientNorm, lambda lin: (lin,), loss_gradient_norm),
    "UpdateNorm": (UpdateNorm, lambda lin: (ief(lin),), lambda lin: norm(ief(lin))),
}


@pytest.mark.parametrize(("kind", "arguments", "truth"), CASES.values(), ids=CASES)
def test_mean_and_deviation_over_batches(kind, arguments, truth):
    metric = kind()
    assert metric.compute().isnan()
    expected = []
    for lin in batches():
        metric.update(*arguments(lin))
        expected.append(truth(lin))
    values = torch.stack(expected)
    assert float(metric.compute()) == pytest.approx(float(values.mean()), rel=1e-12)
    assert float(metric.deviation()) == pytest.approx(float(values.std()), rel=1e-6)
    assert values.std() > 0
    metric.reset()
    metric.update(*arguments(next(batches())))
    assert float(metric.compute()) == pytest.approx(float(truth(next(batches()))))
    assert metric.deviation().isnan()


def test_norms_of_gradients_are_of_samples_in_all_batches():
    norms, logit_norms, all_norms, all_s = GradientNorms(), LogitGradientNorms(), [], []
    for lin in batches():
        norms.update(lin)
        logit_norms.update(lin)
        rows = per_sample_jacobian(lin.model, lin.inputs, lin.targets, lin.objective)
        assert float(loss_gradient_norm(lin)) == pytest.approx(float(rows.sum(0).norm()), rel=1e-12)
        all_norms.append(rows.norm(dim=1))
        one_hot = nn.functional.one_hot(lin.targets, 3)
        all_s.append((lin.model(lin.inputs).detach().softmax(1) - one_hot).square().sum(1))
    for metric, values in ((norms, torch.cat(all_norms)), (logit_norms, torch.cat(all_s))):
        assert len(values) == 20
        assert float(metric.compute()) == pytest.approx(float(values.mean()), rel=1e-12)
        assert float(metric.deviation()) == pytest.approx(float(values.std()), rel=1e-9)


def test_a_metric_goes_on_from_a_checkpoint():
    whole, first, second = Gamma(), Gamma(), Gamma()
    for metric in (whole, first, second):
        metric.persistent(True)
    for number, lin in enumerate(batches()):
        whole.update(lin, ief(lin))
        if number == 2:
            second.load_state_dict(first.state_dict())
        (first if number < 2 else second).update(lin, ief(lin))
    assert second.compute() == whole.compute()


def test_projections_are_those_of_each_sample():
    metric, loss, rows = Projections(), [], []
    for lin in batches(2):
        d = directions.ef(lin, 0.0)
        metric.update(lin, d)
        loss.append(lin.losses)
        rows.append(per_sample_jacobian(lin.model, lin.inputs, lin.targets, lin.objective))
    found = metric.compute()
    assert relative_error(found["loss"], torch.cat(loss)) < 1e-12
    assert relative_error(found["gradient_norm"], torch.cat(rows).norm(dim=1)) < 1e-8
    assert (found["projection"] - 1).abs().max() < 1e-8  # EF pushes all samples alike


def test_what_is_not_defined_is_not_left_out():
    metric, imbalance = Gamma(), GradientNormImbalance()
    lin = next(batches())
    metric.update(lin, {name: torch.zeros_like(p) for name, p in lin.parameters.items()})
    metric.update(lin, ief(lin))
    assert metric.compute() == math.inf
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    imbalance.update(linearize(model, x, torch.ones(2, 1, dtype=torch.float64), objectives.LeastSquares()))
    assert imbalance.compute() == math.inf


def worker(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    metric, seen = Gamma(), Projections()
    for number, lin in enumerate(batches(3)):
        if number % world == rank:  # two batches here, one there
            metric.update(lin, ief(lin))
            seen.update(lin, ief(lin))
    found = float(metric.compute()), float(metric.deviation()), len(seen.compute()["loss"])
    torch.save(found, folder / str(rank))
    dist.destroy_process_group()


def test_on_two_processes_it_is_the_mean_over_all_batches(tmp_path):
    mp.start_processes(worker, (2, tmp_path), nprocs=2, start_method="fork")
    values = torch.stack([gamma(lin, ief(lin)) for lin in batches(3)])
    for rank in range(2):
        mean, deviation, samples = torch.load(tmp_path / str(rank))
        assert mean == pytest.approx(float(values.mean()))
        assert deviation == pytest.approx(float(values.std()))
        assert samples == 15


def test_noise_scale_is_unbiased_and_averages_before_it_divides() -> None:
    """Over all batches of two of a small set, the means of both parts are those of the set itself."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    J = per_sample_jacobian(model, x, y, objectives.CrossEntropy())
    pairs = [[i, j] for i in range(5) for j in range(5)]  # drawn with replacement, as the estimate takes it
    found = [gradient_noise(linearize(model, x[at], y[at], objectives.CrossEntropy())) for at in pairs]
    noise, square = (torch.stack(each).mean() for each in zip(*found, strict=True))
    assert noise == pytest.approx(float((J - J.mean(0)).square().sum(1).mean()))
    assert square == pytest.approx(float(J.mean(0).square().sum()))
    metric = NoiseScale()
    assert metric.compute().isnan()
    for at in pairs:
        metric.update(linearize(model, x[at], y[at], objectives.CrossEntropy()))
    metric.update(linearize(model, x[:1], y[:1], objectives.CrossEntropy()))  # a last batch, which tells nothing
    assert metric.compute() == pytest.approx(float(noise / square))
    opposite = NoiseScale()  # gradients that cancel each other
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    opposite.update(linearize(model, x[:1].expand(2, 3).clone(), y[:2], objectives.CrossEntropy()))
    assert opposite.compute() == math.inf
    with pytest.raises(ValueError, match="at least two samples"):
        gradient_noise(linearize(model, x[:1], y[:1], objectives.CrossEntropy()))
