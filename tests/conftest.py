"""Every test starts from the same random numbers, and leaves torch's defaults as they were."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# torch is imported by the tests: the process that deals them out to others needs none, and these wait for it.


def pytest_collection_finish() -> None:
    """Garbage collection passes by what is there before the first test: modules, which stay as long as the process.

    There are millions of such objects, and forked ranks would copy the pages of those that they look at.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)
    os.environ.pop("PL_GLOBAL_SEED", None)  # of a run in this process; ranks of later tests would start from it


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors and models are float64: the truth's precision."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def in_this_process(monkeypatch) -> list[str]:
    """Subcommands of lightning-ief run here: a process of its own takes ten seconds to start; those that were run."""
    from lightning_ief.experiments.cli import main

    done: list[str] = []

    class Process:
        """That of a run."""

        pid = 0

        def __init__(self, command, **options):
            assert command[:3] == [sys.executable, "-m", "lightning_ief"]
            main(command[3:])
            done.append(command[3])

        def wait(self):
            return 0

    def run(command, **options):
        Process(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["lightning-ief"])
    return done


@pytest.fixture
def unrendered(monkeypatch) -> None:
    """Figures are drawn, but not rendered, which takes seconds for each; their files are empty."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path: Path(path).touch())
