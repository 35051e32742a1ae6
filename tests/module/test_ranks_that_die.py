"""Ranks that die, raise or hang: the others end too."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from lightning_ief import IEF
from lightning_ief.distributed import Exchange
from tests.training.runs import fit, ief, started

pytestmark = pytest.mark.usefixtures("float64")


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
        env={**os.environ, "RANKS_OF_TEST": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
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
