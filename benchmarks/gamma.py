"""What γ costs, in forward passes without gradients, beside forward-mode derivatives and the paper's recipe."""

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.report import machine, markdown_table, read
from benchmarks.timing import flop_counter, seconds
from benchmarks.workloads import Instance, Workload
from lightning_ief import linearize
from lightning_ief.capture import Linearization
from lightning_ief.indicators import gammas, measure_gammas
from lightning_ief.linalg.vectors import dot
from lightning_ief.objectives import CrossEntropy

__all__ = ["FILE", "WORKLOADS", "Cost", "measure", "section"]

FILE = "gamma.csv"
WORKLOADS = ("mlp-256", "vit-tiny-224", "vit-base-96", "t5-lora")

_FOUR = 4
_OBJECTIVE = CrossEntropy()

_TEXT = """\
## The cost of γ

Time for γ(d) = √(dᵀFd) / |dᵀ∇L| of random directions d of all trainable parameters, in forward passes without
gradients on the same batch, with the kernels that torch prefers; in each round there is one before each of the ways.
Below it the floating-point operations of matrix products, convolutions and attention, in the same unit. Before anything
is timed, all ways must give the same γ to {tolerance:g}.

On {machines}.

* *one*, *four*: `measure_gammas` of one direction and of four, the batch's forward pass included. There is no graph.
* *linearised, four*: `gammas` of four directions on a batch that has been linearised, as where the directions come from
  that batch. The forward pass that made the linearization is not included; the one that γ needs is.
* *F v*: one product with F on a batch that has been linearised: what an iteration of conjugate gradients costs.
* *forward mode*: the forward pass by `torch.func.jvp`, for one direction.
* *paper's recipe*: Fd formed by a forward pass, two backward passes for (∂z/∂θ) d and one back, and one for ∇L, for one
  direction.

{table}

Products alone would be 3 forward passes for one direction and 9 for four if every layer had a trainable weight and a
changing input; a first layer's input and frozen weights do not change. The rest goes to memory: for each direction,
what a layer gives is written once more, and what it takes read.
"""
_TOLERANCE = 1e-2


@dataclass
class Cost:
    """The cost of one way at one workload.

    Attributes:
        workload: Its name.
        title: Its title.
        way: What was done.
        low: First quartile, in forward passes.
        forwards: Median.
        high: Third quartile.
        machine: Where.
        operations: Floating-point operations, over those of a forward pass; None if they were not counted.
    """

    workload: str
    title: str
    way: str
    low: float
    forwards: float
    high: float
    machine: str
    operations: float | None = None


