"""Results: rows of CSV files, one file for each workload, and the report that is written from them."""

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from rich.table import Table

from benchmarks.contestants import CONTESTANTS
from benchmarks.workloads import WORKLOADS
from lightning_ief.experiments.tables import read_table, write_table

__all__ = [
    "Row", "machine", "markdown_table", "milliseconds", "read", "render", "rich_markdown", "write", "write_report",
]  # fmt: skip


@dataclass
class Row:
    """What is known of a contestant on a workload; None is what was not measured. CSV files have these columns.

    Attributes:
        workload: Its name.
        title: Its title.
        contestant: Its name.
        samples: N.
        parameters: P, the trainable ones.
        error: Relative error of its iEF update in float64.
        step_ratio: Step time over that of SGD in the same round, median over rounds.
        ratio_low: First quartile.
        ratio_high: Third quartile.
        step_ms: Step time, median over rounds.
        forward_ms: Of which the forward pass.
        backward_ms: Of which backward passes.
        update_ms: Of which the update.
        rounds: Rounds that it took part in.
        memory_mib: Peak memory above model and batch.
        memory_ratio: That over SGD's.
        gflop: Counted operations of a step, in 10⁹.
        note: Why there are no numbers.
        machine: Where it was measured, and with which versions.
    """

    workload: str
    title: str
    contestant: str
    samples: int
    parameters: int
    error: float | None = None
    step_ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    step_ms: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    update_ms: float | None = None
    rounds: int = 0
    memory_mib: float | None = None
    memory_ratio: float | None = None
    gflop: float | None = None
    note: str = ""
    machine: str = ""


