"""The n-th batch is a pure function of the seed and n."""

import hashlib
from collections.abc import Iterable
from itertools import chain, islice

import pytest
import torch
from torch.utils.data import Dataset, default_collate

from schema.errors import ConfigError
from training.data import ResumableBatches, Share, train_loader


class Squares(Dataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"index": torch.tensor(index), "square": torch.tensor(index * index)}


def first(batches: Iterable, count: int) -> list:
    return list(islice(iter(batches), count))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("start", [1, 4, 5, 6, 13])
def test_starting_anywhere_goes_on_as_from_the_beginning(start: int, shuffle: bool) -> None:
    whole = ResumableBatches(23, 4, seed=7, shuffle=shuffle)  # 5 batches an epoch, 3 left over
    later = ResumableBatches(23, 4, seed=7, shuffle=shuffle, start=start)
    assert first(whole, start + 9)[start:] == first(later, 9)


def test_an_epoch_visits_every_example_at_most_once_and_epochs_differ() -> None:
    batches = first(ResumableBatches(20, 4, seed=0), 15)
    epochs = [list(chain(*batches[i : i + 5])) for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seeds_differ_and_the_order_is_the_same_on_every_machine() -> None:
    orders = [first(ResumableBatches(1000, 50, seed=seed), 20) for seed in (0, 1)]
    assert orders[0] != orders[1]
    digest = hashlib.sha256(repr(orders[0]).encode()).hexdigest()
    assert (
        digest == "f79b2cb2039f8e32f2a93f002301cf351e09c593ad3f586ae55e559d422371be"
    )  # recorded once: an old run must resume in its own order


def test_without_shuffling_every_epoch_walks_the_set_in_order() -> None:
    batches = first(ResumableBatches(7, 2, seed=0, shuffle=False), 6)
    assert batches == [[0, 1], [2, 3], [4, 5]] * 2


def test_processes_share_a_batch_without_overlap() -> None:
    shares = [first(ResumableBatches(40, 4, seed=3, share=Share(rank, 2)), 8) for rank in range(2)]
    for n, both in enumerate(zip(*shares, strict=True)):
        assert len(set(both[0]) | set(both[1])) == 8, n
        # together the two are the batch that one process of twice the size would take
        assert sorted(chain(*both)) == sorted(ResumableBatches(40, 8, seed=3).batch(n))


def test_a_batch_larger_than_the_training_set_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=8 on 1 process\(es\): .* 7 examples"):
        ResumableBatches(7, 8, seed=0)
    with pytest.raises(ConfigError, match="on 2 process"):
        ResumableBatches(7, 4, seed=0, share=Share(0, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_yields_the_batches_and_draws_nothing_global(workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = ResumableBatches(23, 4, seed=7, start=3)
    loader = train_loader(Squares(23), batches, default_collate, num_workers=workers)
    got = [batch["index"].tolist() for batch in first(loader, 7)]
    assert got == first(batches, 7)
    assert torch.equal(torch.get_rng_state(), before)
