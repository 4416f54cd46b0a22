"""A number to be found in filler, in tokens (after "Landmark attention", Mohtashami 2023).

N examples, L length, F filler tokens.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, in_parts, require_at_least
from tasks.recall.task import Recall

BEGIN, MARK, ASK = 0, 1, 2
DIGITS = 3  # the id of digit 0
FILLER = DIGITS + 10  # the first filler id
KEY_SIZE = 5  # digits


@dataclass(frozen=True)
class PasskeyConfig(Difficulty):
    """One difficulty: BEGIN, filler, MARK and five digits, filler, ASK, and the digits again.

    The labels are the five digits, from ASK on; each digit is read before the next is asked for.
    A sequence without a wrong position is one that greedy decoding gets right, so that the exact
    accuracy is the passkey's own score.

    Differs from the paper, whose passkey is a text: this is the form for models without one.

    Attributes:
        seq_len: L, F + 12.
        depth: how much of the filler stands before the key, in percent; None draws it uniformly.
        num_filler: how many ids are filler.
    """

    letters: ClassVar = {"seq_len": "L", "depth": "D"}
    guess: ClassVar = "naming any possible answer"

    seq_len: int
    depth: float | None = None
    num_filler: int = 64
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        require_at_least(self, num_filler=1)
        if self.seq_len < 2 * KEY_SIZE + 2:
            raise ConfigError(f"seq_len={self.seq_len}: expected at least {2 * KEY_SIZE + 2}")
        if self.depth is not None and not 0 <= self.depth <= 100:
            raise ConfigError(f"depth={self.depth}: expected 0 to 100 percent or null")
        object.__setattr__(self, "vocab_size", FILLER + self.num_filler)

    @property
    def context(self) -> int:
        """See Difficulty."""
        return self.seq_len - KEY_SIZE

    @property
    def chance(self) -> float:
        """See Difficulty."""
        return 1 / 10

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / 10

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
        filler = self.seq_len - 2 * KEY_SIZE - 2
        whole = rng.integers(FILLER, self.vocab_size, size=(n, self.seq_len + 1))
        digits = rng.integers(10, size=(n, KEY_SIZE)) + DIGITS
        if self.depth is None:
            before = rng.integers(filler + 1, size=n)
        else:
            before = np.full(n, round(self.depth / 100 * filler))
        marked = np.concatenate([np.full((n, 1), MARK), digits], axis=1)
        np.put_along_axis(whole, 1 + before[:, None] + np.arange(KEY_SIZE + 1), marked, axis=1)
        whole[:, 0], whole[:, -KEY_SIZE - 1], whole[:, -KEY_SIZE:] = BEGIN, ASK, digits
        labels = np.full((n, self.seq_len), IGNORED)
        labels[:, -KEY_SIZE:] = digits
        return whole[:, :-1], labels


class Passkey(Recall):
    """Passkey retrieval as a task."""

    name = "passkey"
    difficulty = PasskeyConfig
