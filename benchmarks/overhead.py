"""What the host does in a step: operations that it calls, looks at the device, and time where arithmetic is nothing."""

import copy
import gc
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import workloads
from benchmarks.report import machine, markdown_table, milliseconds, read
from benchmarks.timing import fit, seconds
from benchmarks.workloads import Batch, Instance
from lightning_ief import IEF, SampledFisher, StepTiming, linearize
from lightning_ief.objectives import CrossEntropy
from lightning_ief.optim import DirectionOptimizer
from lightning_ief.tasks import MLP, Classifier, DigitsDataModule

__all__ = [
    "FILE",
    "QUICKSTART",
    "WAYS",
    "Counts",
    "Dispatched",
    "Overhead",
    "count",
    "count_operations",
    "measure",
    "section",
]

FILE = "overhead.csv"
QUICKSTART = "quickstart"
WAYS = {"sgd": "SGD", "ief": "iEF", "sampled_fisher": "F̂(1)"}

Step = Callable[[bool | None], None]
"""A training step; its argument is that of `linearize(verify=)`."""

_LR = 1e-5  # nothing is to change in the course of many steps
_WARMUP = 3  # the first batches are measured and verified
_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml"
_RECIPE_STEPS, _RECIPE_WARMUP, _ROUNDS_A_RUN = 40, 12, 10

_TEXT = """\
## Overhead

What a step costs where its arithmetic is nothing: the host's time, which on a GPU is that of almost every fine-tuning.
Networks of real depth and tiny width, in a loop without Trainer, in the steady state (batches that are not verified),
on {machine}.

* **operations**: those that torch dispatches in a step, views among them, from zeroing the gradients to the update.
  They are exact and the same on every run; a test holds those of iEF.
* **looks**: operations that would have the host wait for a device. The objective's look at the range of targets, made
  on CPUs alone, is not among them.
* **time / SGD**: host time of a step over that of SGD's; they take turns, each turn giving one ratio; median over the
  turns and quartiles.

{table}
"""
_HEADER = ("model", "trainable tensors", "step", "operations", "/ SGD", "looks", "ms", "time / SGD")


@dataclass
class Overhead:
    """One kind of step of one model.

    Attributes:
        model: Its name.
        title: Its title.
        tensors: Number of trainable tensors.
        way: A key of `WAYS`.
        operations: Dispatched in a step; None if they were not counted.
        looks: Operations among them that would have the host wait for a device.
        ms: Median time of a step.
        low: First quartile of that over SGD's in the same turn.
        ratio: Median.
        high: Third quartile.
        machine: Where.
    """

    model: str
    title: str
    tensors: int
    way: str
    operations: int | None
    looks: int | None
    ms: float
    low: float
    ratio: float
    high: float
    machine: str


# --- counts


class Counts(NamedTuple):
    """What was dispatched in a step, and how much of it would have the host wait for a device."""

    operations: int
    looks: int


_ATEN = torch.ops.aten
_LOOKS = {
    _ATEN._linalg_check_errors,
    _ATEN._local_scalar_dense,
    _ATEN._unique2,
    _ATEN.equal,
    _ATEN.is_nonzero,
    _ATEN.masked_select,
    _ATEN.nonzero,
    _ATEN.unique_consecutive,
    _ATEN.unique_dim,
}


