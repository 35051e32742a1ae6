"""γ of several directions at the end of every epoch (Wu et al., arXiv 2406.06420)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from lightning_ief import directions as available
from lightning_ief.callbacks._rendering import print_table
from lightning_ief.capture import Linearization, linearize
from lightning_ief.capture.plan import preserved_state
from lightning_ief.indicators import gamma, gradient_norm_imbalance
from lightning_ief.objectives import Objective

__all__ = ["GammaIndicators"]


class GammaIndicators(Callback):
    """Logs γ(d) = √(dᵀFd) / |dᵀ∇L| of several directions, and the gradient-norm imbalance, after every epoch.

    Smaller is closer to the natural gradient. The directions are evaluated at the present parameters, in eval mode, on
    batches of the training data drawn by a loader of the callback's own; parameters, gradients, buffers, random
    numbers and modes are left as they were, so that a run trains the same with and without it.

    Logged, as means over the batches:

    * `gamma/<direction>`: γ; inf for a direction that does not change the loss.
    * `gamma_relative/<direction>`: γ relative to that of `sgd`, mean of the ratios (if `sgd` is among the directions).
    * `gradient_norm_imbalance`: largest over smallest norm of a sample's gradient; inf if one is zero.

    A batch on which a loss is not finite gives NaN.

    Args:
        directions: Names of directions: sgd, ef, ief, sampled_fisher, natural_gradient.
        damping: λ of the directions, in our units (losses are summed).
        dampings: λ of single directions by name, where it differs.
        num_samples: M, targets drawn per sample for sampled_fisher.
        num_batches: Number of batches to average over.
        batch_size: Samples per batch.
        every_n_epochs: Evaluate after every n-th epoch.
        objective: The objective; the module's own attribute `objective` if None.
        unpack_batch: Maps a batch to (inputs, targets); the module's own method `unpack_batch` if None.
        seed: Seed of the batches and of the sampled targets.
        print_table: Whether to print a table each time.

    Raises:
        ValueError: If an argument is out of range or a direction is unknown.

    """

    def __init__(
        self,
        directions: list[str] | None = None,
        damping: float = 1e-7,
        dampings: dict[str, float] | None = None,
        num_samples: int = 1,
        num_batches: int = 1,
        batch_size: int = 64,
        every_n_epochs: int = 1,
        objective: Objective | None = None,
        unpack_batch: Callable[[Any], tuple[Any, Tensor]] | None = None,
        seed: int = 0,
        print_table: bool = True,
    ) -> None:
        names = ["sgd", "ef", "ief", "sampled_fisher"] if directions is None else directions
        for name in [*names, *(dampings or {})]:
            if name not in available.__all__:
                raise ValueError(f"GammaIndicators: unknown direction '{name}'; there are {available.__all__}.")
        for option, value in {
            "num_samples": num_samples,
            "num_batches": num_batches,
            "batch_size": batch_size,
            "every_n_epochs": every_n_epochs,
        }.items():
            if value < 1:
                raise ValueError(f"GammaIndicators({option}={value}): must be at least 1.")
        self.directions = names
        self.dampings = {name: (dampings or {}).get(name, damping) for name in names}
        self.num_samples = num_samples
        self.num_batches = num_batches
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.objective = objective
        self.unpack_batch = unpack_batch
        self.seed = seed
        self.print_table = print_table

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the module says what is needed.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: 'fit' and others.

        Raises:
            MisconfigurationException: If objective or unpack_batch are missing, or there are several processes.

        """
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"GammaIndicators evaluates on one device; this Trainer has {trainer.world_size}. Set "
                "Trainer(devices=1) or leave the callback out."
            )
        for name in ("objective", "unpack_batch"):
            if getattr(self, name) is None and not hasattr(pl_module, name):
                raise MisconfigurationException(
                    f"GammaIndicators needs {name}: {type(pl_module).__name__} has none, so give it to the callback, "
                    f"GammaIndicators({name}=...), or derive the module from NaturalGradientMixin."
                )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate, log and print.

        Args:
            trainer: The trainer.
            pl_module: The module.

        """
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        values = self.compute(trainer, pl_module)
        pl_module.log_dict(values)
        if self.print_table:
            print_table(trainer, self.table(values, f"γ after epoch {trainer.current_epoch}"))

    def compute(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """The indicators at the present parameters.

        Args:
            trainer: The trainer, for its training data.
            pl_module: The module.

        Returns:
            Values by log key, means over the batches.

        """
        objective = self.objective or cast(Any, pl_module).objective
        unpack = self.unpack_batch or cast(Any, pl_module).unpack_batch
        totals: dict[str, list[float]] = {}
        with preserved_state(pl_module), _eval_mode(pl_module):
            for number, batch in enumerate(self._batches(trainer)):
                inputs, targets = unpack(trainer.strategy.batch_to_device(batch, dataloader_idx=0))
                linearization = linearize(pl_module, inputs, targets, objective)
                for key, value in self._indicators(linearization, number).items():
                    totals.setdefault(key, []).append(value)
        return {key: sum(values) / len(values) for key, values in totals.items()}

    def _indicators(self, linearization: Linearization, number: int) -> dict[str, float]:
        """The indicators on one batch."""
        if linearization.not_finite():
            gammas = dict.fromkeys(self.directions, math.nan)
            imbalance = math.nan
        else:
            generator = torch.Generator(linearization.logits.device).manual_seed(self.seed + number)
            gammas = {name: float(self._gamma(linearization, name, generator)) for name in self.directions}
            imbalance = float(gradient_norm_imbalance(linearization))
        values = {f"gamma/{name}": value for name, value in gammas.items()}
        if "sgd" in gammas:
            values |= {f"gamma_relative/{name}": value / gammas["sgd"] for name, value in gammas.items()}
        return values | {"gradient_norm_imbalance": imbalance}

    def _gamma(self, linearization: Linearization, name: str, generator: torch.Generator) -> Tensor:
        damping = self.dampings[name]
        match name:
            case "sgd":
                direction = available.sgd(linearization)
            case "sampled_fisher":
                direction = available.sampled_fisher(linearization, damping, self.num_samples, generator)
            case _:
                direction = getattr(available, name)(linearization, damping)
        return gamma(linearization, direction)

    def _batches(self, trainer: pl.Trainer) -> Iterator[Any]:
        """Batches of the training data, the same sequence of numbers at every evaluation of a given epoch."""
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise MisconfigurationException(
                "GammaIndicators draws batches of its own, which needs one training DataLoader over a map-style "
                f"dataset; got {type(loader).__name__}."
            )
        generator = torch.Generator().manual_seed(self.seed + trainer.current_epoch)
        size = min(self.batch_size, len(loader.dataset))  # type: ignore[arg-type]  # map-style datasets have a length
        sampler = RandomSampler(loader.dataset, num_samples=size * self.num_batches, generator=generator)  # type: ignore[arg-type]
        yield from DataLoader(
            loader.dataset, size, sampler=sampler, collate_fn=loader.collate_fn, generator=torch.Generator()
        )

    def table(self, values: dict[str, float], title: str) -> Table:
        """The values as a table.

        Args:
            values: Values by log key.
            title: Its title.

        Returns:
            The table.

        """
        table = Table(
            title=title, caption=f"gradient-norm imbalance (max/min): {values['gradient_norm_imbalance']:.3g}"
        )
        table.add_column("direction")
        table.add_column("γ", justify="right")
        table.add_column("γ / γ(sgd)", justify="right")
        for name in self.directions:
            relative = values.get(f"gamma_relative/{name}")
            table.add_row(name, f"{values[f'gamma/{name}']:.4g}", "–" if relative is None else f"{relative:.3f}")
        return table


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and every submodule back into its own on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
