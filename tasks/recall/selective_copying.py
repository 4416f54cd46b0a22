"""Selective copying of MAD (Poli et al. 2024, "Mechanistic design and scaling").

N examples, L length, V vocabulary, C tokens to copy.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, in_parts, require_at_least
from tasks.recall.task import Recall


@dataclass(frozen=True)
class SelectiveCopyingConfig(Difficulty):
    """One difficulty: C data tokens among blanks, then a marker, then C blanks to be filled.

    Each blank stands before a data token chosen at random, so that the last thing before the
    marker is data. The label of the i-th of the final blanks is the i-th data token.

    Attributes:
        vocab_size: V; data are 0..V-3, the blank is V-2, the marker V-1.
        seq_len: L.
        num_tokens: C.
    """

    letters: ClassVar = {"seq_len": "L", "num_tokens": "C"}
    guess: ClassVar = "naming one of the tokens to copy"

    vocab_size: int
    seq_len: int
    num_tokens: int = 16

    def __post_init__(self) -> None:
        require_at_least(self, vocab_size=3, num_tokens=1)
        if self.seq_len < 2 * self.num_tokens + 1:
            raise ConfigError(
                f"seq_len={self.seq_len}: expected at least {2 * self.num_tokens + 1}, for "
                f"num_tokens={self.num_tokens} twice and a marker"
            )

    @property
    def context(self) -> int:
        """See Difficulty."""
        return self.seq_len - self.num_tokens - 1

    @property
    def chance(self) -> float:
        """See Difficulty."""
        right = 1 / self.num_tokens
        return right + (1 - right) * self.chance_of_vocabulary

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / (self.vocab_size - 2)

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        c = self.num_tokens
        blanks = self.seq_len - 2 * c - 1
        before = rng.multinomial(blanks, np.full(c, 1 / c), size=n)
        data = rng.integers(self.vocab_size - 2, size=(n, c))
        inputs = np.full((n, self.seq_len), self.vocab_size - 2)
        np.put_along_axis(inputs, np.cumsum(before, axis=1) + np.arange(c), data, axis=1)
        inputs[:, -c - 1] = self.vocab_size - 1
        labels = np.full_like(inputs, IGNORED)
        labels[:, -c:] = data
        return inputs, labels


class SelectiveCopying(Recall):
    """Selective copying as a task."""

    name = "selective_copying"
    difficulty = SelectiveCopyingConfig
