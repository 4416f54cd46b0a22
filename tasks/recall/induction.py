"""Induction heads, the smoke test of the H3 and Hyena papers.

N examples, L length, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, in_parts
from tasks.recall.task import Recall


@dataclass(frozen=True)
class InductionConfig(Difficulty):
    """One difficulty: random ids with a marker among them; what followed it follows it again.

    The marker stands once before the last position, anywhere that leaves room for a token after
    it, and again at the last position, whose label is that token.

    Differs from the papers, which give no recipe in full: this one is ours.

    Attributes:
        vocab_size: V; the marker is V-1.
        seq_len: L.
    """

    guess: ClassVar = "naming one of the sequence's tokens"

    vocab_size: int
    seq_len: int

    def __post_init__(self) -> None:
        if self.vocab_size < 3:
            raise ConfigError(f"vocab_size={self.vocab_size}: expected at least 3")
        if self.seq_len < 3:
            raise ConfigError(f"seq_len={self.seq_len}: expected at least 3")

    @property
    def context(self) -> int:
        """See Difficulty."""
        return self.seq_len - 1

    @property
    def chance(self) -> float:
        """See Difficulty; of the tokens beside the two markers."""
        right = 1 / (self.seq_len - 2)
        return right + (1 - right) * self.chance_of_vocabulary

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
        marker, row = self.vocab_size - 1, np.arange(n)
        inputs = rng.integers(marker, size=(n, self.seq_len))
        place = rng.integers(self.seq_len - 2, size=n)
        inputs[row, place] = marker
        inputs[:, -1] = marker
        labels = np.full_like(inputs, IGNORED)
        labels[:, -1] = inputs[row, place + 1]
        return inputs, labels


class InductionHeads(Recall):
    """Induction heads as a task."""

    name = "induction_heads"
    difficulty = InductionConfig
