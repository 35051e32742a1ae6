"""The page of the study of influence: formula, example, tables."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import torch

from benchmarks.influence_measure import Measured, Size
from benchmarks.report import machine, markdown_table
from lightning_ief.experiments.summary import spread

__all__ = ["TITLES", "report", "scores_of"]

_OF = {"improved": "iEF", "empirical": "EF", "sampled": "F̂(1)"}

TITLES = {
    **_OF,
    "products": "products of gradients",
    "repeated": "training once more",
    "loss": "loss",
    "gradient norm": "norm of the gradient",
    **{f"itself, {kind}": f"influence on itself, {title}" for kind, title in _OF.items()},
    **{f"held-out, {kind}": f"influence on held-out images, {title}" for kind, title in _OF.items()},
    "held-out, products": "products with gradients of held-out images",
}
"""What the methods are called."""

Scores = Mapping[tuple[str, float], Mapping[int, Sequence[float]]]


def scores_of(rows: Sequence[Measured], experiment: str, part: str) -> Scores:
    """Values by method and ρ, and by seed.

    Args:
        rows: All rows.
        experiment: Which ones.
        part: "search" or "result".

    Returns:
        The scores.
    """
    found: dict[tuple[str, float], dict[int, list[float]]] = {}
    for row in rows:
        if (row.experiment, row.part) == (experiment, part):
            found.setdefault((row.method, row.rho), {})[row.seed] = [*map(float, row.values.split())]
    return found


def _all(by_seed: Mapping[int, Sequence[float]]) -> list[float]:
    return [value for own in by_seed.values() for value in own]


def _chosen(rows: Sequence[Measured], experiment: str) -> dict[str, float]:
    """The best ρ of each method by the part that chooses, methods in the order of the file."""
    search = scores_of(rows, experiment, "search")
    return {
        method: max((rho for name, rho in search if name == method), key=lambda rho: fmean(_all(search[method, rho])))
        for method, _ in search
    }


def _rho(rho: float, size: Size) -> str:
    """ρ in a table, one at the border of those that were tried marked."""
    border = len(size.rhos) > 1 and rho in (min(size.rhos), max(size.rhos))
    return f"{rho:g}{'*' * border}" if rho else "–"


def _lds_table(size: Size, rows: Sequence[Measured]) -> str:
    result, cells = scores_of(rows, "lds", "result"), []
    for method, rho in _chosen(rows, "lds").items():
        scores = result[method, rho]
        means = ", ".join(f"{fmean(own):.3f}" for own in scores.values())
        cells.append([TITLES[method], _rho(rho, size), spread(_all(scores), 3), means])
    return markdown_table(("influence by", "ρ", "LDS", "each seed"), cells)


def _labels_table(size: Size, rows: Sequence[Measured]) -> str:
    result, cells = scores_of(rows, "labels", "result"), []
    for method, rho in _chosen(rows, "labels").items():
        cells.append([TITLES[method], _rho(rho, size), spread([100 * x for x in _all(result[method, rho])], 1)])
    return markdown_table(("ranked by", "ρ", "precision, %"), cells)


def _differences(rows: Sequence[Measured]) -> str:
    """iEF's score beside the others', query by query."""
    result, chosen = scores_of(rows, "lds", "result"), _chosen(rows, "lds")
    ours, lines = result["improved", chosen["improved"]], []
    for method in ("empirical", "sampled", "products"):
        theirs = result[method, chosen[method]]
        differences = [a - b for a, b in zip(_all(ours), _all(theirs), strict=True)]
        better = sum(fmean(ours[seed]) > fmean(theirs[seed]) for seed in ours)
        error = stdev(differences) / len(differences) ** 0.5
        lines.append(
            f"* iEF over {TITLES[method]}: {fmean(differences):+.3f} ± {error:.3f} in the mean over queries, larger "
            f"with {better} of {len(ours)} seeds."
        )
    return "\n".join(lines)


def _by_labels(rows: Sequence[Measured]) -> str:
    """Who finds more than the loss alone."""
    result, chosen = scores_of(rows, "labels", "result"), _chosen(rows, "labels")
    loss, more, less = result["loss", 0.0], [], []
    for method, rho in chosen.items():
        if method != "loss":
            seeds = result[method, rho]
            wins = sum(fmean(seeds[seed]) > fmean(loss[seed]) for seed in loss)
            own, reference = (fmean(_all(each)) for each in (seeds, loss))
            (more if own > reference else less).append(f"{TITLES[method]} ({wins} of {len(loss)} seeds)")
    lines = [f"* More than by the loss alone is found, in the mean, by: {'; '.join(more) or 'nothing'}."]
    lines.append(f"* Not more by: {'; '.join(less) or 'nothing'}.")
    return "\n".join(lines)


def report(size: Size, rows: Sequence[Measured]) -> str:
    """The page.

    Args:
        size: Size of the study.
        rows: All rows.

    Returns:
        Its text.
    """
    return _TEXT.format(
        train_size=f"{size.train_size:,}",
        width=size.width,
        epochs=size.epochs,
        batch=size.batch,
        lr=size.lr,
        weight_decay=size.weight_decay,
        subsets=size.subsets,
        repeats=size.repeats,
        seeds=len(size.seeds),
        queries=size.queries // 2,
        held_out=size.queries,
        rhos=", ".join(f"{rho:g}" for rho in size.rhos),
        planted=round(size.planted * size.train_size),
        share=f"{100 * size.planted:g}",
        search=len(size.search_seeds),
        results=len(size.result_seeds),
        half=size.repeats // 2,
        lds=_lds_table(size, rows),
        differences=_differences(rows),
        labels=_labels_table(size, rows),
        verdict=_by_labels(rows),
        machine=machine(torch.device("cpu")),
    )


_TEXT = """\
# Influence of training samples

