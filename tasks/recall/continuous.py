"""Multi-query recall of vectors in place of tokens (Zoology's code, "continuous MQAR").

N examples, L length, V vocabulary, K key-value pairs.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, distinct, in_parts, require_at_least
from tasks.recall.mqar import query_slots
from tasks.recall.task import Recall


@dataclass(frozen=True)
class ContinuousConfig(Difficulty):
    """One difficulty of MQAR whose positions are pairs of vectors: a key's and its value's.

    The vectors are rows of a table that the model holds and does not train (models/io/vectors.py),
    so that an input is two ids in one number, key * V + value, and 0 for a part that is zero. The
    K pairs stand first, one to a position. Later every key comes up once more, without a value: the
    label there is the id of its value. All else is zero.

    Attributes:
        vocab_size: V; keys are 1..V/2-1, values V/2..V-1.
        seq_len: L.
        num_kv_pairs: K.
        power_a: see MQARConfig; a slot is one position.
    """

    letters: ClassVar = {"seq_len": "L", "num_kv_pairs": "K"}
    guess: ClassVar = "naming one of the sequence's own values"

    vocab_size: int
    seq_len: int
    num_kv_pairs: int
    power_a: float = 0.01

    def __post_init__(self) -> None:
        require_at_least(self, num_kv_pairs=1)
        k = self.num_kv_pairs
        if not self.power_a > 0:
            raise ConfigError(f"power_a={self.power_a}: expected more than 0")
        if self.vocab_size // 2 - 1 < k:
            raise ConfigError(
                f"vocab_size={self.vocab_size}: expected at least {2 * k + 2}, for "
                f"num_kv_pairs={k} different keys"
            )
        if self.seq_len < 2 * k:
            raise ConfigError(
                f"seq_len={self.seq_len}: expected at least {2 * k}, a position for each of "
                f"num_kv_pairs={k} and as query"
            )

    @property
    def num_inputs(self) -> int:
        """See Difficulty."""
        return self.vocab_size**2

    @property
    def context(self) -> int:
        """See Difficulty."""
        return self.num_kv_pairs

    @property
    def chance(self) -> float:
        """See Difficulty."""
        return 1 / self.num_kv_pairs

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.num_inputs)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        k, half = self.num_kv_pairs, self.vocab_size // 2
        keys = 1 + distinct(n, k, half - 1, rng)
        values = half + distinct(n, k, self.vocab_size - half, rng)
        inputs = np.zeros((n, self.seq_len), np.int64)
        labels = np.full_like(inputs, IGNORED)
        inputs[:, :k] = keys * self.vocab_size + values
        queries = k + query_slots(self.seq_len - k, k, self.power_a, n, rng)
        np.put_along_axis(inputs, queries, keys * self.vocab_size, axis=1)
        np.put_along_axis(labels, queries, values, axis=1)
        return inputs, labels


class ContinuousMQAR(Recall):
    """Continuous MQAR as a task."""

    name = "mqar_continuous"
    io = "vectors"
    difficulty = ContinuousConfig
