"""All measurements of a workload, in their order: check, operations, time, memory."""

import gc
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console

from benchmarks import contestants, memory, timing
from benchmarks.check import check
from benchmarks.report import Row, machine
from benchmarks.workloads import Workload

__all__ = ["measure"]

_COUNTED = ("sgd", "ief")


def measure(
    workload: Workload, names: Sequence[str], rounds: int, with_memory: Sequence[str], device: torch.device
) -> list[Row]:
    """Measure contestants on a workload.

    Args:
        workload: The workload.
        names: The contestants, SGD first.
        rounds: How often they take turns.
        with_memory: Those whose memory is measured too.
        device: Where.

    Returns:
        A row for each contestant.
    """
    _say(f"{workload.name}: checking the updates")
    errors, failures = check(workload, names, device)
    instance = workload.full(device)
    rows = [Row(workload.name, workload.title, name, instance.samples, instance.parameters) for name in names]
    if problem := memory.too_large(instance, device):
        failures = {name: problem for name in names if contestants.find(name).dense} | failures
    flops = {name: timing.count_flops(name, instance) for name in names if name in _COUNTED}
    running = [name for name in names if name not in failures]
    times, failed = timing.time_in_turn(workload, running, rounds, instance, _say)
    del instance  # the processes below need the room
    gc.collect()
    torch.cuda.empty_cache()
    for row in rows:
        name = row.contestant
        row.machine, row.error, row.note = machine(device), errors.get(name), (failures | failed).get(name, "")
        row.gflop = flops[name] / 1e9 if name in flops else None
        if name in times:
            _enter_times(row, times)
            if name in with_memory:
                _enter_memory(row, device)
    base = rows[0].memory_mib
    for row in rows:
        row.memory_ratio = row.memory_mib / base if base and row.memory_mib is not None else None
    return rows


def _enter_times(row: Row, times: dict[str, list[timing.Times]]) -> None:
    mine, ratios = times[row.contestant], timing.ratios(times, row.contestant)
    row.rounds = len(mine)
    row.ratio_low, row.step_ratio, row.ratio_high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    for phase in ("step", "forward", "backward", "update"):
        setattr(row, f"{phase}_ms", statistics.median(each[phase] for each in mine))


def _enter_memory(row: Row, device: torch.device) -> None:
    _say(f"{row.workload}: memory, {row.contestant}")
    try:
        row.memory_mib = memory.peak_mib(row.workload, row.contestant, device)
    except RuntimeError as error:
        if not contestants.find(row.contestant).dense:
            raise
        row.note = timing.reason(error)


def _say(text: str) -> None:
    """Tell on the screen what is going on; tables go to standard output, this does not."""
    Console(stderr=True).print(text, highlight=False)
