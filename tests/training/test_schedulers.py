"""Learning-rate schedulers under manual optimization: at the same times as Lightning steps them automatically."""

import copy

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_ief import IEF
from tests.module.test_mixin import Classifier, batches, trainer


class OwnStep(Classifier):
    """What users write who need more than the loss."""

    def training_step(self, batch, batch_idx):
        return self.optimize(*batch).mean()


@pytest.mark.parametrize("kind", [Classifier, OwnStep])
@pytest.mark.parametrize(("interval", "expected"), [("step", 0.5**4), ("epoch", 0.5)])
def test_schedulers_follow_their_interval(kind, interval, expected):
    def scheduler(optimizer):
        return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": interval}

    fit = trainer()
    fit.fit(kind(IEF, scheduler), batches())
    assert fit.optimizers[0].param_groups[0]["lr"] == expected


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_scheduler_that_the_module_steps_is_left_to_it(interval):
    class ByHand(OwnStep):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.lr_schedulers().step()
            return loss

    def scheduler(optimizer):
        return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": interval}

    fit = trainer(max_epochs=2)
    with pytest.warns(RuntimeWarning, match="StepLR is stepped by the module itself"):
        fit.fit(ByHand(IEF, scheduler), batches())
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.5**8


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_epoch_end"])
def test_a_scheduler_that_is_stepped_behind_the_epoch_is_left_to_the_module(hook):
    """The step that was taken before it is taken back."""

    class ByHand(OwnStep):
        rates = ()

        def on_train_batch_start(self, batch, batch_idx):
            self.rates = (*self.rates, self.optimizers().param_groups[0]["lr"])

        def validation_step(self, batch, batch_idx):
            pass

    def by_hand(self):
        if not self.trainer.sanity_checking:
            self.lr_schedulers().step()

    module = type("Own", (ByHand,), {hook: by_hand})(IEF, lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5))
    with pytest.warns(RuntimeWarning, match="StepLR is stepped by the module itself"):
        trainer(max_epochs=3, num_sanity_val_steps=0).fit(module, batches(), batches(4))
    assert module.rates == (1.0,) * 4 + (0.5,) * 4 + (0.25,) * 4


def test_plateau_schedulers_of_epochs_follow_what_the_module_logs_at_their_end():
    class Logs(OwnStep):
        def on_train_epoch_end(self):
            super().on_train_epoch_end()
            self.log("end", float(self.current_epoch))

        def lr_scheduler_step(self, scheduler, metric):
            self.followed = [*getattr(self, "followed", []), float(metric)]

    module = Logs(IEF, plateau(monitor="end"))
    trainer(max_epochs=3).fit(module, batches())
    assert module.followed == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(("accumulate", "batches_of"), [(1, 4), (2, 4), (3, 4)])
def test_a_schedule_over_the_run_ends_with_it(accumulate, batches_of):
    """Updates are counted, the short one at the end of an epoch too."""

    class Falling(OwnStep):
        def configure_optimizers(self):
            optimizer = IEF(self.parameters(), accumulate=accumulate)
            steps = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    fit = trainer(max_epochs=2)
    seen = []
    fit.callbacks.append(Rates(seen))
    fit.fit(Falling(IEF), batches(16, batches_of))
    updates = 2 * -(-4 // accumulate)
    assert [*dict.fromkeys(seen)] == pytest.approx([1 - k / updates for k in range(updates)])
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert fit.global_step == updates and fit.accumulate_grad_batches == 1


class Rates(L.Callback):
    """The learning rate of each batch."""

    def __init__(self, seen):
        self.seen = seen

    def on_train_batch_start(self, trainer, *_):
        self.seen.append(round(trainer.optimizers[0].param_groups[0]["lr"], 9))


def test_plateau_schedulers_of_steps_see_the_validation_behind_the_batch():
    """As in plain Lightning: two validations in an epoch of four batches, after the second and the fourth one."""

    class Validated:
        value = 0.0

        def validation_step(self, batch, batch_idx):
            if batch_idx == 0:
                self.value += 1.0
            self.log("val/loss", self.value)

        def lr_scheduler_step(self, scheduler, metric):
            self.followed.append(float(metric))

    class Plain(Validated, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 3).double()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters())
            configuration = plateau(monitor="val/loss", interval="step", frequency=2)(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": configuration}

    class Ours(Validated, OwnStep):
        pass

    for module in (Plain(), Ours(IEF, plateau(monitor="val/loss", interval="step", frequency=2))):
        module.followed = []
        trainer(max_epochs=2, val_check_interval=2, num_sanity_val_steps=0).fit(module, batches(), batches(4))
        assert module.followed == [1.0, 2.0, 3.0, 4.0]


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
