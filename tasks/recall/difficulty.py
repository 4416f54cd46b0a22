"""What a generator of recall examples is, and the tools its file is written with.

N examples, L length of an example, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np

from schema.errors import ConfigError

_FEW = 8  # cards up to which drawing by ranks, quadratic in their number, is faster
ROWS = 2048  # examples made at once: few enough that their arrays stay in the caches


class Difficulty(ABC):
    """One difficulty of a task: a frozen dataclass of options that makes examples from a generator.

    An option out of its range, or a combination that no example can have, is a ConfigError of the
    constructor.

    Attributes:
        vocab_size: V, every id that labels, and but for `num_inputs` inputs, may hold.
        seq_len: L.
        letters: the short names of options in the name of a slice.
        guess: what a guesser of accuracy `chance` does.
    """

    vocab_size: int
    seq_len: int
    letters: ClassVar[Mapping[str, str]] = {"seq_len": "L"}
    guess: ClassVar[str]

    @abstractmethod
    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, both (N, L), in the smallest of int16 and int32 that holds all ids.

        labels[t] is what to emit after reading inputs[0..t], IGNORED where nothing is asked.
        All that is random comes from `rng`.
        """

    @property
    @abstractmethod
    def chance(self) -> float:
        """Expected accuracy of `guess`."""

    @property
    @abstractmethod
    def chance_of_vocabulary(self) -> float:
        """Expected accuracy of naming any possible answer at random."""

    @property
    def num_inputs(self) -> int:
        """Ids that inputs may hold: V, but where an input is several of them in one number."""
        return self.vocab_size

    @property
    def context(self) -> int | None:
        """Leading positions that hold all there is to know and no question; None where questions
        stand among what they ask for.
        """
        return None

    @property
    def answer_after(self) -> int | None:
        """The token behind which the answer stands in what a model writes by itself after
        `context` and the token that follows it; None where every label is asked for.
        """
        return None

    @property
    def environment(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """What puts tokens in place of the model's while it writes: (N,) of all that was read and
        written (N, T), -1 where the model goes on by itself. None: nothing does.
        """
        return None

    @property
    def groups(self) -> tuple[str, ...]:
        """Names under which slices are also scored together."""
        return ()


def in_parts(
    draw: Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]],
    num_examples: int,
    rng: np.random.Generator,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """`num_examples` rows of inputs and labels, of which `draw` makes up to ROWS at once."""
    dtype = smallest_dtype(vocab_size)
    parts = []
    for start in range(0, num_examples, ROWS):
        inputs, labels = draw(min(ROWS, num_examples - start), rng)
        parts.append((inputs.astype(dtype, copy=False), labels.astype(dtype, copy=False)))
    inputs, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return inputs, labels


def smallest_dtype(vocab_size: int) -> type[np.signedinteger]:
    """int16 where every id fits, else int32."""
    return np.int16 if vocab_size <= np.iinfo(np.int16).max else np.int32


def require_at_least(config: Difficulty, **bounds: float) -> None:
    """Raise ConfigError for an option of `config` below its bound."""
    for name, low in bounds.items():
        if not getattr(config, name) >= low:
            raise ConfigError(f"{name}={getattr(config, name)}: expected at least {low}")


def require_choice(config: Difficulty, name: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError for an option of `config` that is none of `allowed`."""
    if getattr(config, name) not in allowed:
        raise ConfigError(f"{name}={getattr(config, name)!r}: allowed: {', '.join(allowed)}")


def repeats(rows: np.ndarray) -> np.ndarray:
    """Where an element (N, n) equals one before it in its row."""
    order = np.argsort(rows, axis=1, kind="stable")
    ascending = np.take_along_axis(rows, order, axis=1)
    again = np.zeros(rows.shape, bool)
    np.put_along_axis(again, order[:, 1:], ascending[:, 1:] == ascending[:, :-1], axis=1)
    return again


def distinct(rows: int, count: int, cards: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, count) of 0..cards-1, drawn without replacement in every row.

    A few of them by their ranks among the cards not drawn yet. Of more, what repeats an earlier
    draw is drawn anew until nothing does: no card is treated unlike another, so that every result
    without repetition is equally likely.
    """
    if count <= _FEW:
        return _by_ranks(rows, count, cards, rng)
    if 2 * count > cards:
        return np.argsort(rng.random((rows, cards)), axis=1)[:, :count]
    drawn = rng.integers(cards, size=(rows, count))
    left = np.arange(rows)
    while left.size:
        again = repeats(drawn[left])
        some = again.any(axis=1)
        left, again = left[some], again[some]
        part = drawn[left]
        part[again] = rng.integers(cards, size=int(again.sum()))
        drawn[left] = part
    return drawn


def _by_ranks(rows: int, count: int, cards: int, rng: np.random.Generator) -> np.ndarray:
    """Column i is at first a rank among the cards that columns 0..i-1 left, then the card."""
    drawn = np.stack([rng.integers(cards - i, size=rows) for i in range(count)])
    for i in reversed(range(count)):
        drawn[i + 1 :] += drawn[i + 1 :] >= drawn[i]
    return drawn.T.copy()


def pick(marked: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(rows,): one of the marked places (rows, n) of every row, each equally likely."""
    return np.argmax(rng.random(marked.shape) * marked, axis=1)
