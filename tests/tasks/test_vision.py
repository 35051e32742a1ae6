"""torchvision's images: split, scale, and what is said when they are missing."""

import gzip
import time

import pytest
import torch

from lightning_ief.tasks import VisionDataModule, vision
from tests.tasks.stand_ins import write_cifar10, write_fashion_mnist


@pytest.fixture
def root(tmp_path, monkeypatch):
    """300 training and 64 test images in the format of Fashion-MNIST."""
    monkeypatch.setattr(vision, "_DEBIAN", tmp_path / "no_such_package")
    write_fashion_mnist(tmp_path, 300)
    return str(tmp_path)


def prepared(root: str, **options) -> VisionDataModule:
    data = VisionDataModule(**{"dataset": "FashionMNIST", "root": root, "val_size": 50, "download": False, **options})
    data.prepare_data()
    data.setup()
    return data


def everything(data: VisionDataModule, loader) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = zip(*(data.on_after_batch_transfer(batch, 0) for batch in loader), strict=True)
    return torch.cat(images), torch.cat(targets)


def test_batches_are_standardised(root):
    data = prepared(root)
    images, targets = everything(data, data.train_dataloader())
    assert images.shape == (250, 1, 28, 28) and images.dtype == torch.float32 and targets.dtype == torch.int64
    assert float(images.mean()) == pytest.approx(0, abs=1e-5) and float(images.std()) == pytest.approx(1, abs=1e-5)
    # Brightness tells classes apart in the stand-in: images and classes still belong together.
    brightness = torch.stack([images[targets == c].mean() for c in range(10)])
    assert bool((brightness.diff() > 0.1).all())


def test_validation_images_are_held_out_whatever_the_subset(root):
    whole, small = prepared(root), prepared(root, train_size=100)
    assert len(whole.train_set) == 250 and len(small.train_set) == 100
    assert whole.val_set.indices == small.val_set.indices
    assert set(small.train_set.indices) < set(whole.train_set.indices)
    assert sorted(whole.train_set.indices + whole.val_set.indices) == list(range(300))
    assert prepared(root, seed=1).val_set.indices != whole.val_set.indices
    assert len(everything(whole, whole.test_dataloader())[1]) == 64


def test_an_order_of_its_own_leaves_the_split_as_it_is(root):
    data, other = prepared(root, train_size=100), prepared(root, train_size=100, order_seed=1)
    assert data.val_set.indices == other.val_set.indices and data.train_set.indices == other.train_set.indices
    orders = [everything(each, each.train_dataloader())[1].tolist() for each in (data, other)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_colour_images_have_their_channels_first(tmp_path, monkeypatch):
    pixels = torch.from_numpy(write_cifar10(tmp_path, 100, monkeypatch))
    data = prepared(str(tmp_path), dataset="CIFAR10", val_size=10)
    images, _ = everything(data, torch.utils.data.DataLoader(data.val_set, 10))
    chosen = pixels[data.train_set.indices].double() / 255
    expected = pixels[data.val_set.indices].double() / 255 - chosen.mean((0, 2, 3))[:, None, None]
    torch.testing.assert_close(images.double(), expected / chosen.std((0, 2, 3))[:, None, None], atol=1e-5, rtol=0)


def test_images_are_resized(root):
    data = prepared(root, image_size=56)
    assert everything(data, data.val_dataloader())[0].shape == (50, 1, 56, 56)


def test_a_given_scale_is_taken(root):
    data, own = prepared(root, mean=[0.5], std=[0.25], train_size=100), prepared(root)
    images, targets = everything(data, data.val_dataloader())
    pixels = torch.stack([data.val_set.dataset.tensors[0][index] for index in data.val_set.indices])
    torch.testing.assert_close(images, (pixels / 255 - 0.5) / 0.25)
    assert not torch.allclose(images, everything(own, own.val_dataloader())[0], atol=0.1)


def test_channels_have_scales_of_their_own(tmp_path, monkeypatch):
    pixels = torch.from_numpy(write_cifar10(tmp_path, 100, monkeypatch))
    scale = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 4.0]}
    data = prepared(str(tmp_path), dataset="CIFAR10", val_size=10, **scale)
    images, _ = everything(data, data.val_dataloader())
    for channel in range(3):
        expected = (pixels[data.val_set.indices][:, channel] / 255 - 0.1 * (channel + 1)) / 2**channel
        torch.testing.assert_close(images[:, channel], expected)
    with pytest.raises(ValueError, match="have 3 channels; give a number for each"):
        prepared(str(tmp_path), dataset="CIFAR10", val_size=10, mean=[0.5], std=[0.5])


