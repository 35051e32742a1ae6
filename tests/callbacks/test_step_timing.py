"""StepTiming: exact numbers from a clock that the training itself advances."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import IEF, NaturalGradientMixin, StepTiming, objectives
from lightning_ief.callbacks import step_timing
from lightning_ief.capture import linearization

MS = 1e-3


class FakeTime:
    """Time passes only where it is spent."""

    now = 0.0

    def spend(self, ms: float) -> None:
        self.now += ms * MS


@pytest.fixture
def time(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(step_timing, "perf_counter", lambda: fake.now)
    return fake


class SlowSGD(torch.optim.SGD):
    def __init__(self, params, time: FakeTime, ms: float) -> None:
        super().__init__(params, lr=0.1)
        self.time, self.ms = time, ms

    def step(self, closure=None):
        loss = super().step(closure)
        self.time.spend(self.ms)
        return loss


class Automatic(L.LightningModule):
    """Each batch: forward 3 ms (and batch_idx more), zeroing 0.5, backward 5, step 2, logging 0.25."""

    def __init__(self, time: FakeTime) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.time = time

    def training_step(self, batch, batch_idx):
        self.time.spend(3 + batch_idx)
        return self.net(batch[0]).square().mean()

    def backward(self, loss):
        self.time.spend(5)
        loss.backward()

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.time.spend(0.5)
        optimizer.zero_grad()

    def validation_step(self, batch, batch_idx):
        self.time.spend(1000)

    def configure_optimizers(self):
        return SlowSGD(self.parameters(), self.time, ms=2)


class Manual(Automatic):
    """Runs a script of (phase, ms) in each batch: forward, zero_grad, backward, step (ms ignored: it takes 2), rest."""

    def __init__(self, time: FakeTime, *script: tuple[str, float]) -> None:
        super().__init__(time)
        self.automatic_optimization = False
        self.script = script

    def training_step(self, batch, batch_idx):
        for phase, ms in self.script:
            match phase:
                case "forward" | "rest":
                    self.time.spend(ms)
                    loss = self.net(batch[0]).square().mean()
                case "backward":
                    self.backward_ms = ms
                    self.manual_backward(loss)
                case "step":
                    self.optimizers().step()

    def backward(self, loss):
        self.time.spend(self.backward_ms)
        loss.backward()


class Late(Callback):
    """Time spent after StepTiming's hooks, as by a progress bar, and between batches."""

    def __init__(self, time: FakeTime) -> None:
        self.time = time

    def on_train_batch_end(self, *_) -> None:
        self.time.spend(100)


class Slow(TensorDataset):
    """Samples take 1.5 ms each, so that a batch of two takes 3."""

    def __init__(self, time: FakeTime, batches: int) -> None:
        super().__init__(torch.ones(2 * batches, 2))
        self.time = time

    def __getitem__(self, index):
        self.time.spend(1.5)
        return super().__getitem__(index)


class Transfers(Automatic):
    """Validates for 1000 ms a batch; a transfer takes 0.5."""

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.time.spend(0.5)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class Evaluates(Callback):
    """Takes 20 ms for a batch of its own before each batch, and 30 after, of which 5 are not counted as that."""

    def __init__(self, time: FakeTime) -> None:
        self.time, self.spent_seconds = time, 0.0

    def on_train_batch_start(self, *_) -> None:
        self.time.spend(20)
        self.spent_seconds += 20 * MS

    def on_train_batch_end(self, *_) -> None:
        self.time.spend(30)
        self.spent_seconds += 25 * MS


def loader(batches: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(2 * batches, 2)), batch_size=2)


def fit(
    module: L.LightningModule,
    *callbacks: Callback,
    batches: int = 3,
    max_epochs: int = 1,
    data: DataLoader | None = None,
    **options,
) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=max_epochs, callbacks=list(callbacks), **(quiet | options))
    trainer.fit(module, data or loader(batches), loader(2))
    return trainer


def logged(trainer: L.Trainer) -> dict[str, float]:
    return {
        key.removeprefix("timing/"): value.item()
        for key, value in trainer.callback_metrics.items()
        if key.startswith("timing/")
    }


def means(trainer: L.Trainer) -> dict[str, float]:
    """Of the phases of a step."""
    found = logged(trainer)
    return {key.removesuffix("_ms"): value for key, value in found.items() if key.endswith("_ms") and key != "wait_ms"}


def expected(**phases: float) -> object:
    return pytest.approx({**phases, "step": sum(phases.values())}, rel=1e-6)


