"""Which training samples a loss depends on: the influence of all samples of a loader, block by block."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from rich import get_console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_ief.capture import LinearizedBatch, linearize
from lightning_ief.curvature import FisherKind, InfluenceProducts, influence_products
from lightning_ief.curvature.rescaling import require_fisher
from lightning_ief.objectives import Objective

__all__ = ["influence", "self_influence"]


def influence(
    model: nn.Module,
    training: Iterable[Any],
    queries: tuple[Any, Tensor],
    objective: Objective,
    damping: float,
    *,
    fisher: FisherKind | None = "improved",
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    accumulate: int = 1,
    parameters: Mapping[str, nn.Parameter] | None = None,
    progress: bool = True,
) -> Tensor:
    """The influence of each training sample n on the loss of each query q, ∇l_qᵀ (F + λI)⁻¹ ∇l_n.

    To first order, that is by how much l_q would rise if the model were trained without sample n, in a minimum of
    Σ_n l_n + λ/2 ‖θ‖² (Koh and Liang, arXiv 1703.04730, of sums instead of means); negative for samples that do
    harm. F is a sum over all N training samples, in the place of the Hessian:

    * "empirical": Σ_n ∇l_n ∇l_nᵀ. "improved", iEF's: Σ_n s_n⁻¹ ∇l_n ∇l_nᵀ (arXiv 2406.06420).
    * "sampled": that of targets drawn from the predictive distribution, whose expectation is the Fisher matrix itself,
      the Gauss-Newton matrix.
    * None: 0, so that only products of gradients are left, over λ; the others tend to that with λ → ∞.

    P × P matrices are never formed. A block b of N_b samples stands for all, F = (N/N_b) Σ_n∈b …: for its samples

        K_qb (K_bb + (N_b/N) λS)⁻¹ S N_b/N,    K_ab = J_a J_bᵀ,

    S = diag(s), or I for "empirical"; "sampled" by the Woodbury identity. A block is one batch, or `accumulate` of
    them: where it holds all samples, F is that of all, and a row adds up to the rate at which iEF's direction with
    `absolute_damping=λ`, or EF's with λ, lowers l_q. A sample without a gradient has no influence.

    The model is taken in the mode that it is in: `eval()` switches dropout off. Held are the queries' rows and, until
    N is known, N_b² + QN_b numbers for each block (for "sampled" M² as many); layers' inputs and outputs of one block
    at a time.

    Args:
        model: The model, see `linearize`.
        training: Batches (inputs, targets) of all training samples, in an order that is known: a loader without
            shuffling.
        queries: One batch (inputs, targets).
        objective: Turns logits and targets into losses, of training samples and queries.
        damping: λ > 0, in the units of F, a sum over all training samples: N times that of a mean loss; 0 where K is
            regular, but not for "sampled" and None.
        fisher: Which matrix F is.
        num_samples: M targets drawn for each sample, for "sampled" alone.
        generator: Source of random numbers for "sampled", on the model's device; torch's default if None.
        accumulate: How many batches make up a block; a large number for one block of all.
        parameters: Parameters to differentiate by, by name; all with requires_grad if None.
        progress: Whether a progress bar is shown.

    Returns:
        Shape [Q, N], float64; columns in the order of the loader.

    Raises:
        ValueError: If there is no training sample, the loader shuffles, losses or gradients are not finite, λ is
            negative or 0 where it must not be, or K + λI is singular up to rounding.
        TypeError: If a batch is not (inputs, targets).

    Example:
        >>> from lightning_ief import influence, objectives
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> net = nn.Linear(3, 2)
        >>> loader = DataLoader(TensorDataset(torch.randn(10, 3), torch.arange(10) % 2), batch_size=4)
        >>> queries = torch.randn(2, 3), torch.tensor([0, 1])
        >>> influence(net, loader, queries, objectives.CrossEntropy(), damping=0.1, progress=False).shape
        torch.Size([2, 10])

    """
    _require("influence", damping, fisher, num_samples, accumulate)
    given = dict(parameters) if parameters is not None else None
    rows = _linearized(model, queries, objective, given, "The batch of queries").jacobian
    blocks = _blocks(model, training, objective, given, accumulate, progress)
    found = [influence_products(rows, block, fisher, num_samples, generator) for block in blocks]
    return torch.cat([*_solved(found, damping)], dim=1)


def self_influence(
    model: nn.Module,
    training: Iterable[Any],
    objective: Objective,
    damping: float,
    *,
    fisher: FisherKind | None = "improved",
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    accumulate: int = 1,
    parameters: Mapping[str, nn.Parameter] | None = None,
    progress: bool = True,
) -> Tensor:
    """The influence of each training sample on its own loss, ∇l_nᵀ (F + λI)⁻¹ ∇l_n ≥ 0; see `influence`.

    It is large where the model learns a sample from that alone, as it has to with a wrong label.

    Args:
        model: See `influence`, as all others.
        training: Batches (inputs, targets).
        objective: The objective.
        damping: λ.
        fisher: Which matrix F is.
        num_samples: M.
        generator: Source of random numbers.
        accumulate: How many batches make up a block.
        parameters: Parameters to differentiate by.
        progress: Whether a progress bar is shown.

    Returns:
        Shape [N], float64.

    Raises:
        ValueError: As `influence`.
        TypeError: If a batch is not (inputs, targets).

    """
    _require("self_influence", damping, fisher, num_samples, accumulate)
    given = dict(parameters) if parameters is not None else None
    blocks = _blocks(model, training, objective, given, accumulate, progress)
    found = [influence_products(None, block, fisher, num_samples, generator) for block in blocks]
    return torch.cat([each.diagonal() for each in _solved(found, damping)])


def _require(caller: str, damping: float, fisher: str | None, num_samples: int, accumulate: int) -> None:
    """Require options that make sense."""
    if fisher is not None:
        require_fisher(caller, fisher, num_samples)
    if accumulate < 1:
        raise ValueError(f"{caller}: accumulate={accumulate}: a block must be made of at least one batch.")
    if not 0 <= damping < math.inf:
        raise ValueError(f"{caller}: damping={damping} (λ): must be a finite number ≥ 0.")
    if damping == 0 and fisher in ("sampled", None):
        raise ValueError(f"{caller}: damping=0 (λ) with fisher={fisher!r}: F + λI is singular; must be positive.")


def _linearized(
    model: nn.Module,
    batch: Any,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter] | None,
    name: str,
) -> LinearizedBatch:
    """A batch, linearised; its rows are computed while the graph is as it was."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise TypeError(f"{name} must be (inputs, targets), got {type(batch).__name__}. Map your batches to that.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs, targets = move_data_to_device(batch, device)
    found = linearize(model, inputs, targets, objective, parameters=parameters)
    if found.not_finite is not None:
        raise ValueError(f"{name}: {found.not_finite}")
    return found


