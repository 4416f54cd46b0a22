"""Compression of MAD (Poli et al. 2024, "Mechanistic design and scaling").

N examples, L length, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tasks.recall.difficulty import Difficulty, in_parts, require_at_least
from tasks.recall.task import Recall


@dataclass(frozen=True)
class CompressionConfig(Difficulty):
    """One difficulty: random tokens and a marker, all of which are to be named again.

    Labels are the inputs themselves. The task is none for a model that sees the token it is asked
    for: it is the auto-encoder's (models/io/auto_encoder.py), which has one vector to answer from,
    that of the marker.

    Attributes:
        vocab_size: V; tokens are 0..V-2, the marker is V-1.
        seq_len: L, with the marker.
    """

    guess: ClassVar = "naming any token, and the marker in its place"

    vocab_size: int
    seq_len: int

    def __post_init__(self) -> None:
        require_at_least(self, vocab_size=3, seq_len=2)

    @property
    def chance(self) -> float:
        """See Difficulty."""
        return (1 + (self.seq_len - 1) / (self.vocab_size - 1)) / self.seq_len

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / self.vocab_size

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        inputs = rng.integers(self.vocab_size - 1, size=(n, self.seq_len))
        inputs[:, -1] = self.vocab_size - 1
        return inputs, inputs.copy()


class Compression(Recall):
    """Compression as a task."""

    name = "compression"
    io = "auto_encoder"
    difficulty = CompressionConfig
