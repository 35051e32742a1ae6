"""What test files share: the slow truth (one sample at a time, by autograd, dense), and ways to compare with it."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_ief import NaturalGradientMixin, linearize, objectives
from lightning_ief.capture import Linearization
from lightning_ief.capture.linearization import call_model
from lightning_ief.capture.types import CaptureError

# Kernels without forward-mode and second derivatives.
NO_FORWARD = ("_embedding_bag_backward",)


class Function(nn.Module):
    """A model made of a function and its parameters: `body(self, *inputs, **inputs)`.

    Args:
        body: The forward pass.
        parameters: For each parameter by name, its shape (filled with normal random numbers) or its value.

    """

    def __init__(self, body: Callable[..., Any], **parameters: tuple[int, ...] | Tensor) -> None:
        super().__init__()
        self.body = body
        for name, given in parameters.items():
            value = given if isinstance(given, Tensor) else torch.randn(given)
            setattr(self, name, nn.Parameter(value))

    @classmethod
    def of(cls, inner: nn.Module, body: Callable[..., Any], **parameters: tuple[int, ...] | Tensor) -> "Function":
        """A model made of a function and a module, `self.inner`."""
        model = cls(body, **parameters)
        model.inner = inner
        return model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


class Custom(torch.autograd.Function):
    """x Wᵀ as a custom autograd function, which announces no use of W."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient @ w, gradient.T @ x


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get a row entry, in their order in J."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def small_network() -> nn.Sequential:
    """Three classes of five features, with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def weights(model: nn.Module) -> Tensor:
    """All parameters of a model, as they are now, as one vector [P]."""
    return flatten({name: p.detach().clone() for name, p in model.named_parameters()})


def sample_of(inputs: Any, n: int, samples: int) -> Any:
    """Sample n as a batch of one: tensors with N entries on dimension 0 are the batch, everything else is constant."""

    def one(x: Any) -> Any:
        return x[n : n + 1].clone() if isinstance(x, Tensor) and x.ndim > 0 and len(x) == samples else x

    return pytree.tree_map(one, inputs)


def gradient_row(loss: Tensor, parameters: Mapping[str, Tensor], **options: Any) -> Tensor:
    """Gradient of a scalar by all parameters, flattened to [P]; zeros for those that it does not depend on."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, **options)
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=p.dtype, device=p.device) if g is None else g.to_dense().flatten()
            for g, p in zip(gradients, parameters.values(), strict=True)
        ]
    )


def per_sample_jacobian(model: nn.Module, inputs: Any, targets: Tensor, objective: objectives.Objective) -> Tensor:
    """The truth: row n is ∇l_n, [N, P], from a forward and a backward pass of sample n alone."""
    rows = []
    for n in range(len(targets)):
        logits = call_model(model, sample_of(inputs, n, len(targets)))
        rows.append(gradient_row(objective.losses(logits, targets[n : n + 1]).sum(), trainable(model)))
    return torch.stack(rows)


def jacobian_of_graph(lin: Linearization) -> Tensor:
    """The truth where a forward pass can't be repeated (dropout): rows [N, P] from the linearization's own graph."""
    losses = lin.objective.losses(lin.output, lin.targets)
    return torch.stack([gradient_row(loss, lin.parameters, retain_graph=True) for loss in losses])


def flatten(direction: Mapping[str, Tensor]) -> Tensor:
    """A direction as one vector [P]."""
    return torch.cat([x.flatten() for x in direction.values()])


def random_direction(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A direction of normal random numbers."""
    return {name: torch.randn_like(p.detach()) for name, p in parameters.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; the shapes must agree."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm()) if difference > 0 else float(difference)


def assert_jacobian(lin: Linearization, truth: Tensor, tolerance: float = 1e-10) -> None:
    """Compare every answer of the operator with the dense truth [N, P], and the matrix parameter by parameter."""
    jacobian, dtype = lin.jacobian, truth.dtype
    sizes = [p.numel() for p in lin.parameters.values()]
    blocks = zip(
        lin.parameters, jacobian.to_dense().double().split(sizes, 1), truth.double().split(sizes, 1), strict=True
    )
    for name, actual, expected in blocks:
        # Gradients that vanish but for rounding are judged by the rest.
        allowed = tolerance * max(float(expected.norm()), 1e-4 * float(truth.norm()))
        error = float((actual - expected).norm())
        assert error <= allowed, f"'{name}': error {error:.1e}, allowed {allowed:.1e}"

    v = torch.randn(len(truth), dtype=torch.float64)
    d = random_direction(lin.parameters)
    answers = {
        "to_dense": (jacobian.to_dense(), truth),
        "gram": (jacobian.gram(), truth @ truth.T),
        "row_norms": (jacobian.row_norms(), truth.norm(dim=1)),
        "rmatvec": (flatten(jacobian.rmatvec(v)), truth.T @ v.to(dtype)),
        "matvec": (jacobian.matvec(d), truth @ flatten(d).to(dtype)),
    }
    for what, (actual, expected) in answers.items():
        error = relative_error(actual, expected)
        assert error <= tolerance, f"{what}: relative error {error:.1e}"


def assert_exact(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | None = None,
    objective: objectives.Objective | None = None,
    tolerance: float = 1e-10,
) -> Linearization:
    """Linearise, and compare with the truth.

    Args:
        model: The model.
        inputs: Its inputs.
        targets: y; random real numbers of the shape of the logits if None.
        objective: The objective; least squares if None.
        tolerance: Largest relative error.

    Returns:
        The linearization.

    """
    objective = objective or objectives.LeastSquares()
    if targets is None:
        targets = torch.randn_like(call_model(model, pytree.tree_map(_copy, inputs)).detach())
    truth = per_sample_jacobian(model, inputs, targets, objective)
    assert truth.norm() > 0, "the case tests nothing: all gradients are zero"
    lin = linearize(model, inputs, targets, objective)
    assert_jacobian(lin, truth, tolerance)
    assert_forward(lin, truth, tolerance)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    return lin


def assert_forward(lin: Linearization, truth: Tensor, tolerance: float) -> None:
    """Compare the change of the logits along a direction with the dense truth [N, P]."""
    d = random_direction(lin.parameters)
    try:
        u = lin.jvp(d)
    except CaptureError as error:
        if any(name in str(error) for name in NO_FORWARD):
            return
        raise
    change = (u * lin.logit_gradients).reshape(len(truth), -1).sum(1)
    assert relative_error(change, truth @ flatten(d)) < tolerance
    e = random_direction(lin.parameters)
    for direction, tangents in zip((d, e), lin.jvps([d, e]), strict=True):
        change = (tangents * lin.logit_gradients).reshape(len(truth), -1).sum(1)
        assert relative_error(change, truth @ flatten(direction)) < tolerance


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


Configure = Callable[[Any], torch.optim.Optimizer]


class Classifier(NaturalGradientMixin, L.LightningModule):
    """Three classes of six features, trained with what `configure` makes of the parameters."""

    def __init__(self, configure: Configure, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = net or nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
        self.objective = objectives.CrossEntropy()
        self.configure = configure

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.configure(self.parameters())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass
