"""`Objective`: a loss in logit space, of which `losses` is all that has to be written."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

__all__ = ["Objective", "basis", "per_sample", "require_floating", "require_same_shape", "require_tensor"]

# What `losses` says already, or has to go with it.
_DERIVED = (
    "gradient",
    "sample",
    "sampled_gradient",
    "curvature",
    "hessian_form",
    "hessian_product",
    "hessian_factor",
)

# What counts as rounding of the eigenvalues of a Hessian over its largest one, and of the part of a gradient that it
# does not span, by dtype.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


class Objective(ABC):
    """Per-sample loss, its gradient and curvature in the logits, and its predictive distribution.

    Logits z have shape [N, ...]; what targets y look like, each objective says. Logits in half precision are computed
    with in float32.

    A loss of one's own is `losses`. Gradient and Hessian come from autograd, unless they are written, too; a `sample`
    that draws targets is needed for sampled Fisher matrices alone. Whatever is written is compared with autograd of
    `losses` on the first batch. What a class inherits was written for the `losses` beside it: a subclass of an
    objective that overrides `losses` has the rest from autograd again.

    Attributes:
        curvature: What `hessian_form` and its companions are: "hessian", ∇²_z l_n, or "fisher", the Fisher matrix of
            the predictive distribution, for losses that are not convex. Set it where they are written.

    Example:
        >>> class LogCosh(Objective):
        ...     def losses(self, logits, targets):
        ...         return torch.cosh(logits - targets).log().flatten(1).sum(1)
        >>> LogCosh().gradient(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
        tensor([[ 0.0000, -0.7616]])

    """

    curvature: ClassVar[Literal["hessian", "fisher"]] = "hessian"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _DERIVED:
            owner = next(each for each in cls.__mro__ if name in vars(each))
            of_owner = getattr(owner, "losses", Objective.losses)
            if of_owner not in (Objective.losses, cls.losses):
                setattr(cls, name, vars(Objective)[name])

    def validate(self, logits: Tensor, targets: Tensor) -> None:  # noqa: B027  # there may be nothing to check
        """Check targets against logits; nothing, unless a subclass does.

        Args:
            logits: z, shape [N, ...].
            targets: y.

        Raises:
            ValueError: If the shapes or values do not fit.
            TypeError: If the dtype does not fit.

        """

    @abstractmethod
    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Per-sample losses l_n, shape [N]: sums, not means, over all but dimension 0.

        Logits come in float32 or in float64: constants are to follow them, `.to(logits)`.
        """

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Gradient of each sample's loss in its logits, ∂l_n/∂z_n; shape of the logits. By autograd."""
        return _differentiate(self, logits, targets)

    def counted(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Which logits the losses depend on, bool, shape of the logits: all, unless a subclass says otherwise."""
        return torch.ones_like(logits, dtype=torch.bool)

    def sample(self, logits: Tensor, targets: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw targets ŷ from the predictive distribution p(y | z).

        Args:
            logits: z, shape [N, ...].
            targets: y; positions that count for nothing there count for nothing in the sample.
            generator: Source of randomness, on the device of the logits.

        Returns:
            ŷ, shape and dtype of the targets.

        Raises:
            NotImplementedError: If a subclass does not say how.

        """  # noqa: DOC202  # what subclasses return
        name = type(self).__name__
        raise NotImplementedError(
            f"{name} has `losses`, which say nothing of how targets are distributed. Write {name}.sample(logits, "
            "targets, generator) to draw them, or take a direction that draws none: IEF, EF, GaussNewton, "
            "NaturalGradient."
        )

    def sampled_gradient(self, logits: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:
        """Gradient g_n of which E[g_n g_nᵀ] = F_n over drawn targets, E[g_n] = 0; shape of the logits.

        That of the loss for the drawn targets, unless a subclass says otherwise: weights would count twice there.

        Args:
            logits: z, shape [N, ...].
            targets: y, of which a weight of the sample may depend.
            drawn: ŷ from `sample`.

        Returns:
            g, shape of the logits.

        """
        return self.gradient(logits, drawn)

    def hessian_form(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """Per-sample quadratic form of the curvature, u_nᵀ F_n u_n ≥ 0, shape [N]; u has the logits' shape.

        Args:
            logits: z, shape [N, ...].
            targets: y.
            tangents: u, shape of the logits.

        Returns:
            Shape [N].

        Raises:
            ValueError: If it is negative, where it is that of a Hessian by autograd.

        """  # noqa: DOC502  # raised by _require_positive
        return _along(self, logits, targets, tangents)[1]

    def hessian_product(self, logits: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """Product with the curvature, F_n u_n; u and the product have the logits' shape.

        Args:
            logits: z, shape [N, ...].
            targets: y.
            tangents: u, shape of the logits.

        Returns:
            Shape of the logits.

        Raises:
            ValueError: If u_nᵀ F_n u_n is negative, where F_n is a Hessian by autograd.

        """  # noqa: DOC502
        return _along(self, logits, targets, tangents)[0]

    def hessian_factor(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A square root of the curvature, column by column, and the gradient's coordinates in it.

        F_n = Σ_r a_nr a_nrᵀ and ∂l_n/∂z_n = Σ_r c_nr a_nr, with which the natural gradient is found without dividing
        the gradient by λ. Unless a subclass has a formula, by a dense Hessian of each sample, one backward pass for
        each logit.

        Args:
            logits: z, shape [N, ...].
            targets: y.

        Yields:
            For each r: a_r, shape of the logits, and c_r, shape [N], float64.

        Raises:
            ValueError: If a Hessian by autograd is not positive semidefinite, or does not span the gradient.

        """
        wide = logits.double()
        name, rounding = type(self).__name__, _ROUNDING[torch.float64]
        columns = [_differentiate(self, wide, targets, one_hot).flatten(1) for one_hot in basis(wide)]
        gradient = self.gradient(wide, targets).reshape(len(wide), -1, 1)
        hessian = torch.stack(columns, -1)
        eigenvalues, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        cut = rounding * eigenvalues.abs().amax(-1, keepdim=True)
        if bool((eigenvalues < -cut).any()):
            _refuse(name, eigenvalues.amin(-1))
        inside = eigenvalues > cut
        coordinates = (vectors.mT @ gradient)[..., 0]
        outside = torch.where(inside, 0.0, coordinates).norm(dim=-1)
        if bool((outside > rounding**0.5 * gradient.norm(dim=(1, 2))).any()):
            n = int((outside / gradient.norm(dim=(1, 2))).nan_to_num().argmax())
            raise ValueError(
                f"The Hessian of {name} does not span the gradient of sample {n}: it is flat where the loss still "
                "falls, so that the natural gradient is not defined by it. Write `hessian_form`, `hessian_product` and "
                '`hessian_factor` of a Fisher matrix, with curvature = "fisher" (see objectives.Huber), or take IEF.'
            )
        roots = torch.where(inside, eigenvalues, 0.0).sqrt()
        found = torch.where(inside, coordinates / roots, 0.0)
        for r in range(roots.shape[-1]):
            column = roots[:, r, None] * vectors[..., r]
            yield column.view_as(logits).to(logits.dtype), found[:, r]


def _differentiate(objective: Objective, logits: Tensor, targets: Tensor, tangents: Tensor | None = None) -> Tensor:
    """∂l_n/∂z_n, or (∇²_z l_n) u_n; samples are independent, so that the sum over them gives all at once."""
    with torch.inference_mode(False), torch.enable_grad():
        # Tensors of inference mode can't be saved for a backward pass.
        y = targets.clone() if targets.is_inference() else targets
        z = logits.detach().clone().requires_grad_()
        total = objective.losses(z, y).sum()
        (gradient,) = torch.autograd.grad(total, z, create_graph=tangents is not None)
        if tangents is None:
            return gradient.to(logits.dtype)
        if not gradient.requires_grad:  # piecewise linear
            return torch.zeros_like(logits)
        u = tangents.detach().clone().to(gradient.dtype)
        (product,) = torch.autograd.grad(gradient, z, u, materialize_grads=True)
        return product.to(logits.dtype)


def _along(objective: Objective, logits: Tensor, targets: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """H_n u_n and u_nᵀ H_n u_n of the Hessian by autograd, which is refused where that is negative."""
    product = _differentiate(objective, logits, targets, tangents)
    form = per_sample(tangents * product)
    size = per_sample(tangents.square()).sqrt() * per_sample(product.square()).sqrt()
    if bool((form < -_ROUNDING.get(form.dtype, 1e-2) * size).any()):
        _refuse(type(objective).__name__, form)
    return product, form.clamp(min=0)


def _refuse(name: str, values: Tensor) -> None:
    raise ValueError(
        f"The Hessian of {name} is not positive semidefinite ({float(values.min()):.1e} along a direction of one of "
        "its samples), so that it is no Fisher matrix: γ and the natural gradient are not defined by it. Write "
        "`hessian_form`, `hessian_product` and `hessian_factor` of the Fisher matrix of a distribution, with "
        'curvature = "fisher" (see objectives.Gaussian), or take IEF, EF or GaussNewton, which need the gradient alone.'
    )


def per_sample(x: Tensor) -> Tensor:
    """Sum over everything but dimension 0."""
    return x.flatten(1).sum(1) if x.ndim > 1 else x


def basis(like: Tensor) -> Iterator[Tensor]:
    """One-hot arrays over all but dimension 0, one for every logit of a sample."""
    for r in range(like.shape[1:].numel()):
        one_hot = torch.zeros_like(like, memory_format=torch.contiguous_format)
        one_hot.view(len(like), -1)[:, r] = 1.0
        yield one_hot


def require_same_shape(objective: Objective, logits: Tensor, targets: Tensor) -> None:
    """Require targets of the shape of the logits, in floating point.

    Args:
        objective: Who needs them.
        logits: z.
        targets: y.

    Raises:
        ValueError: If the shapes differ.

    """
    name = type(objective).__name__
    if targets.shape != logits.shape:
        raise ValueError(
            f"{name} needs targets of the shape of the logits, got logits {tuple(logits.shape)} and "
            f"targets {tuple(targets.shape)}."
        )
    require_floating(name, targets)


def require_floating(name: str, targets: Tensor) -> None:
    """Require targets of floating point.

    Args:
        name: Who needs them.
        targets: y.

    Raises:
        TypeError: If they are something else.

    """
    if not targets.is_floating_point():
        raise TypeError(f"{name} needs targets of floating point, got {targets.dtype}: targets.to(logits.dtype).")


def require_tensor(targets: Any) -> None:
    """Require targets that are one tensor.

    Args:
        targets: y.

    Raises:
        TypeError: If they are something else; it names the line to write.

    """
    if isinstance(targets, Tensor):
        return
    kind = f"{type(targets).__module__}.{type(targets).__qualname__}".removeprefix("builtins.")
    if isinstance(targets, dict):
        line = f"unpack_batch: return inputs, targets[{next(iter(targets), 'labels')!r}]"
    elif isinstance(targets, tuple | list) and any(isinstance(x, Tensor) for x in targets):
        line = (
            "unpack_batch: return inputs, torch.stack(targets, dim=-1), for several heads with objectives.WeightedSum"
        )
    else:
        line = "unpack_batch: return inputs, torch.as_tensor(targets)"
    raise TypeError(f"Targets are one tensor, samples on dimension 0; got {kind}. Write in {line}.")
