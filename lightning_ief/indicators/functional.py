"""The indicators of Wu et al., arXiv 2406.06420, as pure functions of a linearization.

γ(d) is the reciprocal of the loss decrease that a direction achieves per unit of distance in the Fisher metric, to
first order; the natural gradient minimises it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ief.capture import Direction, LinearizedBatch, push_forward
from lightning_ief.capture.batch import gamma_terms_of
from lightning_ief.linalg.vectors import check_same_space
from lightning_ief.objectives import Objective, as_objective

__all__ = [
    "gamma", "gammas", "gradient_noise", "gradient_norm_imbalance", "loss_gradient_norm", "measure_gammas",
    "projections",
]  # fmt: skip

# Where √(dᵀFd) lies between these, no product was out of range.
_SMALL, _LARGE = 1e-9, 1e9

# Directions that share a forward pass: more would save little, and each takes the memory of a forward pass.
_TOGETHER = 4


def gamma(linearization: LinearizedBatch, direction: Mapping[str, Tensor]) -> Tensor:
    """γ(d) = √(dᵀFd) / |dᵀ∇L|; smaller is closer to the natural gradient. Does not depend on the length of d.

    F and L are sums over the batch. Fd is never formed: with u_n = (∂z_n/∂θ) d, one forward-mode product,
    dᵀFd = Σ_n u_nᵀ(∇²_z l_n)u_n and dᵀ∇L = Σ_n ⟨∂l_n/∂z_n, u_n⟩.

    Args:
        linearization: Model and batch.
        direction: d, {parameter name: tensor}, an entry for every trainable parameter.

    Returns:
        float64 scalar; inf if dᵀ∇L = 0 (a direction that does not change the loss, the zero direction too).

    Raises:
        ValueError: If names or shapes of d do not fit.

    """
    return gammas(linearization, [direction])[0]


def gammas(linearization: LinearizedBatch, directions: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """γ of several directions, which share the forward pass that they need; see `gamma`.

    Args:
        linearization: Model and batch.
        directions: Each {parameter name: tensor}, an entry for every trainable parameter. Four at a time are taken
            from an iterator.

    Returns:
        Shape [K], float64; inf for a direction that does not change the loss.

    Raises:
        ValueError: If names or shapes of a direction do not fit.

    """
    # Only as many are formed at a time as share a forward pass.
    formed = (Direction.of(direction).form() for direction in directions)
    return _in_groups(formed, linearization.parameters, linearization.gamma_terms)


def measure_gammas(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    objective: Objective | nn.Module,
    directions: Iterable[Mapping[str, Tensor]],
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
) -> Tensor:
    """γ of directions that are there already, such as the updates of any optimizer, on a batch; see `gamma`.

    Needs a forward pass for every four directions and two products as large as one for each direction; no graph and no
    Jacobian. The first batch of a model costs more: see `push_forward`.

    Args:
        model: The model. Its output is the logits or an object with `.logits`, samples on dimension 0.
        inputs: A tensor, a tuple (positional arguments) or a dict (keyword arguments).
        targets: y, what the objective says, samples on dimension 0.
        objective: Turns logits and targets into per-sample losses l_n; L = Σ l_n, sums and not means.
        directions: Each {parameter name: tensor}, an entry for every trainable parameter.
        parameters: Parameters to differentiate by; all with requires_grad if None.

    Returns:
        Shape [K], float64; inf for a direction that does not change the loss.

    Raises:
        CaptureError: If the model can't be linearised, or its logits have no derivative along a direction.
        ValueError: If names or shapes of a direction, or those of the batch, do not fit.

    Example:
        >>> from lightning_ief import objectives
        >>> model = nn.Linear(3, 2)
        >>> before = {name: p.detach().clone() for name, p in model.named_parameters()}
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> torch.optim.Adam(model.parameters()).step()
        >>> update = {name: before[name] - p.detach() for name, p in model.named_parameters()}
        >>> measure_gammas(model, x, y, objectives.CrossEntropy(), [update]).shape
        torch.Size([1])

    """
    if parameters is None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    taken = as_objective(objective)

    def terms(group: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
        logits, tangents = push_forward(model, inputs, targets, taken, group, parameters=parameters)
        return gamma_terms_of(taken, logits, targets, tangents)

    return _in_groups(directions, parameters, terms)


def _in_groups(
    directions: Iterable[Mapping[str, Tensor]],
    parameters: Mapping[str, Tensor],
    terms: Callable[[Sequence[Mapping[str, Tensor]]], tuple[Tensor, Tensor]],
) -> Tensor:
    """γ from dᵀFd and dᵀ∇L of so many directions at a time, whatever their length."""
    remaining, found = iter(directions), []
    while group := list(islice(remaining, _TOGETHER)):
        for direction in group:
            check_same_space(direction, parameters)
        for direction, curvature, slope in zip(group, *terms(group), strict=True):
            # The length of d cancels: where products left the range of the numbers, once more with another length.
            if not _SMALL < float(curvature.sqrt()) < _LARGE:
                size = max(float(torch.linalg.vector_norm(entry, float("inf"))) for entry in direction.values())
                if 0 < size < float("inf"):
                    scaled = {name: entry / size for name, entry in direction.items()}
                    ((curvature,), (slope,)) = terms([scaled])  # noqa: PLW2901
            infinite = torch.full_like(slope, float("inf"))
            found.append(torch.where(slope == 0, infinite, curvature.sqrt() / slope.abs()))
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def gradient_norm_imbalance(linearization: LinearizedBatch) -> Tensor:
    """Largest over smallest norm of a sample's gradient, max_n |∇l_n| / min_n |∇l_n|.

    The paper's measure of how strongly EF's inversely-scaled projection distorts: EF pushes a sample with a small
    gradient as hard as one with a large gradient.

    Args:
        linearization: Model and batch.

    Returns:
        float64 scalar ≥ 1; inf if a sample's gradient is zero (and another's is not), NaN if all are.

    """
    norms = linearization.jacobian.row_norms()
    return norms.max() / norms.min()


def loss_gradient_norm(linearization: LinearizedBatch) -> Tensor:
    """‖∇L‖ of the summed loss, from the Gram matrix of a batch: √(Σ_nm K_nm). No gradient is formed.

    Over N it is the norm of the gradient of the mean loss, which an optimizer of torch would see in `.grad`.

    Args:
        linearization: Model and batch.

    Returns:
        float64 scalar.

    """
    return linearization.jacobian.gram().sum().clamp(min=0).sqrt()


def gradient_noise(linearization: LinearizedBatch) -> tuple[Tensor, Tensor]:
    """Noise tr Σ and size ‖∇L‖² of the mean gradient, both without bias, from the Gram matrix of a batch.

    Of gradients that are drawn with mean ∇L and covariance Σ, tr Σ / ‖∇L‖² is the batch size at which noise is as large
    as the gradient, the simple noise scale of McCandlish et al., arXiv 1812.06162: larger batches help little. Means
    over batches are taken of each of the two, see `NoiseScale`; their ratio in one batch is biased.

    Args:
        linearization: Model and batch, of at least two samples.

    Returns:
        tr Σ and ‖∇L‖² of the mean loss, float64 scalars; the latter may be negative where noise is larger.

    Raises:
        ValueError: If there is one sample only.

    """
    samples = linearization.num_samples
    if samples < 2:
        raise ValueError("The noise of gradients needs a batch of at least two samples.")
    gram = linearization.jacobian.gram()
    square = gram.sum() / samples**2  # of the mean gradient of the batch
    noise = (gram.diagonal().mean() - square) * samples / (samples - 1)
    return noise, square - noise / samples


def projections(linearization: LinearizedBatch, direction: Mapping[str, Tensor]) -> Tensor:
    """Projection of an update on each sample, J d: the rate at which it lowers the sample's loss, ⟨∇l_n, d⟩.

    EF has the same for all samples, whatever their loss (the inversely-scaled projection issue); iEF has ‖∂l_n/∂z_n‖².

    Args:
        linearization: Model and batch.
        direction: d, {parameter name: tensor}, an entry for every trainable parameter.

    Returns:
        Shape [N], float64.

    Raises:
        ValueError: If names or shapes of d do not fit.

    """
    return linearization.jacobian.matvec(Direction.of(direction).form())