def machine(device: torch.device) -> str:
    """Device, cores, memory and versions, in one line."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where = f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
    else:
        where = f"CPU {_cpu()}"
    where += f", {os.cpu_count()} cores ({torch.get_num_threads()} threads), "
    where += f"{psutil.virtual_memory().total / 2**30:.0f} GiB RAM, {platform.system()}, Python "
    packages = ("torch", "lightning", "lightning-ief", "opacus", "backpack-for-pytorch", "timm", "transformers", "peft")
    return where + ", ".join([platform.python_version(), *(f"{name} {_version(name)}" for name in packages)])


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


# --- CSV

_Kind = TypeVar("_Kind")


def write(rows: Iterable[Any], path: Path, kind: type = Row) -> Path:
    """Write rows of one dataclass as CSV."""
    write_table(path, rows, kind, digits=6)
    return path


def read(path: Path, kind: type[_Kind] = Row) -> list[_Kind]:
    """Read rows of a dataclass from CSV; none if there is no file."""
    return read_table(path, kind)


# --- tables

_HEADER = ("contestant", "step / SGD", "quartiles", "forward ms", "backward ms", "update ms", "memory MiB", "/ SGD")


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [
            row.contestant,
            f"**{row.step_ratio:.2f}**",
            f"{row.ratio_low:.2f} – {row.ratio_high:.2f}",
            *map(milliseconds, (row.forward_ms, row.backward_ms, row.update_ms)),
            "–" if row.memory_mib is None else f"{row.memory_mib:.{1 if row.memory_mib < 10 else 0}f}",
            "–" if row.memory_ratio is None else f"{row.memory_ratio:.2f}",
        ]
        if row.step_ratio is not None
        else [row.contestant, row.note, *[""] * (len(_HEADER) - 2)]
        for row in rows
    ]


def _below(rows: Sequence[Row]) -> str:
    """What is to be said below a table."""
    errors = [f"{row.contestant} {row.error:.0e}" for row in rows if row.error is not None]
    parts = [f"Error of the iEF update: {', '.join(errors)}."] if errors else []
    flops = {row.contestant: row.gflop for row in rows if row.gflop}
    if {"sgd", "ief"} <= flops.keys():
        ratio = flops["ief"] / flops["sgd"]
        parts.append(f"Operations: SGD {flops['sgd']:.4g} GFLOP, iEF {flops['ief']:.4g} GFLOP ({ratio:.2f} ×).")
    parts += [f"{row.contestant}, memory: {row.note}." for row in rows if row.step_ratio is not None and row.note]
    return " ".join(parts)


def render(rows: Sequence[Row]) -> Table:
    """The table of a workload for the screen."""
    table = Table(title=f"{rows[0].workload}: {rows[0].title}", caption=_below(rows))
    for number, name in enumerate(_HEADER):
        table.add_column(name, justify="left" if number == 0 else "right")
    for cells in _cells(rows):
        table.add_row(*(cell.replace("**", "") for cell in cells))
    return table


def milliseconds(x: float) -> str:
    """A time in a table."""
    return f"{x:.2f}" if x < 10 else f"{x:.0f}"


def markdown_table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A table for the report, the first column to the left, the others to the right."""
    rule = [":---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *cells))


def rich_markdown(table: Table) -> list[str]:
    """A table of rich as paragraphs of Markdown: its title, if it has one, the table, and its caption."""
    header = [str(column.header) for column in table.columns]
    cells = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    head, below = ([f"{text}"] if text else [] for text in (table.title and f"{table.title}:", table.caption))
    return [*head, markdown_table(header, cells), *below]


# --- report

_HEAD = """\
# Benchmarks

Written by `make bench` from the CSV files in [benchmarks/](benchmarks/). What counts is the ratio to a step of SGD;
the milliseconds are those of one machine on one day.

Each contestant trains through Lightning's Trainer from the same weights on the same random batch. SGD, AdamW,
Adafactor, iEF and EF differ by one line, the optimizer; the dense peers get J from their library, all else being
shared.

* **step / SGD**: contestants take turns within one process, and each round gives one ratio of median step times; here
  stand the median over the rounds and the quartiles. The first steps of each round are discarded.
* **forward, backward, update**: by the callback `StepTiming`. The forward pass of `vmap` is within its backward pass.
* **memory**: peak beyond model and batch, in a fresh process for each contestant: resident memory on a CPU
  (with {malloc}, so that freed arrays are given back at once), allocated memory on a GPU.
* By default the package verifies its capture on the first batches of a run (`verify_capture`), which takes one more
  backward pass and the room of two gradients. This is in neither of them: it is switched off here, on in the check.
* **fails, left out**: a peer that does not support the model, with the first line of its error; a dense J that would
  take more than half of the free memory.
* Before anything is timed, each contestant that claims the iEF update makes one step on a small float64 instance of
  the same kind. Relative errors above 1e-8 against a loop over single samples end the run. Operations are those of
  matrix products, convolutions and attention, as counted by `torch.utils.flop_counter`.

{contestants}

Again, in parts, or elsewhere (also on a GPU):

```console
make bench                               # everything; sets itself up
.venv/bin/python -m benchmarks run --workloads '[mlp-64, digits]' --contestants '[ief, adamw]' --rounds 9
.venv/bin/python -m benchmarks growth    # against N and P
.venv/bin/python -m benchmarks forms     # the choice of a form for each layer
.venv/bin/python -m benchmarks gamma     # what γ costs
.venv/bin/python -m benchmarks overhead  # what a step costs where its arithmetic is nothing
.venv/bin/python -m benchmarks grid      # small networks beside the plain dense way
.venv/bin/python -m benchmarks momentum  # which learning rate goes with which momentum
.venv/bin/python -m benchmarks metric    # a step in the Kronecker metric
.venv/bin/python -m benchmarks report    # this text, from the CSV files
.venv/bin/python -m benchmarks --help
```
"""


def write_report(output: Path, malloc: str, sections: Sequence[str]) -> Path:
    """Write benchmarks.md from the CSV files below `output`/benchmarks.

    Args:
        output: The folder of the documentation.
        malloc: Settings of the C library while memory is measured.
        sections: Further sections, empty for what was not measured.

    Returns:
        The file.
    """
    files = [output / "benchmarks" / f"{name}.csv" for name in (*WORKLOADS, "smoke")]
    results = [rows for rows in map(read, files) if rows]
    titles = "\n".join(f"* `{name}`: {contestant.title}" for name, contestant in CONTESTANTS.items())
    machines = list(dict.fromkeys(row.machine for rows in results for row in rows))
    parts = [_HEAD.format(malloc=malloc, contestants=titles)]
    parts.append("## Machine and versions\n\n" + "\n".join(f"{n}. {text}" for n, text in enumerate(machines, 1)))
    for rows in results:
        where = f" (machine {machines.index(rows[0].machine) + 1})" if len(machines) > 1 else ""
        head = f"## {rows[0].workload}\n\n{rows[0].title}; P = {rows[0].parameters:,}{where}."
        parts += [head, markdown_table(_HEADER, _cells(rows)), _below(rows)]
    path = output / "benchmarks.md"
    path.write_text("\n\n".join(part.strip() for part in (*parts, *sections) if part) + "\n", encoding="utf-8")
    return path
