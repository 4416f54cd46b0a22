"""Recall by position, "Index" of Wen et al. 2024 ("RNNs are not Transformers (yet)").

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
class IndexConfig(Difficulty):
    """One difficulty: L - 2 random symbols, a separator and a position, counted from 0.

    The label, at the last position, is the symbol that stands there.

    Attributes:
        seq_len: L.
        num_symbols: S; symbols are 0..S-1, the separator is S, and position i is S + 1 + i.
        num_positions: how many ids are positions, as many as the longest sequence of the task
            needs.
    """

    guess: ClassVar = "naming one of the sequence's symbols"

    seq_len: int
    num_symbols: int
    num_positions: int
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        require_at_least(self, seq_len=3, num_symbols=2)
        if self.num_positions < self.seq_len - 2:
            raise ConfigError(
                f"num_positions={self.num_positions}: expected at least {self.seq_len - 2}, the "
                f"symbols of seq_len={self.seq_len}"
            )
        object.__setattr__(self, "vocab_size", self.num_symbols + 1 + self.num_positions)

    @property
    def context(self) -> int:
        """See Difficulty."""
        return self.seq_len - 2

    @property
    def chance(self) -> float:
        """See Difficulty."""
        right = 1 / (self.seq_len - 2)
        return right + (1 - right) * self.chance_of_vocabulary

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / self.num_symbols

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        inputs = rng.integers(self.num_symbols, size=(n, self.seq_len))
        place = rng.integers(self.seq_len - 2, size=n)
        inputs[:, -2], inputs[:, -1] = self.num_symbols, self.num_symbols + 1 + place
        labels = np.full_like(inputs, IGNORED)
        labels[:, -1] = inputs[np.arange(n), place]
        return inputs, labels


class Index(Recall):
    """Recall by position as a task."""

    name = "index"
    difficulty = IndexConfig
