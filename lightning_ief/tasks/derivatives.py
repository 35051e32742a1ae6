"""A network that carries its derivatives with respect to its inputs forward."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DerivativeMLP"]


class DerivativeMLP(nn.Module):
    """A tanh MLP u: ℝᵈ → ℝ whose value, gradient and Laplacian come from one forward pass.

    They go through the layers side by side, as d + 2 parts of each sample, by ordinary operations on the weights: so
    rows of J are captured of a loss that holds derivatives of u as of any other, and no graph is differentiated twice.

    Args:
        widths: Numbers of features from input to output, such as [2, 32, 1]; d first, 1 last.
        space_dimensions: The Laplacian is over so many of the first coordinates; over all if None. Of (x, t), 1.
        gain: Factor of the initial weights and biases of the first layer. With 1, tanh is almost linear in the unit
            cube.

    Raises:
        ValueError: If there is no hidden layer, a width is not positive or the last one not 1, or another argument is
            out of range.

    Example:
        >>> net = DerivativeMLP([2, 8, 1])
        >>> points = torch.rand(5, 2)
        >>> net(points).shape, net.parts(points).shape
        (torch.Size([5, 1]), torch.Size([5, 4]))

    """

    def __init__(self, widths: list[int], space_dimensions: int | None = None, gain: float = 1.0) -> None:
        super().__init__()
        if len(widths) < 3 or min(widths) < 1 or widths[-1] != 1:
            raise ValueError(
                f"DerivativeMLP(widths={widths}): needs positive numbers, those of hidden layers among them, and 1 as "
                "the last."
            )
        if space_dimensions is not None and not 1 <= space_dimensions <= widths[0]:
            raise ValueError(
                f"DerivativeMLP(space_dimensions={space_dimensions}): must be from 1 to the {widths[0]} coordinates."
            )
        if not 0 < gain < math.inf:
            raise ValueError(f"DerivativeMLP(gain={gain}): must be a finite number > 0.")
        self.space_dimensions = space_dimensions or widths[0]
        layers = [nn.Linear(d_in, d_out) for d_in, d_out in pairwise(widths)]
        with torch.no_grad():
            for parameter in layers[0].parameters():
                parameter.mul_(gain)
        self.layers = nn.ModuleList(layers)

    def forward(self, points: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """Compute u, or a linear differential operator of it, in each point.

        Args:
            points: x, shape [N, d].
            coefficients: c, shape [N, d + 2], those of the operator c₀ u + Σ_i c_i ∂_i u + c_(d+1) Δu in each point;
                u alone if None.

        Returns:
            Its values, shape [N, 1].

        """
        parts = self.parts(points)
        return parts[:, :1] if coefficients is None else (coefficients * parts).sum(1, keepdim=True)

    def parts(self, points: Tensor) -> Tensor:
        """Compute u, ∂_1 u … ∂_d u, Δu in each point.

        Args:
            points: x, shape [N, d].

        Returns:
            The parts, shape [N, d + 2].

        """
        samples, d = points.shape
        identity = torch.eye(d, dtype=points.dtype, device=points.device).expand(samples, d, d)
        parts = torch.cat([points.unsqueeze(1), identity, torch.zeros_like(points).unsqueeze(1)], dim=1)
        for number, layer in enumerate(self.layers):
            if number > 0:
                parts = self._tanh(parts)
            assert isinstance(layer, nn.Linear)
            value = F.linear(parts[:, :1], layer.weight, layer.bias)
            parts = torch.cat([value, F.linear(parts[:, 1:], layer.weight)], dim=1)
        return parts.squeeze(2)

    def _tanh(self, parts: Tensor) -> Tensor:
        """The parts of tanh h from those of h, by the chain rule."""
        value, gradient, laplacian = parts[:, :1], parts[:, 1:-1], parts[:, -1:]
        t = value.tanh()
        slope = 1 - t.square()  # tanh' h; tanh″ h is −2 t slope
        bend = gradient[:, : self.space_dimensions].square().sum(1, keepdim=True)
        return torch.cat([t, slope * gradient, slope * (laplacian - 2 * t * bend)], dim=1)
