"""Objectives: what the package needs to know of a loss, all of it in logit space.

An objective maps the logits z_n and the target y_n of each sample to its loss l_n = −log p(y_n | z_n) (up to a
constant). The Fisher matrix is that of the predictive distribution p(y | z), and for the objectives here it equals
the Hessian ∇²_z l_n, so F = Σ_n J_znᵀ (∇²_z l_n) J_zn is also the generalised Gauss-Newton matrix
(Martens, arXiv 1412.1193, section 9).

Units: a sample is an index of dimension 0; l_n is the sum, never the mean, over everything else that the sample holds.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ief.linalg.scaling import upcast

__all__ = ["BinaryCrossEntropy", "CrossEntropy", "LeastSquares", "Objective"]

_IGNORED = -100


class Objective(ABC):
    """Per-sample loss, its gradient and Hessian in the logits, and its predictive distribution.

    Logits z have shape [N, ...]; what targets y look like, each objective says. Logits in half precision are computed
    with in float32.
    """

    @abstractmethod
    def validate(self, logits: Tensor, targets: Tensor) -> None:
        """Check targets against logits.

        Args:
            logits: z, shape [N, ...].
            targets: y.

        Raises:
            ValueError: If the shapes or values do not fit.
            TypeError: If the dtype does not fit.

        """

    @abstractmethod
    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Per-sample losses l_n, shape [N]."""

    @abstractmethod
    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Gradient of each sample's loss in its logits, ∂l_n/∂z_n, in closed form; shape of the logits."""

    def counted(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Which logits the losses depend on, bool, shape of the logits: all, unless a subclass says otherwise."""
        return torch.ones_like(logits, dtype=torch.bool)

    @abstractmethod
    def sample(self, logits: Tensor, targets: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw targets ŷ from the predictive distribution p(y | z).

        Args:
            logits: z, shape [N, ...].
            targets: y; positions that count for nothing there count for nothing in the sample.
            generator: Source of randomness, on the device of the logits.

        Returns:
            ŷ, shape and dtype of the targets.

        """

    @abstractmethod
    def hessian_form(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """Per-sample quadratic form of the Hessian, u_nᵀ (∇²_z l_n) u_n ≥ 0, shape [N]; u has the logits' shape."""

    @abstractmethod
    def hessian_product(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """Product with the Hessian, (∇²_z l_n) u_n; u and the product have the logits' shape."""

    @abstractmethod
    def hessian_factor(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A square root of the Hessian, column by column, and the gradient's coordinates in it.

        ∇²_z l_n = Σ_r a_nr a_nrᵀ and ∂l_n/∂z_n = Σ_r c_nr a_nr, with which the natural gradient is found without
        dividing the gradient by λ.

        Args:
            logits: z, shape [N, ...].
            targets: y.

        Yields:
            For each r: a_r, shape of the logits, and c_r, shape [N], float64.

        """


def _per_sample(x: Tensor) -> Tensor:
    """Sum over everything but dimension 0."""
    return x.flatten(1).sum(1) if x.ndim > 1 else x


def _basis(like: Tensor) -> Iterator[Tensor]:
    """One-hot arrays over all but dimension 0, one for every logit of a sample."""
    for r in range(like[0].numel()):
        one_hot = torch.zeros_like(like)
        one_hot.view(len(like), -1)[:, r] = 1.0
        yield one_hot


class CrossEntropy(Objective):
    """Softmax cross-entropy over classes on the last dimension of the logits.

    Logits [N, ..., C], targets int64 [N, ...] with values 0 … C−1, or −100 for positions that count for nothing.
    l_n = −Σ_t log softmax(z_nt)[y_nt], summed over the positions t of sample n.

    Example:
        >>> CrossEntropy().losses(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])

    """

    def validate(self, logits: Tensor, targets: Tensor) -> None:  # noqa: D102
        if targets.dtype != torch.int64:
            raise TypeError(
                f"CrossEntropy needs class indices of dtype int64 as targets, got {targets.dtype}. "
                "For probabilities per class use BinaryCrossEntropy, for real values LeastSquares."
            )
        if logits.ndim < 2 or targets.shape != logits.shape[:-1]:
            raise ValueError(
                f"CrossEntropy needs logits [N, ..., C] and targets [N, ...], got logits {tuple(logits.shape)} and "
                f"targets {tuple(targets.shape)}. The classes stand on the last dimension: logits.movedim(1, -1)."
            )
        if logits.shape[-1] == 1:
            raise ValueError(
                f"CrossEntropy got logits {tuple(logits.shape)}: over one class the loss is constant. Use "
                "BinaryCrossEntropy for two classes in one logit, LeastSquares for real values."
            )
        # On other devices the look would stall the device; its kernels assert the range.
        if targets.device.type != "cpu" or not targets.numel():
            return
        least, most = torch.aminmax(targets)
        if least >= 0 and most < logits.shape[-1]:
            return
        wrong = targets[(targets != _IGNORED) & ((targets < 0) | (targets >= logits.shape[-1]))]
        if len(wrong):
            raise ValueError(
                f"CrossEntropy got class {int(wrong[0])} for logits of {logits.shape[-1]} classes; "
                f"only {_IGNORED} marks a position to leave out."
            )

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        per_position = F.cross_entropy(
            upcast(logits).flatten(0, -2), targets.flatten(), ignore_index=_IGNORED, reduction="none"
        )
        return _per_sample(per_position.view(targets.shape))

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        ignored = (targets == _IGNORED).unsqueeze(-1)
        classes = targets.clamp(min=0).unsqueeze(-1)
        # p_y − 1 = −Σ p of the other classes, in which nothing cancels where the sample is almost fitted.
        others = torch.softmax(upcast(logits), dim=-1).scatter(-1, classes, 0.0)
        gradient = others.scatter(-1, classes, -others.sum(-1, keepdim=True))
        return gradient.masked_fill_(ignored, 0.0).to(logits.dtype)

    def sample(  # noqa: D102
        self, logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        p = torch.softmax(upcast(logits), dim=-1).flatten(0, -2)
        drawn = torch.multinomial(p, 1, generator=generator).view(targets.shape)
        return torch.where(targets == _IGNORED, targets, drawn)

    def hessian_form(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        p = torch.softmax(upcast(logits), dim=-1)
        centred = tangents - (p * tangents).sum(-1, keepdim=True)  # the variance form cannot turn negative
        form = (p * centred.square()).sum(-1)
        return _per_sample(torch.where(targets == _IGNORED, 0.0, form))

    def hessian_product(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        p = torch.softmax(upcast(logits), dim=-1)
        product = p * (tangents - (p * tangents).sum(-1, keepdim=True))
        return torch.where((targets == _IGNORED).unsqueeze(-1), 0.0, product)

    def counted(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return (targets != _IGNORED)[..., None].expand(logits.shape)

    def hessian_factor(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        # ∇²_z l = D (I − √p √pᵀ) D with D = diag(√p) has rank C − 1. The reflection that takes √p to −e_k, k the most
        # likely class, is orthogonal, so that its other columns Q_c span the complement of √p, and
        # ∇²_z l = Σ_c (D Q_c)(D Q_c)ᵀ. One column for every class would make each sample's rows of the Gram depend on
        # each other, up to rounding.
        log_p = torch.log_softmax(logits.double(), dim=-1).view(len(logits), -1, logits.shape[-1])
        y = targets.reshape(len(targets), -1, 1)
        log_top, top = log_p.max(-1, keepdim=True)
        root_top = (log_top / 2).exp()
        common = -(log_p.exp() / (1 + root_top)).scatter(-1, top, root_top)
        # Bounded, since infinity times a probability that has underflown to 0 would be NaN.
        inverse_root = (-log_p.gather(-1, y.clamp(min=0)) / 2).clamp(max=350).exp()
        for shift in range(1, logits.shape[-1]):
            c = (top + shift) % logits.shape[-1]
            root = (log_p.gather(-1, c) / 2).exp()
            columns = root * common.scatter_add(-1, c, torch.ones_like(root))
            coordinates = root / torch.where(y == top, root_top, 1 + root_top) - torch.where(y == c, inverse_root, 0.0)
            for t in range(y.shape[1]):
                counts = y[:, t] != _IGNORED
                column = torch.zeros_like(columns)
                column[:, t] = torch.where(counts, columns[:, t], 0.0)
                coordinate = torch.where(counts, coordinates[:, t], 0.0)
                yield column.view_as(logits).to(logits.dtype), coordinate[:, 0]


class LeastSquares(Objective):
    """Half the squared distance to real-valued targets.

    Logits and targets of the same shape [N, ...]; l_n = ½ Σ_i (z_ni − y_ni)². The predictive distribution is Gaussian
    with unit variance.

    Example:
        >>> LeastSquares().losses(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
        tensor([2.5000])

    """

    def validate(self, logits: Tensor, targets: Tensor) -> None:  # noqa: D102
        _validate_same_shape(self, logits, targets)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return _per_sample((upcast(logits) - targets).square() / 2)

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return (upcast(logits) - targets).to(logits.dtype)

    def sample(  # noqa: D102
        self, logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        noise = torch.randn(logits.shape, dtype=targets.dtype, device=logits.device, generator=generator)
        return logits + noise

    def hessian_form(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return _per_sample(tangents.square())

    def hessian_product(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        return tangents

    def hessian_factor(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        residual = (logits - targets).double().flatten(1) if logits.ndim > 1 else (logits - targets).double()[:, None]
        for r, one_hot in enumerate(_basis(logits)):
            yield one_hot, residual[:, r]


class BinaryCrossEntropy(Objective):
    """Independent logistic regressions, one for every logit.

    Logits and targets of the same shape [N, ...], targets floating point in [0, 1] (checked on the CPU only: on a GPU
    the check would stall the device);
    l_n = Σ_i −y_ni log σ(z_ni) − (1 − y_ni) log σ(−z_ni). The predictive distribution is Bernoulli.

    Example:
        >>> BinaryCrossEntropy().losses(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
        tensor([1.3863])

    """

    def validate(self, logits: Tensor, targets: Tensor) -> None:  # noqa: D102
        _validate_same_shape(self, logits, targets)
        if targets.device.type == "cpu" and ((targets < 0) | (targets > 1)).any():
            raise ValueError("BinaryCrossEntropy needs targets between 0 and 1.")

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        z = upcast(logits)
        return _per_sample(F.binary_cross_entropy_with_logits(z, targets.to(z.dtype), reduction="none"))

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        z = upcast(logits)
        # y = 1: σ(z) − 1 = −σ(−z); written so that nothing cancels where the sample is fitted.
        return ((1 - targets) * z.sigmoid() - targets * (-z).sigmoid()).to(logits.dtype)

    def sample(  # noqa: D102
        self, logits: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        return torch.bernoulli(upcast(logits).sigmoid(), generator=generator).to(targets.dtype)

    def hessian_form(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        z = upcast(logits)
        return _per_sample(z.sigmoid() * (-z).sigmoid() * tangents.square())

    def hessian_product(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:  # noqa: D102
        z = upcast(logits)
        return z.sigmoid() * (-z).sigmoid() * tangents

    def hessian_factor(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        z = logits.double()
        # √(σ(z) σ(−z)) in the log domain: the product underflows long before the gradient does.
        root = ((F.logsigmoid(z) + F.logsigmoid(-z)) / 2).clamp(min=-350).exp()
        gradient = (1 - targets) * z.sigmoid() - targets * (-z).sigmoid()
        for one_hot in _basis(z):
            yield (root * one_hot).to(logits.dtype), _per_sample(one_hot * gradient / root)


def _validate_same_shape(objective: Objective, logits: Tensor, targets: Tensor) -> None:
    name = type(objective).__name__
    if targets.shape != logits.shape:
        raise ValueError(
            f"{name} needs targets of the shape of the logits, got logits {tuple(logits.shape)} and "
            f"targets {tuple(targets.shape)}."
        )
    if not targets.is_floating_point():
        raise TypeError(f"{name} needs targets of floating point, got {targets.dtype}: targets.to(logits.dtype).")
