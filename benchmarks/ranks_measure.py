"""Several processes on this machine: step time and bytes beside DistributedDataParallel's SGD, and one process."""

import copy
import gc
import logging
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader

from benchmarks import contestants, workloads
from benchmarks.report import machine, markdown_table, read, write
from benchmarks.timing import seconds
from benchmarks.workloads import Batch, Instance, Workload
from lightning_ief import StepTiming
from lightning_ief.distributed import Exchange
from lightning_ief.linalg.solve import damped_solve

__all__ = ["FILE", "RANKS", "SMOKE", "WORKLOADS", "Measured", "Round", "measure", "section", "train", "work"]

FILE = "ranks.csv"
RANKS = (1, 2, 4)

_CPU = torch.device("cpu")
_ROOT = Path(__file__).resolve().parents[1]


# --- what is trained: N is that of all ranks together


def _vit_lora() -> Instance:
    from lightning_ief.tasks.vit import timm_lora

    options = {"num_classes": 10, "pretrained": False, "img_size": 96, "lora_dropout": 0.0, "train_head": True}
    net = timm_lora("vit_tiny_patch16_224", **options)
    return Instance(net, Batch((torch.randn(32, 3, 96, 96),), torch.randint(10, (32,))))


def _t5() -> Instance:
    import transformers

    shape = {"vocab_size": 2000, "d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 8}
    config = transformers.T5Config(**shape, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False)
    source, target = torch.randint(1, 2000, (32, 32)), torch.randint(1, 2000, (32, 4))
    batch = Batch((source, torch.ones_like(source), target), torch.randint(1, 2000, (32, 4)))
    return Instance(transformers.T5ForConditionalGeneration(config), batch)


_MLP = workloads.find("mlp-64")
WORKLOADS = {
    workload.name: workload
    for workload in (
        _MLP,
        Workload("vit-lora", "timm vit_tiny_patch16_224 at 96×96, LoRA with r=8, N=32", _vit_lora, _vit_lora, 4, 2),
        Workload("t5", "T5 of 2 + 2 layers of width 256, all parameters, N=32, 32 tokens in, 4 out", _t5, _t5, 3, 2),
    )
}
SMOKE = dict(workloads.SMOKE)
_SOLVED = (512, 1024, 2048, 4096)


# --- bytes


def sent_by_kernel() -> int:
    """Bytes that this process has sent through all its connections, and that arrived (Linux: TCP_INFO)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile, or no TCP
            continue
        total += struct.unpack_from("=Q", info, 120)[0]  # tcpi_bytes_acked
    return total


@contextmanager
def _counted() -> Iterator[list[Exchange]]:
    """Every `Exchange` that is made in the meantime."""
    made: list[Exchange] = []
    init = Exchange.__init__

    def remembered(self: Exchange, *args: Any) -> None:
        init(self, *args)
        made.append(self)

    with mock.patch.object(Exchange, "__init__", remembered):
        yield made


class _Bytes(Callback):
    """Reads the counters before the first timed step and after the last one, when no rank is at work."""

    def __init__(self, warmup: int, made: list[Exchange]) -> None:
        self.warmup, self.made, self.readings = warmup, made, list[tuple[int, int]]()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warmup:
            self._read(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._read(trainer)

    def _read(self, trainer: Any) -> None:
        if trainer.world_size > 1:
            dist.barrier()
        self.readings.append((sum(each.sent for each in self.made), sent_by_kernel()))


class Round(NamedTuple):
    """Some steps of one rank.

    Attributes:
        step_ms: Median time of a step.
        counted: Bytes that the package's exchanges have counted, per step.
        sent: Bytes that the kernel has sent, per step.
    """

    step_ms: float
    counted: float
    sent: float


def train(module: pl.LightningModule, batch: Batch, warmup: int, steps: int, **options: Any) -> Round:
    """Train by Lightning's Trainer on one batch again and again.

    Args:
        module: The module.
        batch: This rank's batch.
        warmup: Steps before those that count.
        steps: Steps that count.
        **options: For the Trainer.

    Returns:
        What was found.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    timing = StepTiming(skip_first=warmup, print_table=False)
    with warnings.catch_warnings(), _counted() as made:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*[Ss]kipped a ", RuntimeWarning)
        watch = _Bytes(warmup, made)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=[watch, timing],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **options,
        )
        trainer.fit(module, DataLoader([batch] * (warmup + steps), batch_size=None))
    counted, sent = ((b - a) / steps for a, b in zip(*watch.readings, strict=True))
    return Round(statistics.median(timing.compute()["step"]), counted, sent)


