"""A recall task: slices of one generator's difficulties, walked as a curriculum or mixed.

B batch, N examples, L length of an example, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from schema.errors import ConfigError
from tasks.base import IGNORED, PADDING, SPLITS, Batch, Recipe, Split, Task, as_record
from tasks.recall.difficulty import Difficulty
from tasks.recall.slices import Slice, changed, read_slices

_ORDER_STREAM = len(SPLITS)  # the random stream after those of the splits
_LENGTH_STREAM = _ORDER_STREAM + 1
_FILLER = 0  # what padding is read as; `segments` says that it is none of the sequence


@dataclass(frozen=True)
class RecallSlice:
    """Examples to score: int64 `inputs` and `labels` (N, L), labels IGNORED where nothing is asked.

    `groups` are the names under which slices are also scored together, `context` the leading
    positions that hold all there is to know, see Difficulty, and `prefix_len` those that may be
    read in both directions. With `answer_after` a model reads the context and the token after it
    and goes on by itself: what it writes behind the first such token is its answer, which is right
    if it is the last label. Tokens of the `environment`, see Difficulty, stand in place of its own.
    """

    name: str
    inputs: np.ndarray
    labels: np.ndarray
    chance: float
    chance_of_vocabulary: float
    groups: tuple[str, ...] = ()
    context: int | None = None
    prefix_len: int | None = None
    answer_after: int | None = None
    environment: Callable[[np.ndarray], np.ndarray] | None = None


class Recall(Task):
    """Examples generated from a seed. A subclass names the generator.

    Train, validation and test draw from streams of their own, and no sequence of the last two
    occurs in the first. Validation has the slices of the test, with other sequences.

    Args:
        train: slices to train on. Each is a mapping of `num_examples`, optionally `stage`, and
            options of the difficulty.
        test: slices to validate and be scored on, each difficulty once.
        recipe: see Task.
        order: "curriculum" walks the stages of `train` in every epoch, "shuffled" mixes all of
            it. With slices of several lengths a curriculum pads less.
        prefix: a mixer with causal = "prefix" may read the context of every example in both
            directions (see Difficulty.context).
        seed: of the data; a run's own seed does not change it.
        options: of the difficulty, for all slices that do not say otherwise.

    Attributes:
        difficulty: the generator.

    Raises:
        ConfigError: an option out of its range, no slice, or a test slice given twice.
    """

    kind = "recall"
    difficulty: ClassVar[type[Difficulty]]

    def __init__(
        self,
        train: Sequence[Mapping[str, Any]],
        test: Sequence[Mapping[str, Any]],
        recipe: Recipe,
        *,
        order: Literal["curriculum", "shuffled"] = "curriculum",
        prefix: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if order not in ("curriculum", "shuffled"):
            raise ConfigError(f"task.order={order}: allowed: curriculum, shuffled")
        if seed < 0:
            raise ConfigError(f"task.seed={seed}: expected at least 0")
        self.recipe = as_record(Recipe, recipe, "task.recipe")
        self.shuffle = order == "shuffled"
        self.prefix = prefix
        self.seed = seed
        self._options = options
        self._train = read_slices(self.difficulty, train, options, "task.train")
        self._test = read_slices(self.difficulty, test, options, "task.test")
        names = [each.name for each in self._test]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ConfigError(f"task.test[{i}]: {name} is given twice")
        for each in [*self._train, *self._test]:
            if prefix and each.config.context is None:
                raise ConfigError(
                    f"task.prefix=true: {each.name} has questions in its context; allowed: false"
                )
        sizes = sorted({each.config.vocab_size for each in [*self._train, *self._test]})
        if len(sizes) > 1:
            raise ConfigError(f"task: slices with vocabularies of {sizes} ids: expected the same")
        self._vocab_size = sizes[0]
        self._data: dict[Split, list[tuple[np.ndarray, np.ndarray]]] | None = None

    def prepare(self) -> None:
        """See Task; generates everything."""
        if self._data is not None:
            return
        data: dict[Split, list[tuple[np.ndarray, np.ndarray]]] = {}
        for s, split in enumerate(SPLITS):
            data[split] = [
                each.config.generate(each.num_examples, self._rng(s, i))
                for i, each in enumerate(self._slices_of(split))
            ]
        for split in SPLITS[1:]:
            shared = _sequences(data["train"]) & _sequences(data[split])
            if shared:
                raise ConfigError(
                    f"task.train: {len(shared)} {split} sequences occur in it; there are too few "
                    "different ones: expected a larger vocab_size or fewer examples"
                )
        self._data = data

    @property
    def vocab_size(self) -> int:
        """See Task."""
        return self._vocab_size

    @property
    def max_vocab(self) -> int:
        """See Task."""
        return self._vocab_size

    @property
    def guess(self) -> str:
        """What a guesser does whose accuracy is the chance of a slice."""
        return self.difficulty.guess

    def train_set(self) -> "Examples":
        """See Task; in the order of the curriculum."""
        rng = self._rng(_ORDER_STREAM, 0)
        sizes = [each.num_examples for each in self._train]
        which = np.repeat(np.arange(len(sizes)), sizes)
        row = np.concatenate([np.arange(n) for n in sizes])
        stages = [i if s.stage is None else s.stage for i, s in enumerate(self._train)]
        order = np.lexsort((rng.random(len(which)), np.array(stages)[which]))
        return Examples(
            self._generated("train"), which[order], row[order], self._prefixes(self._train)
        )

    def validation_set(self) -> "Examples":
        """See Task; slice after slice."""
        data = self._generated("validation")
        sizes = [len(inputs) for inputs, _ in data]
        which = np.repeat(np.arange(len(sizes)), sizes)
        row = np.concatenate([np.arange(n) for n in sizes])
        return Examples(data, which, row, self._prefixes(self._test))

    def slices(self, split: Split) -> dict[str, RecallSlice]:
        """The examples of every difficulty of a split by name, such as "L32_K4"."""
        members: dict[str, list[int]] = {}
        for i, each in enumerate(self._slices_of(split)):
            members.setdefault(each.name, []).append(i)
        data, slices = self._generated(split), self._slices_of(split)
        return {
            name: _scored(
                name,
                slices[same[0]].config,
                np.concatenate([data[i][0] for i in same]),
                np.concatenate([data[i][1] for i in same]),
                self.prefix,
            )
            for name, same in members.items()
        }

    def slices_of_length(self, split: Split, lengths: Sequence[int]) -> dict[str, RecallSlice]:
        """Every difficulty of a split at other lengths, by name.

        The examples are new ones, from a stream of their own for each length.

        Raises:
            ConfigError: the length of an example is no option of this task, or is none of its own.
        """
        names = [f.name for f in fields(self.difficulty) if f.init]  # type: ignore[arg-type]
        if "seq_len" not in names:
            raise ConfigError(f"eval.lengths: task={self.name} has no option seq_len to change")
        found: dict[str, RecallSlice] = {}
        for length in lengths:
            for i, each in enumerate(self._slices_of(split)):
                key = f"eval.lengths={length}"
                other = changed(each, self._options, {"seq_len": length}, key)
                if other.name in found:
                    continue
                rng = self._rng(_LENGTH_STREAM, SPLITS.index(split), length, i)
                inputs, labels = other.config.generate(each.num_examples, rng)
                found[other.name] = _scored(other.name, other.config, inputs, labels, self.prefix)
        return found

    def facts(self) -> dict[str, Any]:
        """See Task."""
        return {
            "name": self.name,
            "kind": self.kind,
            "note": self.note,
            "notes": [f"chance is the accuracy of {self.guess}"],
            **self._options,
            "order": "shuffled" if self.shuffle else "curriculum",
            **({"prefix": True} if self.prefix else {}),
            "seed": self.seed,
            "splits": {
                split: {
                    "sha256": _sha256(self._generated(split)),
                    "examples": sum(s.num_examples for s in self._slices_of(split)),
                    "tokens": sum(
                        s.num_examples * s.config.seq_len for s in self._slices_of(split)
                    ),
                    "slices": [each.facts() for each in self._slices_of(split)],
                }
                for split in SPLITS
            },
        }

    def collate(self, items: Sequence[Mapping[str, Tensor]]) -> Batch:
        """See Task. Items of several lengths are padded at the end, which `segments` says."""
        lengths = [len(item["inputs"]) for item in items]
        if min(lengths) == max(lengths):
            return default_collate(list(items))
        shape = len(items), max(lengths)
        inputs, labels = torch.full(shape, _FILLER), torch.full(shape, IGNORED)
        segments = torch.full(shape, PADDING)
        for b, (item, length) in enumerate(zip(items, lengths, strict=True)):
            inputs[b, :length] = item["inputs"]
            labels[b, :length] = item["labels"]
            segments[b, :length] = 0
        batch = Batch(inputs=inputs, labels=labels, segments=segments)
        if "prefix_len" in items[0]:
            batch["prefix_len"] = torch.stack([item["prefix_len"] for item in items])
        return batch

    def _prefixes(self, slices: Sequence[Slice]) -> list[int | None]:
        return [each.config.context if self.prefix else None for each in slices]

    def _rng(self, *stream: int) -> np.random.Generator:
        """One generator per split and slice; streams of different keys do not overlap."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=stream))

    def _slices_of(self, split: Split) -> list[Slice]:
        return self._train if split == "train" else self._test

    def _generated(self, split: Split) -> list[tuple[np.ndarray, np.ndarray]]:
        if self._data is None:
            raise RuntimeError("prepare() has to come first")
        return self._data[split]


