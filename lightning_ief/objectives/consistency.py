"""Whether an objective's gradient, curvature and sampling are those of its losses, by comparison with autograd.

In float64, with random numbers of its own. Objectives of this package are not looked at: their tests do.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_ief.linalg.scaling import wide
from lightning_ief.objectives.base import Objective, per_sample
from lightning_ief.objectives.weighted_sum import WeightedSum

__all__ = ["require_consistent"]

_PACKAGE = __name__.rpartition(".")[0]

# Relative error that may be rounding: formulas may compute in float32.
_TOLERANCE = 1e-4

# At most so many logits are looked at; per sample, for what takes a column for each of them; and in sampling.
_LOGITS, _COLUMNS, _DRAWN_LOGITS = 2**18, 64, 2**22

# Targets drawn for a sample, and the standard errors by which their moments may be off: chance does that once in 10⁸.
_DRAWS, _ERRORS = 2048, 6.0


def require_consistent(objective: Objective, logits: Tensor, targets: Tensor) -> None:
    """Compare what an objective says with autograd of its losses, on some samples of a batch.

    The gradient of Σ w_n l_n for random w, the product of the Hessian with a random vector (where that is what its
    curvature is), its form and factor with that product; of drawn targets, that the mean of their gradients is 0 and
    their second moment the curvature along a random vector, at random logits. Sampling of more than 2¹⁴ logits a sample
    is not looked at.

    Args:
        objective: The objective.
        logits: z, shape [N, ...].
        targets: y.

    Raises:
        ValueError: If there is a contradiction; names what was found, and the remedy.

    """
    if _is_of_the_package(objective):
        # Of several heads each is asked alone: what one of them can't have is not missed before it is asked for.
        for head, _, z, y in objective.heads(logits, targets) if isinstance(objective, WeightedSum) else ():
            require_consistent(head, z, y)
        return
    samples = max(1, min(len(logits), _LOGITS // max(1, logits.shape[1:].numel())))
    generator = torch.Generator().manual_seed(0)
    z, y = logits[:samples].detach().double(), targets[:samples]
    devices = [logits.device] if logits.device.type == "cuda" else []
    with torch.inference_mode(False), torch.random.fork_rng(devices):
        # Like a clone, but of tensors of inference mode too; what is random in an objective is to leave no trace.
        z, y = z.clone(), y.clone()
        _require_gradient(objective, z, y, _random(z, generator), generator)
        _require_curvature(objective, z, y, _random(z, generator))
        _require_sampling(objective, z, y, wide(logits.dtype), generator)


def _is_of_the_package(objective: Objective) -> bool:
    """Whether all of its methods are the package's."""
    replaced = any(callable(getattr(Objective, name, None)) for name in vars(objective))
    return type(objective).__module__.startswith(f"{_PACKAGE}.") and not replaced


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, dtype=torch.float64, generator=generator).to(like.device)


def _ones(z: Tensor) -> Tensor:
    return torch.ones(len(z), dtype=z.dtype, device=z.device)


def _autograd(objective: Objective, z: Tensor, y: Tensor, w: Tensor, u: Tensor | None = None) -> Tensor:
    """Gradient of Σ w_n l_n; with u, the product of its Hessian with u."""
    name = type(objective).__name__
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        try:
            losses = objective.losses(z, y)
        except RuntimeError as error:
            raise ValueError(
                f"{name}.losses fails on logits of float64, in which γ and Hessians are computed ({error}). Have its "
                "constants follow the logits: .to(logits)."
            ) from error
        if losses.shape != z.shape[:1]:
            raise ValueError(
                f"{name}.losses returned shape {tuple(losses.shape)} for {len(z)} samples; expected one loss for each, "
                f"({len(z)},), the sum over the rest of a sample: losses.flatten(1).sum(1)."
            )
        if not losses.requires_grad:
            raise ValueError(
                f"{name}.losses has no gradient in the logits: compute it from them by differentiable functions of "
                "torch, without detach(), item() or no_grad()."
            )
        (gradient,) = torch.autograd.grad(
            (w * losses).sum(), z, create_graph=u is not None, allow_unused=True, materialize_grads=True
        )
        if u is None or not gradient.requires_grad:
            return gradient.detach() if u is None else torch.zeros_like(z)
        (product,) = torch.autograd.grad(gradient, z, u, allow_unused=True, materialize_grads=True)
        return product


