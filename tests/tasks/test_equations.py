"""Equations: derivatives against autograd, points, and the exact solution."""

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_ief import IEF
from lightning_ief.tasks import DerivativeMLP, EquationDataModule, Heat, Poisson, Regressor
from tests.helpers import relative_error

EQUATIONS = {"poisson": (Poisson(2), None), "poisson_5d": (Poisson(5), None), "heat": (Heat(modes=(1, 3)), 1)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def derivatives(u, points: torch.Tensor, space: int) -> torch.Tensor:
    """u, its gradient and Laplacian in each point, by autograd: [N, d + 2]."""
    rows = []
    for x in points:
        of_x = lambda x: u(x.unsqueeze(0)).squeeze()  # noqa: E731
        gradient = torch.autograd.functional.jacobian(of_x, x)
        hessian = torch.autograd.functional.hessian(of_x, x)
        rows.append(torch.cat([of_x(x).reshape(1), gradient, hessian.diagonal()[:space].sum().reshape(1)]))
    return torch.stack(rows).detach()


@pytest.mark.parametrize("widths", [[2, 8, 1], [5, 7, 6, 4, 1], [1, 3, 3, 1]])
@pytest.mark.parametrize("space", [1, None])
def test_parts_are_autograds_derivatives(widths, space):
    net = DerivativeMLP(widths, space).double()
    points = torch.randn(6, widths[0], dtype=torch.float64)
    with torch.no_grad():
        parts = net.parts(points)
    expected = derivatives(net, points, space or widths[0])
    assert expected[:, -1].abs().max() > 1e-3  # not vacuous
    assert relative_error(parts, expected) < 1e-13
    coefficients = torch.randn_like(parts)
    assert relative_error(net(points, coefficients), (coefficients * expected).sum(1, keepdim=True)) < 1e-13
    assert torch.equal(net(points), net.parts(points)[:, :1])


def test_gain_scales_the_first_layer():
    plain = DerivativeMLP([2, 8, 1])
    torch.manual_seed(0)
    scaled = DerivativeMLP([2, 8, 1], gain=3.0)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(dict(scaled.named_parameters())[name], parameter * (3 if "layers.0" in name else 1))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"widths": [2, 1]}, "widths"),
        ({"widths": [2, 0, 1]}, "widths"),
        ({"widths": [2, 8, 2]}, "widths"),
        ({"widths": [2, 8, 1], "space_dimensions": 3}, "space_dimensions=3"),
        ({"widths": [2, 8, 1], "space_dimensions": 0}, "space_dimensions=0"),
        ({"widths": [2, 8, 1], "gain": 0.0}, "gain=0.0"),
    ],
)
def test_impossible_networks_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        DerivativeMLP(**arguments)


@pytest.mark.parametrize("name", EQUATIONS)
def test_residuals_of_the_exact_solution_are_zero(name):
    """Within and on the faces: what stands in a batch is the equation that the docstring names."""
    equation, space = EQUATIONS[name]
    data = EquationDataModule(equation, interior=30, boundary=20, boundary_weight=3.0)
    (points, coefficients), targets = next(iter(data.train_dataloader()))
    exact = derivatives(equation.solution, points, space or equation.dimensions)
    outputs = (coefficients * exact).sum(1, keepdim=True)
    assert outputs.shape == targets.shape == (50, 1) and outputs.abs().max() > 0.01
    torch.testing.assert_close(outputs, targets, atol=1e-13, rtol=1e-13)
    another = derivatives(lambda x: equation.solution(x) + x.exp().sum(1), points, space or equation.dimensions)
    assert ((coefficients * another).sum(1, keepdim=True) - targets).abs().min() > 1e-3


def test_loss_is_the_mean_square_within_plus_that_on_the_faces():
    data = EquationDataModule(Poisson(2), interior=30, boundary=20, boundary_weight=3.0, scale=5.0)
    (points, coefficients), targets = next(iter(data.train_dataloader()))
    net = DerivativeMLP([2, 8, 1]).double()
    parts = net.parts(points)
    within = -parts[:30, 3:] - 2 * torch.pi**2 * (torch.pi * points[:30]).sin().prod(1, keepdim=True)
    expected = 25 * (within.square().mean() + 9 * parts[30:, 0].square().mean()) / 2
    losses = Regressor(net, IEF).objective.losses(net(points, coefficients), targets)
    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", EQUATIONS)
def test_points_are_within_and_on_every_face(name):
    equation, _ = EQUATIONS[name]
    (points, _), _ = next(iter(EquationDataModule(equation, interior=64, boundary=40).train_dataloader()))
    assert points.dtype == torch.float64 and points.shape == (104, equation.dimensions)
    assert points.min() >= 0 and points.max() <= 1 and len(points.unique(dim=0)) == 104
    assert ((points[:64] > 0) & (points[:64] < 1)).all()
    shares = [int((points[64:, coordinate] == side).sum()) for coordinate, side in equation.faces]
    assert sum(shares) == 40 and max(shares) - min(shares) <= 1


