"""GradientStatistics: its numbers are those of dense per-sample gradients, whatever trains the module."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_ief import IEF, objectives
from lightning_ief.callbacks import GradientStatistics, SolverReport
from tests.helpers import Classifier, per_sample_jacobian
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")

N = 8
KEYS = {"norm_mean", "norm_std", "loss_norm", "noise", "square", "noise_scale", "s_mean", "s_variance"}


class Plain(L.LightningModule):
    """Says nothing of its loss, and trains by automatic optimization; in train mode its gradients are others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))
        self.net[0].bias.requires_grad_(False)
        self.norms: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.5)


class Watch(L.Callback):
    """What is logged; and of each batch, when it begins, the dense Jacobian in eval mode and s, from autograd."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.truths: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        log_dict, objective = type(pl_module).log_dict, objectives.CrossEntropy()

        def keep(values: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            self.logged.append({name: float(value) for name, value in values.items()})
            log_dict(pl_module, values, *args, **kwargs)

        pl_module.log_dict = keep
        x, y = batch
        with torch.random.fork_rng():
            pl_module.eval()
            J = per_sample_jacobian(pl_module, x, y, objective)
            z = pl_module(x).detach()
            pl_module.train()
        s = (z.softmax(1) - nn.functional.one_hot(y, 3)).square().sum(1)
        self.truths.append((J, s))


def by_hand(truths: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """What is logged with the last of the batches that were reported in an epoch."""
    J, s = truths[-1]
    norms, samples = J.norm(dim=1), len(J)
    traces = [float(J.var(dim=0).sum()) for J, _ in truths]
    squares = [float(J.mean(0).square().sum()) - trace / len(J) for (J, _), trace in zip(truths, traces, strict=True)]
    found = {
        "norm_mean": float(norms.mean()),
        "loss_norm": float(J.sum(0).norm()),
        "s_mean": float(s.mean()),
    }
    if samples > 1:
        scale = sum(traces) / sum(squares) if sum(squares) > 0 else math.inf
        found |= {"norm_std": float(norms.std()), "s_variance": float(s.var()), "noise_scale": scale}
        found |= {"noise": traces[-1], "square": squares[-1]}
    return found


def data(samples: int) -> TensorDataset:
    torch.manual_seed(5)
    return TensorDataset(torch.randn(samples, 6), torch.randint(3, (samples,)))


def fit(module: L.LightningModule, *callbacks: Any, batch_size: int = N, samples: int = 32, **options: Any) -> Any:
    torch.manual_seed(7)
    trainer = L.Trainer(
        **{"max_epochs": 2, **options},
        accelerator="cpu",
        logger=False,
        callbacks=[*callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data(samples), batch_size))
    return module


def logged_by(watch: Watch) -> list[dict[str, float]]:
    found = [{k.removeprefix("gradients/"): v for k, v in each.items()} for each in watch.logged]
    return [each for each in found if "norm_mean" in each]


@pytest.mark.parametrize("batch_size", [N, 1])
@pytest.mark.parametrize("ours", [True, False])
def test_numbers_are_those_of_dense_gradients(ours: bool, batch_size: int) -> None:
    watch = Watch()
    module = Classifier(lambda p: IEF(p, lr=0.5, damping=1e-3, metric="kronecker")) if ours else Plain()
    fit(module, watch, GradientStatistics(every_n_steps=1), batch_size=batch_size, samples=4 * batch_size)
    found = logged_by(watch)
    assert len(found) == 8
    for number, each in enumerate(found):
        of_epoch = watch.truths[4 * (number // 4) : number + 1]
        length = each.pop("direction_norm", None)
        assert (length is not None) == ours
        assert each == pytest.approx(by_hand(of_epoch), rel=1e-9)
        assert batch_size == 1 or each.keys() == KEYS


def test_the_gradient_of_the_mean_loss_is_that_of_the_optimizer() -> None:
    watch, module = Watch(), Plain()
    module.net[2] = nn.Identity()
    fit(module, watch, GradientStatistics(every_n_steps=1))
    assert [each["loss_norm"] / N for each in logged_by(watch)] == pytest.approx(module.norms, rel=1e-9)


@pytest.mark.parametrize("momentum_type", ["spring", "heavy-ball"])
@pytest.mark.parametrize("max_norm", [None, 1e-3])
def test_the_length_of_the_direction(momentum_type: Any, max_norm: float | None) -> None:
    """From the parameters before and after the step; with a bound on steps from the run's momentum."""
    steps: list[float] = []

    class Moves(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            self.before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            after = nn.utils.parameters_to_vector(module.parameters()).detach()
            steps.append(float((after - self.before).norm()) / 0.5)

    def run(bound: float | None) -> list[float]:
        watch = Watch()
        steps.clear()
        make = lambda p: IEF(  # noqa: E731
            p, lr=0.5, damping=1e-2, momentum=0.5, momentum_type=momentum_type, max_norm=bound
        )
        fit(Classifier(make), watch, GradientStatistics(every_n_steps=1), Moves(), samples=N, max_epochs=1)
        return [each["direction_norm"] for each in logged_by(watch)]

    free, truth = run(None), [*steps]
    assert free == pytest.approx(truth, rel=1e-9)
    assert run(max_norm) == pytest.approx(truth, rel=1e-9)  # of the first step, from the same parameters


@pytest.mark.parametrize("ours", [True, False])
def test_every_nth_step_and_micro_batches(ours: bool) -> None:
    """10 steps of 2 batches each; those of one update are one batch to an optimizer of this package."""
    watch = Watch()
    make = lambda p: IEF(p, lr=0.1, damping=1e-3, accumulate=2)  # noqa: E731
    options = {} if ours else {"accumulate_grad_batches": 2}
    fit(Classifier(make) if ours else Plain(), watch, GradientStatistics(4), samples=10 * N, **options)
    found = logged_by(watch)
    assert len(found) == 3  # steps 0, 4 and 8
    for number, each in zip((0, 4, 8), found, strict=True):
        J, _ = watch.truths[2 * number]
        J = torch.cat([J, watch.truths[2 * number + 1][0]]) if ours else J
        assert each["loss_norm"] == pytest.approx(float(J.sum(0).norm()), rel=1e-9)


@pytest.mark.parametrize("ours", [True, False])
def test_runs_are_the_same_with_it(ours: bool) -> None:
    """Weights, to the last bit, with dropout; and another callback that looks at the optimizer goes on."""
    ends = []
    for callbacks in ((), (GradientStatistics(2), SolverReport(1))):
        module = Classifier(lambda p: IEF(p, lr=0.1, damping=1e-3)) if ours else Plain()
        fit(module, *callbacks)
        ends.append(nn.utils.parameters_to_vector(module.parameters()))
        if ours:
            assert not module.trainer.optimizers[0].observers
    assert torch.equal(*ends)


def test_a_skipped_step_is_left_out_and_the_next_one_reported() -> None:
    class Spoilt(Classifier):
        def unpack_batch(self, batch: Any) -> Any:
            x, y = super().unpack_batch(batch)
            return (x * math.nan if self.trainer.fit_loop.epoch_loop.batch_idx == 0 else x), y

    watch = Watch()
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        fit(Spoilt(lambda p: IEF(p, lr=0.1, damping=1e-3)), watch, GradientStatistics(100), max_epochs=1)
    (found,) = logged_by(watch)
    assert found["loss_norm"] == pytest.approx(by_hand(watch.truths[1:2])["loss_norm"], rel=1e-6)


def on_rank(ours: bool, batch_size: int, **options: Any) -> dict[str, float]:
    module = Classifier(lambda p: IEF(p, lr=0.5, damping=1e-3)) if ours else Plain()
    found = data(24)
    ranks = options.get("devices", 1)
    sampler = DistributedSampler(found, shuffle=False) if ranks > 1 else None
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[GradientStatistics(every_n_steps=1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    if not ours:
        module.net[2] = nn.Identity()
    trainer.fit(module, DataLoader(found, batch_size, sampler=sampler))
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("gradients/")}


@pytest.mark.parametrize("ours", [True, False])
def test_ranks_see_the_batch_of_all(ours: bool) -> None:
    alone = on_rank(ours, 12)
    assert len(alone) == len(KEYS) + ours
    for found in on_ranks(2, lambda rank: on_rank(ours, 6, devices=2, strategy="ddp")):
        assert found == pytest.approx(alone, rel=1e-8)


def as_pair(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["x"], batch["y"]


def test_it_can_be_written_in_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GradientStatistics, "it")
    config = {
        "every_n_steps": 3,
        "objective": {"class_path": "lightning_ief.objectives.LeastSquares"},
        "unpack_batch": f"{__name__}.as_pair",
    }
    callback = parser.instantiate_classes(parser.parse_object({"it": config})).it
    assert callback.every_n_steps == 3
    assert isinstance(callback.objective, objectives.LeastSquares)
    assert callback.unpack_batch is as_pair


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"GradientStatistics\(every_n_steps=0\): must be at least 1"):
        GradientStatistics(0)

    class Named(Plain):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"x": batch[0], "y": batch[1]}

    class Regression(Plain):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0], batch[0][:, :3]

    with pytest.raises(MisconfigurationException, match=r"needs unpack_batch: Named has none, .*dict with keys"):
        fit(Named(), GradientStatistics())
    with pytest.raises(MisconfigurationException, match=r"needs objective: Regression has none, .*no classes"):
        fit(Regression(), GradientStatistics())
    module = Plain()
    module.objective = nn.CosineEmbeddingLoss()
    with pytest.raises(MisconfigurationException, match=r"GradientStatistics can't use Plain\.objective"):
        fit(module, GradientStatistics())
