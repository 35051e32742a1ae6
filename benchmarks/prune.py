"""A network pruned by WoodFisher with EF, iEF and sampled targets, beside magnitude: one-shot and gradually."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks.loop import BATCH, Data, batches, load
from benchmarks.prune_page import report
from benchmarks.report import read, write
from lightning_ief.curvature import BlockFisher, block_fishers, removed, woodfisher
from lightning_ief.experiments.figures.drawing import GREY, STYLES, canvas, plain, save
from lightning_ief.objectives import CrossEntropy
from lightning_ief.tasks import MLP
from lightning_ief.tasks.schedules import multiple

__all__ = ["FULL", "METHODS", "SMOKE", "Method", "Pruned", "Size", "best_dampings", "draw", "study"]


class Method(NamedTuple):
    """A way to prune.

    Attributes:
        title: What page and figure call it.
        fisher: Whose gradients; empty for magnitude.
        update: What the weights that stay do.
    """

    title: str
    fisher: str = ""
    update: str = ""


METHODS = {
    "magnitude": Method("magnitude"),
    "ef": Method("WoodFisher-EF", "empirical", "summed"),
    "ief": Method("WoodFisher-iEF", "improved", "summed"),
    "sampled": Method("WoodFisher, sampled", "sampled", "summed"),
    "ef-exact": Method("WoodFisher-EF, exact update", "empirical", "exact"),
    "ief-exact": Method("WoodFisher-iEF, exact update", "improved", "exact"),
    "sampled-exact": Method("WoodFisher, sampled, exact update", "sampled", "exact"),
}


class Size(NamedTuple):
    """The study at one of its sizes.

    Attributes:
        sparsities: Shares of the weights that are pruned.
        seeds: Of weights, order and images, of the results.
        search: Another one, whose held-out accuracy chooses λ.
        searched: The sparsities at which it does, by the mean.
        dampings: λ that are tried.
        gradual: Methods that are used gradually, too.
        block_size: Entries of a block.
        samples: N, of the Fisher matrix.
        train_size: Training images.
        width: Of the hidden layers.
        epochs: Of training before anything is pruned.
        lr: Its learning rate at the beginning.
        retraining: Learning rate at the beginning of the epoch after each gradual step.
    """

    sparsities: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    seeds: Sequence[int] = (0, 1, 2)
    search: int = 100
    searched: Sequence[float] = (0.9, 0.95)
    dampings: Sequence[float] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    gradual: Sequence[str] = ("magnitude", "ef", "ief")
    block_size: int = 32
    samples: int = 1_000
    train_size: int = 10_000
    width: int = 256
    epochs: int = 3
    lr: float = 3e-3
    retraining: float = 1e-3


FULL = Size()
SMOKE = Size((0.5, 0.9), (0, 1), 100, (0.9,), (1e-4, 1e-2), ("magnitude", "ief"), 16, 64, 256, 6, 1)


@dataclass(frozen=True)
class Pruned:
    """A pruned network; the CSV file has these columns.

    Attributes:
        part: "search", "dense" (nothing pruned), "one-shot" or "gradual".
        seed: Of the network.
        method: Its name.
        damping: λ; 0 where there is none.
        sparsity: Share of the weights that are 0.
        val_accuracy: Of held-out images, 0 to 1.
        test_accuracy: Of images that chose nothing.
    """

    part: str
    seed: int
    method: str
    damping: float
    sparsity: float
    val_accuracy: float
    test_accuracy: float


class _Network:
    """The trained network of a seed; trained, and its Fisher matrices computed, where they are asked for first."""

    def __init__(self, size: Size, data: Data, seed: int) -> None:
        self.size = size
        self.data = data
        self.seed = seed
        self._fishers: dict[str, dict[str, BlockFisher]] = {}

    @cached_property
    def trained(self) -> nn.Module:
        torch.manual_seed(self.seed)
        net = MLP([784, self.size.width, self.size.width, 10])
        _train(net, self.data.train, self.size.epochs, self.size.lr)
        return net

    @property
    def loader(self) -> list[tuple[Tensor, Tensor]]:
        """N training images, the same for all methods."""
        images, classes = self.data.train
        chosen = torch.randperm(len(classes), generator=torch.Generator().manual_seed(self.seed))[: self.size.samples]
        return [(images[part], classes[part]) for part in chosen.split(BATCH)]

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.trained.named_parameters() if p.ndim > 1}

    def fishers(self, fisher: str) -> Mapping[str, BlockFisher]:
        """Those of the trained network; held for one kind at a time."""
        if fisher not in self._fishers:
            options = {"block_size": self.size.block_size, "generator": self.generator}
            self._fishers = {fisher: block_fishers(self.trained.eval(), self.loader, CrossEntropy(), fisher, **options)}
        return self._fishers[fisher]

    def row(self, part: str, method: str, damping: float, sparsity: float, net: nn.Module) -> Pruned:
        accuracies = (_accuracy(net, *images) for images in (self.data.val, self.data.test))
        return Pruned(part, self.seed, method, damping, sparsity, *accuracies)

    def one_shot(self, name: str, damping: float, sparsity: float) -> nn.Module:
        method, net = METHODS[name], deepcopy(self.trained)
        if not method.fisher:
            _by_magnitude(net, sparsity)
            return net
        found, _ = removed(self.weights, self.fishers(method.fisher), sparsity, damping, update=method.update)
        net.load_state_dict(found, strict=False)
        return net

    def gradual(self, name: str, damping: float) -> Iterator[tuple[float, nn.Module]]:
        """The same network at growing sparsities, trained for an epoch after each step."""
        method, net = METHODS[name], deepcopy(self.trained)
        torch.manual_seed(self.seed)  # of the order of images, alike for all methods
        for sparsity in self.size.sparsities:
            if method.fisher:
                options = {"update": method.update, "generator": self.generator, "block_size": self.size.block_size}
                net.eval()
                woodfisher(net, self.loader, CrossEntropy(), sparsity, fisher=method.fisher, damping=damping, **options)
            else:
                _by_magnitude(net, sparsity)
            _train(net, self.data.train, 1, self.size.retraining)
            yield sparsity, net


def _train(net: nn.Module, images: tuple[Tensor, Tensor], epochs: int, lr: float) -> None:
    """By AdamW without weight decay; lr falls linearly to 0."""
    net.train()
    steps = epochs * (len(images[1]) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(multiple, steps=steps, warmup=0.0, decay="linear"))
    for x, y in islice(batches(images), steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        falling.step()


def _by_magnitude(net: nn.Module, sparsity: float) -> None:
    """The smallest of all weights together, those that are pruned already among them."""
    layers = [(module, "weight") for module in net.modules() if isinstance(module, nn.Linear)]
    masks = [getattr(module, "weight_mask", torch.ones_like(module.weight)) for module, _ in layers]
    total, pruned = sum(mask.numel() for mask in masks), sum(int((mask == 0).sum()) for mask in masks)
    prune.global_unstructured(layers, prune.L1Unstructured, amount=round(sparsity * total) - pruned)


@torch.no_grad()
def _accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((net(x).argmax(1) == y).double().mean())


def study(size: Size, output: Path, root: Path, tell: Callable[[str], None]) -> Path:
    """Search λ, prune, draw and write the page; what is in its CSV file is not done again.

    Args:
        size: Size of the study.
        output: Folder of the page; CSV file and figure go to pruning/ in it.
        root: Folder of the images.
        tell: Is told of each network.

    Returns:
        The page.
    """
    path = output / "pruning" / "pruned.csv"
    rows = read(path, Pruned)

    def add(found: Sequence[Pruned]) -> None:
        rows.extend(found)
        write(rows, path, Pruned)
        for row in found:
            at = f"{100 * row.sparsity:.0f} %, λ {row.damping:g}"
            tell(f"{row.part}, seed {row.seed}: {row.method}, {at}: {100 * row.test_accuracy:.2f} %")

    def missing(part: str, seed: int, name: str, damping: float, sparsities: Sequence[float]) -> list[float]:
        done = [row for row in rows if (row.part, row.seed, row.method) == (part, seed, name)]
        return [s for s in sparsities if not any(_alike(row, damping, s) for row in done)]

    data = load(size.train_size, root)
    network = _Network(size, data, size.search)
    by_fisher = sorted((name for name in METHODS if METHODS[name].fisher), key=lambda name: METHODS[name].fisher)
    for name in by_fisher:
        for damping in size.dampings:
            for s in missing("search", size.search, name, damping, size.searched):
                add([network.row("search", name, damping, s, network.one_shot(name, damping, s))])
    best = best_dampings(rows)
    # Of another search.
    rows = [r for r in rows if r.part in ("search", "dense") or _alike(r, best.get(r.method, 0.0), r.sparsity)]
    for seed in size.seeds:
        network = _Network(size, data, seed)
        if missing("dense", seed, "none", 0.0, [0.0]):
            add([network.row("dense", "none", 0.0, 0.0, network.trained)])
        for name in ("magnitude", *by_fisher):
            damping = best.get(name, 0.0)
            for s in missing("one-shot", seed, name, damping, size.sparsities):
                add([network.row("one-shot", name, damping, s, network.one_shot(name, damping, s))])
        for name in size.gradual:
            damping = best.get(name, 0.0)
            if missing("gradual", seed, name, damping, size.sparsities):
                rows = [row for row in rows if (row.part, row.seed, row.method) != ("gradual", seed, name)]
                add([network.row("gradual", name, damping, s, net) for s, net in network.gradual(name, damping)])
    rows = read(path, Pruned)  # with the digits of the file
    draw(rows, output / "pruning" / "accuracy.png")
    page = output / "pruning.md"
    page.write_text(report(size, METHODS, rows, best_dampings(rows)), encoding="utf-8")
    return page


def _alike(row: Pruned, damping: float, sparsity: float) -> bool:
    return abs(row.sparsity - sparsity) < 1e-6 and abs(row.damping - damping) <= 1e-4 * damping


def best_dampings(rows: Sequence[Pruned]) -> dict[str, float]:
    """λ of each method with the best mean accuracy on held-out images in the search."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row.part == "search":
            found.setdefault(row.method, {}).setdefault(row.damping, []).append(row.val_accuracy)
    return {name: max(tried, key=lambda each: statistics.fmean(tried[each])) for name, tried in found.items()}


