"""Losses of a softmax over classes: cross-entropy, with weights, smoothing or soft targets, and focal."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ief.linalg.scaling import upcast, wide
from lightning_ief.linalg.vectors import chunks
from lightning_ief.objectives.base import Objective, per_sample

__all__ = ["CrossEntropy", "Focal"]

_HALF = 0.5


class CrossEntropy(Objective):
    """Softmax cross-entropy over classes on the last dimension of the logits.

    Logits [N, ..., C]. Targets are classes, int64 [N, ...] with values 0 … C−1, or −100 for positions that count for
    nothing; or soft, probabilities [N, ..., C] in floating point, all 0 for such positions.
    l_n = −Σ_t Σ_c q_ntc log softmax(z_nt)_c, summed over the positions t of sample n, with the targets q; of a class y,
    log softmax(z_nt)[y_nt].

    Class weights w and label smoothing ε are those of torch.nn.CrossEntropyLoss: w_c ((1 − ε) q_c + ε/C) stands for
    q_c. Nothing is divided by a sum of weights. F_n is the Hessian, m_nt (diag p − p pᵀ) with the mass m = Σ_c q_c of a
    position.

    Args:
        weight: w, one for each class, shape [C]; 1 if None.
        label_smoothing: ε, between 0 and 1.
        ignore_index: The class of positions that count for nothing.

    Raises:
        ValueError: If ε is out of range, or a weight is negative.

    Example:
        >>> CrossEntropy().losses(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
        >>> CrossEntropy(weight=[1.0, 1.0, 1.0, 2.0]).losses(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 2.7726])

    """

    def __init__(
        self, weight: Tensor | Sequence[float] | None = None, label_smoothing: float = 0.0, ignore_index: int = -100
    ) -> None:
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"CrossEntropy(label_smoothing={label_smoothing}) (ε): must be between 0 and 1.")
        self.weight = None if weight is None else torch.as_tensor(weight, dtype=torch.float64).detach()
        if self.weight is not None and not bool(((self.weight >= 0) & self.weight.isfinite()).all()):
            raise ValueError("CrossEntropy(weight=...) (w): must be ≥ 0, for no class may gain by being wrong.")
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index

    def validate(self, logits: Tensor, targets: Tensor) -> None:  # noqa: D102
        classes = logits.shape[-1] if logits.ndim else 0
        if self.weight is not None and self.weight.shape != (classes,):
            raise ValueError(
                f"CrossEntropy has weights of shape {tuple(self.weight.shape)}, for logits {tuple(logits.shape)}: one "
                "for each class."
            )
        if targets.is_floating_point() and targets.shape == logits.shape:
            _require_probabilities(targets)
            return
        if targets.dtype != torch.int64:
            raise TypeError(
                f"CrossEntropy needs classes of dtype int64 as targets, got {targets.dtype} of shape "
                f"{tuple(targets.shape)} for logits {tuple(logits.shape)}: targets.long(). Probabilities have the "
                "shape of the logits; for real values use LeastSquares."
            )
        if logits.ndim < 2 or targets.shape != logits.shape[:-1]:
            more = logits.shape[1] - targets.shape[1] if logits.ndim - 1 == targets.ndim == 2 else 0
            remedy = "The classes stand on the last dimension: logits.movedim(1, -1)."
            if more > 0 and logits.shape[-1] != targets.shape[1]:
                remedy = (
                    f"There are {more} positions too many: slice off virtual tokens of a prompt, logits[:, {more}:]."
                )
            raise ValueError(
                f"CrossEntropy needs logits [N, ..., C] and targets [N, ...], got logits {tuple(logits.shape)} and "
                f"targets {tuple(targets.shape)}. {remedy}"
            )
        if classes == 1:
            raise ValueError(
                f"CrossEntropy got logits {tuple(logits.shape)}: over one class the loss is constant. Use "
                "BinaryCrossEntropy for two classes in one logit, LeastSquares for real values."
            )
        # On other devices the look would stall the device; its kernels assert the range.
        if targets.device.type != "cpu" or not targets.numel():
            return
        least, most = torch.aminmax(targets)
        if least >= 0 and most < classes:
            return
        wrong = targets[(targets != self.ignore_index) & ((targets < 0) | (targets >= classes))]
        if len(wrong):
            raise ValueError(
                f"CrossEntropy got class {int(wrong[0])} for logits of {classes} classes; "
                f"only {self.ignore_index} marks a position to leave out."
            )

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        if self._weighs(targets):
            q, log_p = self._soft(logits, targets), torch.log_softmax(upcast(logits), dim=-1)
            return per_sample(-torch.where(q > 0, q * log_p, 0.0).sum(-1))
        per_position = F.cross_entropy(
            upcast(logits).flatten(0, -2), targets.flatten(), ignore_index=self.ignore_index, reduction="none"
        )
        return per_sample(per_position.view(targets.shape))

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        if self._weighs(targets):
            p, q = torch.softmax(upcast(logits), dim=-1), self._soft(logits, targets)
            # m p − q, in which nothing cancels where a sample is almost fitted.
            return (p * _others(q) - q * _others(p)).to(logits.dtype)
        ignored = (targets == self.ignore_index).unsqueeze(-1)
        classes = self._classes(targets).unsqueeze(-1)
        # p_y − 1 = −Σ p of the other classes, in which nothing cancels where the sample is almost fitted. In place:
        # with a large vocabulary, logits and gradient are most of what a step needs.
        gradient = torch.softmax(logits.detach(), dim=-1, dtype=wide(logits.dtype)).scatter_(-1, classes, 0.0)
        gradient.scatter_(-1, classes, -gradient.sum(-1, keepdim=True))
        return gradient.masked_fill_(ignored, 0.0).to(logits.dtype)

    def sample(  # noqa: D102
        self, logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        rows = logits.detach().flatten(0, -2)
        drawn = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        for part in chunks(len(rows), rows.shape[-1]):
            p = torch.softmax(upcast(rows[part]), dim=-1)
            drawn[part] = torch.multinomial(p, 1, generator=generator)[:, 0]
        drawn = drawn.view(logits.shape[:-1])
        if targets.is_floating_point():
            counts = targets.sum(-1, keepdim=True) > 0
            return (F.one_hot(drawn, logits.shape[-1]) * counts).to(targets.dtype)
        return torch.where(targets == self.ignore_index, targets, drawn)

    def sampled_gradient(self, logits: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:  # noqa: D102
        if not self._weighs(targets) and self.ignore_index < 0:
            return self.gradient(logits, drawn)
        root = self._soft(logits, targets).sum(-1, keepdim=True).sqrt()
        # Of drawn classes all count, also that which marks positions of the targets.
        classes = drawn.clamp(0, logits.shape[-1] - 1)
        return (root * CrossEntropy(ignore_index=-1).gradient(upcast(logits), classes)).to(logits.dtype)

    def hessian_form(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        z, u = logits.flatten(0, -2), tangents.flatten(0, -2)
        form = torch.empty(len(z), dtype=torch.promote_types(wide(z.dtype), u.dtype), device=z.device)
        for part in chunks(len(z), z.shape[-1]):
            p = torch.softmax(upcast(z[part]), dim=-1)
            centred = u[part] - (p * u[part]).sum(-1, keepdim=True)  # the variance form cannot turn negative
            form[part] = (p * centred.square_()).sum(-1)
        form = form.view(logits.shape[:-1])
        if self._weighs(targets):
            return per_sample(self._soft(logits, targets).sum(-1) * form)
        return per_sample(torch.where(targets == self.ignore_index, 0.0, form))

    def hessian_product(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        p = torch.softmax(upcast(logits), dim=-1)
        product = p * (tangents - (p * tangents).sum(-1, keepdim=True))
        if self._weighs(targets):
            return self._soft(logits, targets).sum(-1, keepdim=True) * product
        return torch.where((targets == self.ignore_index).unsqueeze(-1), 0.0, product)

    def counted(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        if self._weighs(targets):
            return (self._soft(logits, targets).sum(-1, keepdim=True) > 0).expand(logits.shape)
        return (targets != self.ignore_index)[..., None].expand(logits.shape)

    def hessian_factor(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        # ∇²_z l = m D (I − √p √pᵀ) D with D = diag(√p) has rank C − 1. The reflection that takes √p to −e_k, k the most
        # likely class, is orthogonal, so that its other columns Q_c span the complement of √p, and
        # ∇²_z l = m Σ_c (D Q_c)(D Q_c)ᵀ. One column for every class would make each sample's rows of the Gram depend on
        # each other, up to rounding.
        log_p = torch.log_softmax(logits.double(), dim=-1).reshape(len(logits), -1, logits.shape[-1])
        q = self._soft(logits.double(), targets).reshape(log_p.shape)
        log_top, top = log_p.max(-1, keepdim=True)
        root_top = (log_top / 2).exp()
        common = -(log_p.exp() / (1 + root_top)).scatter(-1, top, root_top)
        q_top, root_mass = q.gather(-1, top), q.sum(-1, keepdim=True).sqrt()
        q_others = q.scatter(-1, top, 0.0).sum(-1, keepdim=True)
        for shift in range(1, logits.shape[-1]):
            c = (top + shift) % logits.shape[-1]
            log_root = log_p.gather(-1, c) / 2
            root, q_c = log_root.exp(), q.gather(-1, c)
            columns = root_mass * root * common.scatter_add(-1, c, torch.ones_like(root))
            # Bounded, since infinity times a probability that has underflown to 0 would be NaN.
            fitted = root * (q_top / root_top + q_others / (1 + root_top))
            coordinates = fitted - torch.where(q_c > 0, q_c * (-log_root).clamp(max=350).exp(), 0.0)
            coordinates = torch.where(root_mass > 0, coordinates / root_mass, 0.0)
            for t in range(log_p.shape[1]):
                column = torch.zeros_like(columns)
                column[:, t] = columns[:, t]
                yield column.view(logits.shape).to(logits.dtype), coordinates[:, t, 0]

    def _weighs(self, targets: Tensor) -> bool:
        """Whether positions have another mass than 1, or targets than one class."""
        return self.weight is not None or self.label_smoothing > 0 or targets.is_floating_point()

    def _classes(self, targets: Tensor) -> Tensor:
        """Classes that can be looked up, any for positions that count for nothing."""
        return targets.clamp(min=0) if self.ignore_index < 0 else targets.masked_fill(targets == self.ignore_index, 0)

    def _soft(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The targets q, shape of the logits: 0 for positions that count for nothing."""
        classes, like = logits.shape[-1], upcast(logits.detach())
        if targets.is_floating_point():
            q = targets.to(like)
        else:
            ignored = (targets == self.ignore_index).unsqueeze(-1)
            q = (
                torch.zeros_like(like)
                .scatter_(-1, self._classes(targets).unsqueeze(-1), 1.0)
                .masked_fill_(ignored, 0.0)
            )
        if self.label_smoothing:
            q = (1 - self.label_smoothing) * q + self.label_smoothing / classes * q.sum(-1, keepdim=True)
        if self.weight is not None:
            if self.weight.device != like.device:
                self.weight = self.weight.to(like.device)
            q = q * self.weight.to(like.dtype)
        return q


