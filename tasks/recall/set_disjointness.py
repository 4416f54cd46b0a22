"""The element that two sets share (Arora et al. 2024, "Just read twice", appendix B.1).

N examples, L length, V vocabulary, A and B sizes of the sets.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, distinct, in_parts, require_at_least
from tasks.recall.task import Recall

PREFIX, SEPARATOR, ANSWER = 1, 2, 3
_ELEMENTS = 4  # the first id of an element


@dataclass(frozen=True)
class DisjointnessConfig(Difficulty):
    """One difficulty: A elements, then B others, of which one is then made one of the first.

    A sequence is PREFIX, the first set, SEPARATOR, the second set, ANSWER, whose label is the
    element of both. A model that reads once from left to right has to keep the first set, so
    that it is the order that matters: groups "short_first" and "long_first" are the two arms.

    Attributes:
        vocab_size: V; elements are 4..V-1, id 0 is not used.
        first: A.
        second: B.
        num_passes: how often both sets are shown before the answer (JRT-Prompt). Whoever reads
            them again knows the shorter one by then, whichever came first.
    """

    letters: ClassVar = {"first": "A", "second": "B", "num_passes": "P"}
    guess: ClassVar = "naming an element of the smaller set"

    vocab_size: int
    first: int
    second: int
    num_passes: int = 1
    seq_len: int = field(init=False)

    def __post_init__(self) -> None:
        require_at_least(self, first=1, second=1, num_passes=1)
        if self.vocab_size - _ELEMENTS < self.first + self.second:
            raise ConfigError(
                f"vocab_size={self.vocab_size}: expected at least "
                f"{_ELEMENTS + self.first + self.second}, for first={self.first} and "
                f"second={self.second} different elements"
            )
        object.__setattr__(self, "seq_len", self.num_passes * (self.first + self.second + 2) + 1)

    @property
    def context(self) -> int:
        """See Difficulty."""
        return self.seq_len - 1

    @property
    def chance(self) -> float:
        """See Difficulty."""
        return 1 / min(self.first, self.second)

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / (self.vocab_size - _ELEMENTS)

    @property
    def groups(self) -> tuple[str, ...]:
        """See Difficulty."""
        if self.first == self.second:
            return ()
        return ("short_first",) if self.first < self.second else ("long_first",)

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        a, b, row = self.first, self.second, np.arange(n)
        elements = _ELEMENTS + distinct(n, a + b, self.vocab_size - _ELEMENTS, rng)
        shared = elements[row, rng.integers(a, size=n)]
        elements[row, a + rng.integers(b, size=n)] = shared
        sets = np.empty((n, a + b + 2), np.int64)
        sets[:, 0], sets[:, a + 1] = PREFIX, SEPARATOR
        sets[:, 1 : a + 1], sets[:, a + 2 :] = elements[:, :a], elements[:, a:]
        answer = np.full((n, 1), ANSWER)
        inputs = np.concatenate([np.tile(sets, self.num_passes), answer], axis=1)
        labels = np.full_like(inputs, IGNORED)
        labels[:, -1] = shared
        return inputs, labels


class SetDisjointness(Recall):
    """Set disjointness as a task."""

    name = "set_disjointness"
    difficulty = DisjointnessConfig
