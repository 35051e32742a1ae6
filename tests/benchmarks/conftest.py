"""What the tests of the studies share."""

import subprocess
import sys

import pytest


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