def draw(rows: Sequence[Pruned], path: Path) -> Path:
    """Draw test accuracy against sparsity: means over the seeds, bars from the least to the largest.

    Args:
        rows: All rows.
        path: The file.

    Returns:
        The file.
    """
    figure = canvas(11.0, 4.4)
    styles = dict(zip(METHODS, STYLES, strict=False))
    dense = statistics.fmean(100 * row.test_accuracy for row in rows if row.part == "dense")
    panels = figure.subplots(1, 2)
    for axes, part in zip(panels, ("one-shot", "gradual"), strict=True):
        axes.axhline(dense, color=GREY, linewidth=1.0, zorder=1)
        for number, (name, method) in enumerate(METHODS.items()):
            own = [row for row in rows if (row.part, row.method) == (part, name)]
            at = sorted({row.sparsity for row in own})
            values = [[100 * row.test_accuracy for row in own if row.sparsity == s] for s in at]
            if not own:
                continue
            places = [100 * s + 0.25 * (number - 3) for s in at]  # bars side by side
            axes.vlines(places, [*map(min, values)], [*map(max, values)], color=styles[name]["color"], linewidth=1.0)
            axes.plot(places, [*map(statistics.fmean, values)], markersize=5, label=method.title, **styles[name])
        axes.set(title=part, xlabel="weights pruned, %")
        plain(axes)
    panels[0].set_ylabel("test accuracy, %\n(grey: before pruning)")
    panels[0].legend(frameon=False, fontsize="small")
    return save(figure, path)
