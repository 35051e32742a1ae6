"""Samples that samplers repeat count once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from tests.helpers import Classifier, Configure
from tests.ranks import on_ranks
from tests.training.runs import data, dealt, first, fit, ief

pytestmark = pytest.mark.usefixtures("float64")


class Batches(torch.utils.data.Dataset):
    """Items that are batches."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return data()[4 * i : 4 * i + 4]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        rank, ranks = (
            (torch.distributed.get_rank(), torch.distributed.get_world_size())
            if torch.distributed.is_initialized()
            else (0, 1)
        )
        return iter([data()[i] for i in range(rank, 24, ranks)])


@pytest.mark.parametrize(
    ("alone", "on_rank", "ranks", "options"),
    [
        (lambda: DataLoader(data(), 12), lambda r: dealt(data(), 6, 2, r), 2, {"limit_train_batches": 2}),
        # Two full batches: the last one ends in a repeated sample; one batch, since the next is not full.
        (lambda: DataLoader(first(23), 12), lambda r: dealt(first(23), 6, 2, r, drop_last=False), 2, {}),
        (
            lambda: DataLoader(first(17), 12, drop_last=True),
            lambda r: dealt(first(17), 6, 2, r),
            2,
            {"limit_train_batches": 1},
        ),
        (lambda: DataLoader(first(46), 12), lambda r: dealt(data(), 6, 2, r, drop_last=True), 2, {}),
        (lambda: DataLoader(first(2), 12), lambda r: dealt(first(2), 4, 3, r), 3, {}),
        (lambda: DataLoader(first(20), 8), lambda r: dealt(Batches(), None, 2, r), 2, {}),
        (lambda: DataLoader(Stream(), 8), lambda r: DataLoader(Stream(), 4), 2, {}),
    ],
    ids=[
        "limited",
        "last batch full",
        "last batch dropped",
        "dropped",
        "fewer samples than ranks",
        "whole batches",
        "stream",
    ],
)
@pytest.mark.parametrize("configure", [ief, lambda p: torch.optim.SGD(p, lr=0.1)], ids=["ief", "sgd"])
def test_repeated_samples_count_once(
    configure: Configure, alone: Callable[[], Any], on_rank: Callable[[int], Any], ranks: int, options: dict[str, Any]
) -> None:
    truth = fit(configure, 0, loader=alone(), **options)[0][-1]
    for weights, messages in on_ranks(ranks, lambda rank: fit(configure, 0, None, ranks, on_rank(rank), **options)):
        assert (weights[-1] - truth).norm() < 1e-12 * truth.norm()
        assert not [m for m in messages if "count twice" in m or "counts twice" in m]


class Reversed(torch.utils.data.BatchSampler):
    def __iter__(self) -> Any:
        return iter([batch[::-1] for batch in super().__iter__()])


class Pair(Classifier):
    def unpack_batch(self, batch: Any) -> Any:
        (x, y), (u, v) = batch
        return torch.cat([x, u]), torch.cat([y, v])


class Doubled(Classifier):
    def unpack_batch(self, batch: Any) -> Any:
        return batch[0].repeat(2, 1), batch[1].repeat(2)


@pytest.mark.parametrize(
    ("kind", "loader"),
    [
        (Pair, lambda r: [dealt(first(23), 6, 2, r), dealt(first(22), 6, 2, r)]),
        (
            Classifier,
            lambda r: DataLoader(first(23), batch_sampler=Reversed(DistributedSampler(first(23), 2, r), 6, False)),
        ),
        (Doubled, lambda r: dealt(first(23), 6, 2, r)),
    ],
    ids=["several loaders", "another batch sampler", "more samples than loaded"],
)
def test_repeated_samples_that_are_not_known_are_announced(
    kind: type[Classifier], loader: Callable[[int], Any]
) -> None:
    results = on_ranks(2, lambda rank: fit(ief, 0, None, 2, loader(rank), kind=kind, max_epochs=1))
    for rank, (_, messages) in enumerate(results):
        assert any("twice" in message for message in messages) == (rank == 1)
