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
    ],
)
def test_arguments_out_of_range_are_refused(options, named, root):
    with pytest.raises(ValueError, match=named):
        prepared(root, **options)
