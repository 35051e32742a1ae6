"""The digits: shapes, scale, split, order."""

import sys

import pytest
import torch

from lightning_ief.tasks import DigitsDataModule

IMAGES = 1797


def prepared(**options) -> DigitsDataModule:
    data = DigitsDataModule(**options)
    data.setup()
    return data


def everything(loader) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = zip(*loader, strict=False)
    return torch.cat(images), torch.cat(targets)


def test_batches_are_what_the_docstring_says():
    images, targets = next(iter(prepared(batch_size=32).train_dataloader()))
    assert images.shape == (32, 64) and images.dtype == torch.float32
    assert targets.shape == (32,) and targets.dtype == torch.int64
    assert images.min() == 0.0 and images.max() == 1.0
    assert set(targets.tolist()) <= set(range(10))


def test_every_image_is_in_exactly_one_set():
    data = prepared()
    indices = [*data.train_set.indices, *data.val_set.indices, *data.test_set.indices]
    assert sorted(indices) == list(range(IMAGES))
    assert len(data.val_set) == pytest.approx(0.1 * IMAGES, abs=1)
    assert len(data.test_set) == pytest.approx(0.2 * IMAGES, abs=1)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert sum(len(everything(loader)[1]) for loader in loaders) == IMAGES  # no last batch is dropped


def test_split_is_stratified():
    data = prepared(val_fraction=0.2, test_fraction=0.3)
    shares = [
        everything(loader)[1].bincount(minlength=10) / len(everything(loader)[1])
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    ]
    torch.testing.assert_close(shares[0], shares[1], atol=0.01, rtol=0)
    torch.testing.assert_close(shares[0], shares[2], atol=0.01, rtol=0)


def test_split_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = prepared(seed=3).test_set.indices
    torch.manual_seed(2)
    assert prepared(seed=3).test_set.indices == first
    assert prepared(seed=4).test_set.indices != first


def test_training_order_changes_with_the_epoch_and_repeats():
    loader = prepared().train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)  # as Lightning does
        orders.append(everything(loader)[1].tolist())
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_an_order_of_its_own_leaves_the_split_as_it_is():
    data, other, same = prepared(), prepared(order_seed=1), prepared(order_seed=0)
    sets = ("train_set", "val_set", "test_set")
    assert all(getattr(data, name).indices == getattr(other, name).indices for name in sets)
    orders = [everything(each.train_dataloader())[1].tolist() for each in (data, other, same)]
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_validation_and_test_keep_their_order():
    data = prepared()
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert torch.equal(everything(loader)[0], everything(loader)[0])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"val_fraction": 0.0}, "val_fraction=0.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "test_fraction=0.5"),
    ],
)
def test_arguments_out_of_range_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        DigitsDataModule(**options)


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ief\[recipes\]'"):
        DigitsDataModule().setup()
