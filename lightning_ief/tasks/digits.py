"""Handwritten digits: 1,797 real images of 8 × 8 pixels that scikit-learn ships, so that nothing is downloaded."""

import torch
from torch.utils.data import Subset, TensorDataset

from lightning_ief.tasks.extras import import_extra
from lightning_ief.tasks.loaders import InMemoryDataModule

__all__ = ["DigitsDataModule"]


class DigitsDataModule(InMemoryDataModule):
    """The digits, split into training, validation and test set.

    Batches are (images, classes): float32 [N, 64] with pixels in [0, 1], int64 [N] with values 0 … 9. The split is
    stratified (each set has the same share of every digit) and depends on `seed` alone. Training samples are shuffled
    anew in each epoch; their order depends on `seed` and the number of the epoch, so that a resumed run sees what the
    uninterrupted one would have seen.

    Args:
        batch_size: N, samples per batch; the last batch of an epoch may hold fewer.
        val_fraction: Share of all images kept for validation, between 0 and 1.
        test_fraction: Share of all images kept for the test, between 0 and 1.
        seed: Seed of the split and of the order of the training samples.
        num_workers: Processes that load the data; the images are in memory, so 0 is fastest.
        order_seed: Seed of the order alone, which then leaves the split as it is; `seed` if None.

    Raises:
        ValueError: If an argument is out of range.

    """

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
        order_seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, order_seed)
        if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                f"DigitsDataModule(val_fraction={val_fraction}, test_fraction={test_fraction}): both must be positive "
                "and leave something to train on, val_fraction + test_fraction < 1."
            )
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def setup(self, stage: str | None = None) -> None:
        """Load and split the images.

        Args:
            stage: What Lightning is about to do; the split is the same for all.

        Raises:
            ModuleNotFoundError: If scikit-learn is missing.

        """
        need = "DigitsDataModule takes its images from scikit-learn"
        pixels, classes = import_extra("sklearn.datasets", "recipes", need).load_digits(return_X_y=True)
        train_test_split = import_extra("sklearn.model_selection", "recipes", need).train_test_split
        images = torch.from_numpy(pixels).float() / 16.0
        targets = torch.from_numpy(classes).long()

        def split(indices: list[int], fraction: float) -> list[list[int]]:
            """Two shares of images, the second one of this size."""
            return train_test_split(indices, test_size=fraction, random_state=self.seed, stratify=classes[indices])

        rest, test = split(list(range(len(images))), self.test_fraction)
        train, val = split(rest, self.val_fraction / (1 - self.test_fraction))
        dataset = TensorDataset(images, targets)
        self.train_set = Subset(dataset, train)
        self.val_set = Subset(dataset, val)
        self.test_set = Subset(dataset, test)
