"""Fuzzy recall of MAD (Poli et al. 2024, "Mechanistic design and scaling").

N examples, L length, V vocabulary, P pairs, M the longest motif.
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
    repeats,
    require_at_least,
    require_choice,
)
from tasks.recall.task import Recall


@dataclass(frozen=True)
class FuzzyConfig(Difficulty):
    """One difficulty: pairs of motifs, and at the end a pair that stood somewhere before.

    A motif is a tuple of different ids, of keys or of values. A key motif has one value motif
    per sequence. As many pairs as fit stand behind each other, and padding before them.

    Attributes:
        vocab_size: V; the padding is V-1, the ids before it are one half keys, one half values.
        seq_len: L.
        key_size: how many ids a key motif has at most.
        value_size: how many ids a value motif has at most.
        key_sizes: "any" draws the size of each key motif from 1..key_size, "largest" has it
            key_size always, as the source tests.
        targets: "recall" labels the ids of the value of every key motif that came up before,
            each where the one before it is read. "next" labels every position with the token
            after it and padding with padding, as the source trains.
    """

    letters: ClassVar = {"seq_len": "L", "key_sizes": "", "targets": ""}
    guess: ClassVar = "naming any possible answer"

    vocab_size: int
    seq_len: int
    key_size: int = 3
    value_size: int = 3
    key_sizes: Literal["any", "largest"] = "largest"
    targets: Literal["recall", "next"] = "recall"

    def __post_init__(self) -> None:
        require_choice(self, "key_sizes", ("any", "largest"))
        require_choice(self, "targets", ("recall", "next"))
        require_at_least(self, key_size=1, value_size=1)
        if self.num_keys < self.key_size or self.num_values < self.value_size:
            raise ConfigError(
                f"vocab_size={self.vocab_size}: expected at least "
                f"{2 * max(self.key_size, self.value_size) + 1}, for motifs of "
                f"key_size={self.key_size} and value_size={self.value_size}"
            )
        needed = 2 * (self.key_size + self.value_size) - 1
        if self.seq_len < needed:
            raise ConfigError(f"seq_len={self.seq_len}: expected at least {needed}, two pairs")

    @property
    def num_keys(self) -> int:
        """Ids of keys, 0..num_keys-1."""
        return (self.vocab_size - 1) // 2

    @property
    def num_values(self) -> int:
        """Ids of values, num_keys..V-2."""
        return self.vocab_size - 1 - self.num_keys

    @property
    def chance(self) -> float:
        """See Difficulty."""
        return self.chance_of_vocabulary

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / self.num_values if self.targets == "recall" else 1 / self.vocab_size

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        keys, values = self._pairs(n, rng)
        tokens = np.concatenate([keys, values], axis=2)  # (n, P, 2 M), -1 where a motif ended
        sizes = (tokens >= 0).sum(axis=2)
        # Pair 0 is the probe: it stands at the end, and once more among the pairs that fit.
        fit = np.cumsum(sizes, axis=1) <= self.seq_len + 1 - sizes[:, :1]
        place, row = rng.integers(fit.sum(axis=1)), np.arange(n)
        most = fit.sum(axis=1).max()
        tokens, fit = tokens[:, :most], fit[:, :most]
        tokens[row, 0], tokens[row, place] = tokens[row, place], tokens[row, 0].copy()
        tokens[~fit] = -1
        probe = np.concatenate([keys[:, 0], values[:, 0]], axis=1)[:, None]
        tokens = np.concatenate([tokens, probe], axis=1)  # (n, P + 1, 2 M)
        again = repeats(self._codes(tokens[:, :, : self.key_size]))
        asked = (again & (tokens[:, :, 0] >= 0))[:, :, None] & (tokens >= self.num_keys)
        whole = np.full((n, self.seq_len + 1), self.vocab_size - 1)
        scored = np.zeros(whole.shape, bool)
        flat = tokens.reshape(n, -1)
        kept = flat >= 0
        r, _ = np.nonzero(kept)
        column = (np.cumsum(kept, axis=1) + self.seq_len - kept.sum(axis=1, keepdims=True))[kept]
        whole[r, column] = flat[kept]
        scored[r, column] = asked.reshape(n, -1)[kept]
        labels = whole[:, 1:].copy()
        if self.targets == "recall":
            labels[~scored[:, 1:]] = IGNORED
        else:
            labels[whole[:, :-1] == self.vocab_size - 1] = self.vocab_size - 1
        return whole[:, :-1], labels

    def _pairs(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Key motifs (n, P, key_size) and value motifs (n, P, value_size), -1 behind their ends.

        P pairs are enough to fill a sequence. Equal keys have equal values.
        """
        shortest = 2 if self.key_sizes == "any" else self.key_size + 1
        pairs = -(-self.seq_len // shortest)
        shape = n, pairs, 1
        keys = distinct(n * pairs, self.key_size, self.num_keys, rng).astype(np.int32)
        values = distinct(n * pairs, self.value_size, self.num_values, rng).astype(np.int32)
        keys, values = keys.reshape(n, pairs, -1), values.reshape(n, pairs, -1)
        if self.key_sizes == "any":
            size = rng.integers(1, self.key_size + 1, size=shape)
            keys[np.arange(self.key_size) >= size] = -1
        size = rng.integers(1, self.value_size + 1, size=shape)
        values += self.num_keys
        values[np.arange(self.value_size) >= size] = -1
        codes = self._codes(keys)
        order = np.argsort(codes, axis=1, kind="stable")
        fresh = ~np.take_along_axis(repeats(codes), order, axis=1)
        leader = np.maximum.accumulate(np.where(fresh, np.arange(pairs), 0), axis=1)
        first = np.empty_like(order)  # where each pair's key stands first
        np.put_along_axis(first, order, np.take_along_axis(order, leader, axis=1), axis=1)
        return keys, np.take_along_axis(values, first[:, :, None], axis=1)

    def _codes(self, keys: np.ndarray) -> np.ndarray:
        """A number (n, P) for every key motif, the same for the same one."""
        return (keys + 1) @ (self.num_keys + 1) ** np.arange(self.key_size)


class FuzzyRecall(Recall):
    """Fuzzy recall as a task."""

    name = "fuzzy_recall"
    difficulty = FuzzyConfig
