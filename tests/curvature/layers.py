"""Models with layers of all kinds, and K-FAC of them written out: dense matrices of what hooks see."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ief import objectives
from tests.helpers import Function, per_sample_jacobian

OBJECTIVE = objectives.CrossEntropy()
WORDS = 6


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def sequence() -> nn.Module:
    """An embedding; a norm, which has no factors; layers at each position, one without a bias; and a convolution."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(WORDS, 4, padding_idx=1), nn.LayerNorm(4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False),
        nn.Conv1d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def twice() -> nn.Module:
    """A layer of two uses."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    return Function.of(inner, lambda self, x: self.inner[1](self.inner[0](self.inner[0](x).tanh())))


def turned() -> nn.Module:
    """A matrix on the right, x W; a raw parameter; and one that is used from both sides, which has no factors."""
    torch.manual_seed(0)
    return Function(
        lambda self, x: F.linear((x @ self.weight + self.shift) @ self.both, self.both),
        weight=(4, 3),
        shift=(3,),
        both=(3, 3),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "sequence": sequence, "twice": twice, "turned": turned}


def batch_of(model: nn.Module, seed: int = 1, samples: int = 40) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    words = isinstance(model, nn.Sequential) and isinstance(model[0], nn.Embedding)
    x = torch.randint(WORDS, (samples, 3)) if words else torch.randn(samples, 4)
    return x, torch.randint(3, (samples,))


def norms_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """s."""
    z = model(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(OBJECTIVE.losses(z, y).sum(), z)
    return gradient.square().sum(1)


def seen(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """Of each weight with factors, inputs [N, T, d_in] with a 1, output gradients [N, T, d_out], and one-hot or not."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: calls.append((name, m, args[0].detach(), out)))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Embedding))
    ]
    z = model(x)
    for hook in hooks:
        hook.remove()
    found: dict[str, tuple[Tensor, Tensor, bool]] = {}
    if not calls:  # `turned`
        z, before = _turned(model, x)
        calls = [("", nn.Identity(), x, before)]
    gradients = torch.autograd.grad(OBJECTIVE.losses(z, y).sum(), [out for *_, out in calls])
    for (name, module, inputs, _), gradient in zip(calls, gradients, strict=True):
        if isinstance(module, nn.Embedding):
            mask = (inputs != module.padding_idx)[..., None]
            gradient, inputs = gradient * mask, (F.one_hot(inputs, WORDS) * mask).to(gradient)  # noqa: PLW2901
        if isinstance(module, nn.Conv1d):
            inputs = F.unfold(inputs[:, :, None], (1, 2)).transpose(1, 2)  # noqa: PLW2901
            gradient = gradient.transpose(1, 2)  # noqa: PLW2901
        a, g = inputs.reshape(len(x), -1, inputs.shape[-1]), gradient.reshape(len(x), -1, gradient.shape[-1])
        if getattr(module, "bias", None) is not None:
            a = torch.cat([a, torch.ones_like(a[..., :1])], dim=2)
        name = f"{name}.weight".removeprefix(".")  # noqa: PLW2901
        if name in found:
            a, g = (torch.cat([old, new], 1) for old, new in zip(found[name], (a, g), strict=False))
        found[name] = a, g, isinstance(module, nn.Embedding)
    return found


def _turned(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    before = x @ model.weight
    return F.linear((before + model.shift) @ model.both, model.both), before


def factors(a: Tensor, g: Tensor, one_hot: bool, positions: str) -> tuple[Tensor, Tensor]:
    """Â, and Ĝ of the sum over samples."""
    if positions == "reduce":
        a, g = a.mean(1, keepdim=True), g.sum(1, keepdim=True)
    A = torch.einsum("nti,ntj->ij", a, a) / (a.shape[0] * a.shape[1])
    return A.diagonal().diag() if one_hot else A, torch.einsum("nti,ntj->ij", g, g)


def places(model: nn.Module, averages: Mapping[str, object]) -> tuple[dict[str, Tensor], Tensor]:
    """Where each layer's entries [d_out, d_in] stand in the vector of all parameters; and where all others stand."""
    starts, total = {}, 0
    for name, p in model.named_parameters():
        starts[name], total = torch.arange(total, total + p.numel()), total + p.numel()
    found = {}
    for name in averages:
        weight = model.get_parameter(name)
        at = starts.pop(name).view(len(weight), -1)
        module = model.get_submodule(name.removesuffix("weight").rstrip("."))
        at = at.T if isinstance(module, (nn.Embedding, Function)) else at
        bias = name.removesuffix("weight") + "bias"
        if bias in starts:
            at = torch.cat([at, starts.pop(bias)[:, None]], dim=1)
        found[name] = at
    return found, torch.cat([*starts.values()]) if starts else torch.zeros(0, dtype=torch.long)


def damped_kronecker(A: Tensor, G: Tensor, lam: float) -> Tensor:
    """(A + π√λ I) ⊗ (G + √λ/π I) for entries [d_out, d_in] in a row."""
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    return torch.kron(G + lam**0.5 / pi * torch.eye(len(G)), A + pi * lam**0.5 * torch.eye(len(A)))


def rows_of(model: nn.Module, x: Tensor, targets: list[Tensor], y: Tensor, fisher: str) -> Tensor:
    """Dense rows whose RᵀR is the Fisher matrix of a kind."""
    J = torch.cat([per_sample_jacobian(model, x, each, OBJECTIVE) for each in targets])
    if fisher == "improved":
        return J / norms_of(model, x, y).sqrt()[:, None]
    return J / len(targets) ** 0.5


def seen_as(
    model: nn.Module, x: Tensor, targets: list[Tensor], y: Tensor, fisher: str
) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """What `seen` sees, with gradients of a kind of Fisher matrix: inputs and gradients of M·N samples."""
    found = [seen(model, x, each) for each in targets]
    scale = norms_of(model, x, y).rsqrt() if fisher == "improved" else torch.full((len(x),), 1.0)
    together = {}
    for name, (*_, one_hot) in found[0].items():
        a = torch.cat([each[name][0] for each in found])
        g = torch.cat([each[name][1] * scale[:, None, None] for each in found]) / len(targets) ** 0.5
        together[name] = a, g, one_hot
    return together


def direction(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    fisher: str,
    lam: float,
    averages: Mapping[str, Tensor],
    targets: list[Tensor],
) -> Tensor:
    """d from the matrices of layers, damping included, by weight; the exact block of all other parameters."""
    at, rest = places(model, averages)
    gradient = per_sample_jacobian(model, x, y, OBJECTIVE).sum(0)
    d = torch.zeros_like(gradient)
    for name, matrix in averages.items():
        order = at[name].flatten()
        d[order] = torch.linalg.solve(matrix, gradient[order])
    rows = rows_of(model, x, targets, y, fisher)[:, rest]
    d[rest] = torch.linalg.solve(rows.T @ rows + lam * torch.eye(len(rest)), gradient[rest])
    return d
