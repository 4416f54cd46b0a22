"""Multi-query recall of values that were overwritten (Zoology's code, "forgetting MQAR").

N examples, L length, V vocabulary, K key-value pairs, U of them updated.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import (
    Difficulty,
    distinct,
    in_parts,
    require_at_least,
    require_choice,
)
from tasks.recall.mqar import FILLER, query_slots
from tasks.recall.task import Recall


@dataclass(frozen=True)
class ForgettingConfig(Difficulty):
    """One difficulty of MQAR in which U of the K keys come up again with another value.

    K pairs as in MQAR, then U pairs of keys among them, chosen and ordered at random, each with
    a value unlike the one it replaces; then the queries as in MQAR. The label is a key's last
    value: naming the first is right for the untouched keys alone.

    Differs from the source, which draws the new value unlike that of another key, so that some
    updates change nothing.

    Attributes:
        vocab_size: V; keys are 1..V/2-1, values V/2..V-1, filler is 0.
        seq_len: L, even.
        num_kv_pairs: K.
        num_updates: U.
        power_a, random_non_queries: see MQARConfig.
        scored: which keys have a label. "updated" and "untouched" score them apart.
    """

    letters: ClassVar = {"seq_len": "L", "num_kv_pairs": "K", "num_updates": "U", "scored": ""}
    guess: ClassVar = "naming the value of one of the sequence's pairs"

    vocab_size: int
    seq_len: int
    num_kv_pairs: int = 8
    num_updates: int = 4
    power_a: float = 0.01
    random_non_queries: bool = True
    scored: Literal["all", "updated", "untouched"] = "all"

    def __post_init__(self) -> None:
        require_at_least(self, num_kv_pairs=1, num_updates=1)
        require_choice(self, "scored", ("all", "updated", "untouched"))
        if not self.power_a > 0:
            raise ConfigError(f"power_a={self.power_a}: expected more than 0")
        most = self.num_kv_pairs - (self.scored == "untouched")
        if self.num_updates > most:
            raise ConfigError(f"num_updates={self.num_updates}: expected at most {most}")
        if self.vocab_size // 2 - 1 < self.num_kv_pairs:
            raise ConfigError(
                f"vocab_size={self.vocab_size}: expected at least {2 * self.num_kv_pairs + 2} for "
                f"num_kv_pairs={self.num_kv_pairs} keys and values"
            )
        needed = self.context + 2 * self.num_kv_pairs
        if self.seq_len < needed or self.seq_len % 2:
            raise ConfigError(
                f"seq_len={self.seq_len}: expected an even number of at least {needed}, two "
                f"positions for each of num_kv_pairs={self.num_kv_pairs}, num_updates="
                f"{self.num_updates} and the queries"
            )

    @property
    def context(self) -> int:
        """Positions before the first query slot."""
        return 2 * (self.num_kv_pairs + self.num_updates)

    @property
    def chance(self) -> float:
        """See Difficulty."""
        return 1 / (self.num_kv_pairs + self.num_updates)

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / (self.vocab_size - self.vocab_size // 2)

    @property
    def groups(self) -> tuple[str, ...]:
        """See Difficulty."""
        return () if self.scored == "all" else (self.scored,)

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        half, k = self.vocab_size // 2, self.num_kv_pairs
        num_values = self.vocab_size - half
        keys = 1 + distinct(n, k, half - 1, rng)
        first = distinct(n, k, num_values, rng)
        updated = distinct(n, self.num_updates, k, rng)  # places among the pairs
        old = np.take_along_axis(first, updated, axis=1)
        new = (old + rng.integers(1, num_values, size=old.shape)) % num_values
        last = first.copy()
        np.put_along_axis(last, updated, new, axis=1)
        all_keys = np.concatenate([keys, np.take_along_axis(keys, updated, axis=1)], axis=1)
        all_values = half + np.concatenate([first, new], axis=1)
        inputs = np.full((n, self.seq_len), FILLER)
        inputs[:, : self.context : 2] = all_keys
        inputs[:, 1 : self.context : 2] = all_values
        num_slots = (self.seq_len - self.context) // 2
        queries = self.context + 2 * query_slots(num_slots, k, self.power_a, n, rng)
        np.put_along_axis(inputs, queries, keys, axis=1)
        if self.random_non_queries:
            noise = rng.integers(self.vocab_size, size=inputs.shape)
            inputs = np.where(inputs == FILLER, noise, inputs)
        answers = half + last
        if self.scored != "all":
            touched = np.zeros((n, k), bool)
            np.put_along_axis(touched, updated, True, axis=1)
            answers = np.where(touched == (self.scored == "updated"), answers, IGNORED)
        labels = np.full_like(inputs, IGNORED)
        np.put_along_axis(labels, queries, answers, axis=1)
        return inputs, labels


class ForgettingMQAR(Recall):
    """Forgetting MQAR as a task."""

    name = "mqar_forgetting"
    difficulty = ForgettingConfig
