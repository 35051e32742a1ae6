"""γ of several directions at the end of every epoch (Wu et al., arXiv 2406.06420)."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_ief import directions as available
from lightning_ief.callbacks._rendering import print_table
from lightning_ief.capture import Linearization, linearize
from lightning_ief.capture.plan import preserved_state
from lightning_ief.indicators import gamma, gradient_norm_imbalance
from lightning_ief.objectives import Objective

__all__ = ["GammaIndicators"]


class GammaIndicators(Callback):
    """Logs γ(d) = √(dᵀFd) / |dᵀ∇L| of several directions, and the gradient-norm imbalance, after every epoch.

    Smaller is closer to the natural gradient. The directions are evaluated at the present parameters, in eval mode and
    without autocast, on batches drawn from the whole data set of the training DataLoader (whatever its sampler) by a
    loader of the callback's own. Parameters, gradients, buffers, random numbers and modes are left as they were: a run
    trains the same with and without it.

    Logged, as means over the batches:

    * `gamma/<direction>`: γ; inf for a direction that does not change the loss.
    * `gamma_relative/<direction>`: γ over that of `sgd` on the same batch, a ratio; NaN where neither changes the loss.
    * `gradient_norm_imbalance`: largest over smallest norm of a sample's gradient, a ratio; inf if one is zero, NaN if
      all are.

    All of them are NaN if the gradient of a sample is not finite; training goes on.

    Args:
        directions: Names of directions: sgd, ef, ief, sampled_fisher, natural_gradient.
        damping: λ of the directions, for losses summed over the batch, in the units of squared gradient norms.
        dampings: λ of single directions by name, where it differs; {"sampled_fisher": 1.0} unless said otherwise,
            since a few sampled targets make a poor Fisher matrix where it is small.
        num_samples: M, targets drawn per sample for sampled_fisher.
        num_batches: Number of batches to average over.
        batch_size: Samples per batch (N); the last batch of a small data set may hold fewer.
        every_n_epochs: Evaluate after every n-th epoch.
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
        directions: Sequence[str] = ("sgd", "ef", "ief", "sampled_fisher"),
        damping: float = 1e-7,
        dampings: dict[str, float] | None = None,
        num_samples: int = 1,
        num_batches: int = 1,
        batch_size: int = 64,
        every_n_epochs: int = 1,
        objective: Objective | None = None,
        unpack_batch: Callable[[Any], Any] | None = None,
        seed: int = 0,
        print_table: bool = True,
    ) -> None:
        own_dampings = {"sampled_fisher": 1.0, **(dampings or {})}
        if isinstance(directions, str) or not directions:
            raise ValueError(f"GammaIndicators(directions={directions!r}): must be a list of names, such as ['ief'].")
        for name in [*directions, *own_dampings]:
            if name not in available.__all__:
                raise ValueError(f"GammaIndicators: unknown direction '{name}'; there are {available.__all__}.")
        self.directions = list(directions)
        self.dampings = {name: own_dampings.get(name, damping) for name in directions}
        for name, value in self.dampings.items():
            # The sampled Fisher matrix does not span the gradient: without damping there is no solution.
            if not 0 <= value < float("inf") or (name == "sampled_fisher" and value == 0):
                least = "> 0" if name == "sampled_fisher" else "≥ 0"
                raise ValueError(f"GammaIndicators: the damping of '{name}' must be finite and {least}, got {value}.")
        for option, count in {
            "num_samples": num_samples,
            "num_batches": num_batches,
            "batch_size": batch_size,
            "every_n_epochs": every_n_epochs,
        }.items():
            if count < 1:
                raise ValueError(f"GammaIndicators({option}={count}): must be at least 1.")
        self.num_samples = num_samples
        self.num_batches = num_batches
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.objective = objective
        self.unpack_batch = unpack_batch
        self.seed = seed
        self.print_table = print_table

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the Trainer and the module offer what is needed.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: 'fit' or another one, for which nothing is needed.

        Raises:
            MisconfigurationException: If objective or unpack_batch are missing, or there are several processes.

        """
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"GammaIndicators does not support several processes yet; this Trainer has {trainer.world_size}. Set "
                "Trainer(devices=1) or leave the callback out."
            )
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
        """Check the training data, which are there only now."""
        self._check_data(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate, log and print."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with _undisturbed(trainer, pl_module):
            values = self.compute(pl_module, self.collect(trainer))
        pl_module.log_dict(values)
        if self.print_table:
            print_table(trainer, self.render(values, f"γ after epoch {trainer.current_epoch}"))

    def _check_data(self, trainer: pl.Trainer) -> None:
        samples = len(cast(Sized, _train_loader(trainer).dataset))
        if samples < self.num_batches * self.batch_size:
            warnings.warn(
                f"GammaIndicators(num_batches={self.num_batches}, batch_size={self.batch_size}) asks for more than the "
                f"{samples} samples of the training data set: each evaluation takes all of them once, in "
                f"{-(-samples // self.batch_size)} batch(es).",
                stacklevel=2,
            )

    def collect(self, trainer: pl.Trainer) -> Iterator[Any]:
        """Draw batches of the training data, other ones after every epoch.

        Args:
            trainer: The trainer.

        Yields:
            Batches on the module's device, as its training step would get them.

        """
        given = _train_loader(trainer)
        generator = torch.Generator().manual_seed(self.seed + trainer.current_epoch)
        loader: DataLoader[Any] = DataLoader(
            given.dataset, self.batch_size, shuffle=True, collate_fn=given.collate_fn, generator=generator
        )
        for batch in islice(loader, self.num_batches):
            batch = trainer.lightning_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def compute(self, pl_module: pl.LightningModule, batches: Iterable[Any]) -> dict[str, float]:
        """Evaluate the indicators at the present parameters.

        Args:
            pl_module: The module.
            batches: Batches on its device, at least one.

        Returns:
            Values by log key, means over the batches.

        """
        objective = self.objective or cast(Any, pl_module).objective
        unpack = self.unpack_batch or cast(Any, pl_module).unpack_batch
        generator = torch.Generator(pl_module.device).manual_seed(self.seed)
        each = []
        for inputs, targets in map(unpack, batches):
            each.append(self._indicators(linearize(pl_module, inputs, targets, objective), generator))
        return {key: sum(float(values[key]) for values in each) / len(each) for key in each[0]}

    def _indicators(self, linearization: Linearization, generator: torch.Generator) -> dict[str, Tensor]:
        """Values by log key on one batch, float64 scalars."""
        imbalance = gradient_norm_imbalance(linearization)
        finite = bool(torch.isfinite(linearization.jacobian.gram()).all())
        undefined = torch.full_like(imbalance, torch.nan)
        gammas = {
            name: gamma(linearization, self._direction(linearization, name, generator)) if finite else undefined
            for name in dict.fromkeys(["sgd", *self.directions])  # all are compared with sgd
        }
        return {
            **{f"gamma/{name}": gammas[name] for name in self.directions},
            **{f"gamma_relative/{name}": gammas[name] / gammas["sgd"] for name in self.directions},
            "gradient_norm_imbalance": imbalance if finite else undefined,
        }

    def _direction(self, linearization: Linearization, name: str, generator: torch.Generator) -> dict[str, Tensor]:
        match name:
            case "sgd":
                return available.sgd(linearization)
            case "sampled_fisher":
                return available.sampled_fisher(linearization, self.dampings[name], self.num_samples, generator)
            case _:
                return cast(dict[str, Tensor], getattr(available, name)(linearization, self.dampings[name]))

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
        table.add_column("γ", justify="right")
        table.add_column("γ / γ(sgd)", justify="right")
        for name in self.directions:
            damping = "" if name == "sgd" else f"{self.dampings[name]:g}"
            table.add_row(
                name, damping, _digits(values[f"gamma/{name}"], 4), _digits(values[f"gamma_relative/{name}"], 3)
            )
        return table


def _digits(value: float, digits: int) -> str:
    """A number with so many digits, trailing zeros too, so that columns line up."""
    return f"{value:#.{digits}g}".removesuffix(".")


def _train_loader(trainer: pl.Trainer) -> DataLoader[Any]:
    """The training DataLoader, which must be one from whose data set batches can be drawn."""
    loader = trainer.train_dataloader
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