class Examples(Dataset):
    """Example n is row `row[n]` of slice `which[n]`; items are int64 inputs and labels (L,).

    With `prefixes`, one for each slice, an item also has its prefix_len.
    """

    def __init__(
        self,
        slices: Sequence[tuple[np.ndarray, np.ndarray]],
        which: np.ndarray,
        row: np.ndarray,
        prefixes: Sequence[int | None],
    ) -> None:
        self._slices, self._which, self._row = slices, which, row
        self._prefixes = prefixes

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, labels = self._slices[self._which[index]]
        row = self._row[index]
        item = {
            "inputs": torch.from_numpy(inputs[row].astype(np.int64)),
            "labels": torch.from_numpy(labels[row].astype(np.int64)),
        }
        prefix = self._prefixes[self._which[index]]
        return item if prefix is None else {**item, "prefix_len": torch.tensor(prefix)}


def _scored(
    name: str, config: Difficulty, inputs: np.ndarray, labels: np.ndarray, prefix: bool
) -> RecallSlice:
    return RecallSlice(
        name,
        inputs.astype(np.int64),
        labels.astype(np.int64),
        config.chance,
        config.chance_of_vocabulary,
        config.groups,
        config.context,
        config.context if prefix else None,
        config.answer_after,
        config.environment,
    )


def _sequences(data: Sequence[tuple[np.ndarray, np.ndarray]]) -> set[bytes]:
    """Of one split, each with its length told apart by its number of bytes."""
    return {row.tobytes() for inputs, _ in data for row in inputs}


def _sha256(data: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    total = hashlib.sha256()
    for inputs, labels in data:
        total.update(inputs.astype("<i4").tobytes() + labels.astype("<i4").tobytes())
    return total.hexdigest()
