"""What γ costs, in forward passes without gradients, beside forward-mode derivatives and the paper's recipe."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.report import machine, markdown_table, read
from benchmarks.timing import seconds
from benchmarks.workloads import Instance, Workload
from lightning_ief import gamma, linearize
from lightning_ief.capture import Linearization
from lightning_ief.objectives import CrossEntropy

__all__ = ["FILE", "WORKLOADS", "Cost", "measure", "section"]

FILE = "gamma.csv"
WORKLOADS = ("mlp-256", "vit-tiny-224", "t5-lora")

_FOUR = 4
_OBJECTIVE = CrossEntropy()

_TEXT = """\
## The cost of γ

Time for γ(d) = √(dᵀFd) / |dᵀ∇L| of random directions d of all trainable parameters, in forward passes without
gradients on the same batch, which take their turn in each round. Before anything is timed, all ways must give the same
γ to {tolerance:g}.

* *one*, *four*: γ of one direction and of four, the forward pass that records the graph included; *each further*: what
  a direction more costs on a batch that has been linearised, as in an evaluation of several directions.
* *forward mode*: the forward pass by `torch.func.jvp`, for one direction.
* *paper's recipe*: Fd formed by a forward pass, two backward passes for (∂z/∂θ) d and one back, and one for ∇L.

{table}
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
    """

    workload: str
    title: str
    way: str
    low: float
    forwards: float
    high: float
    machine: str


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
    report(f"{workload.name}: γ, checking")
    values = [_ours(instance, directions[:1]), _forward_mode(instance, directions[0]), _recipe(instance, directions[0])]
    if not max(values) <= (1 + _TOLERANCE) * min(values):
        raise RuntimeError(f"{workload.name}: the ways to γ disagree, {values}")
    times: dict[str, list[float]] = {
        way: [] for way in ("one", "four", "each further", "forward mode", "paper's recipe")
    }
    gc.collect()
    for turn in range(rounds):
        report(f"{workload.name}: γ, round {turn + 1} of {rounds}")
        base = min(seconds(device, lambda: _forward(instance)) for _ in range(2))
        lin = _linearize(instance)
        gamma(lin, directions[0])
        found = {
            "one": seconds(device, lambda: _ours(instance, directions[:1])),
            "four": seconds(device, lambda: _ours(instance, directions)),
            "each further": seconds(device, lambda lin=lin: gamma(lin, directions[1])),
            "forward mode": seconds(device, lambda: _forward_mode(instance, directions[0])),
            "paper's recipe": seconds(device, lambda: _recipe(instance, directions[0])),
        }
        for way, taken in found.items():
            times[way].append(taken / base)
    return [
        Cost(workload.name, workload.title, way, *np.quantile(column, (0.25, 0.5, 0.75)).tolist(), machine(device))
        for way, column in times.items()
    ]


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
        [title, *(f"**{found[way].forwards:.1f}** ({found[way].low:.1f} – {found[way].high:.1f})" for way in ways)]
        for title, found in by_title.items()
    ]
    return _TEXT.format(tolerance=_TOLERANCE, table=markdown_table(("workload", *ways), cells))


# --- the ways


def _forward(instance: Instance) -> Tensor:
    with torch.no_grad():
        return instance.net(*instance.batch.inputs)


def _linearize(instance: Instance) -> Linearization:
    with sdpa_kernel(SDPBackend.MATH):
        return linearize(instance.net, instance.batch.inputs, instance.batch.targets, _OBJECTIVE, verify=False)


def _ours(instance: Instance, directions: Sequence[Mapping[str, Tensor]]) -> float:
    lin = _linearize(instance)
    return [float(gamma(lin, d)) for d in directions][0]


def _of_parts(logits: Tensor, targets: Tensor, tangents: Tensor) -> float:
    slope = (_OBJECTIVE.gradient(logits, targets).double() * tangents.double()).sum()
    form = _OBJECTIVE.hessian_form(logits.double(), targets, tangents.double()).sum()
    return float(form.sqrt() / slope.abs())


def _forward_mode(instance: Instance, direction: Mapping[str, Tensor]) -> float:
    named = {name: p.detach() for name, p in instance.net.named_parameters() if p.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):
        logits, tangents = torch.func.jvp(
            lambda parameters: torch.func.functional_call(instance.net, parameters, instance.batch.inputs),
            (named,),
            (dict(direction),),
        )
    return _of_parts(logits, instance.batch.targets, tangents)


def _recipe(instance: Instance, direction: Mapping[str, Tensor]) -> float:
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
    return form**0.5 / abs(slope)
