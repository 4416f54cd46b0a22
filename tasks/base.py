"""What a task is: data sets for training, facts for the record, and items that collate to batches.

B batch, T time.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, TypedDict, TypeVar

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from schema.errors import ConfigError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
IGNORED = -100  # label of a position that counts neither in the loss nor in a score
PADDING = -1  # document number of a position that is no part of any document


class _Labelled(TypedDict):
    inputs: Tensor  # int64 (B, T)
    labels: Tensor  # int64 (B, T), what to emit after reading inputs[0..t]; IGNORED elsewhere


class Batch(_Labelled, total=False):
    """What the items of a data set collate to; the shapes of an item lack B."""

    segments: Tensor  # int64 (B, T) document numbers, PADDING where there is none
    prefix_len: Tensor  # int64 (B,) positions that may be read in both directions


@dataclass(frozen=True)
class Document:
    """A document to be scored.

    `ids` int64 (n + 1,) starts with the begin-of-document id, which is read and never predicted.
    `words` are the official words of its text, ends of lines included, `bytes` its length in
    UTF-8.
    """

    ids: np.ndarray
    words: int
    bytes: int
    title: str


@dataclass(frozen=True)
class Recipe:
    """How a task is usually trained: defaults for the trainer, the optimizer and the schedule."""

    batch_size: int
    max_steps: int
    lr: float
    warmup_steps: int = 0
    eval_interval: int = 500

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_steps", "eval_interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        if not self.lr > 0:
            raise ConfigError(f"lr={self.lr}: expected more than 0")
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps}: expected 0 to max_steps={self.max_steps}"
            )


class Task(ABC):
    """Data to train on and what counts as correct.

    A task is built from its configuration alone: building reads no data. `check` looks whether
    the data is there, `prepare` reads it; the data sets, `vocab_size` and `facts` come after it.

    Attributes:
        name: short, for records and messages.
        kind: "text" has `documents(split)` to score, "recall" has `slices(split)`.
        recipe: how the task is usually trained.
        shuffle: whether an epoch visits the training set in random order; False walks it from
            the first item to the last, as a curriculum wants.
        io: the file of conf/io/ that a model for this task has; see models/io.
        note: one line to be printed with every figure obtained on this task; mostly empty.
    """

    name: str
    kind: ClassVar[Literal["text", "recall"]]
    io: ClassVar[Literal["tokens", "vectors", "auto_encoder"]] = "tokens"
    recipe: Recipe
    shuffle: bool = True
    note: str = ""

    def check(self) -> None:  # noqa: B027 (a task that generates its data has nothing to look for)
        """Look whether the data is there, without reading it.

        Raises:
            ConfigError: something is missing; says what was looked for, where, and what helps.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Read or make the data. Idempotent, and safe in several processes at once.

        Raises:
            ConfigError: the data is missing, or is not what it has to be.
        """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids, for the model's embedding and head."""

    @property
    @abstractmethod
    def max_vocab(self) -> int:
        """An upper bound of `vocab_size` that is known before `prepare`."""

    @abstractmethod
    def train_set(self) -> Dataset:
        """Map-style; its items collate to a Batch by `collate`."""

    @abstractmethod
    def validation_set(self) -> Dataset:
        """Map-style, in a fixed order; counts every label of the validation split once."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """For the run's record: hashes and sizes of the data and how it was made (plain values)."""

    def collate(self, items: Sequence[Mapping[str, Tensor]]) -> Batch:
        """Items of one data set to a batch."""
        return default_collate(list(items))


R = TypeVar("R")


def as_record(cls: type[R], value: R | Mapping[str, Any], key: str) -> R:
    """`value` as the dataclass `cls`: a configuration hands over plain mappings.

    Raises:
        ConfigError: a field that is unknown or missing, or a value that `cls` does not allow.
    """
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={value!r}: expected a mapping")
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for name in value:
        if name not in known:
            raise ConfigError(f"{key}.{name}: unknown key; allowed: {', '.join(known)}")
    for name, field in known.items():
        if name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{key}.{name}: missing")
    try:
        return cls(**value)
    except ConfigError as error:
        raise ConfigError(f"{key}.{error}") from None
