"""Recall by a gram, "c-gram retrieval" of Wen et al. 2024 ("RNNs are not Transformers (yet)").

N examples, L length, S symbols.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, in_parts, pick, require_at_least
from tasks.recall.task import Recall


@dataclass(frozen=True)
class CGramConfig(Difficulty):
    """One difficulty: n = L - c random symbols, a separator, and a gram of c - 1 symbols.

    The gram stands once among the symbols; the label, at the last position, is what follows it.
    It is drawn from those that do, and symbols without one are drawn anew. c = 2 is associative
    recall by a single token.

    Attributes:
        seq_len: L.
        num_symbols: S; symbols are 0..S-1, the separator is S.
        c: the length of the gram with what follows it.
    """

    guess: ClassVar = "naming one of the sequence's symbols"

    seq_len: int
    num_symbols: int
    c: int = 3
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        require_at_least(self, num_symbols=2, c=2)
        if self.seq_len < 2 * self.c:
            raise ConfigError(
                f"seq_len={self.seq_len}: expected at least {2 * self.c} with c={self.c}"
            )
        # A gram stands nowhere else with probability above (1 - 1/grams)^n, here above 1%.
        most = 4 * self.num_symbols ** (self.c - 1)
        if self.seq_len - self.c > most:
            raise ConfigError(
                f"seq_len={self.seq_len}: expected at most {most + self.c}; of num_symbols="
                f"{self.num_symbols} few grams of {self.c - 1} would stand only once"
            )
        object.__setattr__(self, "vocab_size", self.num_symbols + 1)

    @property
    def context(self) -> int:
        """See Difficulty."""
        return self.seq_len - self.c

    @property
    def chance(self) -> float:
        """See Difficulty; as if what follows the gram were unlike what stands elsewhere."""
        right = 1 / (self.seq_len - self.c)
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
        size, row = self.seq_len - self.c, np.arange(n)
        symbols = np.empty((n, size), np.int64)
        once = np.zeros((n, size - self.c + 2), bool)  # of the grams, the last without a successor
        left = row
        while left.size:
            symbols[left] = rng.integers(self.num_symbols, size=(left.size, size))
            once[left] = self._once(symbols[left])
            left = left[~once[left, :-1].any(axis=1)]
        place = pick(once[:, :-1], rng)
        inputs = np.empty((n, self.seq_len), np.int64)
        inputs[:, :size], inputs[:, size] = symbols, self.num_symbols
        gram = place[:, None] + np.arange(self.c - 1)
        inputs[:, size + 1 :] = np.take_along_axis(symbols, gram, axis=1)
        labels = np.full_like(inputs, IGNORED)
        labels[:, -1] = symbols[row, place + self.c - 1]
        return inputs, labels

    def _once(self, symbols: np.ndarray) -> np.ndarray:
        """Which grams (n, size - c + 2) of a row stand nowhere else in it."""
        grams = np.lib.stride_tricks.sliding_window_view(symbols, self.c - 1, axis=1)
        codes = grams @ self.num_symbols ** np.arange(self.c - 1)
        order = np.argsort(codes, axis=1, kind="stable")
        ascending = np.take_along_axis(codes, order, axis=1)
        same = ascending[:, 1:] == ascending[:, :-1]
        edge = np.zeros((len(codes), 1), bool)
        alone = ~(np.hstack([edge, same]) | np.hstack([same, edge]))
        once = np.empty_like(alone)
        np.put_along_axis(once, order, alone, axis=1)
        return once


class CGramRetrieval(Recall):
    """Recall by a gram as a task."""

    name = "cgram"
    difficulty = CGramConfig
