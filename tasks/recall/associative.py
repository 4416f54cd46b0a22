"""Associative recall with a single query, the smoke test of the H3 and Hyena papers.

N examples, L length, V vocabulary, P pairs.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, in_parts
from tasks.recall.task import Recall


@dataclass(frozen=True)
class AssociativeConfig(Difficulty):
    """One difficulty: P pairs with repetition, then a key among them; its value is the label.

    Keys of the pairs are drawn one by one, each key's value once per sequence; two keys may
    share a value. The query is the key of a pair drawn at random. Gated convolutions solve this,
    so that it tells architectures apart only when they are small.

    Differs from the papers, which give no recipe in full: this one is ours.

    Attributes:
        vocab_size: V; keys are 0..V/2-1, values V/2..V-1.
        seq_len: L = 2 P + 1.
    """

    guess: ClassVar = "naming the value of one of the sequence's pairs"

    vocab_size: int
    seq_len: int

    def __post_init__(self) -> None:
        if self.vocab_size < 4:
            raise ConfigError(f"vocab_size={self.vocab_size}: expected at least 4")
        if self.seq_len < 3 or self.seq_len % 2 == 0:
            raise ConfigError(f"seq_len={self.seq_len}: expected an odd number of at least 3")

    @property
    def context(self) -> int:
        """See Difficulty."""
        return self.seq_len - 1

    @property
    def chance(self) -> float:
        """See Difficulty: the pair guessed is the one asked for, has its key, or its value."""
        half, pairs = self.vocab_size // 2, self.seq_len // 2
        same_key = 1 / pairs + (1 - 1 / pairs) / half
        return same_key + (1 - same_key) * self.chance_of_vocabulary

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        half = self.vocab_size // 2
        value_of = rng.integers(half, self.vocab_size, size=(n, half))
        keys = rng.integers(half, size=(n, self.seq_len // 2))
        inputs = np.empty((n, self.seq_len), np.int64)
        inputs[:, :-1:2] = keys
        inputs[:, 1::2] = np.take_along_axis(value_of, keys, axis=1)
        row = np.arange(n)
        query = keys[row, rng.integers(keys.shape[1], size=n)]
        inputs[:, -1] = query
        labels = np.full_like(inputs, IGNORED)
        labels[:, -1] = value_of[row, query]
        return inputs, labels


class AssociativeRecall(Recall):
    """Single-query associative recall as a task."""

    name = "associative_recall"
    difficulty = AssociativeConfig