class Focal(Objective):
    """Focal loss over classes on the last dimension of the logits (Lin et al., arXiv 1708.02002).

    Logits [N, ..., C], targets int64 [N, ...]; l_n = −Σ_t w_y (1 − p_y)^γ log p_y with y = y_nt, p = softmax(z_nt). Its
    Hessian may have negative eigenvalues. F_n is that of the softmax distribution, times w_y, as of `CrossEntropy`.

    Args:
        gamma: γ ≥ 0, how much less samples count that are fitted.
        weight: w, one for each class, shape [C]; 1 if None. Called α in the paper.
        ignore_index: The class of positions that count for nothing.

    Raises:
        ValueError: If γ or a weight is negative.

    Example:
        >>> Focal(gamma=2.0).losses(torch.zeros(1, 2), torch.tensor([0]))  # ¼ log 2
        tensor([0.1733])

    """

    curvature: ClassVar[Literal["hessian", "fisher"]] = "fisher"

    def __init__(
        self, gamma: float = 2.0, weight: Tensor | Sequence[float] | None = None, ignore_index: int = -100
    ) -> None:
        if not gamma >= 0:
            raise ValueError(f"Focal(gamma={gamma}) (γ): must be ≥ 0.")
        self.gamma = gamma
        self.cross_entropy = CrossEntropy(weight, ignore_index=ignore_index)

    def validate(self, logits: Tensor, targets: Tensor) -> None:  # noqa: D102
        if targets.is_floating_point():
            raise TypeError(f"Focal needs classes of dtype int64 as targets, got {targets.dtype}: targets.long().")
        self.cross_entropy.validate(logits, targets)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        q, log_p = self._fit(logits, targets)
        weight = self.cross_entropy._soft(logits, targets).sum(-1)
        return per_sample(-weight * q**self.gamma * log_p)

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return (self._slope(logits, targets)[..., None] * self.cross_entropy.gradient(logits, targets)).to(logits.dtype)

    def sample(  # noqa: D102
        self, logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.cross_entropy.sample(logits, targets, generator)

    def sampled_gradient(self, logits: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:  # noqa: D102
        return self.cross_entropy.sampled_gradient(logits, targets, drawn)

    def hessian_form(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return self.cross_entropy.hessian_form(logits, targets, tangents)

    def hessian_product(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return self.cross_entropy.hessian_product(logits, targets, tangents)

    def hessian_factor(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        slopes = self._slope(logits.double(), targets).reshape(len(logits), -1)
        for r, (column, coordinate) in enumerate(self.cross_entropy.hessian_factor(logits, targets)):
            yield column, coordinate * slopes[:, r % slopes.shape[1]]  # positions are the inner loop there

    def counted(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return self.cross_entropy.counted(logits, targets)

    def _fit(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """1 − p_y and log p_y, [N, ...], in which nothing cancels where p_y is almost 1."""
        log_p = torch.log_softmax(upcast(logits), dim=-1)
        ignored = targets == self.cross_entropy.ignore_index
        classes = targets.masked_fill(ignored, 0).unsqueeze(-1)
        q = log_p.exp().scatter(-1, classes, 0.0).sum(-1)
        log_p_y = log_p.gather(-1, classes)[..., 0]
        return q, torch.where(q < _HALF, torch.log1p(-q.clamp(max=_HALF)), log_p_y)

    def _slope(self, logits: Tensor, targets: Tensor) -> Tensor:
        """−∂l/∂(log p_y) of each position without its weight, [N, ...]: (1 − p)^γ − γ p (1 − p)^(γ − 1) log p."""
        q, log_p = self._fit(logits, targets)
        return q**self.gamma * (1 - self.gamma * log_p.exp() * torch.where(q > 0, log_p / q, -1.0))


def _others(x: Tensor) -> Tensor:
    """Σ_j≠c x_j for each c of the last dimension and x ≥ 0, without cancellation where x_c is almost all."""
    top = x.argmax(-1, keepdim=True)
    rest = x.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    return (x.sum(-1, keepdim=True) - x).scatter(-1, top, rest)


def _require_probabilities(targets: Tensor) -> None:
    # On other devices the look would stall the device.
    if targets.device.type != "cpu":
        return
    sums = targets.sum(-1, dtype=torch.float64)
    far = (sums - 1).abs() > 0.01  # noqa: PLR2004  # half precision
    if bool(((targets < 0).any(-1) | (far & (sums != 0))).any()):
        raise ValueError(
            "CrossEntropy takes targets of the shape of the logits for probabilities: ≥ 0, with a sum of 1 over the "
            "last dimension, or all 0 where a position counts for nothing. For real values use LeastSquares, for "
            "several labels at once BinaryCrossEntropy."
        )