def test_automatic_optimization(time):
    trainer = fit(Automatic(time), StepTiming(skip_first=0), Late(time))
    assert means(trainer) == expected(forward=4, backward=5, update=2.5)


def test_first_batches_are_left_out(time):
    trainer = fit(Automatic(time), StepTiming(), Late(time))
    assert means(trainer) == expected(forward=4.5, backward=5, update=2.5)
    trainer = fit(Automatic(time), StepTiming(skip_first=2), Late(time))
    assert means(trainer) == expected(forward=5, backward=5, update=2.5)


def test_second_epoch_has_no_first_batch_of_a_run_but_a_second_run_has(time):
    timing = StepTiming()
    assert means(fit(Automatic(time), timing, max_epochs=2)) == expected(forward=4, backward=5, update=2.5)
    assert means(fit(Automatic(time), timing)) == expected(forward=4.5, backward=5, update=2.5)


def test_gradient_accumulation(time):
    trainer = fit(Automatic(time), StepTiming(skip_first=0), Late(time), batches=4, accumulate_grad_batches=2)
    # Two batches zero the gradients, the two others step.
    assert means(trainer) == expected(forward=4.5, backward=5, update=(0.5 + 2) / 2)


def test_validation_within_the_epoch_is_not_counted(time):
    trainer = fit(Automatic(time), StepTiming(skip_first=0), batches=4, val_check_interval=2)
    assert time.now > 4.0
    assert means(trainer) == expected(forward=4.5, backward=5, update=2.5)


@pytest.mark.parametrize(
    ("script", "phases"),
    [
        pytest.param(
            [("forward", 3), ("backward", 5), ("step", 0), ("rest", 1)],
            {"forward": 3, "backward": 5, "update": 3},
            id="one",
        ),
        pytest.param(
            [("forward", 3), ("backward", 5), ("forward", 4), ("backward", 6), ("step", 0)],
            {"forward": 7, "backward": 11, "update": 2},
            id="two-backward-passes",
        ),
        pytest.param(
            [("forward", 3), ("backward", 5), ("step", 0), ("forward", 4), ("backward", 6), ("step", 0), ("rest", 1)],
            {"forward": 7, "backward": 11, "update": 5},
            id="two-steps",
        ),
        pytest.param(
            [("forward", 3), ("backward", 5), ("rest", 1)],
            {"forward": 3, "backward": 5, "update": 1},
            id="no-step",
        ),
    ],
)
def test_manual_optimization(time, script, phases):
    # Once torch has seen an SGD, its step runs the hooks too, before that of the derived class has ended.
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    trainer = fit(Manual(time, *script), StepTiming(skip_first=0), Late(time))
    assert means(trainer) == expected(**phases)


def test_batches_without_a_backward_pass_are_left_out(time):
    class Skips(Automatic):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (0, 2) else loss

    trainer = fit(Skips(time), StepTiming(skip_first=0), batches=4)
    assert means(trainer) == expected(forward=5, backward=5, update=2.5)  # batches 1 and 3
    trainer = fit(Skips(time), StepTiming(skip_first=1), batches=4)
    assert means(trainer) == expected(forward=6, backward=5, update=2.5)  # batch 1 is the one that warms up


@pytest.mark.parametrize("options", [{"batches": 1}, {"fast_dev_run": True}], ids=str)
def test_an_epoch_without_a_batch_that_counts_logs_nothing(time, options, capsys):
    assert means(fit(Automatic(time), StepTiming(), **options)) == {}
    assert "time per batch" not in capsys.readouterr().out


@pytest.mark.parametrize(("recording", "moved"), [(1.5, 1.5), (1000.0, 3.0)], ids=["usual", "more-than-the-forward"])
def test_recording_of_the_capture_counts_as_update(time, recording, moved):
    class Captures(Manual):
        capture_seconds = recording * MS

    module = Captures(time, ("forward", 3), ("backward", 5), ("step", 0))
    assert means(fit(module, StepTiming(skip_first=0))) == expected(forward=3 - moved, backward=5, update=2 + moved)


