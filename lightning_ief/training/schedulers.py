"""Learning-rate schedulers under manual optimization, where Lightning steps none."""

import warnings
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ReduceLROnPlateau

__all__ = ["Schedulers"]


class _Metric(NamedTuple):
    """What a scheduler follows, and whether it is an error if that was not logged."""

    name: str
    strict: bool = True


class Schedulers:
    """Steps the schedulers of a module as automatic optimization would."""

    def __init__(self) -> None:
        self._followed: list[tuple[Any, _Metric]] = []  # schedulers that follow a metric, and which

    def forget(self) -> None:
        """Forget the schedulers of an earlier run."""
        self._followed.clear()

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
            module.lr_scheduler_step(config.scheduler, value)

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