# --- one rank


@dataclass
class Measured:
    """One way at one workload on so many ranks.

    Attributes:
        workload: Its name.
        title: Its title.
        parameters: P, the trainable ones.
        ranks: W.
        way: ief, sgd; alone, one process with the samples of all ranks; solve N, N × N equations.
        low: First quartile of its time over that of SGD in the same round.
        ratio: Median.
        high: Third quartile.
        speedup: Median of one process's time with the same samples over its time; iEF alone.
        counted: Bytes that a rank counted, per step; mean over ranks.
        sent: Bytes that the kernel sent.
        load: Load average of the machine, these processes included.
        machine: Where.
    """

    workload: str
    title: str
    parameters: int
    ranks: int
    way: str
    low: float
    ratio: float
    high: float
    speedup: float | None
    counted: float | None
    sent: float | None
    load: float
    machine: str


def work(names: Sequence[str], rounds: int, path: Path) -> None:
    """What every rank does; rank 0 writes the rows. Called by torchrun, see `measure`.

    Args:
        names: Names of workloads.
        rounds: How often the ways take turns.
        path: Where to.
    """
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    rows: list[Measured] = []
    for name in names:
        rows += _measure((WORKLOADS | SMOKE)[name], rounds, rank, ranks)
    if rank == 0:
        write(rows, path, Measured)


def _measure(workload: Workload, rounds: int, rank: int, ranks: int) -> list[Measured]:
    instance = workload.full(_CPU)
    if instance.samples % ranks:
        raise ValueError(f"{workload.name}: {instance.samples} samples on {ranks} ranks; must be a multiple.")
    own = Batch(*(_part(x, rank, ranks) for x in instance.batch))
    found: dict[str, list[Round]] = {}
    gc.collect()
    for turn in range(rounds):
        ways = _ways(workload, instance, own, rank, ranks)
        for name, way in ways if turn % 2 == 0 else [*reversed(ways)]:
            found.setdefault(name, []).append(way())
            gc.collect()  # Trainer and module refer to each other
            if ranks > 1:
                dist.barrier()
    where, load = machine(_CPU), os.getloadavg()[0]
    common = workload.name, workload.title, instance.parameters, ranks
    return [
        Measured(*common, name, *_times(name, found), *_bytes(name, rounds_, ranks), load, where)
        for name, rounds_ in found.items()
    ]


def _part(x: Any, rank: int, ranks: int) -> Any:
    return tuple(_part(each, rank, ranks) for each in x) if isinstance(x, tuple) else x.chunk(ranks)[rank]


def _ways(
    workload: Workload, instance: Instance, own: Batch, rank: int, ranks: int
) -> list[tuple[str, Callable[[], Round]]]:
    together = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {"devices": 1}
    sizes = workload.warmup, workload.steps

    def step(name: str) -> Round:
        return train(_module(name, instance), own, *sizes, **together)

    def alone() -> Round:
        if rank > 0:  # wait for rank 0
            return Round(0.0, 0.0, 0.0)
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)
        found = train(_module("ief", instance), instance.batch, *sizes, devices=1, plugins=[LightningEnvironment()])
        torch.set_num_threads(threads)
        return found

    ways: list[tuple[str, Callable[[], Round]]] = [("sgd", lambda: step("sgd")), ("ief", lambda: step("ief"))]
    if ranks > 1:
        ways.append(("alone", alone))
    elif workload is _MLP:
        ways += [(f"solve {size}", lambda size=size: _solve(size)) for size in _SOLVED]
    return ways


def _module(name: str, instance: Instance) -> pl.LightningModule:
    return contestants.find(name).timed(copy.deepcopy(instance.net))


def _solve(size: int) -> Round:
    a = torch.randn(size, size, dtype=torch.float64)
    gram, rhs = a @ a.T + size * torch.eye(size), torch.ones(size, dtype=torch.float64)
    return Round(1e3 * seconds(_CPU, lambda: damped_solve(gram, rhs, 1e-4)), 0.0, 0.0)