def measure(workload: Workload, rounds: int, device: torch.device, report: Callable[[str], None]) -> list[Cost]:
    """Measure a workload.

    Args:
        workload: The workload.
        rounds: How often the ways take turns.
        device: Where.
        report: Is told what is going on.

    Returns:
        A row for each way.
    """
    instance = workload.full(device)
    instance.net.eval()
    directions = [
        {name: torch.randn_like(p) for name, p in instance.net.named_parameters() if p.requires_grad}
        for _ in range(_FOUR)
    ]
    linearization = _linearize(instance)
    ways: dict[str, Callable[[], Tensor]] = {
        "one": lambda: _measured(instance, directions[:1]),
        "four": lambda: _measured(instance, directions),
        "linearised, four": lambda: gammas(linearization, directions),
        "forward mode": lambda: _forward_mode(instance, directions[0]),
        "paper's recipe": lambda: _recipe(instance, directions[0]),
    }
    report(f"{workload.name}: γ, checking")
    values = [float(way().flatten()[0]) for way in ways.values()]
    if not max(values) <= (1 + _TOLERANCE) * min(values):
        raise RuntimeError(f"{workload.name}: the ways to γ disagree, {values}")
    ways["F v"] = lambda: dot(linearization.fisher_product(directions[0]), directions[0])
    forward = _operations(lambda: _forward(instance))
    operations = {name: _operations(way) / forward for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    gc.collect()
    for turn in range(rounds):
        report(f"{workload.name}: γ, round {turn + 1} of {rounds}")
        taken, forwards = {}, []
        for name, way in ways.items():
            forwards.append(seconds(device, lambda: _forward(instance)))
            taken[name] = seconds(device, way)
        base = statistics.median(forwards)
        for name, each in taken.items():
            times[name].append(each / base)
    return [
        Cost(workload.name, workload.title, name, *np.quantile(column, (0.25, 0.5, 0.75)).tolist(), machine(device),
             operations[name])
        for name, column in times.items()
    ]  # fmt: skip


def section(folder: Path) -> str:
    """The section of the report, from the CSV file in a folder; empty if there is none."""
    rows = read(folder / FILE, Cost)
    if not rows:
        return ""
    ways = list(dict.fromkeys(row.way for row in rows))
    by_title: dict[str, dict[str, Cost]] = {}
    for row in rows:
        by_title.setdefault(row.title, {})[row.way] = row
    cells = [
        row
        for title, found in by_title.items()
        for row in (
            [title, *(f"**{found[way].forwards:.1f}** ({found[way].low:.1f} – {found[way].high:.1f})" for way in ways)],
            ["operations", *(_digits(found[way].operations) for way in ways)],
        )
    ]
    machines = "; ".join(dict.fromkeys(row.machine for row in rows))
    return _TEXT.format(tolerance=_TOLERANCE, machines=machines, table=markdown_table(("workload", *ways), cells))


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _operations(way: Callable[[], object]) -> int:
    with flop_counter() as counter:
        way()
    return counter.get_total_flops()


# --- the ways


def _forward(instance: Instance) -> Tensor:
    with torch.no_grad():
        return instance.net(*instance.batch.inputs)


def _linearize(instance: Instance) -> Linearization:
    with sdpa_kernel(SDPBackend.MATH):
        return linearize(instance.net, instance.batch.inputs, instance.batch.targets, _OBJECTIVE, verify=False)


def _measured(instance: Instance, directions: Sequence[Mapping[str, Tensor]]) -> Tensor:
    return measure_gammas(instance.net, instance.batch.inputs, instance.batch.targets, _OBJECTIVE, directions)


def _of_parts(logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
    slope = (_OBJECTIVE.gradient(logits, targets).double() * tangents.double()).sum()
    form = _OBJECTIVE.hessian_form(logits.double(), targets, tangents.double()).sum()
    return form.sqrt() / slope.abs()


def _forward_mode(instance: Instance, direction: Mapping[str, Tensor]) -> Tensor:
    named = {name: p.detach() for name, p in instance.net.named_parameters() if p.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):
        logits, tangents = torch.func.jvp(
            lambda parameters: torch.func.functional_call(instance.net, parameters, instance.batch.inputs),
            (named,),
            (dict(direction),),
        )
    return _of_parts(logits, instance.batch.targets, tangents)


def _recipe(instance: Instance, direction: Mapping[str, Tensor]) -> Tensor:
    net, batch = instance.net, instance.batch
    names, parameters = zip(*((name, p) for name, p in net.named_parameters() if p.requires_grad), strict=True)
    along = [direction[name] for name in names]
    with sdpa_kernel(SDPBackend.MATH):
        logits = net(*batch.inputs)
        dummy = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(logits, parameters, dummy, create_graph=True, materialize_grads=True)
        (tangents,) = torch.autograd.grad(pulled, dummy, along)
        detached = logits.detach()
        product = _OBJECTIVE.hessian_product(detached, batch.targets, tangents)
        fisher = torch.autograd.grad(logits, parameters, product, retain_graph=True, materialize_grads=True)
        gradient = torch.autograd.grad(
            logits, parameters, _OBJECTIVE.gradient(detached, batch.targets), materialize_grads=True
        )
    form = sum(float((a.double() * b.double()).sum()) for a, b in zip(fisher, along, strict=True))
    slope = sum(float((a.double() * b.double()).sum()) for a, b in zip(gradient, along, strict=True))
    return torch.tensor(form**0.5 / abs(slope))
