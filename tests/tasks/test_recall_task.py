"""The recall task: splits apart, the curriculum's order, slices to score, batches."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from schema.errors import ConfigError
from tasks.base import IGNORED, PADDING, SPLITS, Recipe
from tasks.recall.mqar import MQAR, MQARConfig, check_mqar

RECIPE = Recipe(batch_size=2, max_steps=10, lr=1e-3)


def part(seq_len: int, num_kv_pairs: int, num_examples: int, **more) -> dict[str, Any]:
    return {
        "seq_len": seq_len,
        "num_kv_pairs": num_kv_pairs,
        "num_examples": num_examples,
        **more,
    }


TEST = [part(32, 2, 30), part(32, 4, 40)]


def recall(train: list[Any] | None = None, prepare: bool = True, **options) -> MQAR:
    train = [part(32, 2, 50), part(32, 4, 60)] if train is None else train
    task = MQAR(**{"vocab_size": 256, "train": train, "test": TEST, "recipe": RECIPE, **options})
    if prepare:
        task.prepare()
    return task


def pairs_of(item: Mapping[str, torch.Tensor]) -> int:
    return int((item["labels"] != IGNORED).sum())


def test_every_slice_of_every_split_is_mqar():
    task = recall(random_non_queries=False, num_passes=2)
    for split in SPLITS:
        slices = task.slices(split)
        assert list(slices) == ["L32_K2", "L32_K4"]
        for each, pairs in zip(slices.values(), (2, 4), strict=True):
            config = MQARConfig(256, 32, pairs, random_non_queries=False, num_passes=2)
            check_mqar(each.inputs, each.labels, config)
            assert each.inputs.dtype == each.labels.dtype == np.int64
            assert each.chance == 1 / pairs
            assert each.chance_of_vocabulary == 1 / 128
    assert [len(each.inputs) for each in task.slices("test").values()] == [30, 40]
    assert [len(each.inputs) for each in task.slices("train").values()] == [50, 60]


def test_splits_and_slices_draw_from_streams_of_their_own():
    same = [part(32, 2, 50, stage=0), part(32, 2, 50, stage=1)]
    task = recall(same, test=[part(32, 2, 50)])
    arrays = [inputs for split in SPLITS for inputs, _ in task._generated(split)]
    for i, one in enumerate(arrays):
        for other in arrays[:i]:
            assert not (one == other).all(axis=1).any()


def test_the_seed_decides_and_the_hashes_say_so():
    one, two, three = recall(), recall(), recall(seed=1)
    for split in SPLITS:
        hashes = [task.facts()["splits"][split]["sha256"] for task in (one, two, three)]
        assert hashes[0] == hashes[1] != hashes[2]
    items = zip(one.train_set(), two.train_set(), strict=False)
    assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in items)


def test_sequences_of_the_test_that_occur_in_training_are_an_error():
    tiny = {
        "vocab_size": 9,
        "test": [part(8, 2, 50)],
        "random_non_queries": False,
        "prepare": False,
    }
    with pytest.raises(ConfigError, match=r"task\.train: \d+ validation sequences occur in it"):
        recall([part(8, 2, 500)], **tiny).prepare()


def test_a_curriculum_shows_its_stages_in_order_and_mixes_inside_them():
    train = [
        part(32, 2, 40, stage=1),
        part(32, 8, 50, stage=2),
        part(32, 4, 30, stage=0),
        part(32, 2, 20, stage=2),
    ]
    task = recall(train)
    assert task.shuffle is False
    pairs = [pairs_of(item) for item in task.train_set()]
    assert len(pairs) == len(task.train_set()) == 140
    assert pairs[:30] == [4] * 30
    assert pairs[30:70] == [2] * 40
    last = pairs[70:]
    assert sorted(last) == [2] * 20 + [8] * 50
    assert sum(a != b for a, b in pairwise(last)) > 10  # mixed; the seed is fixed


def test_every_training_example_comes_up_once():
    task = recall()
    seen = sorted(item["inputs"].numpy().tobytes() for item in task.train_set())
    rows = [inputs.astype(np.int64) for inputs, _ in task._generated("train")]
    assert seen == sorted(row.tobytes() for part in rows for row in part)


def test_without_stages_the_slices_are_shown_as_listed_and_shuffled_says_so():
    pairs = [pairs_of(item) for item in recall([part(32, 4, 9), part(32, 2, 9)]).train_set()]
    assert pairs == [4] * 9 + [2] * 9
    assert recall(order="shuffled").shuffle is True


def test_validation_walks_the_slices_of_the_test_with_other_sequences():
    task = recall()
    items = list(task.validation_set())
    assert [pairs_of(item) for item in items] == [2] * 30 + [4] * 40
    np.testing.assert_array_equal(
        np.stack([item["inputs"] for item in items[:30]]),
        task.slices("validation")["L32_K2"].inputs,
    )


def test_examples_of_one_length_stack_and_of_several_are_padded():
    task = recall([part(16, 2, 4), part(32, 4, 4)])
    items = list(task.train_set())
    short = task.collate(items[:2])
    assert short.keys() == {"inputs", "labels"}
    assert short["inputs"].shape == (2, 16)
    mixed = task.collate([items[0], items[-1]])
    assert mixed["inputs"].shape == (2, 32)
    assert mixed["inputs"].dtype == mixed["labels"].dtype == torch.int64
    assert torch.equal(mixed["inputs"][0, :16], items[0]["inputs"])
    assert torch.equal(mixed["labels"][0, :16], items[0]["labels"])
    assert (mixed["labels"][0, 16:] == IGNORED).all()
    segments = mixed.get("segments")
    assert segments is not None
    assert segments.tolist() == [[0] * 16 + [PADDING] * 16, [0] * 32]


def test_a_configuration_hands_over_mappings():
    task = recall(
        [{"seq_len": 32, "num_kv_pairs": 2, "num_examples": 5}],
        recipe={"batch_size": 4, "max_steps": 3, "lr": 0.1},
    )
    assert len(task.train_set()) == 5
    assert task.recipe == Recipe(4, 3, 0.1)


def test_facts_are_plain_and_complete():
    facts = recall().facts()
    assert facts["splits"]["train"]["examples"] == 110
    assert facts["splits"]["train"]["tokens"] == 110 * 32
    assert [s["chance"] for s in facts["splits"]["test"]["slices"]] == [1 / 2, 1 / 4]
    assert facts["seed"] == 0
    assert facts["order"] == "curriculum"


def test_before_prepare_only_the_vocabulary_is_known():
    task = recall(prepare=False)
    task.check()
    assert task.vocab_size == task.max_vocab == 256
    with pytest.raises(RuntimeError, match=r"prepare\(\) has to come first"):
        task.train_set()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": []}, r"task\.train=\[\]: expected at least one slice"),
        ({"test": []}, r"task\.test=\[\]: expected at least one slice"),
        ({"train": [part(32, 9, 5)]}, r"task\.train\[0\]: seq_len=32: expected at least 36"),
        ({"test": [*TEST, part(32, 9, 5)]}, r"task\.test\[2\]: seq_len=32"),
        ({"test": [*TEST, part(32, 2, 5)]}, r"task\.test\[2\]: L32_K2 is given twice"),
        ({"train": [{"seq_len": 32, "num_kv_pairs": 2}]}, r"task\.train\[0\]\.num_examples: miss"),
        (
            {"train": [{"seq_len": 32, "num_kv_pairs": 2, "num_examples": 0}]},
            r"task\.train\[0\]\.num_examples=0: expected at least 1",
        ),
        ({"train": [{"length": 32}]}, r"task\.train\[0\]\.length=32: unknown key; allowed: num_ex"),
        ({"powera": 1.0}, r"task\.powera=1\.0: unknown key; did you mean power_a\? allowed:"),
        ({"power_a": "x"}, r"task\.power_a='x' \(str\): expected float"),
        (
            {"test": [part(32, 2, 5), {**part(32, 2, 5), "vocab_size": 128}]},
            r"task: slices with vocabularies of \[128, 256\] ids: expected the same",
        ),
        (
            {"train": [part(32, 2, 5, stage=0), part(32, 4, 5)]},
            r"task\.train: expected a stage for ev",
        ),
        ({"order": "random"}, r"task\.order=random: allowed: curriculum, shuffled"),
        ({"seed": -1}, r"task\.seed=-1: expected at least 0"),
        ({"recipe": {"batch_size": 0, "max_steps": 1, "lr": 1}}, r"task\.recipe\.batch_size=0"),
        ({"recipe": {"batch_size": 1}}, r"task\.recipe\.max_steps: missing"),
        ({"recipe": 3}, r"task\.recipe=3: expected a mapping"),
    ],
)
def test_errors_name_the_key(options, said):
    with pytest.raises(ConfigError, match=said):
        recall(prepare=False, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": 0.0}, r"lr=0\.0: expected more than 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"max_steps": 0}, "max_steps=0: expected at least 1"),
        ({"warmup_steps": 11}, "warmup_steps=11: expected 0 to max_steps=10"),
        ({"eval_interval": 0}, "eval_interval=0"),
    ],
)
def test_a_recipe_checks_its_numbers(options, said):
    with pytest.raises(ConfigError, match=said):
        Recipe(**{"batch_size": 2, "max_steps": 10, "lr": 1e-3, **options})
