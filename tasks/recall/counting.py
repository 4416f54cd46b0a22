"""Counting a token, of Wen et al. 2024 ("RNNs are not Transformers (yet)").

N examples, L length, S symbols.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, in_parts, require_at_least
from tasks.recall.task import Recall


@dataclass(frozen=True)
class CountingConfig(Difficulty):
    """One difficulty: n = L - 3 random symbols, a separator, a symbol and a threshold.

    The label, at the last position, is YES where the symbol stands among the n more often than
    the threshold, and NO elsewhere. How often it does is the threshold -1, +0, +1 or +2, each
    equally likely, so that the answers are balanced and hard.

    Attributes:
        seq_len: L.
        num_symbols: S; symbols are 0..S-1, the separator is S, NO S + 1, YES S + 2, and
            threshold t S + 2 + t.
        max_threshold: thresholds are 1..max_threshold.
    """

    guess: ClassVar = "naming any possible answer"

    seq_len: int
    num_symbols: int
    max_threshold: int = 8
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        require_at_least(self, num_symbols=2, max_threshold=1)
        if self.seq_len < self.max_threshold + 5:
            raise ConfigError(
                f"seq_len={self.seq_len}: expected at least {self.max_threshold + 5}, for "
                f"max_threshold={self.max_threshold} and two more"
            )
        object.__setattr__(self, "vocab_size", self.num_symbols + 3 + self.max_threshold)

    @property
    def context(self) -> int:
        """See Difficulty."""
        return self.seq_len - 3

    @property
    def chance(self) -> float:
        """See Difficulty."""
        return 1 / 2

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / 2

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        s, size = self.num_symbols, self.seq_len - 3
        query = rng.integers(s, size=n)
        threshold = rng.integers(1, self.max_threshold + 1, size=n)
        count = threshold + rng.integers(-1, 3, size=n)
        others = (query[:, None] + rng.integers(1, s, size=(n, size))) % s
        place = np.argsort(rng.random((n, size)), axis=1)
        inputs = np.empty((n, self.seq_len), np.int64)
        inputs[:, :size] = np.where(place < count[:, None], query[:, None], others)
        inputs[:, -3], inputs[:, -2], inputs[:, -1] = s, query, s + 2 + threshold
        labels = np.full_like(inputs, IGNORED)
        labels[:, -1] = np.where(count > threshold, s + 2, s + 1)
        return inputs, labels


class Counting(Recall):
    """Counting as a task."""

    name = "counting"
    difficulty = CountingConfig
