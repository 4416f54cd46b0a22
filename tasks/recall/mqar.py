"""Multi-query associative recall (Arora et al. 2023, "Zoology: Measuring and Improving Recall").

N examples, L length, V vocabulary, K key-value pairs, S query slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import ROWS, Difficulty, smallest_dtype
from tasks.recall.task import Recall

FILLER = 0


@dataclass(frozen=True)
class MQARConfig(Difficulty):
    """One difficulty.

    An example starts with K pairs of a key and a value, all distinct, keys from 1..V/2-1 and
    values from V/2..V-1. Later every key comes up once more, as a query; the label there is its
    value. What stands after a query is filler: answers are never shown.

    Attributes:
        vocab_size: V.
        seq_len: L, even.
        num_kv_pairs: K.
        power_a: a. Queries fall on slot g = 0, 1, .. of two positions each, drawn without
            replacement with weights (g + 1) ** (a - 1): 1 is uniform, 0.01 favours the slots
            right after the pairs.
        random_non_queries: fill the rest with random tokens of the whole vocabulary, keys and
            values of the example among them, instead of token 0.
        num_passes: how often the block of pairs is shown before the queries.

    Raises:
        ConfigError: an option out of its range.
    """

    letters: ClassVar = {"seq_len": "L", "num_kv_pairs": "K", "num_passes": "P"}
    guess: ClassVar = "naming one of the sequence's own values"

    vocab_size: int
    seq_len: int
    num_kv_pairs: int
    power_a: float = 0.01
    random_non_queries: bool = True
    num_passes: int = 1

    def __post_init__(self) -> None:
        for name in ("num_kv_pairs", "num_passes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        if not self.power_a > 0:
            raise ConfigError(f"power_a={self.power_a}: expected more than 0")
        if self.seq_len % 2:
            raise ConfigError(f"seq_len={self.seq_len}: expected an even number")
        if self.vocab_size <= self.seq_len:
            raise ConfigError(
                f"vocab_size={self.vocab_size}: expected more than seq_len={self.seq_len}"
            )
        needed = self.context + 2 * self.num_kv_pairs
        if needed > self.seq_len:
            raise ConfigError(
                f"seq_len={self.seq_len}: expected at least {needed}, two positions for each of "
                f"num_kv_pairs={self.num_kv_pairs} in num_passes={self.num_passes} and as query"
            )

    @property
    def context(self) -> int:
        """Positions before the first query slot."""
        return 2 * self.num_kv_pairs * self.num_passes

    @property
    def num_slots(self) -> int:
        """S."""
        return (self.seq_len - self.context) // 2

    @property
    def chance(self) -> float:
        """Accuracy of naming one of the example's own values at random."""
        return 1 / self.num_kv_pairs

    @property
    def chance_of_vocabulary(self) -> float:
        """Accuracy of naming any value at random."""
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return generate(self, num_examples, rng)


class MQAR(Recall):
    """Multi-query associative recall as a task."""

    name = "mqar"
    difficulty = MQARConfig


