"""Multi-query recall by two keys together (Zoology's code, "compositional MQAR").

N examples, L length, V vocabulary, K = R * R triples of two keys and a value.
"""

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, distinct, in_parts, require_at_least
from tasks.recall.mqar import FILLER, query_slots
from tasks.recall.task import Recall


@dataclass(frozen=True)
class CompositionalConfig(Difficulty):
    """One difficulty of MQAR whose keys are all pairs of R first and R second keys.

    The K triples stand in random order, each with a value of its own. A query is a slot of three
    positions: the two keys and filler, and its label stands at the second key. Either key alone
    leaves R values to choose from.

    Attributes:
        vocab_size: V; first keys are 1..V/3-1, second keys V/3..2V/3-1, values 2V/3..V-1, and
            filler is 0.
        seq_len: L.
        num_kv_pairs: K, a square.
        power_a, random_non_queries: see MQARConfig.
    """

    letters: ClassVar = {"seq_len": "L", "num_kv_pairs": "K"}
    guess: ClassVar = "naming a value that stands with the first of the two keys"

    vocab_size: int
    seq_len: int
    num_kv_pairs: int
    power_a: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self) -> None:
        require_at_least(self, num_kv_pairs=1)
        k = self.num_kv_pairs
        if self.side**2 != k:
            raise ConfigError(f"num_kv_pairs={k}: expected a square")
        if not self.power_a > 0:
            raise ConfigError(f"power_a={self.power_a}: expected more than 0")
        second, values = self.bounds
        if second - 1 < self.side or self.vocab_size - values < k:
            raise ConfigError(
                f"vocab_size={self.vocab_size}: expected thirds for {self.side} keys and {k} "
                f"values, of num_kv_pairs={k}"
            )
        if self.seq_len < 6 * k:
            raise ConfigError(
                f"seq_len={self.seq_len}: expected at least {6 * k}, three positions for each of "
                f"num_kv_pairs={k} and as query"
            )

    @property
    def side(self) -> int:
        """R."""
        return isqrt(self.num_kv_pairs)

    @property
    def bounds(self) -> tuple[int, int]:
        """The first second key and the first value."""
        return self.vocab_size // 3, 2 * self.vocab_size // 3

    @property
    def context(self) -> int:
        """See Difficulty."""
        return 3 * self.num_kv_pairs

    @property
    def chance(self) -> float:
        """See Difficulty."""
        return 1 / self.side

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / (self.vocab_size - self.bounds[1])

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        k, (second, values) = self.num_kv_pairs, self.bounds
        order = distinct(n, k, k, rng)  # which pair of keys stands where
        first_keys = 1 + distinct(n, self.side, second - 1, rng)
        second_keys = second + distinct(n, self.side, values - second, rng)
        triples = np.stack(
            [
                np.take_along_axis(first_keys, order // self.side, axis=1),
                np.take_along_axis(second_keys, order % self.side, axis=1),
                values + distinct(n, k, self.vocab_size - values, rng),
            ],
            axis=2,
        )  # (n, K, 3)
        inputs = np.full((n, self.seq_len), FILLER)
        inputs[:, : 3 * k] = triples.reshape(n, 3 * k)
        slots = query_slots((self.seq_len - 3 * k) // 3, k, self.power_a, n, rng)
        queries = 3 * k + 3 * slots
        np.put_along_axis(inputs, queries, triples[:, :, 0], axis=1)
        np.put_along_axis(inputs, queries + 1, triples[:, :, 1], axis=1)
        if self.random_non_queries:
            noise = rng.integers(self.vocab_size, size=inputs.shape)
            inputs = np.where(inputs == FILLER, noise, inputs)
        labels = np.full_like(inputs, IGNORED)
        np.put_along_axis(labels, queries + 1, triples[:, :, 2], axis=1)
        return inputs, labels


class CompositionalMQAR(Recall):
    """Compositional MQAR as a task."""

    name = "mqar_compositional"
    difficulty = CompositionalConfig
