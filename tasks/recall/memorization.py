"""Memorisation of MAD (Poli et al. 2024, "Mechanistic design and scaling").

N examples, L length, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, in_parts, require_at_least
from tasks.recall.task import Recall


@dataclass(frozen=True)
class MemorizationConfig(Difficulty):
    """One difficulty: random keys, each before a marker whose label is what the key maps to.

    The map is one bijection of the ids 0..V-2 for all sequences of all splits: it is learnt by
    heart, nothing in the sequence tells it.

    Attributes:
        vocab_size: V; the marker is V-1.
        seq_len: L, even.
        map_seed: of the bijection.
    """

    guess: ClassVar = "naming any possible answer"

    vocab_size: int
    seq_len: int
    map_seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(self, vocab_size=3, seq_len=2, map_seed=0)
        if self.seq_len % 2:
            raise ConfigError(f"seq_len={self.seq_len}: expected an even number")

    @property
    def mapping(self) -> np.ndarray:
        """What every id 0..V-2 maps to."""
        return np.random.default_rng(self.map_seed).permutation(self.vocab_size - 1)

    @property
    def chance(self) -> float:
        """See Difficulty."""
        return self.chance_of_vocabulary

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / (self.vocab_size - 1)

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        keys = rng.integers(self.vocab_size - 1, size=(n, self.seq_len // 2))
        inputs = np.full((n, self.seq_len), self.vocab_size - 1)
        inputs[:, ::2] = keys
        labels = np.full_like(inputs, IGNORED)
        labels[:, 1::2] = self.mapping[keys]
        return inputs, labels


class Memorization(Recall):
    """Memorisation as a task."""

    name = "memorization"
    difficulty = MemorizationConfig
