"""γ of several directions over training (Wu et al., arXiv 2406.06420)."""

import math
import warnings
from collections.abc import Callable, Sequence, Sized
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from rich.table import Table

from lightning_ief.callbacks._rendering import numbers_table, print_table
from lightning_ief.callbacks.beside_the_run import at_cost_of, check_objective, require_whole
from lightning_ief.callbacks.gamma_evaluation import (
    DampedDirection,
    GammaEvaluation,
    OwnDirection,
    deviation_key,
    map_style,
    named,
)
from lightning_ief.directions.registry import REFERENCE, names, unknown
from lightning_ief.objectives import Objective

__all__ = ["GammaIndicators", "OwnDirection"]


class GammaIndicators(Callback):
    """Logs γ(d) = √(dᵀFd) / |dᵀ∇L| of several directions, and the gradient-norm imbalance, as training goes on.

    Smaller is closer to the natural gradient. Evaluated before the first step, after every epoch, and at chosen
    fractions of training. The directions are those of the parameters that the Trainer's optimizers move, evaluated at
    their present values, in eval mode and without autocast, on batches drawn from the whole data set of the training
    DataLoader (whatever its sampler) by a loader of the callback's own. Layers that merge parameters in eval mode stay
    in train mode. Parameters, gradients, buffers, random numbers and modes are left as they were: a run trains the same
    with and without it, unless the data set has a generator of its own.

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
        directions: Names of directions: sgd, ef, ief, sampled_fisher, natural_gradient, kfac_sampled, kfac_empirical,
            kfac_improved; and others of one's own, each with `name`, `function` and `damping`.
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
        objective: The objective; the module's own attribute `objective` if None. A module that has none takes
            cross-entropy where its targets are classes, and one line says so.
        unpack_batch: Maps a batch to (inputs, targets); the module's own method `unpack_batch` if None, or else
            batches are taken for such pairs.
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
        directions: Sequence[str | OwnDirection] = ("sgd", "ef", "ief", "sampled_fisher"),
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
        if isinstance(directions, str) or not directions:
            raise ValueError(
                f"GammaIndicators(directions={directions!r}): must be a list of names, such as {names()[:1]}."
            )
        if any(not 0 < fraction <= 1 for fraction in fractions):
            raise ValueError(f"GammaIndicators(fractions={list(fractions)}): each must be above 0 and at most 1.")
        if every_n_epochs < 0:
            raise ValueError(f"GammaIndicators: every_n_epochs must be at least 0, got {every_n_epochs}.")
        try:
            self.evaluation = GammaEvaluation(
                _damped(directions, damping, dampings or {}), num_samples, num_batches, batch_size, natural_iterations,
                seed, objective, unpack_batch,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"GammaIndicators: {error}") from None
        self.every_n_epochs = every_n_epochs
        self.at_start = at_start
        self.fractions = list(fractions)
        self.print_table = print_table
        self.spent_seconds = 0.0
        self._due: set[int] = set()
        self._complete = self.evaluation
        self._has_told = False  # that a share is left out

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the Trainer and the module offer what is needed.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: 'fit' or another one, for which nothing is needed.

        Raises:
            MisconfigurationException: If the objective is none of the package.

        """
        if stage == "fit":
            check_objective("GammaIndicators", pl_module, self.evaluation.objective)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check training data and parameters, which are there only now, and evaluate before the first step."""
        self._check_data(trainer)
        require_whole("GammaIndicators", pl_module, "; `lightning-ief evaluate` takes the checkpoints of the run")
        self._complete = self.evaluation.completed(trainer, pl_module, trainer.train_dataloader)
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
        with at_cost_of(self):
            values = self._complete.evaluate(trainer, pl_module, trainer.train_dataloader)
        if not self._has_told and not any(key.startswith("gamma_share/") for key in values):
            self._has_told = True
            rank_zero_info(f"GammaIndicators: {self.evaluation.without_share}")
        if self.print_table:
            print_table(trainer, self.render(values, f"γ {when}"))
        return values

    def _check_data(self, trainer: pl.Trainer) -> None:
        num_batches, batch_size = self.evaluation.num_batches, self.evaluation.batch_size
        samples = len(cast(Sized, map_style(trainer.train_dataloader).dataset))
        if samples < num_batches * batch_size:
            warnings.warn(
                f"GammaIndicators(num_batches={num_batches}, batch_size={batch_size}) asks for more than the "
                f"{samples} samples of the training data set: each evaluation takes all of them once, in "
                f"{-(-samples // batch_size)} batch(es).",
                stacklevel=2,
            )

    def render(self, values: dict[str, float], title: str) -> Table:
        """Make a table of values by log key."""
        imbalance = values["gradient_norm_imbalance"]
        directions = self.evaluation.directions
        shown = {measure: column for measure, column in _COLUMNS.items() if f"{measure}/{directions[0].key}" in values}
        rows = []
        for each in directions:
            rows.append([each.key, "" if each.direction.damping == "none" else f"{each.damping:g}"])
            for measure, (_, digits) in shown.items():
                key = f"{measure}/{each.key}"
                deviation = values.get(deviation_key(key))
                spread = "" if deviation is None else f" ± {deviation:.1g}"
                rows[-1].append(_digits(values[key], digits) + spread)
        columns = ["direction", "λ", *(label for label, _ in shown.values())]
        return numbers_table(columns, rows, title=title, caption=f"gradient-norm imbalance: {imbalance:.3g}")


# Columns of the table: the heading, and the digits shown.
_COLUMNS = {
    "gamma": ("γ", 4),
    "gamma_relative": (f"γ / γ({REFERENCE})", 3),
    "gamma_share": ("γ(natural) / γ", 3),
}


def _damped(
    directions: Sequence[str | OwnDirection], damping: float, dampings: dict[str, float]
) -> list[DampedDirection]:
    """Give each direction its λ: its own, that of `dampings`, that of its registration, or else `damping`."""
    found = [named(each) for each in directions]
    known = dict.fromkeys([*names(), *(each.name for each in found)])
    if strange := sorted(dampings.keys() - known):
        raise ValueError(unknown(strange[0], known, " in dampings"))
    damped = []
    for given, direction in zip(directions, found, strict=True):
        own = given.damping if isinstance(given, OwnDirection) else None
        candidates = (own, dampings.get(direction.name), direction.default_damping)
        chosen = next((value for value in candidates if value is not None), damping)
        damped.append(DampedDirection(direction, chosen, direction.name))
    return damped


def _digits(value: float, digits: int) -> str:
    """A number with so many digits, trailing zeros too, so that columns line up."""
    return f"{value:#.{digits}g}".removesuffix(".")