def test_cuda_events_are_waited_for_once_an_epoch(time, monkeypatch):
    waits = []

    class FakeEvent:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing
            self.at = math.nan

        def record(self) -> None:
            self.at = time.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "FakeEvent") -> float:
            assert waits, "read before the device was waited for"
            return 1e3 * (end.at - self.at)

    class OnCuda(Automatic):
        device = torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(time.now))
    monkeypatch.setattr(step_timing, "perf_counter", lambda: pytest.fail("the host's clock was read"))
    timing = StepTiming(skip_first=0)
    module = OnCuda(time)
    timing.on_train_start(
        SimpleNamespace(optimizers=[], callbacks=[], profiler=SimpleNamespace(start=1, stop=2)), module
    )
    monkeypatch.setattr(StepTiming, "on_train_start", lambda *_: None)  # nothing else shall take the device for real
    monkeypatch.setattr(OnCuda, "device", torch.device("cpu"))
    trainer = fit(module, timing, max_epochs=2)
    assert means(trainer) == expected(forward=4, backward=5, update=2.5)
    assert len(waits) == 2


def rendered(timing: StepTiming, times: dict[str, list[float]]) -> list[list[str]]:
    console = Console(record=True, width=80)
    console.print(timing.render(times, "time per batch, epoch 3"))
    text = console.export_text()
    return [[cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")] for line in text.splitlines()]


def test_table():
    times = {
        "forward": [1.0, 2.0, 6.0],
        "backward": [5.0, 5.0, 5.0],
        "update": [0.0, 3.0, 3.0],
        "step": [6.0, 10.0, 14.0],
    }
    lines = rendered(StepTiming(), times)
    assert ["time per batch, epoch 3"] in lines and ["3 batches"] in lines
    for row in (
        ["phase", "mean ms", "median ms", "share"],
        ["forward", "3.00", "2.00", "30%"],
        ["backward", "5.00", "5.00", "50%"],
        ["update", "2.00", "3.00", "20%"],
        ["step", "10.00", "10.00", "100%"],
    ):
        assert row in lines


@pytest.mark.parametrize("wanted", [True, False])
def test_one_table_is_printed_each_epoch_if_wanted(time, wanted, capsys):
    fit(Automatic(time), StepTiming(print_table=wanted), max_epochs=2)
    printed = capsys.readouterr().out
    assert [f"time per batch, epoch {epoch}" in printed for epoch in range(3)] == [wanted, wanted, False]


def test_loggers_get_the_keys(time, tmp_path):
    trainer = fit(Automatic(time), StepTiming(), logger=CSVLogger(tmp_path))
    header, row = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    logged = dict(zip(header.split(","), row.split(","), strict=True))
    assert {"timing/forward_ms", "timing/backward_ms", "timing/update_ms", "timing/step_ms"} <= set(logged)
    assert float(logged["timing/step_ms"]) == pytest.approx(12.0, rel=1e-6)
    assert means(trainer)["step"] == pytest.approx(12.0, rel=1e-6)


def test_optimizers_are_left_as_they_were(time):
    trainer = fit(Automatic(time), StepTiming())
    assert len(trainer.optimizers[0]._optimizer_step_post_hooks) == 0


def test_a_run_resumes(time, tmp_path):
    fit(Automatic(time), StepTiming()).save_checkpoint(tmp_path / "some.ckpt")
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StepTiming()],
    )
    trainer.fit(Automatic(time), loader(3), ckpt_path=tmp_path / "some.ckpt")
    assert trainer.current_epoch == 2
    assert means(trainer) == expected(forward=4.5, backward=5, update=2.5)


def test_skip_first_must_not_be_negative():
    with pytest.raises(ValueError, match=r"StepTiming\(skip_first=-1\): must be at least 0"):
        StepTiming(skip_first=-1)


@pytest.mark.parametrize("first", [True, False])
def test_waits_and_shares_of_an_epoch(time, first):
    """What another callback spends on batches of its own is in no other share, wherever it stands in the list."""
    timing, others = StepTiming(), [Evaluates(time), Late(time)]
    data = DataLoader(Slow(time, 4), batch_size=2)
    trainer = fit(
        Transfers(time), *([timing, *others] if first else [*others, timing]), data=data, val_check_interval=2
    )
    found = logged(trainer)
    # Forward 3 ms + batch_idx; the 5 ms that nobody counts, and Late's 100, are in the update where they come before.
    between = 0 if first else 105
    assert means(trainer) == expected(forward=5, backward=5, update=2.5 + between)
    assert found["wait_ms"] == pytest.approx(2 * 1.5 + 0.5)
    # Two validations of two batches, whose transfers are none of the training's; the last evaluation comes behind it.
    steps, waits, validation, evaluated = 4 * (4.5 + 5 + 2.5 + between), 4 * 3.5, 2 * 2 * 1000.5, 4 * 45
    whole = steps + waits + validation + evaluated + (4 * 105 if first else 0)
    shares = {"step": steps, "wait": waits, "validation": validation, "indicators": evaluated}
    assert found["epoch_s"] == pytest.approx(whole * MS)
    for name, spent in shares.items():
        assert found[f"{name}_share"] == pytest.approx(spent / whole), name
    assert 0 < found["own_share"] < 1


