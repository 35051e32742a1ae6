"""The page of the study `prune`: its text, its tables, and what the numbers say of EF and iEF."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.report import machine, markdown_table
from lightning_ief.experiments.summary import spread

__all__ = ["report"]

_TEXT = """\
# Pruning, by EF and by iEF

WoodFisher (Singh and Alistarh, [arXiv 2004.14340](https://arxiv.org/abs/2004.14340)) removes weights of a trained
network by a quadratic model of its loss, whose Hessian is an empirical Fisher matrix by blocks. It is one of the
methods that iEF's paper says to improve by its rescaling (response, D.2.3); `curvature.woodfisher` takes `fisher` as an
option.

## What is computed

Of each weight, entries are taken in blocks of consecutive ones, and of the N samples

    F = λI + (1/N) Σ_n g_n g_nᵀ,    g_n = ∇l_n (EF)    or    ∇l_n / ‖∂l_n/∂z_n‖ (iEF),

exactly and in float64; with `fisher="sampled"`, g_n is the gradient with a target drawn from the model. Entry q is
removed at the least cost ρ_q to the model if its block moves by δw (optimal brain surgeon):

    δw = −w_q F⁻¹e_q / [F⁻¹]_qq,    ρ_q = w_q² / (2 [F⁻¹]_qq).

Entries with the smallest ρ_q go, by rank over all weights (`ranking="joint"`, as there) or within each. Many go at
once, Q, and there are two ways to make up for them:

* `update="summed"`, the paper's: the δw of all q of Q, each as if it went alone, added up; then w_Q = 0.
* `update="exact"`: the minimum of the model with w_Q = 0, δw_S = F_SS⁻¹ F_SQ w_Q for the entries S that stay.

```python
>>> import torch
>>> from torch import nn
>>> from torch.nn.utils import prune
>>> from lightning_ief import objectives
>>> from lightning_ief.curvature import woodfisher
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5)).eval()
>>> data = torch.utils.data.TensorDataset(torch.randn(128, 20), torch.arange(128) % 5)
>>> loader = torch.utils.data.DataLoader(data, batch_size=32)
>>> masks = woodfisher(model, loader, objectives.CrossEntropy(), sparsity=0.5, fisher="improved", damping=1e-3)
>>> for sparsity in (0.7, 0.8):     # gradually; to be trained in between
...     masks = woodfisher(model, loader, objectives.CrossEntropy(), sparsity, damping=1e-3, update="exact")
>>> sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
(160, 800)
>>> "0.weight_mask" in model.state_dict()
True
>>> for layer in (model[0], model[2]):      # a plain weight again, with zeros
...     _ = prune.remove(layer, "weight")

```

Biases and norms are not pruned unless they are named in `parameters`. `steps=k` removes the weights in k parts, each
with an F of its own. λ is in the units of F, and does not carry over from EF to iEF, whose rows are divided by small
numbers.

## What was measured

The MLP 784-{width}-{width}-10 of the [other studies](scratch.md), trained with AdamW on {train_size:,} images of
Fashion-MNIST (lr {lr:g}, falling linearly to 0, {epochs}), is pruned by one command:

    python -m benchmarks prune

* F is of N = {samples:,} training images, the same for all methods, in blocks of {block_size}; the script with which
  WoodFisher's authors prune an MLP has 8,000 gradients and λ = 1e-5. Weights are ranked over all layers, also by
  magnitude.
* λ is searched for each method alike, one-shot with a network of another seed: the best by the mean accuracy at
  {searched} on 5,000 held-out images, of {dampings}.
* **One-shot**: nothing is trained after pruning.
* **Gradual**: one network is pruned to each of the sparsities in turn, with F anew, and trained by AdamW for an epoch
  after each (lr {retraining:g}, falling linearly to 0). λ is that of one-shot.
* Test accuracy is of the test images, which have chosen nothing; mean ± standard deviation over {seeds} seeds of the
  network. Before pruning it is {dense} %.

![Test accuracy against sparsity](pruning/accuracy.png)

### One-shot

{one_shot}

{one_shot_gaps}

### Gradual

{gradual}

{gradual_gaps}

One kind of network and {seeds} seeds: differences of the size of these standard deviations say little. Every number:
[pruning/pruned.csv](pruning/pruned.csv). Measured on {machine}.
"""


def report(size: Any, methods: Mapping[str, Any], rows: Sequence[Any], dampings: Mapping[str, float]) -> str:
    """The page.

    Args:
        size: The study's size.
        methods: By name.
        rows: All rows.
        dampings: λ that was chosen, by method.

    Returns:
        Markdown.
    """
    dense = spread([100 * row.test_accuracy for row in rows if row.part == "dense"], 2)
    parts = {
        key: value
        for part, key in (("one-shot", "one_shot"), ("gradual", "gradual"))
        for key, value in (
            (key, _table(size, methods, _of(rows, part), dampings)),
            (f"{key}_gaps", _gaps(size, methods, _of(rows, part))),
        )
    }
    return _TEXT.format(
        **{name: getattr(size, name) for name in ("width", "train_size", "lr", "samples", "block_size", "retraining")},
        epochs=f"{size.epochs} epoch{'s' if size.epochs > 1 else ''}",
        dampings=", ".join(f"{damping:g}" for damping in size.dampings),
        searched=" and ".join(f"{100 * s:g} %" for s in size.searched),
        seeds=len(size.seeds),
        dense=dense,
        machine=machine(torch.device("cpu")),
        **parts,
    )


def _of(rows: Sequence[Any], part: str) -> dict[str, dict[float, dict[int, float]]]:
    """Test accuracy in % by method, sparsity and seed."""
    found: dict[str, dict[float, dict[int, float]]] = {}
    for row in rows:
        if row.part == part:
            found.setdefault(row.method, {}).setdefault(row.sparsity, {})[row.seed] = 100 * row.test_accuracy
    return found


def _table(size: Any, methods: Mapping[str, Any], found: Mapping[str, Any], dampings: Mapping[str, float]) -> str:
    def damping(name: str) -> str:
        if name not in dampings:
            return "–"
        border = dampings[name] in (min(size.dampings), max(size.dampings))
        return f"{dampings[name]:g}{'*' if border else ''}"

    header = ("method", "λ", *(f"{100 * s:g} %" for s in size.sparsities))
    cells = [
        [method.title, damping(name), *(spread([*found[name][s].values()], 2) for s in size.sparsities)]
        for name, method in methods.items()
        if name in found
    ]
    star = any("*" in row[1] for row in cells)
    return markdown_table(header, cells) + ("\n\n\\*: at the border of those tried." if star else "")


def _gaps(size: Any, methods: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """How far pairs of methods are from each other, seed by seed."""
    pairs = (
        ("ief", "ef"), ("ief", "sampled"), ("ief-exact", "ef-exact"), ("ief-exact", "sampled-exact"),
        ("ef-exact", "ef"), ("ief-exact", "ief"), ("ief", "magnitude"), ("ief-exact", "magnitude"),
    )  # fmt: skip
    header = ("difference in points", *(f"{100 * s:g} %" for s in size.sparsities))
    cells = []
    for first, second in pairs:
        if first in found and second in found:
            gaps = [_paired(found[first][s], found[second][s]) for s in size.sparsities]
            title = f"{methods[first].title} over {methods[second].title}"
            cells.append([title, *(f"{statistics.fmean(gap):+.2f} ({sum(x > 0 for x in gap)})" for gap in gaps)])
    verdicts = [_verdict(size, methods, found, *pair) for pair in _VERDICTS if {*pair} <= found.keys()]
    note = f"In brackets, in how many of {len(size.seeds)} seeds the first is better."
    return "\n\n".join([markdown_table(header, cells), note, "\n".join(verdicts)])


_VERDICTS = (("ief", "ef"), ("ief-exact", "ef-exact"))


def _verdict(size: Any, methods: Mapping[str, Any], found: Mapping[str, Any], first: str, second: str) -> str:
    """Where all seeds agree."""
    gaps = {f"{100 * s:g} %": _paired(found[first][s], found[second][s]) for s in size.sparsities}
    better = ", ".join(at for at, gap in gaps.items() if min(gap) > 0) or "none"
    worse = ", ".join(at for at, gap in gaps.items() if max(gap) < 0) or "none"
    titles = f"{methods[first].title} over {methods[second].title}"
    return f"* {titles}: better in all seeds at {better}; worse in all at {worse}."


def _paired(a: Mapping[int, float], b: Mapping[int, float]) -> list[float]:
    return [value - b[seed] for seed, value in a.items()]
