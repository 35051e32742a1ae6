"""γ and its companions on batches of the training data, with the run left as it was.

This draws the batches and computes the values. When that is done, and what becomes of the values, is up to the callback
`GammaIndicators` and the command `evaluate`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset

from lightning_ief.callbacks.beside_the_run import check_objective, moving_parameters, reading_of, undisturbed
from lightning_ief.capture import Linearization, linearize
from lightning_ief.curvature import sides_of
from lightning_ief.directions.fisher import natural_gradient
from lightning_ief.directions.registry import REFERENCE, NamedDirection, find, names
from lightning_ief.distributed import Exchange
from lightning_ief.indicators import gammas, gradient_norm_imbalance, projections
from lightning_ief.linalg.vectors import cosine, norm
from lightning_ief.objectives import Objective, as_objective
from lightning_ief.training.lightning_internals import as_training_batch

__all__ = ["DampedDirection", "GammaEvaluation", "OwnDirection", "deviation_key", "map_style", "named"]

# Logits of a batch up to which the exact natural gradient is solved for in the space of rows, within seconds.
_MAX_ROWS = 5_000
# Its λ over the trace of F: below, it is float32's rounding that would be divided by.
_RELATIVE_DAMPING = 1e-6


@dataclass
class OwnDirection:
    """A direction of the user's own, for lists in YAML; those of the package are given by their names.

    Attributes:
        name: What it is called in logs and tables.
        function: Maps a linearization and λ to d, {parameter name: tensor}; in YAML its import path.
        damping: λ; that of all directions if None.
        needs_sides: Whether both sides of all weights are to be kept, see `linearize(..., keep_sides=...)`.

    """

    name: str
    function: Callable[[Linearization, float], Mapping[str, Tensor]]
    damping: float | None = None
    needs_sides: bool = False


def named(given: str | OwnDirection) -> NamedDirection:
    """Find a direction by its name, or take the user's own.

    Args:
        given: A name, or a direction of the user's own.

    Returns:
        The direction.

    Raises:
        ValueError: If there is none of this name, or the package has one of the same name.

    """
    if isinstance(given, str):
        return find(given)
    if given.name in names():
        raise ValueError(f"'{given.name}' is a direction of the package; call your own by another name.")
    return NamedDirection(given.name, given.function, label=given.name, needs_sides=given.needs_sides)


@dataclass(frozen=True)
class DampedDirection:
    """A direction at one λ.

    Attributes:
        direction: The direction.
        damping: λ.
        key: What its values are called: `gamma/<key>`, `cosine/<key>` and so on.

    Raises:
        ValueError: If the direction is not defined for this λ.

    """

    direction: NamedDirection
    damping: float
    key: str

    def __post_init__(self) -> None:
        self.direction.check_damping(self.damping)

    @property
    def is_reference(self) -> bool:
        """Whether it is the direction that the others are compared with."""
        return self.direction.name == REFERENCE


@dataclass(frozen=True)
class GammaEvaluation:
    """Evaluates directions on batches of the training data.

    Attributes:
        directions: The directions, each with a key of its own.
        num_samples: M, targets drawn per sample.
        num_batches: Number of batches to average over.
        batch_size: Samples per batch.
        natural_iterations: Iterations of conjugate gradients for the exact natural gradient of large batches; with 0,
            the share of what it achieves is left out there.
        seed: Seed of the batches (together with the epoch) and of the targets (together with the batch's number).
        objective: The objective; the module's own attribute `objective` if None.
        unpack_batch: Maps a batch to (inputs, targets); the module's own method `unpack_batch` if None.

    Raises:
        ValueError: If a number is out of range, or a key stands there twice.

    """

    directions: Sequence[DampedDirection]
    num_samples: int
    num_batches: int
    batch_size: int
    natural_iterations: int
    seed: int
    objective: Objective | None = None
    unpack_batch: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        for option, least in {"num_samples": 1, "num_batches": 1, "batch_size": 1, "natural_iterations": 0}.items():
            if getattr(self, option) < least:
                raise ValueError(f"{option} must be at least {least}, got {getattr(self, option)}.")
        keys = [each.key for each in self.directions]
        if repeated := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"several directions are called {repeated}.")

    def check_module(self, module: pl.LightningModule) -> None:
        """Require an objective and a way to unpack batches.

        Args:
            module: The module, which is asked where neither was given.

        Raises:
            MisconfigurationException: If one is missing, or the objective is none of the package.

        """
        kind = type(module).__name__
        for name in ("objective", "unpack_batch"):
            if getattr(self, name) is None and not hasattr(module, name):
                raise MisconfigurationException(
                    f"GammaIndicators needs {name}: {kind} has none, so give it to the callback, "
                    f"GammaIndicators({name}=...), or derive the module from NaturalGradientMixin."
                )
        check_objective("GammaIndicators", module, self.objective)

    def completed(self, trainer: pl.Trainer, module: pl.LightningModule, loader: Any) -> "GammaEvaluation":
        """The same with the objective and the way to unpack batches that the module, or else a batch, says.

        Args:
            trainer: The trainer.
            module: The module, on the trainer's device.
            loader: The training DataLoader.

        Returns:
            An evaluation to which nothing is missing.

        Raises:
            MisconfigurationException: If something is missing, and batches are no pairs of inputs and classes.

        """
        has = [getattr(self, name) is not None or hasattr(module, name) for name in ("objective", "unpack_batch")]
        if all(has):
            return self
        with undisturbed(trainer, module):
            batch = next(self._batches(trainer, module, map_style(loader)))
            objective, unpack = reading_of("GammaIndicators", module, self.objective, self.unpack_batch, batch)
        return replace(self, objective=objective, unpack_batch=unpack)

    @property
    def without_share(self) -> str:
        """Why `gamma_share` is left out, where it is."""
        return (
            f"gamma_share is left out: batches of batch_size={self.batch_size} have more than {_MAX_ROWS:,} logits, "
            "for which the exact natural gradient takes iterations. Give natural_iterations=50, each of which costs a "
            "forward and a backward pass, or a smaller batch_size."
        )

    def evaluate(self, trainer: pl.Trainer, module: pl.LightningModule, loader: Any) -> dict[str, float]:
        """Evaluate the directions at the present parameters; many ranks share the work.

        Gradients are those of the parameters that the trainer's optimizers move; of all trainable ones if it has none,
        as where checkpoints are evaluated.

        Args:
            trainer: The trainer.
            module: The module, on the trainer's device.
            loader: The training DataLoader, whose data set and collation are used.

        Returns:
            `gamma/<key>`, `gamma_relative/<key>`, `gamma_share/<key>`, `cosine/<key>` and `gradient_norm_imbalance`,
            means over the batches; with several batches their standard deviations too, under `deviation_key`.

        Raises:
            MisconfigurationException: If batches can't be drawn from its data set.

        """
        given = map_style(loader)
        world = Exchange() if torch.distributed.is_initialized() else None
        size, rank = (world.size, world.rank) if world else (1, 0)
        mine = []
        with undisturbed(trainer, module):
            for number, batch in enumerate(self._batches(trainer, module, given)):
                if number % size == rank:
                    values = self._evaluate_batch(self._linearize(trainer, module, batch), number)
                    mine.append({key: value.cpu() for key, value in values.items()})
            shares = world.gather_objects(mine) if world else [mine]
        each = [shares[number % size][number // size] for number in range(sum(map(len, shares)))]
        # `gamma_share` is left out of large batches, and then of all: a mean of the small ones would be another value.
        keys = [key for key in each[0] if all(key in values for values in each)]
        columns = {key: torch.stack([values[key] for values in each]) for key in keys}
        found = {key: float(column.mean()) for key, column in columns.items()}
        if len(each) > 1:
            found |= {deviation_key(key): float(column.std()) for key, column in columns.items()}
        return found

    def project(self, trainer: pl.Trainer, module: pl.LightningModule, loader: Any) -> dict[str, dict[str, Tensor]]:
        """Project each direction on each sample of the first batch that `evaluate` would take.

        Args:
            trainer: The trainer.
            module: The module, on the trainer's device.
            loader: The training DataLoader, whose data set and collation are used.

        Returns:
            By key: `loss` l_n, `gradient_norm` ‖∇l_n‖ and `projection` ⟨∇l_n, d⟩, each of shape [N], and
            `update_norm` ‖d‖, a scalar; float64. They are NaN if the gradient of a sample is not finite.

        Raises:
            MisconfigurationException: If batches can't be drawn from its data set.

        """
        with undisturbed(trainer, module):
            linearization = self._linearize(trainer, module, next(self._batches(trainer, module, map_style(loader))))
            norms = linearization.jacobian.row_norms()
            finite = bool(norms.isfinite().all())
            found = {}
            for each in self.directions:
                along, length = torch.full_like(norms, torch.nan), torch.full_like(norms[0], torch.nan)
                if finite:
                    direction = self._compute(each, linearization, 0)
                    along, length = projections(linearization, direction), norm(direction)
                values = {"loss": linearization.losses, "gradient_norm": norms, "projection": along}
                found[each.key] = {key: value.double() for key, value in values.items()} | {"update_norm": length}
            return found

    def _batches(self, trainer: pl.Trainer, module: pl.LightningModule, given: DataLoader[Any]) -> Iterator[Any]:
        """Draw batches of the training data, other ones after every epoch, as the training step would get them."""
        generator = torch.Generator().manual_seed(self.seed + trainer.current_epoch)
        loader: DataLoader[Any] = DataLoader(
            given.dataset, self.batch_size, shuffle=True, collate_fn=given.collate_fn, generator=generator
        )
        count = min(self.num_batches, len(loader))
        # Shows itself if it takes long.
        for batch in Tqdm(islice(loader, count), "γ", count, delay=5, leave=False, disable=not trainer.is_global_zero):
            yield as_training_batch(trainer, module, batch)

    def _linearize(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Linearization:
        """Linearise by the parameters that the Trainer's optimizers move; by all trainable ones if it has none."""
        parameters = moving_parameters(trainer, module)
        inputs, targets = (self.unpack_batch or cast(Any, module).unpack_batch)(batch)
        with sdpa_kernel(SDPBackend.MATH):  # the kernel of attention that has the derivatives γ needs
            objective = as_objective(self.objective or cast(Any, module).objective)
            sides = sides_of(parameters) if any(each.direction.needs_sides for each in self.directions) else ()
            return linearize(module, inputs, targets, objective, parameters=parameters, keep_sides=sides)

    def _evaluate_batch(self, linearization: Linearization, number: int) -> dict[str, Tensor]:
        """Values by log key on the batch of this number, float64 scalars."""
        imbalance = gradient_norm_imbalance(linearization)
        undefined = torch.full_like(imbalance, torch.nan)
        has_natural = linearization.num_logits <= _MAX_ROWS or self.natural_iterations > 0
        natural = of_reference = undefined
        found: dict[str, Tensor] = {}
        cosines: dict[str, Tensor] = {}
        if finite := bool(torch.isfinite(linearization.jacobian.gram()).all()):
            reference = find(REFERENCE).compute(linearization, 0.0)

            def in_turn() -> Iterator[Mapping[str, Tensor]]:
                """All whose γ is wanted, each computed when it is taken: few are held at a time."""
                if has_natural:
                    yield self._natural(linearization)
                yield reference
                for each in self.directions:
                    direction = reference if each.is_reference else self._compute(each, linearization, number)
                    cosines[each.key] = cosine(direction, reference)
                    if not each.is_reference:
                        yield direction

            measured = iter(gammas(linearization, in_turn()))
            natural = next(measured) if has_natural else undefined
            of_reference = next(measured)
            found = {each.key: of_reference if each.is_reference else next(measured) for each in self.directions}
        values = {"gradient_norm_imbalance": imbalance if finite else undefined}
        for each in self.directions:
            key, value = each.key, found.get(each.key, undefined)
            values[f"gamma/{key}"] = value
            values[f"gamma_relative/{key}"] = value / of_reference
            values[f"cosine/{key}"] = cosines.get(key, undefined)
            if has_natural:
                values[f"gamma_share/{key}"] = natural / value
        return values

    def _natural(self, linearization: Linearization) -> Mapping[str, Tensor]:
        """The exact natural gradient, whose γ is the smallest there is."""
        if linearization.num_logits <= _MAX_ROWS:
            rows, coordinates = linearization.hessian_rows()
            return rows.solve(coordinates, _RELATIVE_DAMPING * float(rows.row_norms().square().sum()))
        with warnings.catch_warnings():
            # That the iterations end early is what the user has asked for.
            warnings.filterwarnings("ignore", f"{natural_gradient.__name__}: after", RuntimeWarning)
            return natural_gradient(
                linearization, 0.0, _MAX_ROWS, tolerance=1e-5, max_iterations=self.natural_iterations
            )

    def _compute(self, each: DampedDirection, linearization: Linearization, number: int) -> Mapping[str, Tensor]:
        # A generator for each batch and direction: the same targets whoever evaluates it, and whatever else.
        generator = torch.Generator(linearization.logits.device).manual_seed(self.seed + number)
        return each.direction.compute(linearization, each.damping, self.num_samples, generator)


def deviation_key(key: str) -> str:
    """Log key of the standard deviation over batches: `gamma_std/ief` for `gamma/ief`."""
    head, slash, name = key.partition("/")
    return f"{head}_std{slash}{name}"


def map_style(loader: Any) -> DataLoader[Any]:
    """Require a training DataLoader from whose data set batches can be drawn.

    Args:
        loader: What the Trainer trains from.

    Returns:
        The same.

    Raises:
        MisconfigurationException: If it is no such DataLoader.

    """
    if not isinstance(loader, DataLoader):
        got = f"a {type(loader).__name__}"
    elif isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        got = f"one over a {type(loader.dataset).__name__}, which has no length or no order"
    elif loader.batch_sampler is None:
        got = "one with batch_size=None, which does not collate samples"
    else:
        return loader
    raise MisconfigurationException(
        f"GammaIndicators draws batches of its own, which needs one training DataLoader that collates the samples of a "
        f"map-style data set; got {got}. Leave the callback out, or train from such a DataLoader."
    )
