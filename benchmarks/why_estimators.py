"""What directions of different batches have in common, and what each is worth on other data than its own."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_ief.capture import push_forward
from lightning_ief.objectives import Objective

__all__ = [
    "Along",
    "actual_decreases",
    "along",
    "best_decreases",
    "common_square",
    "cosine_in_common",
    "decrease_at_one_length",
    "gram_of",
    "share_in_common",
]

_TOGETHER = 4  # directions that share a forward pass


def gram_of(directions: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Inner products ⟨d_b, d_b'⟩ of directions.

    Args:
        directions: B of them, {parameter name: tensor}.

    Returns:
        Shape [B, B], float64.
    """
    gram = torch.zeros(len(directions), len(directions), dtype=torch.float64)
    for name in directions[0]:
        rows = torch.stack([direction[name].flatten() for direction in directions]).double()
        gram.addmm_(rows, rows.T)
    return gram


def common_square(gram: Tensor) -> float:
    """‖E d‖² without bias: ⟨d_b, d_b'⟩ in the mean over the pairs of different batches, of which each is a sample.

    ‖mean of d_b‖² itself is too large by (E‖d‖² − ‖E d‖²)/B.

    Args:
        gram: ⟨d_b, d_b'⟩, shape [B, B], B ≥ 2; in any metric.

    Returns:
        An estimate of ‖E d‖²; of directions that have little in common it may be below 0.
    """
    count = len(gram)
    return float((gram.sum() - gram.trace()) / (count * (count - 1)))


def share_in_common(gram: Tensor) -> float:
    """c = ‖E d‖² / E‖d‖²: 1 if all batches have the same direction, 0 if these have nothing in common.

    Args:
        gram: ⟨d_b, d_b'⟩, shape [B, B].

    Returns:
        c, by `common_square`.
    """
    return common_square(gram) / float(gram.diagonal().mean())


def cosine_in_common(gram: Tensor) -> float:
    """The mean cosine between directions of two batches: c of directions that are scaled to one length.

    Args:
        gram: ⟨d_b, d_b'⟩, shape [B, B].

    Returns:
        The mean over the pairs.
    """
    lengths = gram.diagonal().sqrt()
    return common_square(gram / torch.outer(lengths, lengths))


class Along(NamedTuple):
    """The local model of a mean loss L along directions, L(θ − α d) ≈ L − α ∇Lᵀd + ½ α² dᵀFd.

    Attributes:
        slopes: ∇Lᵀd, shape [K], float64.
        gram: dᵀFd' of all pairs, shape [K, K], float64; F is the Fisher matrix of the mean loss.
    """

    slopes: Tensor
    gram: Tensor

    @property
    def curvatures(self) -> Tensor:
        """dᵀFd, shape [K]."""
        return self.gram.diagonal()


def along(
    net: nn.Module, samples: tuple[Tensor, Tensor], objective: Objective, directions: Sequence[Mapping[str, Tensor]]
) -> Along:
    """The local model of samples along directions, exactly: u_n = (∂z_n/∂θ) d by forward mode, and no F.

    With ∇²_z l_n = Σ_r a_nr a_nrᵀ, dᵀFd' is the mean over n of Σ_r ⟨a_nr, u_n⟩⟨a_nr, u'_n⟩.

    Args:
        net: The model.
        samples: Inputs and targets.
        objective: The loss of a sample.
        directions: K of them, {parameter name: tensor}.

    Returns:
        Slopes and curvatures.
    """
    slopes, parts = [], []
    for start in range(0, len(directions), _TOGETHER):
        logits, tangents = push_forward(net, *samples, objective, directions[start : start + _TOGETHER])
        z, u = logits.double(), tangents.double().flatten(2)
        slopes.append((u * objective.gradient(z, samples[1]).flatten(1)).sum((1, 2)) / len(z))
        columns = [column.flatten(1) for column, _ in objective.hessian_factor(z, samples[1])]
        parts.append(torch.cat([(u * column).sum(2) for column in columns], dim=1) / len(z) ** 0.5)
    rows = torch.cat(parts)
    return Along(torch.cat(slopes), rows @ rows.T)


def best_decreases(slopes: Tensor, curvatures: Tensor) -> Tensor:
    """Decrease of the local model along each direction with the best step length, (∇Lᵀd)²/(2 dᵀFd) = 1/(2γ²).

    Args:
        slopes: ∇Lᵀd, shape [K].
        curvatures: dᵀFd, shape [K].

    Returns:
        Shape [K]; 0 where −d leads uphill, since no step is best there.
    """
    return torch.where(slopes > 0, slopes.square() / (2 * curvatures), 0.0)


def decrease_at_one_length(found: Along) -> float:
    """The decrease in the mean over directions which all have the same, best step length, (E ∇Lᵀd)²/(2 E dᵀFd).

    That is c in the metric F, (E d)ᵀF(E d)/(E dᵀFd), times the decrease along the mean direction, E d.

    Args:
        found: The local model along directions of different batches.

    Returns:
        The decrease, without bias by the choice of the length; 0 if the mean direction leads uphill.
    """
    if float(found.slopes.sum()) <= 0:
        return 0.0
    return common_square(torch.outer(found.slopes, found.slopes)) / (2 * float(found.curvatures.mean()))


@torch.no_grad()
def actual_decreases(
    net: nn.Module,
    samples: tuple[Tensor, Tensor],
    objective: Objective,
    directions: Sequence[Mapping[str, Tensor]],
    lengths: Tensor,
    factors: Sequence[float],
) -> Tensor:
    """Decrease of the mean loss itself along each direction, with the best of a few step lengths, or none.

    Args:
        net: The model.
        samples: Inputs and targets.
        objective: The loss of a sample.
        directions: K of them, {parameter name: tensor}.
        lengths: A step length for each, shape [K]; those that are not above 0 are not tried.
        factors: What these are multiplied by, in turn.

    Returns:
        Shape [K], float64, at least 0.
    """
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(values: Mapping[str, Tensor]) -> float:
        logits = torch.func.functional_call(net, dict(values), (samples[0],))
        return float(objective.losses(logits, samples[1]).double().mean())

    here, found = loss(parameters), []
    for direction, length in zip(directions, lengths.tolist(), strict=True):
        tried = [
            loss({name: p - factor * length * direction[name] for name, p in parameters.items()})
            for factor in (factors if length > 0 else ())
        ]
        found.append(here - min([here, *(value for value in tried if value < here)]))
    return torch.tensor(found, dtype=torch.float64)
