"""The comparison of optimizers: one recipe, several optimizers, learning rates and seeds, as a table."""

import csv
import hashlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from statistics import fmean, stdev
from threading import Event, Lock, current_thread, main_thread
from typing import IO, Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_ief.experiments.tables import Series, lock, read_metrics, read_table, update_table

__all__ = ["Outcome", "chosen", "compare", "spread", "summarize"]

TABLE = "comparison.csv"
_LR = ("model", "init_args", "optimizer", "init_args", "lr")
_LOSS = "train/loss"
_PATIENCE = 20.0  # seconds that an interrupted run has to end


@dataclass(frozen=True)
class Outcome:
    """A row of the table: a finished run.

    Attributes:
        optimizer: Its name.
        lr: Learning rate.
        seed: Seed of the run.
        metric: Name of the validation metric.
        best: Its best value over the epochs.
        epoch: The epoch of that value, counted from 0.
        train_loss: Mean training loss of the last epoch.
        run: Folder of the run.
        settings: Digest of recipe and options; rows with another one are of another comparison.

    """

    optimizer: str
    lr: float
    seed: int
    metric: str
    best: float
    epoch: int
    train_loss: float
    run: str
    settings: str


@dataclass(frozen=True)
class _Run:
    """A run to be done."""

    optimizer: str
    lr: float
    seed: int
    arguments: tuple[str, ...]
    folder: Path
    settings: str


def compare(
    config: Path,
    optimizers: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    lr_factors: Sequence[float] = (1.0,),
    directory: Path = Path("runs/comparison"),
    metric: str = "val/accuracy",
    minimize: bool = False,
    devices: Sequence[int | str] = (),
    options: Sequence[str] = (),
) -> list[Outcome]:
    """Train a recipe with several optimizers and seeds; prints and saves the table of the best validation metric.

    Each run is a process of its own, `lightning-ief fit`, that logs to a folder of its own in `directory`, its output
    in output.log there. With several factors, each optimizer's learning rate is searched first: the same factors for
    all, with the first seed; the best by the metric is repeated with the other seeds. Finished runs are not done again,
    one that was interrupted goes on from its checkpoint last.ckpt if the recipe writes one. A run that fails leaves the
    others alone, and is tried anew next time. Several comparisons may share a directory, even at the same time.

    Args:
        config: The recipe.
        optimizers: What differs: YAML files, or names of such in the folder that is called as the recipe is, without
            suffix; each gives at least the model's optimizer. A name without file is the recipe as it is.
        seeds: Seeds of the run (`seed_everything`): weights, dropout. A data module with a seed of its own, as those
            of this package, has the same order of the data in all runs.
        lr_factors: The learning rates to search, as multiples of that in each file.
        directory: Folder of the runs; comparison.csv there holds a row for each.
        metric: The validation metric that is compared.
        minimize: Whether smaller is better.
        devices: Names of GPUs, as CUDA_VISIBLE_DEVICES takes them: so many runs at once, one on each. One after the
            other if there are none.
        options: Further options of fit, such as --trainer.max_epochs=3: for all runs alike.

    Returns:
        A row for each finished run, those of the search included.

    Raises:
        MisconfigurationException: If an option is wrong, or a run failed.

    """
    if not optimizers or not seeds or not lr_factors or min(lr_factors) <= 0:
        raise MisconfigurationException("compare needs an optimizer, a seed, and factors above 0.")
    for name, given in (("optimizers", optimizers), ("seeds", seeds), ("lr_factors", lr_factors)):
        if len({*given}) < len(given):
            raise MisconfigurationException(f"compare(--{name}={[*given]}): one stands there twice.")
    variants = {Path(name).stem: _variant(config, name) for name in optimizers}
    if len(variants) < len(optimizers):
        raise MisconfigurationException(f"compare: several of {[*optimizers]} have the same name.")

    def planned(name: str, lr: float, seed: int) -> _Run:
        # Factors are round numbers, their products with a learning rate often are not.
        return _run(config, variants[name], name, float(f"{lr:.12g}"), seed, directory, options)

    base = {name: _learning_rate(config, variants[name]) for name in variants}
    search = [planned(name, base[name] * factor, seeds[0]) for name in variants for factor in lr_factors]
    total = len(search) + len(variants) * (len(seeds) - 1)
    with _progress() as progress:
        task = progress.add_task("", total=total)
        runner = _Runner(progress, task, directory, metric, minimize, devices)
        found = runner.do(search)
        best = {name: _best([o for o in found if o.optimizer == name], minimize) for name in variants}
        found += runner.do([planned(name, o.lr, seed) for name, o in best.items() if o for seed in seeds[1:]])
    Console().print(summarize(found, minimize))
    if runner.failed:
        raise MisconfigurationException(
            f"{len(runner.failed)} of {total} runs failed; what they printed: "
            f"{', '.join(str(run.folder / 'output.log') for run in runner.failed)}. The others are kept."
        )
    return found