def test_classes_are_chosen_and_numbered_anew(root):
    chosen = prepared(root, classes=[7, 2, 4], mean=[0.0], std=[1.0])
    assert len(chosen.train_set) == 3 * 30 - 50  # 30 of each class
    images, targets = everything(chosen, torch.utils.data.DataLoader(chosen.train_set.dataset, 90))
    # The stand-in's classes are 15 of 255 apart in brightness, and start at 49.5.
    brightness = torch.stack([255 * images[targets == number].mean() for number in range(3)])
    torch.testing.assert_close(brightness, 49.5 + 15 * torch.tensor([7.0, 2.0, 4.0]), atol=1, rtol=0)
    tested = everything(chosen, chosen.test_dataloader())[1]
    assert tested.bincount().tolist() == [6, 7, 6]  # of 64 images the first four classes have one more


def test_other_batches_pass(root):
    data = prepared(root)
    batch = {"x": torch.ones(2)}
    assert data.on_after_batch_transfer(batch, 0) is batch


def test_the_debian_package_is_unpacked(root, tmp_path, monkeypatch):
    package, empty = tmp_path / "package", tmp_path / "empty"
    package.mkdir()
    for file in (tmp_path / "FashionMNIST" / "raw").iterdir():
        with gzip.open(package / f"{file.name}.gz", "wb") as packed:
            packed.write(file.read_bytes())
    monkeypatch.setattr(vision, "_DEBIAN", package)
    assert len(prepared(str(empty)).train_set) == 250
    assert not list(empty.rglob("*.part"))


@pytest.mark.parametrize("dataset", ["FashionMNIST", "CIFAR10", "CIFAR100"])
@pytest.mark.parametrize("download", [True, False])
def test_missing_data_say_what_to_get_and_where_to_put_it(dataset, download, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "_DEBIAN", tmp_path / "no_such_package")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=rf"{dataset} is not in '.*'.*Put .*http.*name the folder") as caught:
        VisionDataModule(dataset, str(tmp_path / "nowhere"), download=download).prepare_data()
    assert str(tmp_path / "nowhere") in str(caught.value).partition("Put")[2]
    assert time.perf_counter() - start < 5


def refuse(*args, **kwargs):
    raise OSError("no network")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"val_size": 0}, "val_size=0"),
        ({"train_size": 0}, "train_size=0"),
        ({"image_size": 0}, "image_size=0"),
        ({"dataset": "MNIST"}, "dataset='MNIST'"),
        ({"val_size": 300}, "has 300 training images"),
        ({"train_size": 251}, "has 300 training images"),
        ({"classes": [1, 2], "val_size": 60}, r"has 60 training images of classes \[1, 2\]"),
        ({"classes": [1, 10]}, "no class 10, but 0 to 9"),
        ({"classes": [1, -1]}, "no class -1"),
        ({"classes": [1, 1]}, "two or more different"),
        ({"classes": [1]}, "two or more different"),
        ({"mean": [0.5]}, "given together"),
        ({"std": [0.5]}, "given together"),
        ({"mean": [0.5], "std": [0.5, 0.5]}, "a number for each channel"),
        ({"mean": [0.5], "std": [0.0]}, "deviations above 0"),
        ({"mean": [0.5] * 3, "std": [0.5] * 3}, "have 1 channel; give a number for each"),
        ({"mean": [], "std": []}, "give a number for each"),
    ],
)
def test_arguments_out_of_range_are_refused(options, named, root):
    with pytest.raises(ValueError, match=named):
        prepared(root, **options)
