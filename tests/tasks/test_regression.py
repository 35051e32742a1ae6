"""The regressor and its table."""

import sys
from functools import partial

import lightning as L
import pytest
import torch

from lightning_ief import IEF
from lightning_ief.tasks import MLP, DiabetesDataModule, Regressor


def prepared(**options) -> DiabetesDataModule:
    data = DiabetesDataModule(**options)
    data.setup()
    return data


def test_table_is_split_and_standardised_by_its_training_part():
    data = prepared()
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == (309, 10) and targets.shape == (309, 1) and inputs.dtype == targets.dtype == torch.float32
    for columns in (inputs, targets):
        torch.testing.assert_close(columns.mean(0), torch.zeros(columns.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(columns.std(0), torch.ones(columns.shape[1]))
    assert len(data.val_set) == 133
    held_out = data.val_set.tensors[0]
    assert not torch.isclose(inputs[:, None], held_out[None], atol=1e-4).all(-1).any()
    assert held_out.mean(0).abs().max() > 0.01


def test_split_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = prepared(seed=3).val_set.tensors[1]
    torch.manual_seed(2)
    assert torch.equal(prepared(seed=3).val_set.tensors[1], first)
    assert not torch.equal(prepared(seed=4).val_set.tensors[1], first)
    other = prepared(seed=3, order_seed=1)
    assert torch.equal(other.val_set.tensors[1], first)
    orders = [next(iter(each.train_dataloader()))[1] for each in (other, prepared(seed=3))]
    assert not torch.equal(*orders) and torch.equal(*(order.sort(0).values for order in orders))


@pytest.mark.parametrize("options", [{"val_fraction": 0.0}, {"val_fraction": 1.0}, {"batch_size": 0}])
def test_arguments_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        DiabetesDataModule(**options)


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ief\[recipes\]'"):
        DiabetesDataModule().setup()


def test_regressor_logs_what_a_loop_by_hand_finds():
    """Over all batches of the validation, the last of which is smaller."""
    torch.manual_seed(0)
    model = Regressor(MLP([10, 8, 1]), partial(IEF, lr=0.5, relative_damping=1.0))
    data = DiabetesDataModule(batch_size=100)
    trainer = L.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(model, data)
    inputs, targets = data.val_set.tensors
    with torch.no_grad():
        errors = model(inputs) - targets
    logged = trainer.callback_metrics
    assert float(logged["val/relative_l2"]) == pytest.approx(float(errors.norm() / targets.norm()), rel=1e-5)
    assert float(logged["val/loss"]) == pytest.approx(float(errors.square().mean() / 2), rel=1e-5)
    assert float(logged["val/relative_l2"]) < 0.9
