"""In-context recall and noisy recall of MAD (Poli et al. 2024, "Mechanistic design and scaling").

N examples, L length, V vocabulary, P pairs.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import (
    Difficulty,
    in_parts,
    pick,
    repeats,
    require_at_least,
    require_choice,
)
from tasks.recall.task import Recall


@dataclass(frozen=True)
class InContextConfig(Difficulty):
    """One difficulty: pairs of a random key and its value, and at the end a key seen before.

    Of V ids the last `noise_ids` are noise, before them is a copy marker unless `multi_query`,
    and the others are one half keys, one half values. Every key has one value per sequence; two
    keys may share a value. A pair is two noise ids with probability `noise_fraction`, except one
    pair that never is.

    Attributes:
        vocab_size: V.
        seq_len: L, of multi_query odd and else even.
        targets: "recall" labels a key that came up before with its value, at its every
            repetition or, unless multi_query, at the end only, behind a marker. "next" labels
            every position with the token after it, as the source trains.
        multi_query: see targets.
        noise_ids: how many ids are noise.
        noise_fraction: see above.
    """

    letters: ClassVar = {"seq_len": "L", "noise_fraction": "noise", "targets": ""}
    guess: ClassVar = "naming any possible answer"

    vocab_size: int
    seq_len: int
    targets: Literal["recall", "next"] = "recall"
    multi_query: bool = True
    noise_ids: int = 0
    noise_fraction: float = 0.0

    def __post_init__(self) -> None:
        require_choice(self, "targets", ("recall", "next"))
        require_at_least(self, noise_ids=0, noise_fraction=0)
        if self.num_keys < 1:
            raise ConfigError(
                f"vocab_size={self.vocab_size}: expected at least "
                f"{2 + self.noise_ids + (not self.multi_query)} with noise_ids={self.noise_ids}"
            )
        if not self.noise_fraction <= 1 or (self.noise_fraction > 0) != (self.noise_ids > 0):
            raise ConfigError(
                f"noise_fraction={self.noise_fraction}: expected more than 0 and up to 1 with "
                f"noise ids, 0 without; noise_ids={self.noise_ids}"
            )
        if self.seq_len < 3 or self.seq_len % 2 != self.multi_query:
            raise ConfigError(
                f"seq_len={self.seq_len}: expected an {'odd' if self.multi_query else 'even'} "
                f"number of at least 3 with multi_query={self.multi_query}"
            )

    @property
    def num_keys(self) -> int:
        """Ids of keys."""
        return (self.vocab_size - self.noise_ids - (not self.multi_query)) // 2

    @property
    def values(self) -> tuple[int, int]:
        """The first id of a value, and the first behind the values."""
        return self.num_keys, self.vocab_size - self.noise_ids - (not self.multi_query)

    @property
    def chance(self) -> float:
        """See Difficulty."""
        return self.chance_of_vocabulary

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        low, high = self.values
        return 1 / (high - low) if self.targets == "recall" else 1 / self.vocab_size

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.values
        pairs, row = (self.seq_len - 1) // 2, np.arange(n)
        value_of = rng.integers(low, high, size=(n, self.num_keys))
        keys = rng.integers(self.num_keys, size=(n, pairs))
        noisy = rng.random((n, pairs)) < self.noise_fraction
        noisy[row, rng.integers(pairs, size=n)] = False
        seen = np.zeros((n, self.num_keys), bool)
        r, p = np.nonzero(~noisy)
        seen[r, keys[r, p]] = True
        query = pick(seen, rng)
        whole = np.empty((n, self.seq_len + 1), np.int64)  # with the last answer
        block = whole[:, : 2 * pairs].reshape(n, pairs, 2)
        block[:, :, 0], block[:, :, 1] = keys, np.take_along_axis(value_of, keys, axis=1)
        if self.noise_ids:
            noise = rng.integers(self.vocab_size - self.noise_ids, self.vocab_size, block.shape)
            np.copyto(block, noise, where=noisy[:, :, None])
        if not self.multi_query:
            whole[:, -3] = high  # the marker
        whole[:, -2], whole[:, -1] = query, value_of[row, query]
        labels = whole[:, 1:].copy()
        if self.targets == "recall":
            labels[~self._asked(whole[:, :-1])] = IGNORED
        return whole[:, :-1], labels

    def _asked(self, inputs: np.ndarray) -> np.ndarray:
        asked = np.zeros(inputs.shape, bool)
        asked[:, -1] = True
        if self.multi_query:
            keys = inputs[:, ::2]
            asked[:, ::2] = repeats(keys) & (keys < self.num_keys)
        return asked


class InContextRecall(Recall):
    """In-context recall as a task."""

    name = "in_context_recall"
    difficulty = InContextConfig


class NoisyRecall(Recall):
    """In-context recall among noise as a task."""

    name = "noisy_recall"
    difficulty = InContextConfig
