"""Faults, interrupted runs and low precision, on several ranks."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_ief import IEF, NaturalGradient, SampledFisher
from lightning_ief.distributed import Exchange
from lightning_ief.training.refusals import require_supported_options, require_supported_strategy
from tests.helpers import Classifier, Configure
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("float64")


class Watch(L.Callback):
    """Calls a function before every batch; notes the parameters after it, and the warnings of the run."""

    def __init__(self, before: Callable[[L.Trainer, Any, int], None] | None = None) -> None:
        self.before = before
        self.weights: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if self.before:
            self.before(trainer, batch, trainer.current_epoch * trainer.num_training_batches + batch_idx)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.weights.append(nn.utils.parameters_to_vector(module.parameters()).detach().clone())


def data(samples: int = 47) -> TensorDataset:
    torch.manual_seed(2)
    return TensorDataset(torch.randn(samples, 6), torch.randint(3, (samples,)))


def fit(
    configure: Configure,
    batch_size: int,
    before: Callable[[L.Trainer, Any, int], None] | None = None,
    ranks: int = 1,
    loader: Any = None,
    net: nn.Module | None = None,
    kind: type[Classifier] = Classifier,
    ckpt_path: Any = None,
    callbacks: Any = (),
    **options: Any,
) -> tuple[list[Tensor], list[str]]:
    """The parameters after every batch, and the warnings."""
    watch = Watch(before)
    found = data()
    workers = options.pop("workers", 0)
    # Over several ranks, Lightning puts the same sampler there.
    sampler = DistributedSampler(found, 1, 0) if ranks == 1 else None
    options = {
        "max_epochs": 3,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "strategy": "ddp" if ranks > 1 else "auto",
    } | options
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, *callbacks],
        **options,
    )
    loader = (
        loader
        if loader is not None
        else DataLoader(found, batch_size, sampler=sampler, shuffle=sampler is None, num_workers=workers)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(
            kind(configure, net),
            loader,
            DataLoader(found, 20) if "val_check_interval" in options else None,
            ckpt_path=ckpt_path,
        )
    return watch.weights, [str(w.message) for w in caught]


# --------------------------------------------------------------------------- losses that are not finite


def poison(trainer: L.Trainer, batch: Any, number: int) -> None:
    if number == 1 and trainer.global_rank == trainer.world_size - 1:
        batch[0][2] = torch.nan


SKIPPING: dict[str, Configure] = {
    "ief": lambda p: IEF(p, lr=0.5, damping=1e-3),
    "ief, local": lambda p: IEF(p, lr=0.5, damping=1e-3, sync="local"),
    "ief, pairs of micro-batches": lambda p: IEF(p, lr=0.5, damping=1e-3, accumulate=2),
    "sampled_fisher": lambda p: SampledFisher(p, lr=0.3),
    "sampled_fisher, local": lambda p: SampledFisher(p, lr=0.3, sync="local"),
    "natural_gradient": lambda p: NaturalGradient(p, lr=0.1, damping=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", SKIPPING)
def test_all_ranks_skip_alike(name: str) -> None:
    results = on_ranks(2, lambda rank: fit(SKIPPING[name], 6, poison, 2))
    for weights, messages in results:
        said = [message for message in messages if "kipped a" in message]
        assert len(said) == 1 and f"samples [{8 if 'pairs' in name else 2}] of rank 1" in said[0], said
        assert torch.equal(weights[0], weights[1])  # skipped
        assert not torch.equal(weights[1], weights[3]) and weights[-1].isfinite().all()
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][0], strict=True))


class Length(nn.Module):
    """Inputs of zeros have finite losses, and gradients that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4, bias=False), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).square().sum(1, keepdim=True).sqrt())


@pytest.mark.parametrize("name", ["ief", "ief, local", "sampled_fisher", "sampled_fisher, local"])
def test_gradients_of_one_rank_that_are_not_finite(name: str) -> None:
    def zeros(trainer: L.Trainer, batch: Any, number: int) -> None:
        if number == 1 and trainer.global_rank == 1:
            batch[0][2] = 0.0

    results = on_ranks(2, lambda rank: fit(SKIPPING[name], 6, zeros, 2, net=Length()))
    for weights, messages in results:
        assert len([message for message in messages if "skipped a step" in message]) == 1
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][0], strict=True))


