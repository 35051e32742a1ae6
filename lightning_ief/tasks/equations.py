"""Linear equations with known solutions, as points at which a network is to satisfy them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any, TypeAlias

import lightning as L
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

__all__ = ["Equation", "EquationDataModule", "Heat", "Poisson"]

Batch: TypeAlias = tuple[tuple[Tensor, Tensor], Tensor]
"""Inputs of the network (points [N, d] and coefficients [N, d + 2]), and targets [N, 1]."""

_VALIDATION_SEED = 2**20  # points that no seed of training points gives


class Equation(ABC):
    """A linear equation A u = f within the unit cube, u given on some of its faces.

    Coefficients of operators stand in the order u, ∂_1 u … ∂_d u, Δu, as `DerivativeMLP` takes them; its
    `space_dimensions` says what Δ is over.

    Attributes:
        dimensions: d, number of coordinates.
        faces: Coordinate and its value, 0 or 1, of each face on which u is given.

    """

    dimensions: int
    faces: tuple[tuple[int, float], ...]

    @abstractmethod
    def solution(self, points: Tensor) -> Tensor:
        """The exact u, shape [N, 1], in points, shape [N, d]."""

    @abstractmethod
    def operator(self, points: Tensor) -> Tensor:
        """Coefficients of A, shape [N, d + 2], in points, shape [N, d]."""

    @abstractmethod
    def right_side(self, points: Tensor) -> Tensor:
        """f, shape [N, 1], in points, shape [N, d]."""


class Poisson(Equation):
    """−Δu = f with u = Π_i sin πx_i, which is 0 on all faces.

    Args:
        dimensions: d.

    Raises:
        ValueError: If it is not positive.

    """

    def __init__(self, dimensions: int = 2) -> None:
        if dimensions < 1:
            raise ValueError(f"Poisson(dimensions={dimensions}): must be at least 1.")
        self.dimensions = dimensions
        self.faces = tuple((i, side) for i in range(dimensions) for side in (0.0, 1.0))

    def solution(self, points: Tensor) -> Tensor:  # noqa: D102
        return (math.pi * points).sin().prod(1, keepdim=True)

    def operator(self, points: Tensor) -> Tensor:  # noqa: D102
        coefficients = points.new_zeros(len(points), self.dimensions + 2)
        coefficients[:, -1] = -1.0
        return coefficients

    def right_side(self, points: Tensor) -> Tensor:  # noqa: D102
        return self.dimensions * math.pi**2 * self.solution(points)


class Heat(Equation):
    """∂_t u = κ ∂²_x u with coordinates (x, t), u given at t = 0, x = 0 and x = 1.

    u = Σ_m exp(−κ(mπ)² t) sin mπx over the modes m. `DerivativeMLP` needs space_dimensions=1.

    Args:
        conductivity: κ.
        modes: Numbers m of half waves; those of higher ones fade faster.

    Raises:
        ValueError: If an argument is not positive, or there is no mode.

    """

    dimensions = 2
    faces = ((1, 0.0), (0, 0.0), (0, 1.0))

    def __init__(self, conductivity: float = 0.25, modes: tuple[int, ...] = (1,)) -> None:
        if not conductivity > 0:
            raise ValueError(f"Heat(conductivity={conductivity}): must be > 0.")
        if not modes or min(modes) < 1:
            raise ValueError(f"Heat(modes={modes}): needs positive numbers of half waves.")
        self.conductivity = conductivity
        self.modes = modes

    def solution(self, points: Tensor) -> Tensor:  # noqa: D102
        x, t = points.split(1, dim=1)
        waves = [(-self.conductivity * (m * math.pi) ** 2 * t).exp() * (m * math.pi * x).sin() for m in self.modes]
        return torch.stack(waves).sum(0)

    def operator(self, points: Tensor) -> Tensor:  # noqa: D102
        return points.new_tensor([0.0, 0.0, 1.0, -self.conductivity]).expand(len(points), 4)

    def right_side(self, points: Tensor) -> Tensor:  # noqa: D102
        return points.new_zeros(len(points), 1)


class EquationDataModule(L.LightningDataModule):
    """Points of an equation: each batch holds all of them.

    A sample is a point. Batches are ((points [N, d], coefficients [N, d + 2]), targets [N, 1]) in the dtype of the
    module: what the network makes of points and coefficients is to equal the targets. Within, these are A and f over
    √interior; on the faces, u over √boundary, times `boundary_weight`; so the loss, summed, is half the mean square of
    the residuals within plus that of those on the faces. Validation compares u with the exact solution in other points.

    Points are scrambled Sobol points, on the faces as many on each. They depend on `seed`, and on the number of the
    epoch if they are resampled, so that a resumed run sees what the uninterrupted one would have seen. On many ranks
    each has its share of them.

    Args:
        equation: The equation.
        interior: Number of points within.
        boundary: Number of points on the faces.
        resample: Whether each epoch has points of its own.
        steps_per_epoch: Batches of an epoch, each with all points of the epoch.
        boundary_weight: Factor of residuals on the faces.
        scale: Factor of all residuals, for optimizers that know absolute bounds: torch's L-BFGS drops a pair of step s
            and change of gradients y unless yᵀs > 1e-10.
        seed: Seed of the points.
        val_points: Number of points of the validation.

    Raises:
        ValueError: If an argument is out of range.

    """

    def __init__(
        self,
        equation: Equation,
        interior: int = 900,
        boundary: int = 120,
        resample: bool = False,
        steps_per_epoch: int = 10,
        boundary_weight: float = 1.0,
        scale: float = 1.0,
        seed: int = 0,
        val_points: int = 4096,
    ) -> None:
        super().__init__()
        counts = {"interior": interior, "steps_per_epoch": steps_per_epoch, "val_points": val_points}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"EquationDataModule({name}={value}): must be at least 1.")
        if boundary < len(equation.faces):
            raise ValueError(
                f"EquationDataModule(boundary={boundary}): must be at least {len(equation.faces)}, a point for each "
                f"face on which {type(equation).__name__} gives u."
            )
        for name, factor in (("boundary_weight", boundary_weight), ("scale", scale)):
            if not 0 < factor < math.inf:
                raise ValueError(f"EquationDataModule({name}={factor}): must be a finite number > 0.")
        self.equation = equation
        self.interior = interior
        self.boundary = boundary
        self.resample = resample
        self.steps_per_epoch = steps_per_epoch
        self.boundary_weight = boundary_weight
        self.scale = scale
        self.seed = seed
        self.val_points = val_points

    def train_dataloader(self) -> Iterable[Batch]:
        """Batches of all points.

        Returns:
            The batches of an epoch, whenever they are asked for.

        """
        return _Repeated(self._training_points, self.steps_per_epoch)

    def val_dataloader(self) -> Iterable[Batch]:
        """One batch of other points, with the exact solution as targets.

        Returns:
            The batch.

        """
        return _Repeated(self._validation_points, 1)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning's hook: the dtype of the module; points are drawn in float64.

        Args:
            batch: The batch.
            dataloader_idx: Number of the loader.

        Returns:
            The same, cast.

        """
        (points, coefficients), targets = batch
        dtype = self.trainer.lightning_module.dtype if self.trainer else points.dtype
        return (points.to(dtype), coefficients.to(dtype)), targets.to(dtype)

    def _training_points(self) -> Batch:
        epoch = self.trainer.current_epoch if self.trainer and self.resample else 0
        seed = hash((self.seed, epoch)) % 2**31
        within = self._draw(self.interior, seed)
        on_faces = self._draw(self.boundary, seed + 1)
        for number, (coordinate, side) in enumerate(self.equation.faces):
            on_faces[number :: len(self.equation.faces), coordinate] = side
        weight = self.scale * self.interior**-0.5
        face_weight = self.scale * self.boundary_weight * self.boundary**-0.5
        points = torch.cat([within, on_faces])
        coefficients = torch.cat([weight * self.equation.operator(within), face_weight * self._value(on_faces)])
        targets = torch.cat([weight * self.equation.right_side(within), face_weight * self.equation.solution(on_faces)])
        own = slice(self.trainer.global_rank, None, self.trainer.world_size) if self.trainer else slice(None)
        return (points[own], coefficients[own]), targets[own]

    def _validation_points(self) -> Batch:
        points = self._draw(self.val_points, _VALIDATION_SEED)
        return (points, self._value(points)), self.equation.solution(points)

    def _draw(self, count: int, seed: int) -> Tensor:
        return SobolEngine(self.equation.dimensions, scramble=True, seed=seed).draw(count, dtype=torch.float64)

    @staticmethod
    def _value(points: Tensor) -> Tensor:
        """Coefficients of the operator that gives u itself."""
        coefficients = points.new_zeros(len(points), points.shape[1] + 2)
        coefficients[:, 0] = 1.0
        return coefficients


class _Repeated:
    """One batch, made anew for each epoch, so many times; no DataLoader, which has samples to put together."""

    def __init__(self, make: Callable[[], Batch], times: int) -> None:
        self.make = make
        self.times = times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Batch]:
        return repeat(self.make(), self.times)