def summarize(outcomes: Iterable[Outcome], minimize: bool = False) -> Table:
    """The table of the comparison: each optimizer at its best learning rate.

    Args:
        outcomes: Rows of finished runs.
        minimize: Whether a smaller metric is better.

    Returns:
        Best validation metric and final training loss, mean ± standard deviation over seeds.

    """
    outcomes = list(outcomes)
    metric = outcomes[0].metric if outcomes else "metric"
    table = Table("optimizer", title="Mean ± standard deviation over the seeds")
    for name in ("lr", "searched", f"best {metric}", "final train/loss", "runs"):
        table.add_column(name, justify="right")
    for name, rows in chosen(outcomes, minimize).items():
        tried = sorted({o.lr for o in outcomes if o.optimizer == name})
        table.add_row(
            name, f"{rows[0].lr:g}", ", ".join(f"{lr:g}" for lr in tried),
            spread([o.best for o in rows]), spread([o.train_loss for o in rows]), str(len(rows)),
        )  # fmt: skip
    return table


def chosen(outcomes: Iterable[Outcome], minimize: bool = False) -> dict[str, list[Outcome]]:
    """The rows of each optimizer at the learning rate that the first seed found best, as `compare` goes about it.

    Args:
        outcomes: Rows of finished runs, in the order of `compare`.
        minimize: Whether a smaller metric is better.

    Returns:
        Rows by optimizer.

    """
    found: dict[str, list[Outcome]] = {}
    outcomes = list(outcomes)
    for name in dict.fromkeys(o.optimizer for o in outcomes):
        mine = [o for o in outcomes if o.optimizer == name]
        best = _best([o for o in mine if o.seed == mine[0].seed], minimize)
        assert best is not None
        found[name] = [o for o in mine if o.lr == best.lr]
    return found


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation.

    Args:
        values: At least one.
        digits: Digits behind the point.

    Returns:
        The mean alone for a single value, and where it is not finite.

    """
    mean = fmean(values)
    if len(values) < 2 or not math.isfinite(mean):  # as of runs that diverged
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {stdev(values):.{digits}f}"


class _Runner:
    """Does runs, each in a process of its own, and keeps the table.

    Threads of the standard library wait for the processes: pools of processes (joblib, concurrent.futures) would do
    several runs in one process, which sees its devices once and for all, and whose crash ends the pool.
    """

    def __init__(
        self, progress: Progress, task: Any, directory: Path, metric: str, minimize: bool, devices: Sequence[int | str]
    ) -> None:
        self.progress = progress
        self.task = task
        self.path = directory / TABLE
        self.metric = metric
        self.minimize = minimize
        self.failed: list[_Run] = []
        self._starting = Lock()
        self._stopping = Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._free: Queue[str] = Queue()
        for device in devices or [""]:
            self._free.put(str(device))

    def do(self, runs: Sequence[_Run]) -> list[Outcome]:
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

    def _known(self, run: _Run) -> Outcome | None:
        """The row of a finished run. Read anew each time: others may write to the same table."""
        known = next((o for o in read_table(self.path, Outcome) if _key(o) == _key(run)), None)
        marked = run.folder / "settings"
        begun = marked.is_file() and (run.folder / "checkpoints" / "last.ckpt").is_file()
        settings = known.settings if known else marked.read_text() if begun else run.settings
        if settings != run.settings or (known and known.metric != self.metric):
            raise MisconfigurationException(
                f"{run.folder} is a run of another recipe or with other options. Name another --directory."
            )
        return known and replace(known, run=str(run.folder))  # whatever the directory was called then

    def _one(self, run: _Run) -> Outcome | None:
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
            found = f"failed, see {run.folder / 'output.log'}" if outcome is None else f"{self.metric} {outcome.best:g}"
            self._say(f"{name}: {found}")
        self.progress.advance(self.task)
        return outcome

    @contextmanager
    def _alone(self, run: _Run, name: str) -> Iterator[IO[str]]:
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

    def _train(self, run: _Run, environment: dict[str, str], held: IO[str]) -> Outcome | None:
        marked = run.folder / "settings"
        if not marked.is_file():
            marked.write_text(run.settings)
        elif marked.read_text() != run.settings:  # of an attempt that got nowhere
            for metrics in run.folder.glob("metrics*.csv"):
                metrics.unlink()
            marked.write_text(run.settings)
        checkpoint = run.folder / "checkpoints" / "last.ckpt"
        arguments = [*run.arguments, *([f"--ckpt_path={checkpoint}"] if checkpoint.is_file() else [])]
        _keep_metrics(run.folder)
        with (run.folder / "output.log").open("a") as log:
            code = self._wait_for([sys.executable, "-m", "lightning_ief", *arguments], log, environment, held)
        _join_metrics(run.folder)
        series = read_metrics(run.folder / "metrics.csv") if (run.folder / "metrics.csv").is_file() else {}
        if code != 0 or self.metric not in series:
            if code == 0:
                with (run.folder / "output.log").open("a") as log:
                    log.write(f"The run logged no {self.metric}; it logged {[*series]}.\n")
            self.failed.append(run)
            return None
        best, epoch = self._best_epoch(series[self.metric], series["epoch"])
        # A test after training is logged as one more epoch.
        tested = {step for name, (steps, _) in series.items() if name.startswith("test/") for step in steps}
        losses = _of_last_epoch(series[_LOSS], series["epoch"], tested) if _LOSS in series else [math.nan]
        return Outcome(
            run.optimizer, run.lr, run.seed, self.metric, best, epoch, fmean(losses), str(run.folder), run.settings
        )

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

    def _best_epoch(self, series: Series, epochs: Series) -> tuple[float, int]:
        steps, values = series
        best = min(values) if self.minimize else max(values)
        return best, int(dict(zip(*epochs, strict=True))[steps[values.index(best)]])


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


def _key(of: Outcome | _Run) -> tuple[str, float, int]:
    """What tells the runs of a directory apart, as their folders do; however the directory is spelled."""
    return of.optimizer, of.lr, of.seed


def _best(outcomes: Sequence[Outcome], minimize: bool) -> Outcome | None:
    pick: Callable[..., Outcome] = min if minimize else max
    return pick(outcomes, key=lambda o: o.best) if outcomes else None


def _of_last_epoch(values: Series, epochs: Series, tested: Collection[int] = ()) -> list[float]:
    epoch_of = dict(zip(*epochs, strict=True))
    last = max(epoch for step, epoch in epoch_of.items() if step not in tested)
    # Values that are not finite are not in a series: without any, the run has diverged.
    return [value for step, value in zip(*values, strict=True) if epoch_of[step] == last] or [math.nan]


def _progress() -> Progress:
    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=Console(stderr=True))


# --- a run's arguments


def _variant(config: Path, name: str) -> Path | None:
    """The file that says what an optimizer changes in the recipe; None for the recipe as it is."""
    if not config.is_file():
        raise MisconfigurationException(f"compare: there is no recipe {config}.")
    folder = config.with_suffix("")
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise MisconfigurationException(f"compare: there is no {name}.")
        return Path(name)
    if (file := folder / f"{name}.yaml").is_file():
        return file
    optimizer = _read(config, ("model", "init_args", "optimizer", "class_path"))
    if str(optimizer).rpartition(".")[2].lower() == name.lower():
        return None
    known = [path.stem for path in sorted(folder.glob("*.yaml"))]
    raise MisconfigurationException(
        f"compare: '{name}' is neither the recipe's own optimizer ({optimizer}) nor one of {folder}/: {known}."
    )


def _learning_rate(config: Path, variant: Path | None) -> float:
    found = _read(variant or config, _LR)
    if found is None:
        raise MisconfigurationException(f"compare: {variant or config} gives no {'.'.join(_LR)}.")
    return float(found)


def _read(path: Path, keys: Sequence[str]) -> Any:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _run(
    config: Path, variant: Path | None, name: str, lr: float, seed: int, directory: Path, options: Sequence[str]
) -> _Run:
    files = [config] if variant is None else [config, variant]
    digest = hashlib.sha256(b"\0".join([*(file.read_bytes() for file in files), *map(str.encode, options)]))
    version = f"lr_{lr:.12g}_seed_{seed}"
    logger = "lightning.pytorch.loggers.CSVLogger"
    return _Run(
        name, lr, seed,
        ("fit", *(f"--config={file}" for file in files), f"--seed_everything={seed}", f"--{'.'.join(_LR)}={lr!r}",
         f"--trainer.logger={logger}", f"--trainer.logger.save_dir={directory}", f"--trainer.logger.name={name}",
         f"--trainer.logger.version={version}", *options),
        directory / name / version, digest.hexdigest()[:16],
    )  # fmt: skip


# --- metrics of a run that was interrupted: CSVLogger removes an earlier file


def _keep_metrics(folder: Path) -> None:
    if (folder / "metrics.csv").is_file():
        number = len([*folder.glob("metrics.*.csv")])
        (folder / "metrics.csv").rename(folder / f"metrics.{number}.csv")


def _join_metrics(folder: Path) -> None:
    """One file of all parts: what a later part logged again replaces what an earlier one logged."""
    earlier = sorted(folder.glob("metrics.*.csv"), key=lambda path: int(path.suffixes[0][1:]))
    if not earlier:
        return
    parts = [*earlier, *folder.glob("metrics.csv")]  # a run with nothing left to do writes none
    rows: list[dict[str, str]] = []
    for part in parts:
        with part.open(newline="") as file:
            read = list(csv.DictReader(file))
        if read:
            first = int(read[0]["step"])
            again = set().union(*(_logged(row) for row in read if int(row["step"]) == first))
            rows = [
                row for row in rows
                if int(row["step"]) < first or (int(row["step"]) == first and not again & _logged(row))
            ] + read  # fmt: skip
    whole = folder / "metrics.part"
    with whole.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*dict.fromkeys(name for row in rows for name in row)])
        writer.writeheader()
        writer.writerows(rows)
    whole.replace(folder / "metrics.csv")
    for part in parts:
        if part.name != "metrics.csv":
            part.unlink()


def _logged(row: dict[str, str]) -> set[str]:
    """Keys that a row has values of."""
    return {name for name, value in row.items() if value} - {"step", "epoch"}