def _overridden(objective: Objective, name: str) -> bool:
    return name in vars(objective) or getattr(type(objective), name) is not getattr(Objective, name)


def _differ(found: Tensor, expected: Tensor) -> float | None:
    """Their relative difference, where it is more than rounding and both are finite."""
    if found.shape != expected.shape:
        return float("inf")
    difference, size = (found.double() - expected).norm(), expected.norm()
    error = float(difference / size.clamp(min=1e-300))
    return error if error > _TOLERANCE and float(difference) > 1e-12 else None  # noqa: PLR2004


def _contradiction(objective: Objective, method: str, what: str) -> ValueError:
    name = type(objective).__name__
    return ValueError(
        f"{name}.{method} contradicts {name}.losses: {what}. Delete {name}.{method}, and what `losses` implies takes "
        "its place (see objectives.Objective), or correct it."
    )


def _require_gradient(
    objective: Objective, z: Tensor, y: Tensor, direction: Tensor, generator: torch.Generator
) -> None:
    w = torch.rand(len(z), dtype=torch.float64, generator=generator).to(z.device) + 0.5
    weighted, plain = (_autograd(objective, z, y, each) for each in (w, _ones(z)))
    if not (torch.isfinite(weighted).all() and torch.isfinite(plain).all()):
        return  # which training itself reports
    by_sample = w.view(-1, *(1,) * (z.ndim - 1))
    if (error := _differ(weighted, by_sample * plain)) is not None:
        name = type(objective).__name__
        raise ValueError(
            f"Samples influence each other in {name}.losses: with weights w_n, the gradient of Σ w_n l_n is off by "
            f"{error:.1e} from w_n ∂L/∂z_n. l_n may depend on sample n alone: no mean, maximum or norm over "
            "dimension 0."
        )
    found = objective.gradient(z, y)
    if (error := _differ(found, plain)) is not None:
        raise _contradiction(objective, "gradient", f"autograd's ∂l/∂z is another one, relative difference {error:.1e}")
    counted = objective.counted(z, y)
    if bool((~counted & (plain != 0)).any()):
        raise _contradiction(objective, "counted", "logits that it leaves out have a gradient")


def _require_curvature(objective: Objective, z: Tensor, y: Tensor, u: Tensor) -> None:
    written = [name for name in ("hessian_form", "hessian_product", "hessian_factor") if _overridden(objective, name)]
    if not written:
        return
    if objective.curvature == "hessian":
        product = _autograd(objective, z, y, _ones(z), u)
        what = 'autograd of `losses`, which objectives have whose curvature is "hessian"'
    elif len(written) < 3:  # noqa: PLR2004
        missing = sorted({"hessian_form", "hessian_product", "hessian_factor"} - {*written})
        name = type(objective).__name__
        raise ValueError(
            f'{name} has curvature = "fisher" and writes {written}, but not {missing}, which would be of the Hessian. '
            "Write them, too."
        )
    else:
        product, what = objective.hessian_product(z, y, u), "hessian_product"
    if not torch.isfinite(product).all():
        return
    expected = {"hessian_product": product, "hessian_form": per_sample(u * product)}
    for name in written:
        if name == "hessian_factor":
            if z.shape[1:].numel() <= _COLUMNS:
                _require_factor(objective, z, y, u, product, what)
            continue
        if (error := _differ(getattr(objective, name)(z, y, u), expected[name])) is not None:
            raise _contradiction(objective, name, f"relative difference {error:.1e} from {what}")