@pytest.mark.parametrize("name", ["ief, local", "sampled_fisher, local"])
def test_a_rank_without_gradients_moves_with_the_others(name: str) -> None:
    def ignored(trainer: L.Trainer, batch: Any, number: int) -> None:
        if number == 1 and trainer.global_rank == 1:
            batch[1].fill_(-100)

    results = on_ranks(2, lambda rank: fit(SKIPPING[name], 6, ignored, 2))
    for weights, messages in results:
        assert not [message for message in messages if "skipped a step" in message]
        assert not torch.equal(weights[0], weights[1])
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][0], strict=True))


# --------------------------------------------------------------------------- runs that are killed, and go on


def killed(at: int) -> Callable[[L.Trainer, Any, int], None]:
    def kill(trainer: L.Trainer, batch: Any, number: int) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def ief(p: Any) -> torch.optim.Optimizer:
    return IEF(p, lr=0.5, damping=1e-3)


def sampled_fisher(p: Any) -> torch.optim.Optimizer:
    return SampledFisher(p, lr=0.3, num_samples=2)


def in_windows(p: Any) -> torch.optim.Optimizer:
    return IEF(p, lr=0.5, damping=1e-3, accumulate=3)


EVERY_STEP: dict[str, Any] = {"every_n_train_steps": 1}
AFTER_VALIDATION: dict[str, Any] = {"every_n_epochs": 1, "save_on_train_epoch_end": False}


