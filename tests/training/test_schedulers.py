"""Learning-rate schedulers under manual optimization: at the same times as Lightning steps them automatically."""

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_ief import IEF
from tests.module.test_mixin import Classifier, batches, trainer


@pytest.mark.parametrize(("interval", "expected"), [("step", 0.5**4), ("epoch", 0.5)])
def test_schedulers_follow_their_interval(interval, expected):
    def scheduler(optimizer):
        return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": interval}

    fit = trainer()
    fit.fit(Classifier(IEF, scheduler), batches())
    assert fit.optimizers[0].param_groups[0]["lr"] == expected


def plateau(**options):
    def configuration(optimizer):
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
        return {"scheduler": scheduler, **options}

    return configuration


@pytest.mark.parametrize(("interval", "expected"), [("epoch", 0.5**3), ("step", 0.5**12)])
@pytest.mark.filterwarnings("error:The lr scheduler dict contains")
def test_plateau_scheduler_follows_its_metric(interval, expected):
    fit = trainer(max_epochs=3)
    fit.fit(Classifier(IEF, plateau(monitor="train/loss", interval=interval)), batches())
    # No value beats the threshold, so that every step of the scheduler halves.
    assert fit.optimizers[0].param_groups[0]["lr"] == expected


def test_schedulers_step_once_an_update():
    for scheduler in (
        plateau(monitor="train/loss", interval="step"),
        lambda optimizer: {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"},
    ):
        fit = trainer()
        fit.fit(Classifier(lambda p: IEF(p, accumulate=2), scheduler), batches())
        assert fit.optimizers[0].param_groups[0]["lr"] == 0.5**2


def test_plateau_scheduler_in_the_other_forms():
    class Pair(Classifier):
        def configure_optimizers(self):
            found = super().configure_optimizers()
            return [found["optimizer"]], [found["lr_scheduler"]]

    class Flat(Classifier):
        def configure_optimizers(self):
            found = super().configure_optimizers()
            return {**found, "lr_scheduler": found["lr_scheduler"]["scheduler"], "monitor": "train/loss"}

    for kind, options in ((Pair, {"monitor": "train/loss"}), (Flat, {})):
        fit = trainer()
        fit.fit(kind(IEF, plateau(**options)), batches())
        assert fit.optimizers[0].param_groups[0]["lr"] == 0.5


def test_plateau_scheduler_without_its_metric():
    with pytest.raises(MisconfigurationException, match="no metric to follow"):
        trainer().fit(Classifier(IEF, plateau()), batches())
    with pytest.raises(MisconfigurationException, match="'missing', which was not logged"):
        trainer().fit(Classifier(IEF, plateau(monitor="missing")), batches())
    fit = trainer()
    with pytest.warns(RuntimeWarning, match="'missing', which was not logged"):
        fit.fit(Classifier(IEF, plateau(monitor="missing", strict=False)), batches())
    assert fit.optimizers[0].param_groups[0]["lr"] == 1.0


def test_one_trainer_fits_several_modules():
    """Each one's own schedulers are stepped, of a copy too."""
    fit, model = trainer(), Classifier(IEF, plateau(monitor="train/loss", interval="step"))
    for each in (model, Classifier(IEF, plateau(monitor="train/loss", interval="epoch")), copy.deepcopy(model), model):
        fit.fit_loop.epoch_progress.reset()
        fit.fit(each, batches())
        expected = 0.5 ** (1 if each.make[1] is not model.make[1] else 4)
        assert fit.optimizers[0].param_groups[0]["lr"] == expected
