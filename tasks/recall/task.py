"""Multi-query associative recall as a task: slices of difficulty, walked as a curriculum or mixed.

B batch, N examples, L length of an example, V vocabulary, K key-value pairs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from schema.errors import ConfigError
from tasks.base import IGNORED, PADDING, SPLITS, Batch, Recipe, Split, Task, as_record
from tasks.recall.mqar import FILLER, MQARConfig, generate

_ORDER_STREAM = len(SPLITS)  # the random stream after those of the splits


@dataclass(frozen=True)
class Slice:
    """Examples of one difficulty.

    Attributes:
        seq_len: L.
        num_kv_pairs: K.
        num_examples: N.
        stage: of a curriculum. The training set shows the stages in ascending order and mixes the
            slices of a stage. Given for every slice or for none: then each is a stage of its own.
    """

    seq_len: int
    num_kv_pairs: int
    num_examples: int
    stage: int | None = None

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise ConfigError(f"num_examples={self.num_examples}: expected at least 1")

    @property
    def name(self) -> str:
        """Of the difficulty."""
        return f"L{self.seq_len}_K{self.num_kv_pairs}"


@dataclass(frozen=True)
class RecallSlice:
    """Examples to score: int64 `inputs` and `labels` (N, L), labels IGNORED where nothing is asked.

    `chance` is the accuracy of naming one of the example's own values, 1/K, and
    `chance_of_vocabulary` of naming any value.
    """

    name: str
    inputs: np.ndarray
    labels: np.ndarray
    seq_len: int
    num_kv_pairs: int
    chance: float
    chance_of_vocabulary: float


class Recall(Task):
    """Multi-query associative recall, generated from a seed; see MQARConfig for the options.

    Train, validation and test draw from streams of their own, and no sequence of the last two
    occurs in the first. Validation has the slices of the test, with other sequences.

    Args:
        vocab_size: V.
        train: slices to train on.
        test: slices to validate and be scored on, each difficulty once.
        recipe: see Task.
        order: "curriculum" walks the stages of `train` in every epoch, "shuffled" mixes all of
            it. With slices of several lengths a curriculum pads less.
        power_a, random_non_queries, num_passes: see MQARConfig.
        seed: of the data; a run's own seed does not change it.

    Raises:
        ConfigError: an option out of its range, no slice, or a test slice given twice.
    """

    kind = "recall"
    name = "mqar"

    def __init__(
        self,
        vocab_size: int,
        train: Sequence[Slice],
        test: Sequence[Slice],
        recipe: Recipe,
        *,
        order: Literal["curriculum", "shuffled"] = "curriculum",
        power_a: float = 0.01,
        random_non_queries: bool = True,
        num_passes: int = 1,
        seed: int = 0,
    ) -> None:
        if order not in ("curriculum", "shuffled"):
            raise ConfigError(f"task.order={order}: allowed: curriculum, shuffled")
        if seed < 0:
            raise ConfigError(f"task.seed={seed}: expected at least 0")
        options = {
            "vocab_size": vocab_size,
            "power_a": power_a,
            "random_non_queries": random_non_queries,
            "num_passes": num_passes,
        }
        self.recipe = as_record(Recipe, recipe, "task.recipe")
        self.shuffle = order == "shuffled"
        self.seed = seed
        self._train = _slices(train, "task.train")
        self._test = _slices(test, "task.test")
        names = [each.name for each in self._test]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ConfigError(f"task.test[{i}]: {name} is given twice")
        self._vocab_size = vocab_size
        self._configs = {
            split: [
                _config(each, options, f"task.{'train' if split == 'train' else 'test'}[{i}]")
                for i, each in enumerate(self._slices_of(split))
            ]
            for split in SPLITS
        }
        self._options = options
        self._data: dict[Split, list[tuple[np.ndarray, np.ndarray]]] | None = None

    def prepare(self) -> None:
        """See Task; generates everything."""
        if self._data is not None:
            return
        data: dict[Split, list[tuple[np.ndarray, np.ndarray]]] = {}
        for s, split in enumerate(SPLITS):
            sizes = [each.num_examples for each in self._slices_of(split)]
            data[split] = [
                generate(config, n, self._rng(s, i))
                for i, (config, n) in enumerate(zip(self._configs[split], sizes, strict=True))
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

    def train_set(self) -> "Examples":
        """See Task; in the order of the curriculum."""
        rng = self._rng(_ORDER_STREAM, 0)
        sizes = [each.num_examples for each in self._train]
        which = np.repeat(np.arange(len(sizes)), sizes)
        row = np.concatenate([np.arange(n) for n in sizes])
        stages = [i if s.stage is None else s.stage for i, s in enumerate(self._train)]
        order = np.lexsort((rng.random(len(which)), np.array(stages)[which]))
        return Examples(self._generated("train"), which[order], row[order])

    def validation_set(self) -> "Examples":
        """See Task; slice after slice."""
        data = self._generated("validation")
        sizes = [len(inputs) for inputs, _ in data]
        which = np.repeat(np.arange(len(sizes)), sizes)
        return Examples(data, which, np.concatenate([np.arange(n) for n in sizes]))

    def slices(self, split: Split) -> dict[str, RecallSlice]:
        """The examples of every difficulty of a split by name, "L<seq_len>_K<num_kv_pairs>"."""
        members: dict[str, list[int]] = {}
        for i, each in enumerate(self._slices_of(split)):
            members.setdefault(each.name, []).append(i)
        data, configs = self._generated(split), self._configs[split]
        return {
            name: RecallSlice(
                name,
                np.concatenate([data[i][0] for i in same]).astype(np.int64),
                np.concatenate([data[i][1] for i in same]).astype(np.int64),
                configs[same[0]].seq_len,
                configs[same[0]].num_kv_pairs,
                configs[same[0]].chance,
                configs[same[0]].chance_of_vocabulary,
            )
            for name, same in members.items()
        }

    def facts(self) -> dict[str, Any]:
        """See Task."""
        return {
            "name": self.name,
            "kind": self.kind,
            "note": self.note,
            "notes": ["chance is the accuracy of naming one of the sequence's own values, 1/K"],
            **self._options,
            "order": "shuffled" if self.shuffle else "curriculum",
            "seed": self.seed,
            "splits": {
                split: {
                    "sha256": _sha256(self._generated(split)),
                    "examples": sum(s.num_examples for s in self._slices_of(split)),
                    "tokens": sum(s.num_examples * s.seq_len for s in self._slices_of(split)),
                    "slices": [
                        {**asdict(s), "name": s.name, "chance": c.chance}
                        for s, c in zip(self._slices_of(split), self._configs[split], strict=True)
                    ],
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
        inputs, labels = torch.full(shape, FILLER), torch.full(shape, IGNORED)
        segments = torch.full(shape, PADDING)
        for b, (item, length) in enumerate(zip(items, lengths, strict=True)):
            inputs[b, :length] = item["inputs"]
            labels[b, :length] = item["labels"]
            segments[b, :length] = 0
        return Batch(inputs=inputs, labels=labels, segments=segments)

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
    """Example n is row `row[n]` of slice `which[n]`; items are int64 inputs and labels (L,)."""

    def __init__(
        self, slices: Sequence[tuple[np.ndarray, np.ndarray]], which: np.ndarray, row: np.ndarray
    ) -> None:
        self._slices, self._which, self._row = slices, which, row

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, labels = self._slices[self._which[index]]
        row = self._row[index]
        return {
            "inputs": torch.from_numpy(inputs[row].astype(np.int64)),
            "labels": torch.from_numpy(labels[row].astype(np.int64)),
        }


def _slices(given: Sequence[Any], key: str) -> list[Slice]:
    if not given:
        raise ConfigError(f"{key}=[]: expected at least one slice")
    slices = [as_record(Slice, each, f"{key}[{i}]") for i, each in enumerate(given)]
    if len({each.stage is None for each in slices}) > 1:
        raise ConfigError(f"{key}: expected a stage for every slice or for none")
    return slices


def _config(each: Slice, options: Mapping[str, Any], key: str) -> MQARConfig:
    try:
        return MQARConfig(seq_len=each.seq_len, num_kv_pairs=each.num_kv_pairs, **options)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _sequences(data: Sequence[tuple[np.ndarray, np.ndarray]]) -> set[bytes]:
    """Of one split, each with its length told apart by its number of bytes."""
    return {row.tobytes() for inputs, _ in data for row in inputs}


def _sha256(data: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    total = hashlib.sha256()
    for inputs, labels in data:
        total.update(inputs.astype("<i4").tobytes() + labels.astype("<i4").tobytes())
    return total.hexdigest()
