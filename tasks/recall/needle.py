"""Facts to be found in filler, in tokens (after RULER's needles; Hsieh et al. 2024).

N examples, L length, F filler tokens, K needles, Q queries.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, distinct, in_parts, require_at_least
from tasks.recall.task import Recall

BEGIN, MARK, ASK = 0, 1, 2
KEYS = 3  # the first id of a key


@dataclass(frozen=True)
class NeedleConfig(Difficulty):
    """One difficulty: BEGIN, then F filler tokens with K needles among them, then Q queries.

    A needle is MARK, a key and a value, and each stands behind a number of filler tokens drawn
    uniformly. A query is ASK and the key of one of the needles, whose label is its value; no
    key is asked for twice, and answers are not shown. Keys are different, values may be equal.

    Differs from the source, whose needles are sentences in a text.

    Attributes:
        seq_len: L = 1 + F + 3 K + 2 Q.
        num_needles: K.
        num_queries: Q.
        depth: how much of the filler stands before the needle asked for, in percent; None draws
            it uniformly. Of one query.
        num_keys, num_values, num_filler: how many ids are keys, values and filler.
    """

    letters: ClassVar = {"seq_len": "L", "num_needles": "K", "num_queries": "Q", "depth": "D"}
    guess: ClassVar = "naming the value of one of several needles, or of one any value"

    seq_len: int
    num_needles: int = 1
    num_queries: int = 1
    depth: float | None = None
    num_keys: int = 64
    num_values: int = 64
    num_filler: int = 64
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        require_at_least(self, num_needles=1, num_queries=1, num_values=1, num_filler=1)
        if self.num_queries > self.num_needles:
            raise ConfigError(
                f"num_queries={self.num_queries}: expected at most num_needles={self.num_needles}"
            )
        if self.num_keys < self.num_needles:
            raise ConfigError(
                f"num_keys={self.num_keys}: expected at least num_needles={self.num_needles}"
            )
        if self.depth is not None and not 0 <= self.depth <= 100:
            raise ConfigError(f"depth={self.depth}: expected 0 to 100 percent or null")
        if self.depth is not None and self.num_queries > 1:
            raise ConfigError(f"depth={self.depth}: expected null with several num_queries")
        if self.filler < 0:
            raise ConfigError(
                f"seq_len={self.seq_len}: expected at least {self.seq_len - self.filler}, for "
                f"num_needles={self.num_needles} and num_queries={self.num_queries}"
            )
        object.__setattr__(self, "vocab_size", self.first_filler + self.num_filler)

    @property
    def filler(self) -> int:
        """F."""
        return self.seq_len - 1 - 3 * self.num_needles - 2 * self.num_queries

    @property
    def first_value(self) -> int:
        """The first id of a value."""
        return KEYS + self.num_keys

    @property
    def first_filler(self) -> int:
        """The first id of filler."""
        return self.first_value + self.num_values

    @property
    def context(self) -> int:
        """See Difficulty."""
        return self.seq_len - 2 * self.num_queries

    @property
    def chance(self) -> float:
        """See Difficulty."""
        if self.num_needles == 1:
            return self.chance_of_vocabulary
        right = 1 / self.num_needles
        return right + (1 - right) * self.chance_of_vocabulary

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / self.num_values

    @property
    def groups(self) -> tuple[str, ...]:
        """The row and the column of the matrix of lengths and depths."""
        return () if self.depth is None else (f"L{self.seq_len}", f"D{self.depth:g}")

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        k, q = self.num_needles, self.num_queries
        keys = KEYS + distinct(n, k, self.num_keys, rng)
        values = rng.integers(self.first_value, self.first_filler, size=(n, k))
        before = rng.integers(self.filler + 1, size=(n, k))  # filler; the first Q are asked for
        if self.depth is not None:
            before[:, 0] = round(self.depth / 100 * self.filler)
        # Of needles between the same two filler tokens the first drawn is not always the first.
        order = np.lexsort((rng.random((n, k)), before))
        rank = np.argsort(order, axis=1)
        start = 1 + before + 3 * rank
        inputs = rng.integers(self.first_filler, self.vocab_size, size=(n, self.seq_len))
        inputs[:, 0] = BEGIN
        for offset, tokens in enumerate((np.full((n, k), MARK), keys, values)):
            np.put_along_axis(inputs, start + offset, tokens, axis=1)
        inputs[:, -2 * q :: 2], inputs[:, -2 * q + 1 :: 2] = ASK, keys[:, :q]
        labels = np.full_like(inputs, IGNORED)
        labels[:, -2 * q + 1 :: 2] = values[:, :q]
        return inputs, labels


class Needle(Recall):
    """Needles in filler as a task."""

    name = "needle"
    difficulty = NeedleConfig
