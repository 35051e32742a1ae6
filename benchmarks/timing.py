"""Step times, all contestants in turn within one process, and the operations of a step."""

import copy
import gc
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks import contestants
from benchmarks.workloads import Batch, Instance, Workload
from lightning_ief import StepTiming

__all__ = ["Times", "count_flops", "fit", "flop_counter", "ratios", "reason", "seconds", "time_in_turn"]

Times = dict[str, float]
"""Median milliseconds of a round by phase: forward, backward, update, step."""

# A round of a slow contestant ends after so many seconds (not before one step is timed), and one that takes so many
# times longer than SGD needs no more than so many rounds to show it.
_SECONDS, _SLOW, _SLOW_ROUNDS = 10.0, 5.0, 3


class _Repeat:
    """One batch again and again, until there were enough steps or the time is over."""

    def __init__(self, batch: Batch, steps: int, at_least: int) -> None:
        self.batch, self.steps, self.at_least = batch, steps, at_least

    def __iter__(self) -> Iterator[Batch]:
        start = perf_counter()
        for step in range(self.steps):
            if step >= self.at_least and perf_counter() - start > _SECONDS:
                return
            yield self.batch


def fit(module: pl.LightningModule, batch: Batch, steps: int, at_least: int = 2, callbacks: Sequence[Callback] = ()):
    """Train by Lightning's Trainer, on the device where the batch is.

    A step that an optimizer skips with a warning raises: it must not be timed.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*[Ss]kipped a ", RuntimeWarning)
        trainer = pl.Trainer(
            accelerator="cpu" if batch.targets.device.type == "cpu" else "gpu",
            devices=1,
            max_epochs=1,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, _Repeat(batch, steps, at_least))


def seconds(device: torch.device, way: Callable[[], object]) -> float:
    """Time of one call; a GPU is waited for before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start


def reason(error: BaseException) -> str:
    """Why a peer fails: the error's first line."""
    lines = str(error).strip().splitlines()
    return f"fails: {lines[0] if lines else type(error).__name__}"


def time_in_turn(
    workload: Workload, names: Sequence[str], rounds: int, instance: Instance, report: Callable[[str], None]
) -> tuple[dict[str, list[Times]], dict[str, str]]:
    """Let all contestants train in turn, A B C, C B A, A B C …, each from the same weights.

    Args:
        workload: The workload.
        names: The contestants, SGD among them.
        rounds: How often.
        instance: Its network and batch; the network stays as it is.
        report: Is told what is going on.

    Returns:
        For each contestant its times, round by round, fewer for one that is slow; and why peers failed.
    """
    times: dict[str, list[Times]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    gc.collect()
    gc.freeze()  # collections that come during a step need not look through all modules
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else [*reversed(names)]:
            slow = turn >= _SLOW_ROUNDS and statistics.median(ratios(times, name)) > _SLOW
            if slow or name in failures:
                continue
            report(f"{workload.name}: round {turn + 1} of {rounds}, {name}")
            try:
                times[name].append(_time(workload, name, instance))
            except Exception as error:
                if not contestants.find(name).dense:
                    raise
                failures[name] = reason(error)
    gc.unfreeze()
    return {name: rows for name, rows in times.items() if name not in failures}, failures


def ratios(times: dict[str, list[Times]], name: str) -> list[float]:
    """Step time of a contestant over that of SGD, for each round that both took part in."""
    rounds = zip(times[name], times["sgd"], strict=False)  # who sits out does so to the end
    return [mine["step"] / base["step"] for mine, base in rounds]


def _time(workload: Workload, name: str, instance: Instance) -> Times:
    timing = StepTiming(skip_first=workload.warmup, print_table=False)
    steps = workload.warmup + workload.steps
    fit(_module(name, instance.net), instance.batch, steps, workload.warmup + 1, [timing])
    times = {phase: statistics.median(values) for phase, values in timing.compute().items()}
    gc.collect()  # Trainer and module refer to each other: free the weights before the next one's turn
    return times


def _module(name: str, net: nn.Module) -> pl.LightningModule:
    # Peers hook into the network for good, so each gets a copy.
    return contestants.find(name).timed(copy.deepcopy(net))


# --- operations

_ATEN = torch.ops.aten
_ALIKE = {  # operations that torch's table lacks, and one each that it has; what else it lacks counts for nothing
    _ATEN.addmm_: _ATEN.addmm,
    _ATEN.baddbmm_: _ATEN.baddbmm,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _ATEN._scaled_dot_product_flash_attention_backward,
}


def _formula_of(known: Any) -> Callable[..., int]:
    def formula(*args: Any, **kwargs: Any) -> int:
        return flop_registry[known](*args, **kwargs)

    formula._get_raw = True  # takes tensors, not shapes: the entries of the table see to that themselves
    return formula


def flop_counter() -> FlopCounterMode:
    """Counts the floating-point operations of matrix products, convolutions and attention."""
    return FlopCounterMode(display=False, custom_mapping={new: _formula_of(known) for new, known in _ALIKE.items()})


class _CountFlops(Callback):
    """Counts the operations of the second step: at the first one the capture looks around."""

    def __init__(self) -> None:
        self.step = 1
        self.counter = flop_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step:
            self.counter.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step:
            self.counter.__exit__(None, None, None)


def count_flops(name: str, instance: Instance) -> int:
    """Floating-point operations of a contestant's step: those of matrix products, convolutions and attention."""
    callback = _CountFlops()
    fit(_module(name, instance.net), instance.batch, 2, callbacks=[callback])
    return callback.counter.get_total_flops()