def points_of_epochs(epochs: int, **options) -> list[list[torch.Tensor]]:
    """Points of each batch, by epoch, as a run sees them."""
    seen: list[list[torch.Tensor]] = []

    class Watched(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def on_train_epoch_start(self):
            seen.append([])

        def training_step(self, batch, batch_idx):
            (points, _), targets = batch
            assert targets.dtype == torch.float32  # that of the module
            seen[-1].append(points.clone())
            return self.weight.sum()

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters())

    data = EquationDataModule(Poisson(2), interior=30, boundary=8, steps_per_epoch=3, **options)
    fit(Watched(), data, max_epochs=epochs)
    return seen


def fit(module: L.LightningModule, data: L.LightningDataModule, **options) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", num_sanity_val_steps=0, **quiet, **options)
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize("resample", [False, True])
def test_points_are_fixed_or_those_of_the_epoch(resample):
    seen = points_of_epochs(3, resample=resample)
    assert [len(batches) for batches in seen] == [3, 3, 3]
    assert all(torch.equal(points, batches[0]) for batches in seen for points in batches)
    assert all(torch.equal(batches[0], seen[0][0]) is not resample for batches in seen[1:])
    again, other = points_of_epochs(2, resample=resample), points_of_epochs(2, resample=resample, seed=1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, seen, strict=False))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(other, seen, strict=False))


def test_ranks_share_the_points():
    data = EquationDataModule(Poisson(2), interior=30, boundary=8)
    (everything, _), _ = next(iter(data.train_dataloader()))
    shares = []
    for rank in range(3):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=3, current_epoch=0)
        (points, coefficients), targets = next(iter(data.train_dataloader()))
        assert len(points) == len(coefficients) == len(targets)
        shares.append(points)
    assert torch.equal(torch.cat(shares).unique(dim=0), everything.unique(dim=0))
    assert sum(map(len, shares)) == len(everything) and max(map(len, shares)) == 13


def test_validation_compares_with_the_exact_solution_in_the_same_points_whatever_the_seed():
    (first, values), targets = next(iter(EquationDataModule(Heat(), seed=0, val_points=50).val_dataloader()))
    (other, _), _ = next(iter(EquationDataModule(Heat(), seed=1, val_points=50).val_dataloader()))
    assert torch.equal(first, other) and torch.equal(targets, Heat().solution(first))
    assert torch.equal(values, torch.tensor([1.0, 0.0, 0.0, 0.0]).double().expand(50, 4))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"interior": 0}, "interior=0"),
        ({"boundary": 3}, "boundary=3.*at least 4"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"val_points": 0}, "val_points=0"),
        ({"boundary_weight": 0.0}, "boundary_weight=0.0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"boundary_weight": float("nan")}, "boundary_weight=nan"),
    ],
)
def test_arguments_out_of_range_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        EquationDataModule(Poisson(2), **options)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Poisson(0), "dimensions=0"),
        (lambda: Heat(conductivity=0.0), "conductivity=0.0"),
        (lambda: Heat(modes=()), "modes"),
        (lambda: Heat(modes=(1, 0)), "modes"),
    ],
)
def test_equations_out_of_range_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_ief_solves_poisson_in_one_dimension():
    """To a ten thousandth within 40 steps; and what is logged is the error of a loop by hand."""
    model = Regressor(
        DerivativeMLP([1, 12, 1]), partial(IEF, lr=1.0, absolute_damping=1e-12, max_norm=1.0, line_search=10)
    )
    data = EquationDataModule(Poisson(1), interior=64, boundary=2)
    trainer = fit(model, data, max_epochs=4, precision="64-true")
    assert {"train/loss", "val/loss", "val/relative_l2"} <= set(trainer.callback_metrics)
    (points, _), exact = next(iter(data.val_dataloader()))
    with torch.no_grad():
        error = float((model.net(points) - exact).norm() / exact.norm())
    assert float(trainer.callback_metrics["val/relative_l2"]) == pytest.approx(error, rel=1e-4)
    assert error < 1e-4


@pytest.mark.parametrize("after", [4, 6])  # steps: within an epoch of three, and at its end
def test_resumed_run_sees_the_points_of_the_uninterrupted_one(tmp_path, after):
    def run(**options) -> Regressor:
        torch.manual_seed(0)
        net = DerivativeMLP([2, 6, 1]).double()  # Lightning loads a checkpoint before it casts the module
        model = Regressor(net, partial(IEF, lr=0.5, absolute_damping=1e-2))
        data = EquationDataModule(Poisson(2), interior=30, boundary=8, steps_per_epoch=3, resample=True)
        saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=after, save_top_k=-1)
        trainer = L.Trainer(
            accelerator="cpu", precision="64-true", max_epochs=3, callbacks=[saved], logger=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(model, data, **options)
        return model

    whole = run()
    resumed = run(ckpt_path=str(tmp_path / f"step={after}.ckpt"))
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