Which training samples does the loss of a query depend on? Without sample n the minimum θ of Σ_n l_n + λ/2 ‖θ‖² would
be elsewhere, to first order by H⁻¹∇l_n, and the query's loss l_q would be higher by

    ∇l_qᵀ (F + λI)⁻¹ ∇l_n

(Koh and Liang, [arXiv 1703.04730](https://arxiv.org/abs/1703.04730); here of sums, not means), with a Fisher matrix F
in the place of the Hessian: that of EF, Σ_n ∇l_n ∇l_nᵀ; iEF's, Σ_n s_n⁻¹ ∇l_n ∇l_nᵀ; or that of sampled targets. Below
0, the sample does harm. `influence` gives it for all training samples of a loader, without any P × P matrix and
without J:

    K_qb (K_bb + λS)⁻¹ S,        K_ab = J_a J_bᵀ,

S = diag(s) for iEF, I for EF: by (RᵀR + λI)⁻¹Rᵀ = Rᵀ(RRᵀ + λI)⁻¹ with the rows R = S^-½ J_b, in which nothing cancels.
Rows of sampled targets are not the samples' own, and take the Woodbury identity. K_qb is `jacobian.cross_gram(other)`,
inner products of the rows of two batches from what went into each layer and what came back.

```python
>>> import torch
>>> from torch import nn
>>> from torch.utils.data import DataLoader, TensorDataset
>>> from lightning_ief import influence, linearize, objectives
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()
>>> x, y = torch.randn(30, 5).double(), torch.arange(30) % 3
>>> queries = torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
>>> loader = DataLoader(TensorDataset(x, y), batch_size=10)         # not shuffled: columns have its order
>>> options = {{"damping": 0.1, "accumulate": 3, "progress": False}}  # 3 batches in a block: F of all samples
>>> found = influence(model, loader, queries, objectives.CrossEntropy(), **options)
>>> found.shape
torch.Size([4, 30])
>>> seen = linearize(model, x, y, objectives.CrossEntropy())        # the same with P × P matrices
>>> rows, s = seen.jacobian.to_dense(), seen.logit_gradient_norms
>>> F = rows.T @ torch.diag(1 / s) @ rows
>>> q = linearize(model, *queries, objectives.CrossEntropy()).jacobian.to_dense()
>>> torch.allclose(found, q @ torch.linalg.solve(F + 0.1 * torch.eye(len(F)).double(), rows.T))
True
>>> found.topk(3).indices.shape                                     # the samples that help each query most
torch.Size([4, 3])

```

* **Blocks**: one batch each, unless `accumulate` says otherwise. The matrix of a block of N_b samples, times N/N_b,
  stands for F of all N.
* **Damping** λ is in the units of F, a sum over all training samples: N times that of a mean loss.
* `fisher=None` leaves products of gradients, over λ, to which the others tend with λ → ∞.
* `lightning_ief.attribution.self_influence` is the influence of each sample on its own loss.

## How well it predicts training again

The linear datamodelling score (Park et al., [arXiv 2303.14186](https://arxiv.org/abs/2303.14186)): train on random
halves of the training images; over the halves, the rank correlation of a query's loss with what the influence of the
images in them adds up to.

* MLPs 784-{width}-10 on {train_size} images of Fashion-MNIST; {epochs} epochs of SGD in batches of {batch},
  momentum 0.9, lr {lr} falling to 0, weight decay {weight_decay:g}, float32.
* {subsets} halves, each trained from {repeats} initial weights, whose losses are averaged. So is the influence over
  {repeats} networks of all images, of other initial weights. One block of all images.
* λ is ρ times the mean square of the rows of F. The best ρ of {rhos}
  by {queries} queries of each of {seeds} seeds; scores of {queries} others. A ρ at the border is marked \\*.

Mean ± standard deviation over the queries:

{lds}

"Training once more" is what training itself achieves: the mean loss from {half} of the initial weights against that
from the others.

{differences}

Standard errors are those of the queries alone, which share their training images and halves.

## Wrong labels

Of {train_size} training images {planted} ({share} %) get a wrong label, and one network is trained as above. Then
images are ranked, the most suspicious first: by their loss, by the norm of their gradient, by the influence on their
own loss, and by the harm that they do to {held_out} held-out images with right labels. Precision is the share of wrong
labels among the first {planted}. The best ρ of {search} seeds; mean ± standard deviation over {results} others:

{labels}

{verdict}

![Scores against ρ](influence/scores.png)

*Means over the seeds of the results, bars their standard deviation.*

## What this does not say

One small network and data set. At other sizes, and where training comes closer to a minimum, the order of the matrices
may be another: `influence` takes each of them. Again, by one command, within a quarter of an hour on a core:

    python -m benchmarks influence

All numbers: [influence/measured.csv](influence/measured.csv). Measured on {machine}.
"""
