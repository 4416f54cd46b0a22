"""Which examples the n-th batch holds, as a pure function of the seed and n.

A run's place in its data is then one number, the batches seen. torchdata's StatefulDataLoader
would keep that place too, but the trainer asks an endless loader for one batch ahead of the one
it trains on, so that the loader's own state is a batch too far when a checkpoint is written.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, Sampler

from records.process import rank
from schema.errors import ConfigError
from tasks.base import Task


@dataclass(frozen=True)
class Share:
    """Which part of every batch this process takes: the `rank`-th of `world_size`."""

    rank: int = 0
    world_size: int = 1


def share_of(settings: DictConfig) -> Share:
    """This process's share under cfg.trainer: all of it where processes divide time instead."""
    return Share() if settings.strategy == "sequence" else Share(rank(), settings.devices)


class ResumableBatches(Sampler[list[int]]):
    """Endless batches of indices 0..num_examples - 1, from batch number `start` on.

    Batch n belongs to epoch n // batches_per_epoch and holds the next batch_size entries of that
    epoch's order: a permutation drawn from (seed, epoch), or the order of the data set. What does
    not fill a batch at an epoch's end is left out of that epoch. With several processes batch_size
    counts the examples of one of them, and they take turns at the entries of the batch.

    Raises:
        ConfigError: there are fewer examples than one batch of all processes holds.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        start: int = 0,
        share: Share | None = None,
    ) -> None:
        self.num_examples = num_examples
        self.seed = seed
        self.shuffle = shuffle
        self.start = start
        self.share = share or Share()
        self.global_size = batch_size * self.share.world_size
        self.batches_per_epoch = num_examples // self.global_size
        self._order: tuple[int, np.ndarray] | None = None
        if self.batches_per_epoch == 0:
            raise ConfigError(
                f"task.recipe.batch_size={batch_size} on {self.share.world_size} process(es): "
                f"allowed: up to the {num_examples} examples of the training set together"
            )

    def __iter__(self) -> Iterator[list[int]]:
        n = self.start
        while True:
            yield self.batch(n)
            n += 1

    def batch(self, n: int) -> list[int]:
        """The indices of batch number `n` that fall to this process."""
        epoch, place = divmod(n, self.batches_per_epoch)
        first = place * self.global_size
        whole = self._epoch_order(epoch)[first : first + self.global_size]
        return whole[self.share.rank :: self.share.world_size].tolist()

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            epoch = 0
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._draw_order(epoch))
        return self._order[1]

    def _draw_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_examples)
        # numpy promises that the raw bits stay the same in later versions, but not what its
        # `permutation` makes of them. Equal keys, once in 2**64, keep the order of the data set.
        keys = np.random.PCG64((self.seed, epoch)).random_raw(self.num_examples)
        return np.argsort(keys, kind="stable")


def train_loader(
    dataset: Dataset,
    batches: ResumableBatches,
    collate: Callable[..., Any],
    *,
    num_workers: int = 0,
    pin: bool = False,
) -> DataLoader:
    """A plain loader over `batches`; it draws nothing from the global generators.

    The items of `dataset` must be functions of their index: what a worker draws from generators
    of its own, which are seeded here too, is no part of what a run can resume.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(batches.seed + batches.start),
    )


def loader_of(task: Task, cfg: DictConfig, step: int) -> DataLoader:
    """The training batches of `task` from the one that follows optimizer step `step`."""
    settings = cfg.trainer
    dataset = task.train_set()
    examples = len(dataset)  # type: ignore[arg-type]
    if settings.train_batches is not None:
        batch = task.recipe.batch_size * share_of(settings).world_size
        examples = min(examples, settings.train_batches * batch)
    batches = ResumableBatches(
        examples,
        task.recipe.batch_size,
        cfg.seed,
        shuffle=task.shuffle,
        start=step * settings.accumulate,
        share=share_of(settings),
    )
    return train_loader(
        dataset,
        batches,
        task.collate,
        num_workers=settings.num_workers,
        pin=settings.accelerator != "cpu" and torch.cuda.is_available(),
    )
