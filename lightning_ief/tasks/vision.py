"""Images of torchvision: Fashion-MNIST, CIFAR10 and CIFAR100."""

import gzip
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

from lightning_ief.tasks.extras import import_extra
from lightning_ief.tasks.hub import MissingError
from lightning_ief.tasks.loaders import InMemoryDataModule

__all__ = ["VisionDataModule"]

_SOURCES = {
    "FashionMNIST": "the four files of https://github.com/zalandoresearch/fashion-mnist, unpacked, into "
    "{root}/FashionMNIST/raw (or, on Debian: apt-get install dataset-fashion-mnist)",
    "CIFAR10": "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz into {root}",
    "CIFAR100": "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz into {root}",
}
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


class VisionDataModule(InMemoryDataModule):
    """Images of torchvision, standardised, with a validation set held out of the training set.

    Batches are (images, classes): float32 [N, channels, height, width], each channel with mean 0 and standard deviation
    1 over the training set, unless other numbers are given; int64 [N]. The validation set depends on `seed` alone, and
    so does the subset that is trained on. Training samples are shuffled anew in each epoch, in an order that depends on
    `seed` and the number of the epoch. No augmentation.

    Args:
        dataset: Which images: FashionMNIST (28 × 28, grey), CIFAR10 or CIFAR100 (32 × 32, in colour); their 10,000 test
            images are the test set.
        root: Folder of the data, as torchvision lays it out.
        batch_size: N, samples per batch; the last batch of an epoch may hold fewer.
        val_size: Number of training images held out for validation.
        train_size: Number of other training images to train on; all of them if None.
        image_size: Height and width to which images are resized, bilinearly; as they are if None.
        classes: Numbers of the classes to take; they become 0, 1, ... in this order. All of them if None.
        mean: What is taken off each channel, on a scale from 0 to 1: pretrained models want what they were trained
            with. The mean over the images that are trained on if None.
        std: What each channel is then divided by, given together with `mean`; the standard deviation if None.
        download: Whether to download what is missing. Fashion-MNIST is taken from Debian's package
            dataset-fashion-mnist if that is installed.
        seed: Seed of the validation set, the subset and the order of the training samples.
        num_workers: Processes that load the data; the images are in memory, so 0 is fastest.
        order_seed: Seed of the order alone, which then leaves the split as it is; `seed` if None.
        eval_batch_size: Samples per batch of validation and test; N if None.

    Raises:
        ValueError: If an argument is out of range.

    """

    def __init__(
        self,
        dataset: Literal["FashionMNIST", "CIFAR10", "CIFAR100"],
        root: str = "data",
        batch_size: int = 64,
        val_size: int = 5_000,
        train_size: int | None = None,
        image_size: int | None = None,
        classes: list[int] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        download: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        order_seed: int | None = None,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, order_seed, eval_batch_size)
        self._require_positive(val_size=val_size, train_size=train_size, image_size=image_size)
        if dataset not in _SOURCES:
            raise ValueError(f"VisionDataModule(dataset={dataset!r}): must be one of {[*_SOURCES]}.")
        if classes is not None and len({*classes}) < max(2, len(classes)):
            raise ValueError(f"VisionDataModule(classes={classes}): must be two or more different ones.")
        if (mean is None) != (std is None) or len(mean or []) != len(std or []) or min(std or [1.0]) <= 0:
            raise ValueError(
                f"VisionDataModule(mean={mean}, std={std}): must be given together, a number for each channel, such as "
                "[0.5] and [0.5] for grey images; deviations above 0."
            )
        self.dataset = dataset
        self.root = root
        self.val_size = val_size
        self.train_size = train_size
        self.image_size = image_size
        self.classes = classes
        self.mean = mean
        self.std = std
        self.download = download

    def prepare_data(self) -> None:
        """Download what is missing; in one process only.

        Raises:
            MissingError: If data are missing and can't be downloaded.

        """
        if self.dataset == "FashionMNIST" and _DEBIAN.is_dir():
            raw = Path(self.root, "FashionMNIST", "raw")
            raw.mkdir(parents=True, exist_ok=True)
            for packed in _DEBIAN.glob("*.gz"):
                if not (raw / packed.stem).exists():
                    whole = raw / f"{packed.stem}.part"  # a run that is killed leaves no half file under the name
                    with gzip.open(packed) as source, whole.open("wb") as target:
                        shutil.copyfileobj(source, target)
                    whole.rename(raw / packed.stem)
        for train in (True, False):
            self._images(train, download=self.download)

    def setup(self, stage: str | None = None) -> None:
        """Load and split the images.

        Args:
            stage: What Lightning is about to do; the split is the same for all.

        Raises:
            MissingError: If data are missing.
            ValueError: If there are fewer training images than asked for, or other classes or channels.

        """
        images, targets = self._images(train=True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        available = len(order) - self.val_size
        train_size = available if self.train_size is None else self.train_size
        if not 1 <= train_size <= available:
            raise ValueError(
                f"VisionDataModule(val_size={self.val_size}, train_size={self.train_size}): {self.dataset} has "
                f"{len(order)} training images" + (f" of classes {self.classes}." if self.classes else ".")
            )
        channels = images.shape[1]
        if self.mean is not None and len(self.mean) != channels:
            raise ValueError(
                f"VisionDataModule(mean={self.mean}, std={self.std}): images of {self.dataset} have {channels} "
                f"channel{'s' * (channels > 1)}; give a number for each."
            )
        whole = TensorDataset(images, targets)
        self.val_set = Subset(whole, order[: self.val_size].tolist())
        chosen = order[self.val_size : self.val_size + train_size]
        self.train_set = Subset(whole, chosen.tolist())
        self.test_set = TensorDataset(*self._images(train=False))
        if self.mean is None or self.std is None:
            self._moments = _moments(images[chosen])
        else:
            mean, std = torch.tensor([self.mean, self.std])[:, :, None, None]
            self._moments = mean, std

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Standardise and resize images: they are bytes until here, which keeps memory small.

        Args:
            batch: (images, classes), images as bytes.
            dataloader_idx: Number of the loader.

        Returns:
            (images, classes), images as float32; any other batch as it is.

        """
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and batch[0].dtype == torch.uint8):
            return batch
        pixels, targets = batch
        mean, std = (moment.to(pixels.device) for moment in self._moments)
        images: Tensor = (pixels / 255 - mean) / std
        if self.image_size is not None:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        if self.trainer is not None:  # the precision of the run: bytes have passed it by
            images = self.trainer.precision_plugin.convert_input(images)
        return images, targets

    def _images(self, train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
        """Images as bytes, [N, channels, height, width], and classes."""
        need = "VisionDataModule takes its images from torchvision"
        datasets = import_extra("torchvision.datasets", "recipes", need)
        try:
            found = getattr(datasets, self.dataset)(self.root, train=train, download=download)
        except (RuntimeError, OSError) as error:  # torchvision's for missing files, and for a missing network
            raise MissingError(
                f"{self.dataset} is not in '{self.root}' and was not downloaded ({str(error).splitlines()[-1]}). Put "
                f"{_SOURCES[self.dataset].format(root=self.root)}, or name the folder that has it as root."
            ) from error
        pixels = torch.as_tensor(found.data)
        # Grey images have no dimension for channels, coloured ones have it last.
        images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        targets = torch.as_tensor(found.targets)
        if self.classes is None:
            return images, targets
        if unknown := {*self.classes} - {*targets.tolist()}:
            raise ValueError(
                f"VisionDataModule(classes={self.classes}): {self.dataset} has no class {min(unknown)}, but 0 to "
                f"{int(targets.max())}."
            )
        numbers = torch.full((int(targets.max()) + 1,), -1)
        numbers[self.classes] = torch.arange(len(self.classes))
        kept = numbers[targets] >= 0
        return images[kept], numbers[targets[kept]]


def _moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of bytes, on a scale from 0 to 1; [channels, 1, 1]."""
    # From how often each of the 256 values occurs: the images as floats would take gigabytes.
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)]).double()
    values, total = torch.linspace(0, 1, 256, dtype=torch.float64), counts.sum(1, keepdim=True)
    mean = (counts * values).sum(1, keepdim=True) / total
    variance = (counts * (values - mean).square()).sum(1, keepdim=True) / (total - 1)
    return mean.float()[:, :, None], variance.sqrt().float()[:, :, None]
