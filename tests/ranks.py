"""Several ranks within one test: forked processes that share what the test has built so far."""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60  # after which ranks that wait for one another are given up


def on_ranks(size: int, function: Callable[[int], Any]) -> list[Any]:
    """Run a function on so many ranks of a gloo group; returns what it returned on each, raises what it raised on one.

    Forked, which takes a fraction of a second; so the test's process must not run anything on several threads.
    """
    context = multiprocessing.get_context("fork")
    with TemporaryDirectory() as folder:
        processes = [context.Process(target=_work, args=(Path(folder), r, size, function)) for r in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
        stuck = [r for r, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        found = [
            pickle.loads(path.read_bytes()) if (path := Path(folder, str(r))).exists() else (None, "nothing")
            for r in range(size)
        ]
    problems = [f"rank {r}: {problem}" for r, (_, problem) in enumerate(found) if problem]
    if stuck or problems:
        raise AssertionError(f"ranks {stuck} did not end; " + "\n".join(problems))
    return [result for result, _ in found]


def _work(folder: Path, rank: int, size: int, function: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    result, problem = None, ""
    try:
        # What torchrun would set: a Trainer with strategy="ddp" finds itself launched.
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(size), RANK=str(rank))
        os.environ.update(LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        result = function(rank)
        dist.barrier()
    except BaseException:
        problem = traceback.format_exc()
    Path(folder, str(rank)).write_bytes(pickle.dumps((result, problem)))
    os._exit(0)  # nothing of the test's process is cleaned up twice