def _require_factor(objective: Objective, z: Tensor, y: Tensor, u: Tensor, product: Tensor, what: str) -> None:
    total, gradient = torch.zeros_like(z), torch.zeros_like(z)
    view = -1, *(1,) * (z.ndim - 1)
    for column, coordinate in objective.hessian_factor(z, y):
        total += per_sample(column * u).view(view) * column
        gradient += coordinate.view(view) * column
    if (error := _differ(total, product)) is not None:
        raise _contradiction(
            objective, "hessian_factor", f"Σ a aᵀ has a relative difference of {error:.1e} from {what}"
        )
    if (error := _differ(gradient, objective.gradient(z, y))) is not None:
        raise _contradiction(
            objective, "hessian_factor", f"Σ c a has a relative difference of {error:.1e} from the gradient"
        )


def _logits_to_sample_at(objective: Objective, z: Tensor, y: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Logits at which no target is rare, so that few of them tell the moments: around 0, or positive ones."""
    for logits in (_random(z, generator) / 2, _random(z, generator).abs() / 2 + 0.5):
        if torch.isfinite(objective.losses(logits, y)).all():
            yield logits


def _require_sampling(
    objective: Objective, z: Tensor, y: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> None:
    size = max(1, z.shape[1:].numel())
    if not _overridden(objective, "sample") or size * 256 > _DRAWN_LOGITS:
        return
    z, y = z[:4], y[:4]
    at = next(_logits_to_sample_at(objective, z, y, generator), None)
    if at is None:
        return
    draws = max(256, min(_DRAWS, _DRAWN_LOGITS // (size * len(z))))
    many, targets = (x.repeat(draws, *(1,) * (x.ndim - 1)) for x in (at, y))
    try:
        drawn, again = (
            objective.sample(many.to(dtype), targets, torch.Generator(z.device).manual_seed(seed)) for seed in (1, 1)
        )
    except NotImplementedError:  # as of an objective that asks another one
        return
    name = type(objective).__name__
    if drawn.shape != targets.shape or drawn.dtype != targets.dtype:
        raise ValueError(
            f"{name}.sample returned {drawn.dtype} of shape {tuple(drawn.shape)}, targets are {targets.dtype} of shape "
            f"{tuple(targets.shape)}: it must return what `losses` takes, such as drawn.to(targets)."
        )
    if not torch.equal(drawn, again):
        raise ValueError(
            f"{name}.sample draws other targets with the same generator: hand it on, torch.randn(..., "
            "generator=generator), or runs do not repeat."
        )
    u = _random(at, generator)
    along_u = u.repeat(draws, *(1,) * (u.ndim - 1))
    along = per_sample(objective.sampled_gradient(many, targets, drawn).double() * along_u).view(draws, -1)
    if _overridden(objective, "hessian_form"):
        curvature = objective.hessian_form(at, y, u).double().expand_as(along)
    elif _overridden(objective, "sampled_gradient"):
        curvature = per_sample(u * _autograd(objective, at, y, _ones(at), u)).expand_as(along)
    else:  # Bartlett's identity, E[g gᵀ] = E[∇²l], holds whatever the Hessian depends on
        curvature = per_sample(along_u * _autograd(objective, many, drawn, _ones(many), along_u)).view(draws, -1)
    if not (torch.isfinite(along).all() and torch.isfinite(curvature).all()):
        return
    for found, expected, what in (
        (along, torch.zeros_like(along), "the mean of their gradients is not 0"),
        (along.square(), curvature, "the second moment of their gradients is not the curvature"),
    ):
        error = (found - expected).std(0) / draws**0.5
        off = (found - expected).mean(0).abs()
        rounding = _TOLERANCE * (found.abs() + expected.abs()).mean(0) + 1e-12
        if bool((off > _ERRORS * error + rounding).any()):
            n = int((off / (error + rounding)).argmax())
            raise ValueError(
                f"{name}.sample contradicts {name}.losses: of {draws} targets drawn for sample {n}, {what} "
                f"({float(found.mean(0)[n]):.3g} along a random vector, expected {float(expected.mean(0)[n]):.3g} ± "
                f"{float(error[n]):.1g}). Draw targets from the density exp(−l) over its integral; where the losses "
                f"are none of a density, write {name}.sampled_gradient, too, or delete {name}.sample."
            )