def test_its_own_cost(time, monkeypatch):
    """Readings of another clock, 1 ms apart, stand for its own time: it is what all hooks took, and begins anew."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(step_timing, "perf_counter_ns", lambda: 10**6 * next(ticks))
    hooks = []
    original = StepTiming._mark_of
    monkeypatch.setattr(StepTiming, "_mark_of", lambda self, phase: hooks.append(phase) or original(self, phase))
    trainer = fit(Automatic(time), StepTiming(), max_epochs=2, limit_val_batches=0)
    found = logged(trainer)
    marks = len([phase for phase in hooks if phase != "epoch"]) / 2 - 1  # without the end of the epoch
    waits = 3 * 4  # loading and transfer, beginning and end
    assert found["own_share"] * found["epoch_s"] == pytest.approx((marks + waits) * MS)


def test_the_profiler_is_left_as_it_was(time):
    for fails in (False, True):
        module = Automatic(time)
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[StepTiming()],
        )
        if fails:
            module.optimizer_zero_grad = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError) if fails else nullcontext():
            trainer.fit(module, loader(2))
        assert not {"start", "stop"} & vars(trainer.profiler).keys()
        assert len(trainer.optimizers[0]._optimizer_step_post_hooks) == 0


def test_without_news_of_loading_there_is_no_wait(time, monkeypatch):
    monkeypatch.setattr(step_timing, "_LOADING", ("another name",))
    found = logged(fit(Automatic(time), StepTiming()))
    assert "wait_ms" not in found and "wait_share" not in found and found["step_share"] > 0


def test_tables_of_every_nth_epoch(time, capsys):
    fit(Automatic(time), StepTiming(every_n_epochs=2), max_epochs=5)
    printed = capsys.readouterr().out
    assert [f"time per batch, epoch {epoch}" in printed for epoch in range(5)] == [False, True, False, True, False]
    with pytest.raises(ValueError, match=r"StepTiming\(every_n_epochs=0\): must be at least 1"):
        StepTiming(every_n_epochs=0)


class SlowIEF(IEF):
    time: FakeTime

    def direction(self, linearization):
        self.time.spend(4)
        return super().direction(linearization)


class Mixed(NaturalGradientMixin, L.LightningModule):
    def __init__(self, time: FakeTime) -> None:
        super().__init__()
        self.net = nn.Linear(2, 3)
        self.objective = objectives.CrossEntropy()
        self.time = time

    def unpack_batch(self, batch):
        return batch[0], torch.arange(len(batch[0])) % 3

    def forward(self, x):
        self.time.spend(3)
        return self.net(x)

    def backward(self, loss, *args, **kwargs):
        self.time.spend(5)
        super().backward(loss, *args, **kwargs)

    def configure_optimizers(self):
        optimizer = SlowIEF(self.parameters(), lr=0.1, damping=1e-2)
        optimizer.time = self.time
        return optimizer


def test_the_mixin_is_timed_with_its_recording_as_update(time, monkeypatch):
    module = Mixed(time)
    # Recording takes real time, which the fake clock does not see: say it took 1 ms of each forward pass.
    monkeypatch.setattr("lightning_ief.capture.Linearization.capture_seconds", property(lambda self: 1 * MS))
    trainer = fit(module, StepTiming(), limit_val_batches=0)
    # The first batch, left out, runs the forward pass three times: two of them measure.
    assert means(trainer) == expected(forward=2, backward=5, update=5)


def test_batches_that_are_verified_do_not_count(time, monkeypatch):
    """Of 12 batches the first one is left out, and the tenth is verified: its backward pass comes twice."""
    checked = []

    class Counts(Mixed):
        def on_train_batch_end(self, *_):
            checked.append(self.capture_checks)

    monkeypatch.setattr("lightning_ief.capture.Linearization.capture_seconds", property(lambda self: 0.0))
    verify_rows = linearization.verify_rows
    monkeypatch.setattr(linearization, "verify_rows", lambda *a, **k: time.spend(500) or verify_rows(*a, **k))
    trainer = fit(Counts(time), StepTiming(), batches=12, limit_val_batches=0)
    assert [number for number, was in enumerate(checked, 1) if was] == [1, 10]
    assert means(trainer) == expected(forward=3, backward=5, update=4)
