"""Influence scored by training again on random subsets, and by wrong labels that were planted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from lightning_ief import linearize
from lightning_ief.capture import LinearizedBatch
from lightning_ief.curvature import influence_products
from lightning_ief.objectives import CrossEntropy
from lightning_ief.tasks import MLP

__all__ = ["FULL", "SMOKE", "Measured", "Size", "drawn", "labels", "lds", "lds_of", "precision_of", "trained"]

_CLASSES = 10

_KINDS = ("improved", "empirical", "sampled")


class Size(NamedTuple):
    """Size of the study.

    Attributes:
        train_size: N.
        width: Of the hidden layer.
        epochs: Of each training.
        queries: Of which half choose ρ, the other half are scored; as many clean images rank wrong labels.
        subsets: Random halves of the training images.
        repeats: Initial weights with which each subset is trained, and all images for the influence.
        rhos: ρ that are tried.
        seeds: Of the images, subsets and weights of the datamodelling score.
        search_seeds: Of the wrong labels with which ρ is chosen.
        result_seeds: Of those of the results.
        planted: The share of wrong labels.
        batch: Images of a batch.
        lr: Learning rate at the beginning; falls linearly to 0.
        weight_decay: Of the mean loss.
    """

    train_size: int = 1_000
    width: int = 32
    epochs: int = 20
    queries: int = 200
    subsets: int = 100
    repeats: int = 4
    rhos: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0, 1_000.0)
    seeds: Sequence[int] = (0, 1, 2)
    search_seeds: Sequence[int] = (100, 101)
    result_seeds: Sequence[int] = (0, 1, 2, 3, 4)
    planted: float = 0.1
    batch: int = 50
    lr: float = 0.1
    weight_decay: float = 1e-3


FULL = Size()
SMOKE = Size(60, 4, 2, 8, 6, 2, (1.0, 100.0), (0,), (100,), (0, 1), batch=20)


@dataclass(frozen=True)
class Measured:
    """A score; the CSV file has these columns.

    Attributes:
        experiment: "lds" or "labels".
        seed: Of images, subsets, wrong labels and weights.
        part: "search", if it took part in the choice of ρ, or "result".
        method: How images were ranked.
        rho: λ over the mean square of the rows; 0 where there is none.
        values: The score of each query, or the precision, with spaces between.
    """

    experiment: str
    seed: int
    part: str
    method: str
    rho: float
    values: str


# --- many networks at once


def trained(size: Size, x: Tensor, y: Tensor, chosen: Tensor, seeds: Sequence[int]) -> list[MLP]:
    """Train networks, each on images and with labels and initial weights of its own, all in one go.

    Args:
        size: The network and how it is trained.
        x: Images, [I, 784].
        y: Labels of each network, [M, I].
        chosen: Which images each network is trained on, [M, N]; N is a multiple of the batch.
        seeds: Of the initial weights of each and the order of its images.

    Returns:
        M networks.
    """
    nets = [_net(size, seed) for seed in seeds]
    of_each = zip(*(net.parameters() for net in nets), strict=True)
    weights = [torch.stack([*each]).detach().requires_grad_() for each in of_each]
    optimizer = torch.optim.SGD(weights, size.lr, momentum=0.9, weight_decay=size.weight_decay)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    per_epoch = chosen.shape[1] // size.batch
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, size.epochs * per_epoch)
    for _ in range(size.epochs):
        orders = torch.stack([torch.randperm(chosen.shape[1], generator=generator) for generator in generators])
        for at in chosen.gather(1, orders).split(size.batch, dim=1):
            optimizer.zero_grad()
            loss = F.cross_entropy(_logits(x[at], weights).flatten(0, 1), y.gather(1, at).flatten(), reduction="sum")
            (loss / size.batch).backward()  # of networks that have nothing in common
            optimizer.step()
            falling.step()
    for number, net in enumerate(nets):
        with torch.no_grad():
            for p, stacked in zip(net.parameters(), weights, strict=True):
                p.copy_(stacked[number])
    return nets


def _net(size: Size, seed: int) -> MLP:
    torch.manual_seed(seed)
    return MLP([784, size.width, _CLASSES])


def _logits(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Logits [M, N, C] of networks with weights [M, ...] for images [M, N, 784] of each."""
    w1, b1, w2, b2 = weights
    hidden = torch.baddbmm(b1[:, None], x, w1.transpose(1, 2)).relu()
    return torch.baddbmm(b2[:, None], hidden, w2.transpose(1, 2))


# --- the datamodelling score


