"""γ of several directions over training (Wu et al., arXiv 2406.06420)."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.seed import isolate_rng
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset

from lightning_ief import directions as available
from lightning_ief.callbacks._rendering import print_table
from lightning_ief.capture import Linearization, linearize, preserved_state
from lightning_ief.distributed import Exchange
from lightning_ief.indicators import gammas, gradient_norm_imbalance, projections
from lightning_ief.linalg.vectors import cosine, norm
from lightning_ief.objectives import Objective
from lightning_ief.training.lightning_internals import as_training_batch

__all__ = ["Direction", "GammaIndicators", "deviation_key", "named_direction"]

# Logits of a batch up to which the exact natural gradient is solved for in the space of rows, within seconds.
_MAX_ROWS = 5_000
# Its λ over the trace of F: below, it is float32's rounding that would be divided by.
_RELATIVE_DAMPING = 1e-6


@dataclass
class Direction:
    """A direction to evaluate, for lists in YAML.

    Attributes:
        name: What it is called in logs and tables.
        function: Maps a linearization and λ to d, {parameter name: tensor}; in YAML its import path.
        damping: λ; that of the callback if None.

    """

    name: str
    function: Callable[[Linearization, float], Mapping[str, Tensor]]
    damping: float | None = None


class GammaIndicators(Callback):
    """Logs γ(d) = √(dᵀFd) / |dᵀ∇L| of several directions, and the gradient-norm imbalance, as training goes on.

    Smaller is closer to the natural gradient. Evaluated before the first step, after every epoch, and at chosen
    fractions of training. The directions are evaluated at the present parameters, in eval mode and without autocast, on
    batches drawn from the whole data set of the training DataLoader (whatever its sampler) by a loader of the
    callback's own. Parameters, gradients, buffers, random numbers and modes are left as they were: a run trains the
    same with and without it, unless the data set has a generator of its own.

    Logged, as means over the batches:

    * `gamma/<direction>`: γ; inf for a direction that does not change the loss.
    * `gamma_relative/<direction>`: γ over that of `sgd` on the same batch, a ratio; NaN where neither changes the loss.
    * `gamma_share/<direction>`: γ of the natural gradient (of the exact F, λ a millionth of its trace) over γ: the
      share that the direction has of the achievable decrease of the loss per distance, between 0 and about 1.
    * `cosine/<direction>`: cosine of the angle to `sgd`.
    * `gradient_norm_imbalance`: largest over smallest norm of a sample's gradient, a ratio; inf if one is zero, NaN if
      all are.

    With several batches, each key also comes with its standard deviation over them: `gamma_std/<direction>` and so on.
    At the start and at fractions of training they are logged at the Trainer's `global_step`; after an epoch one step
    earlier, as all of Lightning's values of an epoch.
    All of them are NaN if the gradient of a sample is not finite; training goes on.

    Args:
        directions: Names of directions: sgd, ef, ief, sampled_fisher, natural_gradient; and others of one's own, each
            with `name`, `function` and `damping`.
        damping: λ of the directions, for losses summed over the batch, in the units of squared gradient norms.
        dampings: λ of single directions by name, where it differs; {"sampled_fisher": 1.0} unless said otherwise,
            since a few sampled targets make a poor Fisher matrix where it is small.
        num_samples: M, targets drawn per sample for sampled_fisher.
        num_batches: Number of batches to average over.
        batch_size: Samples per batch (N); the last batch of a small data set may hold fewer.
        every_n_epochs: Evaluate after every n-th epoch; 0 for never.
        at_start: Whether to evaluate before the first step.
        fractions: Evaluate when these fractions of all training batches are done, each between 0 and 1.
        natural_iterations: Iterations of conjugate gradients for the exact natural gradient where a batch has more
            than 5,000 logits; with 0, `gamma_share` is left out there. Each costs a forward and a backward pass.
        objective: The objective; the module's own attribute `objective` if None.
        unpack_batch: Maps a batch to (inputs, targets); the module's own method `unpack_batch` if None.
        seed: Seed of the batches (together with the epoch) and of the targets drawn for sampled_fisher.
        print_table: Whether to print a table each time.

    Raises:
        ValueError: If an argument is out of range or a direction is unknown.

    Example:
        >>> from lightning_ief import objectives
        >>> callback = GammaIndicators(["ef", "ief"], objective=objectives.CrossEntropy(), unpack_batch=tuple)
        >>> trainer = pl.Trainer(callbacks=[callback])  # doctest: +SKIP

    """

    def __init__(
        self,
        directions: Sequence[str | Direction] = ("sgd", "ef", "ief", "sampled_fisher"),
        damping: float = 1e-7,
        dampings: dict[str, float] | None = None,
        num_samples: int = 1,
        num_batches: int = 1,
        batch_size: int = 64,
        every_n_epochs: int = 1,
        at_start: bool = True,
        fractions: Sequence[float] = (),
        natural_iterations: int = 0,
        objective: Objective | None = None,
        unpack_batch: Callable[[Any], Any] | None = None,
        seed: int = 0,
        print_table: bool = True,
    ) -> None:
        own_dampings = {"sampled_fisher": 1.0, **(dampings or {})}
        if isinstance(directions, str) or not directions:
            raise ValueError(f"GammaIndicators(directions={directions!r}): must be a list of names, such as ['ief'].")
        own = {each.name: each for each in directions if isinstance(each, Direction)}
        self.directions = [each.name if isinstance(each, Direction) else each for each in directions]
        for name in [*self.directions, *own_dampings]:
            if name not in available.__all__ and name not in own:
                raise ValueError(f"GammaIndicators: unknown direction '{name}'; there are {available.__all__}.")
        if taken := sorted(own.keys() & set(available.__all__)):
            raise ValueError(f"GammaIndicators: {taken} are directions of the package; call your own by other names.")
        if repeated := {name for name in self.directions if self.directions.count(name) > 1}:
            raise ValueError(f"GammaIndicators: several directions are called {sorted(repeated)}.")
        self.functions = {name: each.function for name, each in own.items()}
        self.dampings = {name: own_dampings.get(name, damping) for name in self.directions}
        self.dampings |= {name: each.damping for name, each in own.items() if each.damping is not None}
        for name, value in self.dampings.items():
            # The sampled Fisher matrix does not span the gradient: without damping there is no solution.
            if not 0 <= value < float("inf") or (name == "sampled_fisher" and value == 0):
                least = "> 0" if name == "sampled_fisher" else "≥ 0"
                raise ValueError(f"GammaIndicators: the damping of '{name}' must be finite and {least}, got {value}.")
        for option, count, least_count in (
            ("num_samples", num_samples, 1),
            ("num_batches", num_batches, 1),
            ("batch_size", batch_size, 1),
            ("every_n_epochs", every_n_epochs, 0),
            ("natural_iterations", natural_iterations, 0),
        ):
            if count < least_count:
                raise ValueError(f"GammaIndicators({option}={count}): must be at least {least_count}.")
        if any(not 0 < fraction <= 1 for fraction in fractions):
            raise ValueError(f"GammaIndicators(fractions={list(fractions)}): each must be above 0 and at most 1.")
        self.num_samples = num_samples
        self.num_batches = num_batches
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.at_start = at_start
        self.fractions = list(fractions)
        self.natural_iterations = natural_iterations
        self.objective = objective
        self.unpack_batch = unpack_batch
        self.seed = seed
        self.print_table = print_table
        self._due: set[int] = set()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the Trainer and the module offer what is needed.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: 'fit' or another one, for which nothing is needed.

        Raises:
            MisconfigurationException: If objective or unpack_batch are missing.

        """
        if stage != "fit":
            return
        module = type(pl_module).__name__
        for name in ("objective", "unpack_batch"):
            if getattr(self, name) is None and not hasattr(pl_module, name):
                raise MisconfigurationException(
                    f"GammaIndicators needs {name}: {module} has none, so give it to the callback, "
                    f"GammaIndicators({name}=...), or derive the module from NaturalGradientMixin."
                )
        objective = self.objective or cast(Any, pl_module).objective
        if not isinstance(objective, Objective):
            raise MisconfigurationException(
                f"{module}.objective is a {type(objective).__name__}, which GammaIndicators can't use. Give it one of "
                "lightning_ief.objectives: GammaIndicators(objective=...)."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check training data and parameters, which are there only now, and evaluate before the first step."""
        self._check_data(trainer)
        if sharded := [name for name, p in pl_module.named_parameters() if isinstance(p, DTensor)]:
            raise MisconfigurationException(
                f"GammaIndicators needs whole parameters, '{sharded[0]}' is sharded. Leave the callback out; "
                "`lightning-ief evaluate` takes the checkpoints of the run."
            )
        self._due = self._batches_due(trainer)
        if self.at_start and trainer.global_step == 0:
            self._evaluate_now(trainer, pl_module, "before training")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate at the chosen fractions of training."""
        done = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx + 1
        last = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if done in self._due and not (last and self._at_epoch_end(trainer)):
            self._evaluate_now(trainer, pl_module, f"after {done} batches")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate, log and print."""
        if self._at_epoch_end(trainer):
            # By way of the module, so that checkpoints and schedulers can follow a value.
            pl_module.log_dict(self._evaluate(trainer, pl_module, f"after epoch {trainer.current_epoch}"))

    def _batches_due(self, trainer: pl.Trainer) -> set[int]:
        """After how many batches the fractions of training are reached."""
        if not self.fractions:
            return set()
        batches = float("inf")
        if trainer.max_epochs not in (None, -1):
            batches = float(trainer.num_training_batches * trainer.max_epochs)
        if trainer.max_steps != -1:
            batches = min(batches, float(trainer.max_steps * trainer.accumulate_grad_batches))
        if math.isinf(batches):
            raise MisconfigurationException(
                f"GammaIndicators(fractions={self.fractions}) needs to know when training ends: set max_epochs or "
                "max_steps of the Trainer, to other than -1."
            )
        return {math.ceil(fraction * batches - 1e-9) for fraction in self.fractions}

    def _at_epoch_end(self, trainer: pl.Trainer) -> bool:
        return self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _evaluate_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule, when: str) -> None:
        """Evaluate and log at this step; through the module the values would wait for the end of the epoch."""
        values = self._evaluate(trainer, pl_module, when)
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=trainer.global_step)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, when: str) -> dict[str, float]:
        values = self.evaluate(trainer, pl_module, trainer.train_dataloader)
        if self.print_table:
            print_table(trainer, self.render(values, f"γ {when}"))
        return values

    def _check_data(self, trainer: pl.Trainer) -> None:
        samples = len(cast(Sized, _map_style(trainer.train_dataloader).dataset))
        if samples < self.num_batches * self.batch_size:
            warnings.warn(
                f"GammaIndicators(num_batches={self.num_batches}, batch_size={self.batch_size}) asks for more than the "
                f"{samples} samples of the training data set: each evaluation takes all of them once, in "
                f"{-(-samples // self.batch_size)} batch(es).",
                stacklevel=2,
            )

    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: Any) -> dict[str, float]:
        """Evaluate the indicators at the present parameters, and leave everything as it was.

        Args:
            trainer: The trainer.
            pl_module: The module, on the trainer's device.
            loader: The training DataLoader, whose data set and collation are used.

        Returns:
            Values by log key, means over the batches, and standard deviations if there are several.

        Raises:
            MisconfigurationException: If batches can't be drawn from its data set.

        """
        with _undisturbed(trainer, pl_module):
            return self.compute(pl_module, self._collect(trainer, pl_module, _map_style(loader)))

    def project(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: Any) -> dict[str, dict[str, Tensor]]:
        """Project each direction on each sample of the first batch that `evaluate` would take.

        Args:
            trainer: The trainer.
            pl_module: The module, on the trainer's device.
            loader: The training DataLoader, whose data set and collation are used.

        Returns:
            By direction: `loss` l_n, `gradient_norm` ‖∇l_n‖ and `projection` ⟨∇l_n, d⟩, each of shape [N], and
            `update_norm` ‖d‖, a scalar; float64. They are NaN if the gradient of a sample is not finite.

        Raises:
            MisconfigurationException: If batches can't be drawn from its data set.

        """
        with _undisturbed(trainer, pl_module):
            batches = islice(self._collect(trainer, pl_module, _map_style(loader)), 1)
            (linearization,) = self._linearizations(pl_module, batches)
            generator = torch.Generator(pl_module.device).manual_seed(self.seed)
            norms = linearization.jacobian.row_norms()
            found = {}
            for name in self.directions:
                along, length = torch.full_like(norms, torch.nan), torch.full_like(norms[0], torch.nan)
                if bool(norms.isfinite().all()):
                    direction = self._direction(linearization, name, generator)
                    along, length = projections(linearization, direction), norm(direction)
                values = {"loss": linearization.losses, "gradient_norm": norms, "projection": along}
                found[name] = {key: value.double() for key, value in values.items()} | {"update_norm": length}
            return found

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, given: DataLoader[Any]) -> Iterator[Any]:
        """Draw batches of the training data, other ones after every epoch, as the training step would get them."""
        generator = torch.Generator().manual_seed(self.seed + trainer.current_epoch)
        loader: DataLoader[Any] = DataLoader(
            given.dataset, self.batch_size, shuffle=True, collate_fn=given.collate_fn, generator=generator
        )
        count = min(self.num_batches, len(loader))
        # Shows itself if it takes long.
        for batch in Tqdm(islice(loader, count), "γ", count, delay=5, leave=False, disable=not trainer.is_global_zero):
            yield as_training_batch(trainer, pl_module, batch)

    def compute(self, pl_module: pl.LightningModule, batches: Iterable[Any]) -> dict[str, float]:
        """Evaluate the indicators at the present parameters; many ranks share the work.

        Args:
            pl_module: The module.
            batches: Batches on its device, at least one, the same on all ranks.

        Returns:
            Values by log key, means over the batches, and standard deviations if there are several.

        """
        world = Exchange() if torch.distributed.is_initialized() else None
        size, rank = (world.size, world.rank) if world else (1, 0)
        mine = []
        for number, batch in enumerate(batches):
            if number % size == rank:
                (linearization,) = self._linearizations(pl_module, [batch])
                # Each batch draws on its own: the same whoever evaluates it.
                generator = torch.Generator(pl_module.device).manual_seed(self.seed + number)
                values = self._indicators(linearization, generator)
                mine.append({key: value.cpu() for key, value in values.items()})
        shares = world.gather_objects(mine) if world else [mine]
        each = [shares[number % size][number // size] for number in range(sum(map(len, shares)))]
        # A share that was too much for a large batch is not taken from a small one alone.
        keys = [key for key in each[0] if all(key in values for values in each)]
        columns = {key: torch.stack([values[key] for values in each]) for key in keys}
        found = {key: float(column.mean()) for key, column in columns.items()}
        if len(each) > 1:
            found |= {deviation_key(key): float(column.std()) for key, column in columns.items()}
        return found

    def _linearizations(self, pl_module: pl.LightningModule, batches: Iterable[Any]) -> Iterator[Linearization]:
        objective = self.objective or cast(Any, pl_module).objective
        unpack = self.unpack_batch or cast(Any, pl_module).unpack_batch
        for inputs, targets in map(unpack, batches):
            with sdpa_kernel(SDPBackend.MATH):  # the kernel of attention that has the derivatives γ needs
                yield linearize(pl_module, inputs, targets, objective)

    def _indicators(self, linearization: Linearization, generator: torch.Generator) -> dict[str, Tensor]:
        """Values by log key on one batch, float64 scalars."""
        imbalance = gradient_norm_imbalance(linearization)
        undefined = torch.full_like(imbalance, torch.nan)
        names = list(dict.fromkeys(["sgd", *self.directions]))
        natural, found, angles = undefined, dict.fromkeys(names, undefined), dict.fromkeys(names, undefined)
        finite = bool(torch.isfinite(linearization.jacobian.gram()).all())
        share = self._natural_is_affordable(linearization)
        if finite:
            sgd = available.sgd(linearization)

            def each() -> Iterator[Mapping[str, Tensor]]:
                # Few are held at a time.
                if share:
                    yield self._natural(linearization)
                for name in names:
                    direction = sgd if name == "sgd" else self._direction(linearization, name, generator)
                    angles[name] = cosine(direction, sgd)
                    yield direction

            measured = list(gammas(linearization, each()))
            natural = measured.pop(0) if share else natural
            found = dict(zip(names, measured, strict=True))
        values = {"gradient_norm_imbalance": imbalance if finite else undefined}
        for name in self.directions:
            values[f"gamma/{name}"] = found[name]
            values[f"gamma_relative/{name}"] = found[name] / found["sgd"]
            values[f"cosine/{name}"] = angles[name]
            if share:
                values[f"gamma_share/{name}"] = natural / found[name]
        return values

    def _natural_is_affordable(self, linearization: Linearization) -> bool:
        return linearization.num_logits <= _MAX_ROWS or self.natural_iterations > 0

    def _natural(self, linearization: Linearization) -> Mapping[str, Tensor]:
        """The exact natural gradient, whose γ is the smallest there is."""
        if linearization.num_logits <= _MAX_ROWS:
            return available.natural_gradient(linearization, 0.0, _MAX_ROWS, relative_damping=_RELATIVE_DAMPING)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "natural_gradient: after", RuntimeWarning)
            return available.natural_gradient(
                linearization, 0.0, _MAX_ROWS, tolerance=1e-5, max_iterations=self.natural_iterations
            )

    def _direction(self, linearization: Linearization, name: str, generator: torch.Generator) -> Mapping[str, Tensor]:
        if name in self.functions:
            return self.functions[name](linearization, self.dampings[name])
        return named_direction(name, linearization, self.dampings[name], self.num_samples, generator)

    def render(self, values: dict[str, float], title: str) -> Table:
        """Make a table of the values.

        Args:
            values: Values by log key.
            title: Its title.

        Returns:
            The table.

        """
        imbalance = values["gradient_norm_imbalance"]
        table = Table("direction", title=title, caption=f"gradient-norm imbalance: {imbalance:.3g}")
        table.add_column("λ", justify="right")
        columns = {"gamma": ("γ", 4), "gamma_relative": ("γ / γ(sgd)", 3), "gamma_share": ("γ(natural) / γ", 3)}
        shown = {key: column for key, column in columns.items() if f"{key}/{self.directions[0]}" in values}
        for label, _ in shown.values():
            table.add_column(label, justify="right")
        for name in self.directions:
            damping = "" if name == "sgd" else f"{self.dampings[name]:g}"
            cells = []
            for key, (_, digits) in shown.items():
                deviation = values.get(deviation_key(f"{key}/{name}"))
                spread = "" if deviation is None else f" ± {deviation:.1g}"
                cells.append(_digits(values[f"{key}/{name}"], digits) + spread)
            table.add_row(name, damping, *cells)
        return table


def named_direction(
    name: str, linearization: Linearization, damping: float, num_samples: int, generator: torch.Generator
) -> Mapping[str, Tensor]:
    """A direction of the package by its name.

    Args:
        name: sgd, ef, ief, sampled_fisher or natural_gradient.
        linearization: Model and batch.
        damping: λ; sgd has none.
        num_samples: M, for sampled_fisher.
        generator: Source of randomness, for sampled_fisher.

    Returns:
        d, {parameter name: tensor}.

    """
    match name:
        case "sgd":
            return available.sgd(linearization)
        case "sampled_fisher":
            return available.sampled_fisher(linearization, damping, num_samples, generator)
        case _:
            return cast(dict[str, Tensor], getattr(available, name)(linearization, damping))


def deviation_key(key: str) -> str:
    """Log key of the standard deviation over batches.

    Args:
        key: Log key of the mean.

    Returns:
        For instance `gamma_std/ief` for `gamma/ief`.

    """
    head, slash, name = key.partition("/")
    return f"{head}_std{slash}{name}"


def _digits(value: float, digits: int) -> str:
    """A number with so many digits, trailing zeros too, so that columns line up."""
    return f"{value:#.{digits}g}".removesuffix(".")


def _map_style(loader: Any) -> DataLoader[Any]:
    """The training DataLoader, which must be one from whose data set batches can be drawn."""
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


@contextmanager
def _undisturbed(trainer: pl.Trainer, model: nn.Module) -> Iterator[None]:
    """Eval mode and the parameters' precision; on exit, modes, buffers and random numbers are back."""
    modes = [(module, module.training) for module in model.modules()]
    # Rounding by autocast would show in an almost undamped solve.
    full_precision = torch.autocast(trainer.strategy.root_device.type, enabled=False)
    # Data sets may draw random numbers from Python and NumPy too, which preserved_state does not know.
    with isolate_rng(include_cuda=False), preserved_state(model):
        try:
            with trainer.precision_plugin.forward_context(), full_precision:
                model.eval()
                yield
        finally:
            for module, mode in modes:
                module.training = mode