def generate(
    config: MQARConfig, num_examples: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels, see Difficulty.generate."""
    dtype = smallest_dtype(config.vocab_size)
    inputs = np.full((num_examples, config.seq_len), FILLER, dtype)
    labels = np.full_like(inputs, IGNORED)
    half = config.vocab_size // 2
    rows = min(ROWS, num_examples)
    keys_of = _Decks(np.arange(1, half, dtype=dtype), rows)
    values_of = _Decks(np.arange(half, config.vocab_size, dtype=dtype), rows)
    for part in _parts(num_examples):
        n, k = part.stop - part.start, config.num_kv_pairs
        keys, values = keys_of.draw(k, n, rng), values_of.draw(k, n, rng)
        pairs = np.stack([keys, values], axis=2).reshape(n, 2 * k)
        inputs[part, : config.context] = np.tile(pairs, config.num_passes)
        queries = config.context + 2 * query_slots(config.num_slots, k, config.power_a, n, rng)
        np.put_along_axis(inputs[part], queries, keys, axis=1)
        np.put_along_axis(labels[part], queries, values, axis=1)
        if config.random_non_queries:
            noise = rng.integers(config.vocab_size, size=(n, config.seq_len), dtype=dtype)
            np.copyto(inputs[part], noise, where=inputs[part] == FILLER)
    return inputs, labels


def _parts(num_examples: int) -> Iterator[slice]:
    for start in range(0, num_examples, ROWS):
        yield slice(start, min(start + ROWS, num_examples))


class _Decks:
    """A deck of the same cards for every row, to draw from without replacement."""

    def __init__(self, cards: np.ndarray, rows: int) -> None:
        self._decks = np.repeat(cards[:, None], rows, axis=1)  # (cards, rows)

    def draw(self, count: int, rows: int, rng: np.random.Generator) -> np.ndarray:
        """(rows, count): the start of a Fisher-Yates shuffle, whose result is uniform from any
        order of the decks, so that they need not be sorted again before the next draw."""
        row = np.arange(rows)
        for i in range(count):
            j = rng.integers(i, len(self._decks), size=rows)
            drawn = self._decks[j, row]
            self._decks[j, row] = self._decks[i, :rows]
            self._decks[i, :rows] = drawn
        return self._decks[:count, :rows].T.copy()


def query_slots(
    num_slots: int, k: int, power_a: float, rows: int, rng: np.random.Generator
) -> np.ndarray:
    """(rows, K): the slot of every key, in the order of the pairs.

    The first K of S arrivals at exponential times of rate p_g: a slot g that has not arrived is
    the next one with probability proportional to p_g, because exponential waiting has no memory.
    That is a sequential draw without replacement with weights p (the Gumbel top-k of log p).
    """
    weights = np.arange(1, num_slots + 1) ** (power_a - 1.0)
    arrivals = rng.exponential(size=(rows, num_slots)) / weights
    first = np.argpartition(arrivals, k - 1, axis=1)[:, :k]
    order = np.argsort(np.take_along_axis(arrivals, first, axis=1), axis=1)
    return np.take_along_axis(first, order, axis=1)


def check_mqar(inputs: np.ndarray, labels: np.ndarray, config: MQARConfig) -> None:
    """Whether a batch (N, L) of whatever origin is MQAR of difficulty `config`.

    Raises:
        ValueError: the first property that does not hold and the first row without it.
    """
    half, context, k = config.vocab_size // 2, config.context, config.num_kv_pairs
    if inputs.shape != labels.shape or inputs.shape[1:] != (config.seq_len,):
        raise ValueError(f"inputs {inputs.shape} and labels {labels.shape}: expected two (N, L)")
    block = inputs[:, :context].reshape(len(inputs), config.num_passes, k, 2)
    keys, values = block[:, 0, :, 0], block[:, 0, :, 1]
    asked = labels != IGNORED

    def require(name: str, holds: Any) -> None:
        if not holds.all():
            raise ValueError(f"row {int(np.argmin(holds))}: {name}")

    require(
        "a token is not of the vocabulary", ((inputs >= 0) & (inputs < config.vocab_size)).all(1)
    )
    require("the pairs differ between passes", (block == block[:, :1]).all((1, 2, 3)))
    require("a key is not from 1..V/2-1", ((keys >= 1) & (keys < half)).all(1))
    require("a value is not from V/2..V-1", (values >= half).all(1))
    require("a key stands in two pairs", _distinct(keys))
    require("a value stands in two pairs", _distinct(values))
    require(f"there are not {k} labels", asked.sum(1) == k)
    require("a label stands among the pairs", ~asked[:, :context].any(1))
    require("a label stands between two slots", ~asked[:, context + 1 :: 2].any(1))
    queries = inputs[asked].reshape(-1, k)
    answers = labels[asked].reshape(-1, k)
    require("not every key is asked for once", (np.sort(queries) == np.sort(keys)).all(1))
    expected = np.take_along_axis(values, np.argsort(keys), axis=1)
    given = np.take_along_axis(answers, np.argsort(queries), axis=1)
    require("a label is not the value of its key", (given == expected).all(1))
    if not config.random_non_queries:
        rest = np.where(asked, FILLER, inputs)[:, context:]
        require("something else than filler stands beside the queries", (rest == FILLER).all(1))


def _distinct(rows: np.ndarray) -> np.ndarray:
    ascending = np.sort(rows)
    return np.all(ascending[:, 1:] > ascending[:, :-1], axis=1)