@pytest.mark.parametrize(
    ("configure", "before", "after", "at", "save", "options"),
    [
        (ief, 1, 1, 6, EVERY_STEP, {"workers": 1}),
        (ief, 1, 1, 8, EVERY_STEP, {"workers": 1}),
        (ief, 2, 2, 6, EVERY_STEP, {}),
        (ief, 2, 3, 6, EVERY_STEP, {}),
        (ief, 1, 1, 6, EVERY_STEP, {"max_steps": 12, "max_epochs": -1}),
        (ief, 1, 1, 8, {"every_n_epochs": 1}, {}),
        (sampled_fisher, 1, 2, 6, EVERY_STEP, {}),
        (sampled_fisher, 2, 2, 6, EVERY_STEP, {}),
        (in_windows, 2, 1, 21, EVERY_STEP, {"size": 3}),
        (in_windows, 1, 1, 21, AFTER_VALIDATION, {"size": 3, "val_check_interval": 4}),
        (in_windows, 2, 2, 21, AFTER_VALIDATION, {"size": 3, "val_check_interval": 4}),
        (ief, 1, 1, 7, AFTER_VALIDATION, {"val_check_interval": 2}),
    ],
)
def test_a_killed_run_resumes(
    configure: Configure,
    before: int,
    after: int,
    at: int,
    save: dict[str, Any],
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # seeds Lightning's samplers
    whole = options.pop("size", 6) * 2  # 4 batches in an epoch, or 8

    def run(ranks: int, fault: Any = None, folder: str | None = None, ckpt_path: Path | None = None) -> Any:
        saves = [ModelCheckpoint(tmp_path / folder, save_last="link", **save)] if folder else []
        seen: list[tuple[int, float]] = []

        def watch(trainer: L.Trainer, batch: Any, number: int) -> None:
            seen.append((number, float(batch[0].sum())))
            if fault:
                fault(trainer, batch, number)

        def work(rank: int) -> Any:
            found = fit(configure, whole // ranks, watch, ranks, ckpt_path=ckpt_path, callbacks=saves, **options)
            return found[0], seen

        return on_ranks(ranks, work)

    straight, numbers = run(before, folder="a")[0]
    with pytest.raises(AssertionError, match="nothing"):
        run(before, killed(at), "b")
    for weights, seen in run(after, ckpt_path=tmp_path / "b" / "last.ckpt"):
        assert seen[-1][0] == numbers[-1][0]
        if before == after:
            assert torch.equal(weights[-1], straight[-1])
            assert before > 1 or seen == numbers[-len(seen) :]
        for ours, truth in zip(weights, straight[-len(weights) :], strict=True):
            assert (ours - truth).norm() < 1e-12 * truth.norm()


class Restoring(DataLoader):
    """A data loader that restores its position itself."""

    seen = 0

    def __iter__(self) -> Any:
        start, self.seen = self.seen, 0
        for number, batch in enumerate(super().__iter__()):
            self.seen = (number + 1) % len(self)
            if number >= start:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def test_data_loaders_may_restore_their_position(tmp_path: Path) -> None:
    def run(configure: Configure, before: Any = None, **options: Any) -> tuple[list[Tensor], list[str]]:
        return fit(configure, 0, before, loader=Restoring(data(), 12), **options)

    def save(trainer: L.Trainer, batch: Any, number: int) -> None:
        if number == 6:
            trainer.save_checkpoint(tmp_path / "between.ckpt")

    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    straight, _ = run(ief, callbacks=[saves])
    resumed, _ = run(ief, ckpt_path=tmp_path / "step=6.ckpt")
    assert len(resumed) == 6 and all(torch.equal(a, b) for a, b in zip(resumed, straight[6:], strict=True))
    _, messages = run(in_windows, save)
    assert any("the 2 micro-batches since the last one will be missing" in message for message in messages)


def test_an_epoch_that_has_become_shorter(tmp_path: Path) -> None:
    fit(ief, 12, callbacks=[ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)], max_steps=3)
    with pytest.raises(MisconfigurationException, match="after 3 batches of an epoch, the data loader has 2 only"):
        fit(ief, 0, loader=DataLoader(first(24), 12), ckpt_path=tmp_path / "last.ckpt")


# --------------------------------------------------------------------------- samples that samplers repeat


class Batches(torch.utils.data.Dataset):
    """Items that are batches."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return data()[4 * i : 4 * i + 4]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        rank, ranks = (
            (torch.distributed.get_rank(), torch.distributed.get_world_size())
            if torch.distributed.is_initialized()
            else (0, 1)
        )
        return iter([data()[i] for i in range(rank, 24, ranks)])


def dealt(found: Any, size: int | None, ranks: int, rank: int, drop_last: bool = False, **options: Any) -> DataLoader:
    return DataLoader(
        found, size, sampler=DistributedSampler(found, ranks, rank, False, drop_last=drop_last), **options
    )


def first(samples: int) -> TensorDataset:
    return TensorDataset(*data()[:samples])


@pytest.mark.parametrize(
    ("alone", "on_rank", "ranks", "options"),
    [
        (lambda: DataLoader(data(), 12), lambda r: dealt(data(), 6, 2, r), 2, {"limit_train_batches": 2}),
        # Two full batches: the last one ends in a repeated sample; one batch, since the next is not full.
        (lambda: DataLoader(first(23), 12), lambda r: dealt(first(23), 6, 2, r, drop_last=False), 2, {}),
        (
            lambda: DataLoader(first(17), 12, drop_last=True),
            lambda r: dealt(first(17), 6, 2, r),
            2,
            {"limit_train_batches": 1},
        ),
        (lambda: DataLoader(first(46), 12), lambda r: dealt(data(), 6, 2, r, drop_last=True), 2, {}),
        (lambda: DataLoader(first(2), 12), lambda r: dealt(first(2), 4, 3, r), 3, {}),
        (lambda: DataLoader(first(20), 8), lambda r: dealt(Batches(), None, 2, r), 2, {}),
        (lambda: DataLoader(Stream(), 8), lambda r: DataLoader(Stream(), 4), 2, {}),
    ],
    ids=[
        "limited",
        "last batch full",
        "last batch dropped",
        "dropped",
        "fewer samples than ranks",
        "whole batches",
        "stream",
    ],
)
@pytest.mark.parametrize("configure", [ief, lambda p: torch.optim.SGD(p, lr=0.1)], ids=["ief", "sgd"])
def test_repeated_samples_count_once(
    configure: Configure, alone: Callable[[], Any], on_rank: Callable[[int], Any], ranks: int, options: dict[str, Any]
) -> None:
    truth = fit(configure, 0, loader=alone(), **options)[0][-1]
    for weights, messages in on_ranks(ranks, lambda rank: fit(configure, 0, None, ranks, on_rank(rank), **options)):
        assert (weights[-1] - truth).norm() < 1e-12 * truth.norm()
        assert not [m for m in messages if "count twice" in m or "counts twice" in m]


class Reversed(torch.utils.data.BatchSampler):
    def __iter__(self) -> Any:
        return iter([batch[::-1] for batch in super().__iter__()])


class Pair(Classifier):
    def unpack_batch(self, batch: Any) -> Any:
        (x, y), (u, v) = batch
        return torch.cat([x, u]), torch.cat([y, v])


class Doubled(Classifier):
    def unpack_batch(self, batch: Any) -> Any:
        return batch[0].repeat(2, 1), batch[1].repeat(2)


@pytest.mark.parametrize(
    ("kind", "loader"),
    [
        (Pair, lambda r: [dealt(first(23), 6, 2, r), dealt(first(22), 6, 2, r)]),
        (
            Classifier,
            lambda r: DataLoader(first(23), batch_sampler=Reversed(DistributedSampler(first(23), 2, r), 6, False)),
        ),
        (Doubled, lambda r: dealt(first(23), 6, 2, r)),
    ],
    ids=["several loaders", "another batch sampler", "more samples than loaded"],
)
def test_repeated_samples_that_are_not_known_are_announced(
    kind: type[Classifier], loader: Callable[[int], Any]
) -> None:
    results = on_ranks(2, lambda rank: fit(ief, 0, None, 2, loader(rank), kind=kind, max_epochs=1))
    for rank, (_, messages) in enumerate(results):
        assert any("twice" in message for message in messages) == (rank == 1)


# --------------------------------------------------------------------------- strategies


class Counting(L.Callback):
    """Fails if DistributedDataParallel sends gradients, or if it does not."""

    def __init__(self, expected: bool) -> None:
        self.expected = expected
        self.sent = 0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        def hook(state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
            self.sent += 1
            return torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(None, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)

    def on_train_end(self, *_: Any) -> None:
        assert (self.sent > 0) == self.expected


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
@pytest.mark.parametrize("configure", [ief, lambda p: torch.optim.SGD(p, lr=0.1)], ids=["ief", "sgd"])
def test_only_ordinary_optimizers_have_gradients_sent(configure: Configure, strategy: str) -> None:
    truth = fit(configure, 12)[0][-1]
    counting = Counting(configure is not ief)
    for found, _ in on_ranks(2, lambda rank: fit(configure, 6, ranks=2, strategy=strategy, callbacks=[counting])):
        assert (found[-1] - truth).norm() < 1e-12 * truth.norm()


class Remembering(nn.Linear):
    """Has a buffer that depends on the samples of a rank."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.register_buffer("total", torch.zeros(()))
        self.noted: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.noted.append(float(self.total))
        self.total += x.detach().sum()
        return super().forward(x)


@pytest.mark.parametrize("configure", [ief, lambda p: torch.optim.SGD(p, lr=0.1)], ids=["ief", "sgd"])
def test_buffers_are_those_of_the_first_rank(configure: Configure) -> None:
    def work(rank: int) -> list[float]:
        net = Remembering()
        fit(configure, 6, ranks=2, net=net)
        return net.noted

    one, other = on_ranks(2, work)
    assert one == other and len(set(one)) >= 12


def started(strategy: Any, before: Any = None, configure: Configure = ief, ranks: int = 2) -> Tensor:
    """The parameters after a run of which Lightning starts the ranks, forked or anew."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watch(before)],
    )
    module = Classifier(configure)
    with mock.patch.dict(os.environ):  # Lightning leaves its port there
        trainer.fit(module, DataLoader(data(), 6, shuffle=True))
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", "ddp_fork_find_unused_parameters_true", "ddp_spawn"])
def test_strategies_that_start_ranks_themselves(strategy: str, monkeypatch: Any) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    truth = fit(ief, 12)[0][-1]
    assert (started(strategy) - truth).norm() < 1e-12 * truth.norm()


@pytest.mark.parametrize(
    ("strategy", "what"),
    [
        (FSDPStrategy(), "FSDPStrategy hides"),
        (mock.Mock(spec=DeepSpeedStrategy), "DeepSpeedStrategy|Mock"),
        (
            mock.Mock(spec=ModelParallelStrategy, device_mesh={"tensor_parallel": mock.Mock(size=lambda: 2)}),
            "tensor_parallel_size=2",
        ),
        (mock.Mock(spec=DDPStrategy, model=mock.Mock(static_graph=True)), "static_graph=True"),
    ],
    ids=["fsdp", "deepspeed", "tensor parallel", "static graph"],
)
def test_strategies_that_are_not_exact_are_refused(strategy: Any, what: str) -> None:
    with pytest.raises(MisconfigurationException, match=what):
        require_supported_strategy(strategy)


def test_static_graph_is_refused_before_the_first_batch() -> None:
    strategy = lambda: DDPStrategy(static_graph=True)  # noqa: E731
    with pytest.raises(AssertionError, match=r"MisconfigurationException: DDPStrategy\(static_graph=True\) waits"):
        on_ranks(2, lambda rank: fit(ief, 6, ranks=2, strategy=strategy()))
    on_ranks(2, lambda rank: fit(lambda p: torch.optim.SGD(p, lr=0.1), 6, ranks=2, strategy=strategy()))


# --------------------------------------------------------------------------- low precision


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


@pytest.mark.parametrize(
    "plugin",
    [HalfPrecision("16-true"), mock.Mock(spec=Precision, precision="transformer-engine-float16")],
    ids=["16-true", "transformer engine"],
)
def test_fp16_that_nothing_scales_is_refused(plugin: Any) -> None:
    trainer = mock.Mock(
        precision=plugin.precision, precision_plugin=plugin, gradient_clip_val=None, accumulate_grad_batches=1
    )
    with pytest.raises(MisconfigurationException, match=f"precision='{plugin.precision}'.*Use '16-mixed' on a GPU"):
        require_supported_options(trainer)
    if plugin.precision == "16-true":
        with pytest.raises(MisconfigurationException, match="would lose small per-sample gradients"):
            fit(ief, 12, plugins=[plugin])


# --------------------------------------------------------------------------- ranks that die


def die_in_step(trainer: L.Trainer, batch: Any, number: int) -> None:
    """Kill the last rank within a collective of the third step."""
    if number == 2 and trainer.global_rank == 1:
        Exchange.sum_ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def exit_in_step(trainer: L.Trainer, batch: Any, number: int) -> None:
    if number == 2 and trainer.global_rank == 1:
        os._exit(3)


def raise_in_step(trainer: L.Trainer, batch: Any, number: int) -> None:
    """Something that one rank can't capture."""
    if number == 2 and trainer.global_rank == 1:
        batch[1][0] = 99  # no class


def hang_in_step(trainer: L.Trainer, batch: Any, number: int) -> None:
    if number == 2 and trainer.global_rank == 1:
        time.sleep(1000)


SECONDS = 3
FAULTS = {"die": die_in_step, "exit": exit_in_step, "raise": raise_in_step, "hang": hang_in_step}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("die", "SIGKILL|Connection closed|reset by peer"),
        ("exit", "exit code 3|Connection closed|reset by peer"),
        ("raise", "target|class"),
        ("hang", "[Tt]imed out"),
    ],
)
def test_other_ranks_end_too(fault: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises((ProcessExitedException, ProcessRaisedException), match=message):
        started(DDPStrategy(start_method="fork", timeout=timedelta(seconds=SECONDS)), FAULTS[fault])
    assert time.monotonic() - start < SECONDS + 10
    assert not multiprocessing.active_children()


def hang_in_group(trainer: L.Trainer, batch: Any, number: int) -> None:
    """One rank of each group hangs where it exchanges something with its group only."""
    if number == 2 and trainer.global_rank in (1, 3):
        alike = Exchange.sum_
        Exchange.sum_ = lambda self, x: time.sleep(1000) if self.size == 2 else alike(self, x)


def test_groups_of_ranks_have_the_timeout_of_all() -> None:
    start = time.monotonic()
    with pytest.raises((ProcessExitedException, ProcessRaisedException), match="[Tt]imed out"):
        started(
            DDPStrategy(start_method="fork", timeout=timedelta(seconds=SECONDS)),
            hang_in_group,
            lambda p: IEF(p, lr=0.5, damping=1e-3, sync=2),
            4,
        )
    assert time.monotonic() - start < SECONDS + 10
    assert not multiprocessing.active_children()


def alive(mark: str) -> list[str]:
    """Processes with this mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("launcher", "fault", "message"),
    [
        (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], "die", r"Signal 9 \(SIGKILL\)"),
        ([], "raise", "Connection closed by peer|classes"),
    ],
    ids=["torchrun", "ddp"],
)
def test_no_process_is_left_behind(
    launcher: list[str], fault: str, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    mark = f"RANKS_OF_TEST={tmp_path}"
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", __spec__.name, fault, str(tmp_path)],
        env={**os.environ, "RANKS_OF_TEST": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode != 0
    assert re.search(message, ended.stderr)
    deadline = time.monotonic() + 10
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(mark)
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]  # after two steps
    found, truth = torch.cat([x.flatten() for x in weights.values()]), fit(ief, 12, max_steps=2)[0][-1]
    assert (found - truth).norm() < 1e-12 * truth.norm()


if __name__ == "__main__":  # what the test above launches
    torch.set_default_dtype(torch.float64)
    saves = [ModelCheckpoint(sys.argv[2], save_last=True, every_n_train_steps=1)]
    fit(ief, 6, FAULTS[sys.argv[1]], 2, callbacks=saves, strategy=DDPStrategy(timeout=timedelta(seconds=60)))
