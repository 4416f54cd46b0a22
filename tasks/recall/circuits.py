"""Functions of a string of bits or symbols that need a count (Zoology's code, "circuits").

N examples, L length.
"""

from dataclasses import dataclass, field
from math import comb
from typing import Any, ClassVar, Literal

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, in_parts, pick, require_at_least, require_choice
from tasks.recall.task import Recall

Circuit = Literal[
    "parity", "cumulative_parity", "majority", "cumulative_majority", "vocabulary_majority"
]
_NAMES = ("parity", "cumulative_parity", "majority", "cumulative_majority", "vocabulary_majority")


@dataclass(frozen=True)
class CircuitConfig(Difficulty):
    """One difficulty of one circuit, over ids 0..num_symbols-1 drawn uniformly.

    parity, majority, vocabulary_majority: L - 1 symbols and the end id; the label, there, is
    the xor of the bits, whether more are ones than zeros, or the most frequent symbol. Where
    several symbols are most frequent the smallest is, and one more position is made it.
    cumulative_parity, cumulative_majority: L bits; the label at each is the xor of the bits so
    far, or whether at least as many are ones as zeros.

    Attributes:
        circuit: see above.
        seq_len: L.
        num_symbols: 2, or for vocabulary_majority any number of at least 2.
    """

    guess: ClassVar = "always giving the most frequent answer"

    circuit: Circuit
    seq_len: int
    num_symbols: int = 2
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        require_choice(self, "circuit", _NAMES)
        require_at_least(self, seq_len=2, num_symbols=2)
        if self.num_symbols != 2 and self.circuit != "vocabulary_majority":
            raise ConfigError(
                f"num_symbols={self.num_symbols}: expected 2 with circuit={self.circuit!r}"
            )
        object.__setattr__(self, "vocab_size", self.num_symbols + 1)

    @property
    def chance(self) -> float:
        """See Difficulty; of vocabulary_majority as if its answers were equally frequent."""
        if self.circuit == "majority":
            return (1 + _tie(self.seq_len - 1)) / 2
        if self.circuit == "cumulative_majority":
            return sum((1 + _tie(t)) / 2 for t in range(1, self.seq_len + 1)) / self.seq_len
        return 1 / self.num_symbols

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
        if self.circuit == "cumulative_parity":
            return inputs, np.cumsum(inputs, axis=1) % 2
        if self.circuit == "cumulative_majority":
            return inputs, (np.cumsum(2 * inputs - 1, axis=1) >= 0).astype(np.int64)
        inputs[:, -1] = self.num_symbols  # the end id
        symbols = inputs[:, :-1]
        labels = np.full_like(inputs, IGNORED)
        if self.circuit == "parity":
            labels[:, -1] = symbols.sum(axis=1) % 2
        elif self.circuit == "majority":
            labels[:, -1] = 2 * symbols.sum(axis=1) > symbols.shape[1]
        else:
            labels[:, -1] = self._unique_mode(symbols, rng)
        return inputs, labels

    def _unique_mode(self, symbols: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The most frequent symbol (n,) of (n, L - 1), made unique in place."""
        offsets = self.num_symbols * np.arange(len(symbols))[:, None]
        counts = np.bincount((symbols + offsets).ravel(), minlength=self.num_symbols * len(symbols))
        counts = counts.reshape(len(symbols), self.num_symbols)
        mode = counts.argmax(axis=1)  # the smallest of several
        tied = np.flatnonzero((counts == counts.max(axis=1, keepdims=True)).sum(axis=1) > 1)
        place = pick(symbols[tied] != mode[tied, None], rng)
        symbols[tied, place] = mode[tied]
        return mode


def _tie(n: int) -> float:
    """The probability of as many ones as zeros among n bits."""
    return 0.0 if n % 2 else comb(n, n // 2) / 2**n


class Circuits(Recall):
    """One circuit as a task, which is named after it."""

    difficulty = CircuitConfig

    def __init__(self, circuit: Circuit, *args: Any, **options: Any) -> None:
        super().__init__(*args, circuit=circuit, **options)
        self.name = circuit