def _times(way: str, found: dict[str, list[Round]]) -> tuple[float, float, float, float | None]:
    """Quartiles of the ratio to SGD, and the speed-up."""
    times = {name: np.array([each.step_ms for each in rounds]) for name, rounds in found.items()}
    low, ratio, high = np.quantile(times[way] / times["sgd"], (0.25, 0.5, 0.75)).tolist()
    together = way == "ief" and "alone" in times
    return low, ratio, high, float(np.median(times["alone"] / times["ief"])) if together else None


def _bytes(way: str, rounds: Sequence[Round], ranks: int) -> tuple[float | None, float | None]:
    """Bytes counted and sent, the median over the rounds of the mean over the ranks."""
    if ranks == 1 or way == "alone":
        return None, None
    found = torch.tensor([each[1:] for each in rounds], dtype=torch.float64)
    dist.all_reduce(found)
    counted, sent = (found / ranks).median(0).values.tolist()
    return counted, sent


# --- the command


def measure(names: Sequence[str], ranks: Sequence[int], rounds: int, report: Callable[[str], None]) -> list[Measured]:
    """Measure workloads on several numbers of processes, all of them on this machine.

    Args:
        names: Names of workloads.
        ranks: Numbers of processes.
        rounds: How often the ways take turns.
        report: Is told what is going on.

    Returns:
        The rows.

    Raises:
        RuntimeError: If a process fails.
    """
    rows: list[Measured] = []
    for number in ranks:
        report(f"{number} processes: {', '.join(names)}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
            command = ["-m", "benchmarks", "rank", f"--workloads=[{','.join(names)}]"]
            done = subprocess.run(
                [*launch, *command, f"--rounds={rounds}", f"--path={path}"],
                cwd=_ROOT,
                env={"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ},  # threads are set in `work`
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"{number} processes failed:\n{done.stderr}")
            rows += read(path, Measured)
    return rows


_TEXT = """\
## Many ranks

iEF on W processes of this machine, the samples of a batch shared among them, by `python -m benchmarks ranks`.
[Many ranks](ranks.md) says what is sent. The machine has {cores} cores; its load average, these processes included, was
{low:.0f} to {high:.0f}. What exceeds the cores waits: times are rough, and rows of more processes than cores are about
bytes. The loopback interface is faster than most networks.

* **iEF / SGD**: step time over that of SGD in DistributedDataParallel with as many processes (in one process, without
  it), in turn, each round giving one ratio; median over the rounds and quartiles.
* **speed-up**: time of one process that has all samples and all cores, over that of W.
* **MB**: sent by a rank in one step, mean over the ranks: as the package counts, and as the kernel counts what the
  connections of the process have sent (TCP_INFO); the latter for SGD, too.

{table}

{solves}On {machine}.
"""
_HEADER = ("workload", "P", "W", "iEF / SGD", "speed-up", "iEF MB, counted", "iEF MB, sent", "SGD MB, sent")
_SOLVES = """\
Solving for the coefficients, which every rank does on its own, in steps of SGD of {title} (one process):
{found}.

"""


def section(folder: Path) -> str:
    """The section of the report, from the CSV file in a folder; empty if there is none."""
    rows = read(folder / FILE, Measured)
    if not rows:
        return ""
    titles = list(dict.fromkeys(row.title for row in rows))
    sgd = {(row.title, row.ranks): row.sent for row in rows if row.way == "sgd"}
    cells = [
        [
            row.title,
            f"{row.parameters:,}",
            str(row.ranks),
            f"**{row.ratio:.2f}** ({row.low:.2f} – {row.high:.2f})",
            "–" if row.speedup is None else f"{row.speedup:.2f}",
            *(_megabytes(x) for x in (row.counted, row.sent, sgd[row.title, row.ranks])),
        ]
        for row in sorted(rows, key=lambda row: titles.index(row.title))
        if row.way == "ief"
    ]
    solved = [row for row in rows if row.way.startswith("solve ")]
    found = ", ".join(f"{row.ratio:.2g} for N = {int(row.way.split()[1]):,}" for row in solved)
    return _TEXT.format(
        cores=os.cpu_count(),
        low=min(row.load for row in rows),
        high=max(row.load for row in rows),
        table=markdown_table(_HEADER, cells),
        solves=_SOLVES.format(title=solved[0].title, found=found) if solved else "",
        machine=rows[0].machine,
    )


def _megabytes(x: float | None) -> str:
    return "–" if x is None else f"{x / 1e6:.3g}"
