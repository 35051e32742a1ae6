"""The evaluation of saved checkpoints: γ of several directions at several dampings, as a tidy table."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_ief.callbacks._rendering import numbers_table
from lightning_ief.callbacks.gamma_evaluation import DampedDirection, GammaEvaluation, OwnDirection, named
from lightning_ief.directions.registry import REFERENCE
from lightning_ief.experiments.tables import read_table, update_table

__all__ = ["EvaluatingTrainer", "Result", "SampleProjection", "tabulate"]


@dataclass(frozen=True)
class Result:
    """A row of the table: one direction at one checkpoint.

    Attributes:
        checkpoint: The file.
        epoch: Epochs that were finished.
        step: Steps that were taken.
        direction: Name of the direction.
        damping: λ; 0 for sgd, which has none.
        num_batches: Number of batches.
        batch_size: Samples per batch.
        seed: Seed of the batches and of the targets drawn for sampled_fisher.
        num_samples: M.
        natural_iterations: Iterations of conjugate gradients.
        gamma: γ, mean over the batches.
        gamma_std: Its standard deviation over the batches; NaN for a single one, as all below.
        gamma_relative: γ over that of sgd.
        gamma_relative_std: Its standard deviation.
        gamma_share: γ of the natural gradient over γ; NaN if it was left out.
        gamma_share_std: Its standard deviation.
        cosine: Cosine of the angle to sgd.
        cosine_std: Its standard deviation.
        gradient_norm_imbalance: Largest over smallest norm of a sample's gradient.
        gradient_norm_imbalance_std: Its standard deviation.

    """

    checkpoint: str
    epoch: int
    step: int
    direction: str
    damping: float
    num_batches: int
    batch_size: int
    seed: int
    num_samples: int
    natural_iterations: int
    gamma: float
    gamma_std: float
    gamma_relative: float
    gamma_relative_std: float
    gamma_share: float
    gamma_share_std: float
    cosine: float
    cosine_std: float
    gradient_norm_imbalance: float
    gradient_norm_imbalance_std: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells rows apart."""
        return _before(self, "gamma")


@dataclass(frozen=True)
class SampleProjection:
    """A row of the table of projections: one direction, projected on one sample of a batch.

    Attributes:
        checkpoint: The file.
        step: Steps that were taken.
        direction: Name of the direction.
        damping: λ; 0 for sgd, which has none.
        batch_size: Samples of the batch.
        seed: Seed of the batch, and of the targets drawn for sampled_fisher.
        num_samples: M.
        sample: Number of the sample within the batch.
        loss: l_n.
        gradient_norm: ‖∇l_n‖.
        projection: ⟨∇l_n, d⟩, the rate at which the direction lowers the loss of the sample.
        update_norm: ‖d‖.

    """

    checkpoint: str
    step: int
    direction: str
    damping: float
    batch_size: int
    seed: int
    num_samples: int
    sample: int
    loss: float
    gradient_norm: float
    projection: float
    update_norm: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells updates apart."""
        return _before(self, "sample")


def _before(row: Result | SampleProjection, column: str) -> tuple[Any, ...]:
    """The columns before one: they say what was evaluated, those after it are the values."""
    columns = asdict(row)
    return tuple(columns.values())[: [*columns].index(column)]


_SETTINGS = ("num_batches", "batch_size", "seed", "num_samples", "natural_iterations")
"""Columns of `Result` that are settings of the evaluation."""


class EvaluatingTrainer(L.Trainer):
    """Lightning's Trainer, which can also evaluate directions at checkpoints."""

    def evaluate(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        checkpoints: list[str] | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        directions: Sequence[str | OwnDirection] = ("sgd", "ef", "ief", "sampled_fisher"),
        dampings: Sequence[float] = (1e-7,),
        num_samples: int = 1,
        num_batches: int = 10,
        batch_size: int = 160,
        natural_iterations: int = 0,
        seed: int = 0,
        output: str = "evaluation.csv",
        projections: str | None = None,
    ) -> list[Result]:
        """Evaluate γ of directions at checkpoints, each at several dampings, in the space of all trainable parameters.

        What stands in the output file already, with the same settings, is not evaluated again: an interrupted
        evaluation goes on where it was, and further checkpoints are added to it.

        Args:
            model: The module; its `objective` and `unpack_batch` are used.
            datamodule: Its training data are evaluated on.
            checkpoints: The checkpoints; that of `ckpt_path`, or the weights as they are, if none.
            ckpt_path: A single checkpoint, as for the other subcommands.
            weights_only: Is there so that the config.yaml of a run fits; nothing else is ever loaded.
            directions: Names of directions: sgd, ef, ief, sampled_fisher, natural_gradient; and others of one's own,
                each with `name` and `function`.
            dampings: λ, for losses summed over the batch; each direction is evaluated at each (sgd once).
            num_samples: M, targets drawn per sample for sampled_fisher.
            num_batches: Number of batches to average over.
            batch_size: Samples per batch.
            natural_iterations: Iterations of conjugate gradients for the exact natural gradient where a batch has
                more than 5,000 logits; with 0 its share is left out there.
            seed: Seed of the batches.
            output: The CSV file.
            projections: Another CSV file, for the projection of each direction on each sample of one batch; none if it
                is left out.

        Returns:
            The rows of these checkpoints.

        Raises:
            MisconfigurationException: If there are several processes, no training data, or the output file is another.
            ValueError: If a direction is unknown, or not defined for one of the dampings.

        """
        if self.world_size > 1:
            raise MisconfigurationException(f"evaluate runs on one device; this Trainer has {self.world_size}.")
        if not directions or not dampings:
            raise MisconfigurationException("evaluate needs at least one direction and one damping.")
        if datamodule is None:
            raise MisconfigurationException("evaluate needs training data: give a datamodule.")
        wanted = [each for given in directions for each in _at_dampings(given, dampings)]
        evaluation = GammaEvaluation(wanted, num_samples, num_batches, batch_size, natural_iterations, seed)
        settings = {name: getattr(evaluation, name) for name in _SETTINGS}
        path, projected = Path(output), Path(projections) if projections is not None else None
        done = {result.key: result for result in read_table(path, Result)}
        counted = Counter(row.key for row in read_table(projected, SampleProjection)) if projected else Counter()
        model = self._set_up(model, datamodule)
        evaluation.check_module(model)
        loader = datamodule.train_dataloader()
        results: list[Result] = []
        for checkpoint in checkpoints or [ckpt_path or ""]:
            if checkpoint and not Path(checkpoint).is_file():
                raise MisconfigurationException(f"evaluate takes files as checkpoints; there is no {checkpoint}.")
            loaded = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint else {}
            place = {"checkpoint": checkpoint, "epoch": loaded.get("epoch", 0), "step": loaded.get("global_step", 0)}
            # By direction, the columns that say what is evaluated.
            asked = {
                each.key: {**place, "direction": each.direction.name, "damping": each.damping, **settings}
                for each in wanted
            }
            # Weights without a file may be others than last time.
            missing = [each for each in wanted if not checkpoint or tuple(asked[each.key].values()) not in done]
            unprojected = []
            if projected:
                size = min(batch_size, len(loader.dataset))  # a batch may have been cut off
                unprojected = [
                    each for each in wanted
                    if not checkpoint or counted[tuple(_projected(asked[each.key]).values())] < size
                ]  # fmt: skip
            if loaded and (missing or unprojected):
                model.on_load_checkpoint(loaded)  # as Lightning does
                model.load_state_dict(loaded["state_dict"], strict=model.strict_loading)
            if missing:
                values = replace(evaluation, directions=missing).evaluate(self, model, loader)
                found = [_result(asked[each.key], each.key, values) for each in missing]
                done |= {result.key: result for result in found}
                update_table(path, found, Result, lambda result: result.key)
            if projected and unprojected:
                columns = replace(evaluation, directions=unprojected).project(self, model, loader)
                rows = [row for key, found_there in columns.items() for row in _projections(asked[key], found_there)]
                update_table(projected, rows, SampleProjection, lambda row: row.key)
            results += [done[tuple(asked[each.key].values())] for each in wanted]
            title = "/".join(Path(checkpoint).parts[-3:]) or "weights as they are"
            Console().print(tabulate(title, results[-len(wanted) :]))
        return results

    def _set_up(self, model: L.LightningModule, datamodule: L.LightningDataModule) -> L.LightningModule:
        """Do what `fit` does with them before it begins: hooks, precision, device."""
        self._data_connector.attach_datamodule(model, datamodule=datamodule)
        model.trainer = self
        datamodule.prepare_data()
        datamodule.setup("fit")
        model.setup("fit")
        model.configure_model()
        model = cast(L.LightningModule, self.precision_plugin.convert_module(model)).to(self.strategy.root_device)
        self.strategy.connect(model)
        return model


