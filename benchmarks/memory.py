"""Memory of training beyond that of model and batch, each contestant in a fresh process."""

import gc
import json
import os
import re
import resource
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import torch

from benchmarks import contestants, workloads
from benchmarks.timing import fit
from benchmarks.workloads import Instance

__all__ = ["available", "dense_bytes", "measure_here", "peak_mib", "too_large"]

_ROOT = Path(__file__).resolve().parents[1]

# The C library keeps freed memory for later, and how much is its own affair. With these it gives arrays back at once,
# so that the resident memory is what is alive.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def available(device: torch.device) -> int:
    """Free bytes of the machine, or of the GPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def dense_bytes(instance: Instance) -> int:
    """Size of J in the network's precision."""
    return instance.samples * instance.parameters * next(instance.net.parameters()).element_size()


def too_large(instance: Instance, device: torch.device) -> str | None:
    """Say why no dense contestant should be tried, if so: peers need about twice J."""
    size = dense_bytes(instance)
    return f"left out: N×P = {size / 1e9:.1f} GB" if 2 * size > available(device) else None


def peak_mib(workload: str, contestant: str, device: torch.device, steps: int = 3) -> float:
    """Peak of a contestant's first steps above model and batch in MiB, from a fresh process.

    Raises:
        RuntimeError: If the process fails.
    """
    command = [sys.executable, "-m", "benchmarks", "peak", "--workload", workload, "--contestant", contestant]
    done = subprocess.run(
        [*command, "--device", device.type, "--steps", str(steps), "--threads", str(torch.get_num_threads())],
        cwd=_ROOT,
        env={**os.environ, **MALLOC},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(last[0])
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def measure_here(workload: str, contestant: str, device: torch.device, steps: int, verify: bool = False) -> float:
    """What `peak_mib` runs in the fresh process; with `verify` of first batches, which are verified."""
    timed = partial(contestants.find(contestant).timed, verify=verify)
    # Whatever is loaded and set up at the first step of a process is loaded and set up on a tiny model.
    tiny = next(iter(workloads.SMOKE.values())).full(device)
    fit(timed(tiny.net), tiny.batch, steps)
    instance = workloads.find(workload).full(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        with suppress(
            OSError
        ):  # Linux: let the high-water mark start anew, since making the weights may have raised it
            Path("/proc/self/clear_refs").write_text("5")
        before = psutil.Process().memory_info().rss
    fit(timed(instance.net), instance.batch, steps)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _high_water()
    return max(0, peak - before) / 2**20


def _high_water() -> int:
    """Largest resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would start from the parent's
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