def _blocks(
    model: nn.Module,
    training: Iterable[Any],
    objective: Objective,
    parameters: Mapping[str, nn.Parameter] | None,
    accumulate: int,
    progress: bool,
) -> Iterator[LinearizedBatch]:
    """Blocks of training samples, linearised."""
    _require_order(training)
    bar = track(training, "Training samples", console=get_console(), disable=not progress, transient=True)
    linearized = (
        _linearized(model, batch, objective, parameters, f"Training batch {number}") for number, batch in enumerate(bar)
    )
    seen = False
    while parts := [*islice(linearized, accumulate)]:
        seen = True
        yield LinearizedBatch.of(parts)
    if not seen:
        raise ValueError("There are no training samples: the loader gave no batch.")


def _require_order(training: Iterable[Any]) -> None:
    """Require that columns can be told apart."""
    sampler = getattr(getattr(training, "batch_sampler", None), "sampler", getattr(training, "sampler", None))
    drawn = isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler)
    if drawn or (isinstance(sampler, DistributedSampler) and sampler.shuffle):
        raise ValueError(
            f"The loader draws its samples at random ({type(sampler).__name__}), so that nobody would know which "
            "sample a column belongs to: make one with shuffle=False."
        )


def _solved(products: list[InfluenceProducts], damping: float) -> Iterator[Tensor]:
    """The influence of the samples of each block."""
    start, total = 0, sum(each.samples for each in products)
    for each in products:
        try:
            yield each.influence(damping, each.samples / total)
        except ValueError as error:
            raise ValueError(f"Training samples {start} to {start + each.samples - 1}: {error}") from error
        start += each.samples