def _at_dampings(given: str | OwnDirection, dampings: Sequence[float]) -> Iterator[DampedDirection]:
    """A direction at each λ; once, if it has none or brings its own."""
    direction = named(given)
    if direction.damping == "none":
        dampings = [0.0]
    elif isinstance(given, OwnDirection) and given.damping is not None:
        dampings = [given.damping]
    for damping in dict.fromkeys(map(float, dampings)):
        yield DampedDirection(direction, damping, key=f"{direction.name}@{damping!r}")


def _result(asked: Mapping[str, Any], key: str, values: Mapping[str, float]) -> Result:
    """The row of what was asked for, with the values of the direction of this key."""
    measures: dict[str, Any] = {}
    for field in fields(Result)[len(asked) :]:
        of_all = field.name.startswith("gradient_norm")
        measures[field.name] = values.get(field.name if of_all else f"{field.name}/{key}", float("nan"))
    return Result(**asked, **measures)


def _projected(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Of what was asked for, the columns that say what is projected."""
    return {field.name: asked[field.name] for field in fields(SampleProjection) if field.name in asked}


def _projections(asked: Mapping[str, Any], found: Mapping[str, Tensor]) -> Iterator[SampleProjection]:
    """The rows of a direction, one for each sample."""
    names = ("loss", "gradient_norm", "projection")
    update_norm = float(found["update_norm"])
    for sample, values in enumerate(zip(*(found[name].tolist() for name in names), strict=True)):
        measured = dict(zip(names, values, strict=True))
        yield SampleProjection(**_projected(asked), **measured, sample=sample, update_norm=update_norm)


def tabulate(title: str, results: Sequence[Result]) -> Table:
    """A table of the results at one checkpoint, of which there is at least one."""
    columns = ("direction", "λ", "γ", f"γ / γ({REFERENCE})", "γ(natural) / γ", f"cos({REFERENCE})")
    rows = [
        (row.direction, f"{row.damping:g}", f"{row.gamma:.4g}", f"{row.gamma_relative:.3g}",
         f"{row.gamma_share:.3g}", f"{row.cosine:.3g}")
        for row in results
    ]  # fmt: skip
    return numbers_table(columns, rows, title=title, caption=f"imbalance: {results[0].gradient_norm_imbalance:.3g}")
