"""The runs of a comparison: each in a process of its own, with a row in the table once it is finished."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import Queue
from threading import Event, Lock, current_thread, main_thread
from typing import IO, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.progress import Progress

from lightning_ief.experiments.outcomes import RESULT, SEARCH, Outcome, Run, read_outcome
from lightning_ief.experiments.tables import join_metrics, keep_metrics, lock, read_metrics, read_table, update_table

__all__ = ["Outcome", "Run", "Runner"]

_TABLE = "comparison.csv"
_PATIENCE = 20.0  # seconds that an interrupted run has to end


class Runner:
    """Does runs, each in a process of its own, and keeps the table.

    Threads of the standard library wait for the processes: pools of processes (joblib, concurrent.futures) would do
    several runs in one process, which sees its devices once and for all, and whose crash ends the pool.
    """

    def __init__(
        self, progress: Progress, directory: Path, metric: str, minimize: bool, devices: Sequence[int | str]
    ) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=0)
        self.expected = 0
        self.path = directory / _TABLE
        self.metric = metric
        self.minimize = minimize
        self.failed: list[Run] = []
        self._starting = Lock()
        self._stopping = Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._free: Queue[str] = Queue()
        for device in devices or [""]:
            self._free.put(str(device))

    def expect(self, runs: int) -> None:
        """Have the progress bar expect so many further runs."""
        self.expected += runs
        self.progress.update(self.task, total=self.expected)

    def do(self, runs: Sequence[Run]) -> list[Outcome]:
        """Do runs that are not done yet.

        Args:
            runs: The runs.

        Returns:
            Rows of those that are finished, in their order.

        Raises:
            MisconfigurationException: If the folder holds runs of another recipe.
            KeyboardInterrupt: When interrupted or terminated, after the processes have ended.

        """
        for run in runs:
            self._known(run)  # refuses, before anything runs
        pool = ThreadPoolExecutor(self._free.qsize())
        try:
            with _termination_interrupts():
                return [outcome for outcome in pool.map(self._one, runs) if outcome is not None]
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _stop(self) -> None:
        with self._starting:
            self._stopping.set()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()

    def require_apart(self, names: Sequence[str], search: Sequence[int], results: Sequence[int]) -> None:
        """Require, before anything runs, that no seed has had the other part before, at whatever learning rate.

        Args:
            names: The optimizers that are searched.
            search: Seeds that are to search; nothing is required if there are none.
            results: Seeds of the results.

        Raises:
            MisconfigurationException: If one has.

        """
        others = {SEARCH: results, RESULT: search} if search else {}
        for row in read_table(self.path, Outcome):
            if row.optimizer in names and row.seed in others.get(row.part, ()):
                raise MisconfigurationException(
                    f"{self.path}: seed {row.seed} was one of the {row.part} for {row.optimizer}: what has chosen is "
                    "no result. Give other seeds, or name another --directory."
                )

    def _known(self, run: Run) -> Outcome | None:
        """The row of a finished run. Read anew each time: others may write to the same table."""
        known = next((o for o in read_table(self.path, Outcome) if _key(o) == _key(run)), None)
        marked = run.folder / "settings"
        begun = marked.is_file() and (run.folder / "checkpoints" / "last.ckpt").is_file()
        settings = known.settings if known else marked.read_text() if begun else run.settings
        if settings != run.settings or (known and known.metric != self.metric):
            raise MisconfigurationException(
                f"{run.folder} is a run of another recipe or with other options. Name another --directory."
            )
        if known and known.part != run.part:
            parts = {part: f"of the {part}" + "s" * (part == RESULT) for part in (SEARCH, RESULT)}
            raise MisconfigurationException(
                f"{run.folder} is a run {parts.get(known.part, 'of a comparison without search_seeds')}: what has "
                "chosen is no result. Give other seeds, or name another --directory."
            )
        return known and replace(known, run=str(run.folder))  # whatever the directory was called then

    def _one(self, run: Run) -> Outcome | None:
        outcome = self._known(run)
        if outcome is None:
            name = f"{run.optimizer}, lr {run.lr:g}, seed {run.seed}"
            device = self._free.get()
            try:
                self.progress.update(self.task, description=name)
                with self._alone(run, name) as held:
                    # Another comparison may have finished it meanwhile.
                    outcome = self._known(run) or self._train(
                        run, {"CUDA_VISIBLE_DEVICES": device} if device else {}, held
                    )
                    if outcome is not None:
                        update_table(self.path, [outcome], Outcome, _key)
            finally:
                self._free.put(device)
            if outcome is None:
                self._say(f"{name}: failed, see {run.folder / 'output.log'}")
            else:
                value = outcome.last if outcome.part else outcome.best
                self._say(f"{name}: {self.metric} {value:g}")
        self.progress.advance(self.task)
        return outcome

    @contextmanager
    def _alone(self, run: Run, name: str) -> Iterator[IO[str]]:
        """The lock of a run's folder, which its process inherits: it may outlive this one, if this one is killed."""
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / "lock").open("a+") as file:
            said = False
            while not lock(file, wait=False):
                if not said:
                    said = True
                    file.seek(0)
                    self._say(f"{name}: waiting for process {file.read()}, which is at work in {run.folder}")
                if self._stopping.wait(0.5):
                    raise CancelledError
            yield file

    def _train(self, run: Run, environment: dict[str, str], held: IO[str]) -> Outcome | None:
        marked = run.folder / "settings"
        if not marked.is_file():
            marked.write_text(run.settings)
        elif marked.read_text() != run.settings:  # of an attempt that got nowhere
            for metrics in run.folder.glob("metrics*.csv"):
                metrics.unlink()
            marked.write_text(run.settings)
        checkpoint = run.folder / "checkpoints" / "last.ckpt"
        arguments = [*run.arguments, *([f"--ckpt_path={checkpoint}"] if checkpoint.is_file() else [])]
        keep_metrics(run.folder)
        with (run.folder / "output.log").open("a") as log:
            code = self._wait_for([sys.executable, "-m", "lightning_ief", *arguments], log, environment, held)
        join_metrics(run.folder)
        outcome = read_outcome(run, self.metric, self.minimize) if code == 0 else None
        if outcome is None:
            if code == 0:
                path = run.folder / "metrics.csv"
                logged = [*read_metrics(path)] if path.is_file() else []
                with (run.folder / "output.log").open("a") as log:
                    log.write(f"The run logged no {self.metric}; it logged {logged}.\n")
            self.failed.append(run)
        return outcome

    def _wait_for(self, command: list[str], log: IO[str], environment: dict[str, str], held: IO[str]) -> int:
        with self._starting:
            if self._stopping.is_set():
                raise CancelledError
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=() if sys.platform == "win32" else (held.fileno(),),
            )
            self._processes.append(process)
        held.truncate(0)
        held.write(str(process.pid))
        held.flush()
        code = process.wait()
        if self._stopping.is_set():
            raise CancelledError
        return code

    def _say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False)


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Have SIGTERM, by which clusters end jobs, interrupt as Ctrl-C does, unless someone handles it already."""
    ours = current_thread() is main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def interrupt(number: int, _: Any) -> None:
        raise KeyboardInterrupt(number)

    if ours:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _key(of: Outcome | Run) -> tuple[str, float, int]:
    """What tells the runs of a directory apart, as their folders do; however the directory is spelled."""
    return of.optimizer, of.lr, of.seed
