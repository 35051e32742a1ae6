"""Learning-rate schedulers under manual optimization, where Lightning steps none."""

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_ief.optim import DirectionOptimizer

__all__ = ["Schedulers"]

_BY_HAND = "by hand"


class _Metric(NamedTuple):
    """What a scheduler follows, and whether it is an error if that was not logged."""

    name: str
    strict: bool = True


class Schedulers:
    """Steps the schedulers of a module as automatic optimization would, but for those that the module steps itself."""

    def __init__(self) -> None:
        self._followed: list[tuple[Any, _Metric]] = []  # schedulers that follow a metric, and which
        self._left_at: list[tuple[Any, Any]] = []  # schedulers, and their count when they were left
        self._before: list[tuple[Any, dict[str, Any], list[float]]] = []  # as they were, with lr, before an epoch's end

    def forget(self) -> None:
        """Forget the schedulers of an earlier run."""
        self._followed.clear()
        self._left_at.clear()
        self._before.clear()

    def begin(self, module: pl.LightningModule) -> None:
        """Note where the schedulers stand as training begins: who moves them from there on?"""
        known = [each for each, _ in self._left_at]  # of this run, in the midst of which a Tuner may try others
        present = [config.scheduler for config in module.trainer.lr_scheduler_configs]
        new = [each for each in present if not any(each is other for other in known)]
        self._left_at += [(each, _count(each)) for each in new]

    def configured(self, module: pl.LightningModule, configure: Callable[[pl.LightningModule], Any]) -> Any:
        """What `configure_optimizers` returns, with a schedule that ends with the run.

        Lightning's estimated_stepping_batches knows of its own accumulation alone, and no optimizer can be asked before
        there is one: where it makes updates of several batches, it is made once more.

        Args:
            module: The module.
            configure: Its `configure_optimizers`.

        Returns:
            What that returns, for Lightning.

        """
        found = configure(module)
        trainer = module._trainer
        accumulate = {each.accumulate for each in _optimizers(found) if isinstance(each, DirectionOptimizer)}
        if trainer is not None and len(accumulate) == 1 and (batches := accumulate.pop()) > 1:
            before = trainer.accumulate_grad_batches
            trainer.accumulate_grad_batches = batches
            try:
                found = configure(module)
            finally:
                trainer.accumulate_grad_batches = before
        return self.remember(found)

    def remember(self, found: Any) -> Any:
        """Remember which metrics schedulers follow, for Lightning drops that, with a warning.

        Args:
            found: What `configure_optimizers` returns.

        Returns:
            The same without the keys that Lightning warns of.

        """
        if isinstance(found, (list, tuple)):
            return type(found)([self.remember(each) for each in found])
        if not isinstance(found, dict):
            return found
        scheduler = found.get("scheduler", found.get("lr_scheduler"))
        follows = isinstance(scheduler, ReduceLROnPlateau) or found.get("reduce_on_plateau", False)
        if follows and found.get("monitor") is not None:
            self._followed.append((scheduler, _Metric(found["monitor"], found.get("strict", True))))
        dropped = {"monitor", "strict", "reduce_on_plateau"}
        return {key: self.remember(value) for key, value in found.items() if key not in dropped}

    def require_metrics(self, module: pl.LightningModule) -> None:
        """Refuse a ReduceLROnPlateau that was not told what to follow."""
        for config in module.trainer.lr_scheduler_configs:
            self._metric_of(config.scheduler, module)

    def step(self, module: pl.LightningModule, interval: str, count: int, plateau: bool = False) -> None:
        """Step the schedulers of an interval.

        Args:
            module: The module.
            interval: "step" or "epoch".
            count: How many of them have ended in this epoch, or run.
            plateau: Whether to step those that follow a metric, or those that only count.

        Raises:
            MisconfigurationException: If a metric was not logged.

        """
        for config in module.trainer.lr_scheduler_configs:
            followed = self._metric_of(config.scheduler, module)
            if config.interval != interval or (followed is not None) != plateau or count % config.frequency:
                continue
            if self._is_moved_by_others(config.scheduler):
                continue
            value = None
            if followed is not None:
                logged = module.trainer.callback_metrics
                value = logged.get(followed.name)
                if value is None:
                    problem = (
                        f"{type(config.scheduler).__name__} follows '{followed.name}', which was not logged; there "
                        f"are: {[*logged]}."
                    )
                    if followed.strict:
                        raise MisconfigurationException(f"{problem} Log it, or set 'strict': False to skip the step.")
                    warnings.warn(f"{problem} Skipped its step.", RuntimeWarning, stacklevel=2)
                    continue
            if interval == "epoch" and not plateau:
                groups = getattr(getattr(config.scheduler, "optimizer", None), "param_groups", [])
                state = deepcopy(config.scheduler.state_dict())
                self._before.append((config.scheduler, state, [group["lr"] for group in groups]))
            module.lr_scheduler_step(config.scheduler, value)
            self._left_at = [(each, _count(each) if each is config.scheduler else at) for each, at in self._left_at]

    def take_back(self, module: pl.LightningModule) -> None:
        """Take back the steps at this epoch's end of schedulers that the module has stepped itself since."""
        for scheduler, state, rates in self._before:
            at = next((at for each, at in self._left_at if each is scheduler), None)
            if not (isinstance(at, int) and self._is_moved_by_others(scheduler)):
                continue
            own = _count(scheduler) - at
            scheduler.load_state_dict(state)
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            for _ in range(own):
                module.lr_scheduler_step(scheduler, None)
        self._before.clear()

    def _is_moved_by_others(self, scheduler: Any) -> bool:
        """Whether a scheduler stands elsewhere than it was left: then the module steps it, as by hand one has to."""
        for number, (each, at) in enumerate(self._left_at):
            if each is not scheduler:
                continue
            if at != _BY_HAND and _count(scheduler) != at:
                self._left_at[number] = (scheduler, _BY_HAND)
                warnings.warn(
                    f"{type(scheduler).__name__} is stepped by the module itself, and from now on left to it. "
                    "NaturalGradientMixin would step it by its interval and frequency: leave that to it.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return bool(self._left_at[number][1] == _BY_HAND)
        return False

    def _metric_of(self, scheduler: Any, module: pl.LightningModule) -> _Metric | None:
        """The metric that a scheduler follows; None for those that only count."""
        for known, metric in self._followed:
            if known is scheduler:
                return metric
        if not isinstance(scheduler, ReduceLROnPlateau):
            return None
        if name := getattr(scheduler, "monitor", None):  # LightningCLI's own class
            return _Metric(name)
        raise MisconfigurationException(
            "ReduceLROnPlateau has no metric to follow: return {'optimizer': ..., 'lr_scheduler': {'scheduler': ..., "
            f"'monitor': 'val/loss'}}}} from {type(module).__name__}.configure_optimizers()."
        )


def _count(scheduler: Any) -> Any:
    """How far a scheduler has come; None for one that does not say."""
    return getattr(scheduler, "last_epoch", None)


def _optimizers(found: Any) -> list[Any]:
    """The optimizers in what `configure_optimizers` returns."""
    if isinstance(found, Mapping):
        found = found.get("optimizer")
    if isinstance(found, (list, tuple)):
        return [optimizer for each in found for optimizer in _optimizers(each)]
    return [found] if isinstance(found, Optimizer) else []