class Dispatched(TorchDispatchMode):
    """Counts the operations that torch dispatches, those of backward passes too.

    Attributes:
        operations: How often each was called, by name.
        looks: How often something would have waited for a device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.looks = 0
        self._on_cpu_alone = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(func)] += 1
        if not self._on_cpu_alone and (func.overloadpacket in _LOOKS or _selects_by_mask(func, args)):
            self.looks += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count; what torch does not dispatch on a CPU is counted by the methods that are called."""
        validate = CrossEntropy.validate

        def unwatched(*args: Any) -> None:
            self._on_cpu_alone = True
            try:
                validate(*args)
            finally:
                self._on_cpu_alone = False

        def watched(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.looks += 1
                return method(*args, **kwargs)

            return call

        patches = [mock.patch.object(CrossEntropy, "validate", unwatched)]
        patches += [mock.patch.object(Tensor, name, watched(getattr(Tensor, name))) for name in ("tolist", "numpy")]
        for patch in patches:
            patch.start()
        try:
            with self:
                yield
        finally:
            for patch in patches:
                patch.stop()


def _selects_by_mask(func: Any, args: Any) -> bool:
    """Whether the size of the result depends on values."""
    if func.overloadpacket is not _ATEN.index:
        return func is _ATEN.repeat_interleave.Tensor
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def count(model: str, ways: Sequence[str] = tuple(WAYS), device: torch.device | None = None) -> dict[str, Counts]:
    """Count what a step dispatches in the steady state.

    Args:
        model: A key of `workloads.OVERHEAD`.
        ways: Keys of `WAYS`.
        device: Where; on the CPU if None.

    Returns:
        The counts, for each way.
    """
    instance = workloads.OVERHEAD[model].full(device or torch.device("cpu"))
    return {way: _counted(_warm(way, instance)) for way in ways}


def count_operations(model: str, ways: Sequence[str] = tuple(WAYS)) -> dict[str, int]:
    """The dispatched operations of `count`."""
    return {way: found.operations for way, found in count(model, ways).items()}


def _counted(step: Step) -> Counts:
    dispatched = Dispatched()
    with dispatched.watching():
        step(False)
    return Counts(dispatched.operations.total(), dispatched.looks)


# --- steps


def _trainable(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def _warm(way: str, instance: Instance) -> Step:
    """A step on a copy of the network, after the first few of them."""
    step = _step(way, Instance(copy.deepcopy(instance.net), instance.batch))
    for _ in range(_WARMUP):
        step(None)
    return step


def _step(way: str, instance: Instance) -> Step:
    if way == "sgd":
        return _sgd_step(instance)
    optimizers: dict[str, Callable[..., DirectionOptimizer]] = {
        "ief": partial(IEF, damping=1e-4),
        "sampled_fisher": partial(SampledFisher, damping=1.0, num_samples=1),
    }
    optimizer, objective = optimizers[way](_trainable(instance.net), lr=_LR), CrossEntropy()

    def step(verify: bool | None) -> None:
        batch = instance.batch
        optimizer.step(linearization=linearize(instance.net, batch.inputs, batch.targets, objective, verify=verify))
        if optimizer.skipped:
            raise RuntimeError(f"{WAYS[way]} skipped a step: {optimizer.skipped}")

    return step


def _sgd_step(instance: Instance) -> Step:
    optimizer = torch.optim.SGD(_trainable(instance.net), lr=_LR)

    def step(_: bool | None) -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = instance.net(*instance.batch.inputs)
        cross_entropy(logits.flatten(0, -2), instance.batch.targets.flatten()).backward()
        optimizer.step()

    return step


# --- time


def measure(models: Sequence[str], rounds: int, device: torch.device, report: Callable[[str], None]) -> list[Overhead]:
    """Count and time steps.

    Args:
        models: Keys of `workloads.OVERHEAD`, or `QUICKSTART`.
        rounds: How often the ways take turns; a tenth of it with the Trainer, where a turn is many steps.
        device: Where.
        report: Is told what is going on.

    Returns:
        A row for each model and way.
    """
    rows = []
    for model in models:
        report(f"overhead: {model}")
        rows += _through_trainer(rounds, device) if model == QUICKSTART else _in_a_loop(model, rounds, device)
    return rows


def _in_a_loop(model: str, rounds: int, device: torch.device) -> list[Overhead]:
    workload = workloads.OVERHEAD[model]
    instance = workload.full(device)
    steps = {way: _warm(way, instance) for way in WAYS}
    counts = {way: _counted(step) for way, step in steps.items()}
    times = _in_turn({way: partial(_timed, step, device) for way, step in steps.items()}, rounds)
    tensors = len(_trainable(instance.net))
    return [
        Overhead(model, workload.title, tensors, way, *counts[way], *_times(times, way), machine(device))
        for way in WAYS
    ]


def _timed(step: Step, device: torch.device) -> float:
    return seconds(device, lambda: step(False))


def _through_trainer(rounds: int, device: torch.device) -> list[Overhead]:
    recipe = yaml.safe_load(_RECIPE.read_text())
    options, data = recipe["model"]["init_args"], DigitsDataModule(**recipe["data"]["init_args"])
    widths = options["net"]["init_args"]["widths"]
    data.setup("fit")
    images, classes = next(iter(data.train_dataloader()))
    batch = Batch((images.to(device),), classes.to(device))
    optimizers = {
        "sgd": partial(torch.optim.SGD, lr=_LR),
        "ief": partial(IEF, **options["optimizer"]["init_args"] | {"lr": _LR}),
    }

    def run(way: str) -> float:
        torch.manual_seed(0)
        module = Classifier(MLP(widths), optimizers[way], options["num_classes"])
        timing = StepTiming(skip_first=_RECIPE_WARMUP, print_table=False)
        fit(module, batch, _RECIPE_WARMUP + _RECIPE_STEPS, callbacks=[timing])
        gc.collect()  # Trainer and module refer to each other
        return statistics.median(timing.compute()["step"]) / 1e3

    times = _in_turn({way: partial(run, way) for way in optimizers}, max(1, rounds // _ROUNDS_A_RUN))
    title, tensors = "quickstart's step through the Trainer", 2 * (len(widths) - 1)
    return [
        Overhead(QUICKSTART, title, tensors, way, None, None, *_times(times, way), machine(device)) for way in times
    ]


def _in_turn(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {way: [] for way in ways}
    gc.collect()
    gc.freeze()  # collections that come during a step need not look through all modules
    for _ in range(rounds):
        for way, run in ways.items():
            times[way].append(run())
    gc.unfreeze()
    return times


def _times(times: dict[str, list[float]], way: str) -> tuple[float, float, float, float]:
    """Median milliseconds, and quartiles of the ratio to SGD."""
    ratios = np.array(times[way]) / np.array(times["sgd"])
    low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return 1e3 * statistics.median(times[way]), low, ratio, high


# --- report


def section(folder: Path) -> str:
    """The section of the report, from the CSV file in a folder; empty if there is none."""
    rows = read(folder / FILE, Overhead)
    if not rows:
        return ""
    return _TEXT.format(machine=rows[0].machine, table=markdown_table(_HEADER, _cells(rows)))


def _cells(rows: Sequence[Overhead]) -> list[list[str]]:
    base = {row.model: row.operations for row in rows if row.way == "sgd"}
    return [
        [
            *([row.title, str(row.tensors)] if row.way == "sgd" else ["", ""]),
            WAYS[row.way],
            "–" if row.operations is None else f"{row.operations:,}",
            "–" if row.operations is None or row.way == "sgd" else f"**{row.operations / base[row.model]:.2f}**",
            "–" if row.looks is None else str(row.looks),
            milliseconds(row.ms),
            "–" if row.way == "sgd" else f"**{row.ratio:.2f}** ({row.low:.2f} – {row.high:.2f})",
        ]
        for row in rows
    ]
