"""Looking up a number in a phone book, in tokens (after Jelassi et al. 2024, "Repeat after me").

N examples, L length, E entries.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, distinct, in_parts, require_at_least
from tasks.recall.task import Recall

END, COLON = 10, 11  # ids 0..9 are the digits
NAMES = 12  # the first id of a name
NUMBER_SIZE = 7
LINE = 2 + 1 + NUMBER_SIZE + 1  # two names, COLON, the number, END


@dataclass(frozen=True)
class PhonebookConfig(Difficulty):
    """One difficulty: a book of E lines, two of them again as examples, and a name to look up.

    A line is a name of two ids, COLON, seven digits and END; no name stands twice in a book, and
    the one to look up is neither example. The labels are the seven digits, from the last COLON
    on; each digit is read before the next is asked for. A sequence without a wrong position is
    one that greedy decoding gets right: the exact accuracy is the paper's score.

    Differs from the paper, whose book is a text: this is the form for models without one.

    Attributes:
        num_entries: E.
        num_names: ids that a first or a last name is drawn from.
    """

    letters: ClassVar = {"num_entries": "E"}
    guess: ClassVar = "naming any possible answer"

    num_entries: int
    num_names: int = 200
    vocab_size: int = field(init=False)
    seq_len: int = field(init=False)

    def __post_init__(self) -> None:
        require_at_least(self, num_entries=3, num_names=1)
        if self.num_names**2 < self.num_entries:
            raise ConfigError(
                f"num_names={self.num_names}: expected a square of at least "
                f"num_entries={self.num_entries}"
            )
        object.__setattr__(self, "vocab_size", NAMES + self.num_names)
        object.__setattr__(self, "seq_len", LINE * (self.num_entries + 3) - 2)

    @property
    def context(self) -> int:
        """See Difficulty."""
        return LINE * self.num_entries

    @property
    def chance(self) -> float:
        """See Difficulty."""
        return 1 / 10

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / 10

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        names = distinct(n, self.num_entries, self.num_names**2, rng)
        book = np.empty((n, self.num_entries, LINE), np.int64)
        book[:, :, 0], book[:, :, 1] = (NAMES + part for part in divmod(names, self.num_names))
        book[:, :, 2], book[:, :, -1] = COLON, END
        book[:, :, 3:-1] = rng.integers(10, size=(n, self.num_entries, NUMBER_SIZE))
        chosen = distinct(n, 3, self.num_entries, rng)  # two examples and the line asked for
        asked = np.take_along_axis(book, chosen[:, :, None], axis=1)
        whole = np.concatenate([book, asked], axis=1).reshape(n, -1)
        inputs = whole[:, :-2]  # without the last digit and END
        labels = np.full_like(inputs, IGNORED)
        labels[:, -NUMBER_SIZE:] = asked[:, -1, 3:-1]
        return inputs, labels


class Phonebook(Recall):
    """The phone book as a task."""

    name = "phonebook"
    difficulty = PhonebookConfig