def lds(size: Size, data: tuple[Tensor, Tensor], seed: int) -> Iterator[Measured]:
    """The datamodelling score of each method at each ρ, of one seed."""
    x, y, query_x, query_y = drawn(size, data, seed)
    generator = torch.Generator().manual_seed(seed)
    subsets = torch.stack([torch.randperm(len(x), generator=generator)[: len(x) // 2] for _ in range(size.subsets)])
    inits = [1_000 * (seed + 1) + number for number in range(size.repeats)]
    everyone = [init for init in inits for _ in range(size.subsets)]
    nets = trained(size, x, y.expand(len(everyone), -1), subsets.repeat(size.repeats, 1), everyone)
    with torch.no_grad():
        losses = torch.stack([F.cross_entropy(net(query_x), query_y, reduction="none") for net in nets]).double()
    losses = losses.view(size.repeats, size.subsets, -1)
    held = torch.zeros(size.subsets, len(x), dtype=torch.float64).scatter_(1, subsets, 1.0)
    whole = torch.arange(len(x)).expand(size.repeats, -1)
    full = trained(size, x, y.expand(size.repeats, -1), whole, [init + 500 for init in inits])
    found: dict[tuple[str, float], Tensor] = {}
    for net in full:
        block = _linearized(net, x, y)
        queries = _linearized(net, query_x, query_y)
        for key, influence in _influences(size, queries, block, seed):
            found[key] = found.get(key, 0.0) + influence / len(full)  # the mean over networks, as in TRAK
    half = size.repeats // 2
    scores = {key: lds_of(losses.mean(0), held, influence) for key, influence in found.items()}
    scores["repeated", 0.0] = spearman_corrcoef(losses[:half].mean(0), losses[half:].mean(0))
    for (method, rho), values in scores.items():
        for part, own in zip(("search", "result"), values.chunk(2), strict=True):
            yield Measured("lds", seed, part, method, rho, " ".join(f"{value:.4f}" for value in own.tolist()))


def lds_of(losses: Tensor, held: Tensor, influence: Tensor) -> Tensor:
    """The linear datamodelling score of each query (arXiv 2303.14186).

    Args:
        losses: Of queries, after training on each subset, [J, Q].
        held: Which samples each subset holds, 0 or 1, [J, N].
        influence: By how much a query's loss would rise without a sample, [Q, N].

    Returns:
        Over the subsets, the rank correlation of each query's loss with what the influence of their samples
        adds up to, [Q].
    """
    return spearman_corrcoef(-(held @ influence.T), losses)


def _influences(
    size: Size, queries: LinearizedBatch | None, block: LinearizedBatch, seed: int
) -> Iterator[tuple[tuple[str, float], Tensor]]:
    """Each kind of influence at each ρ; on themselves if there are no queries."""
    rows = None if queries is None else queries.jacobian
    yield ("products", 0.0), influence_products(rows, block, None).influence(1.0)
    for fisher in _KINDS:
        generator = torch.Generator().manual_seed(seed)
        products = influence_products(rows, block, fisher, generator=generator)
        assert products.gram is not None
        square = float(products.gram.diagonal().mean())
        for rho in size.rhos:
            yield (fisher, rho), products.influence(rho * square)


# --- wrong labels


def labels(size: Size, data: tuple[Tensor, Tensor], seed: int) -> Iterator[Measured]:
    """How many wrong labels each method finds at each ρ, of one seed."""
    x, y, clean_x, clean_y = drawn(size, data, seed)
    generator = torch.Generator().manual_seed(seed)
    count = round(size.planted * len(x))
    wrong = torch.randperm(len(x), generator=generator)[:count]
    y[wrong] = (y[wrong] + torch.randint(1, _CLASSES, (count,), generator=generator)) % _CLASSES
    (net,) = trained(size, x, y[None], torch.arange(len(x))[None], [2_000 + seed])
    block, queries = _linearized(net, x, y), _linearized(net, clean_x, clean_y)
    suspicion: dict[tuple[str, float], Tensor] = {
        ("loss", 0.0): block.losses,
        ("gradient norm", 0.0): block.jacobian.row_norms(),
    }
    for (method, rho), found in _influences(size, None, block, seed):
        if method != "products":  # which is the gradient's norm
            suspicion[f"itself, {method}", rho] = found.diagonal()
    for (method, rho), found in _influences(size, queries, block, seed):
        suspicion[f"held-out, {method}", rho] = -found.sum(0)
    part = "search" if seed in size.search_seeds else "result"
    for (method, rho), scores in suspicion.items():
        yield Measured("labels", seed, part, method, rho, f"{precision_of(scores, wrong):.4f}")


def precision_of(scores: Tensor, wrong: Tensor) -> float:
    """The share of wrong labels among as many images of the highest scores as there are wrong labels.

    Args:
        scores: [N].
        wrong: Indices of the images with wrong labels.

    Returns:
        0 to 1.
    """
    return float(torch.isin(scores.topk(len(wrong)).indices, wrong).double().mean())


def drawn(size: Size, data: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, and other ones."""
    chosen = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(seed))
    train, other = chosen[: size.train_size], chosen[size.train_size : size.train_size + size.queries]
    return data[0][train].flatten(1), data[1][train], data[0][other].flatten(1), data[1][other]


def _linearized(net: MLP, x: Tensor, y: Tensor) -> LinearizedBatch:
    return linearize(net, x, y, CrossEntropy())
