"""Which recall examples are scored: lengths, slices by name, contexts shown again."""

import io

import numpy as np
import pytest
from rich.console import Console

from evaluation import Settings, evaluate, print_table
from evaluation.chosen import chosen_slices, repeat_context
from schema.errors import ConfigError
from tasks.base import IGNORED, Recipe
from tasks.recall.associative import AssociativeRecall
from tasks.recall.cgram import CGramRetrieval
from tasks.recall.circuits import Circuits
from tasks.recall.compositional import CompositionalMQAR
from tasks.recall.compression import Compression
from tasks.recall.continuous import ContinuousMQAR
from tasks.recall.counting import Counting
from tasks.recall.forgetting import ForgettingMQAR
from tasks.recall.fuzzy import FuzzyRecall
from tasks.recall.in_context import InContextRecall, NoisyRecall
from tasks.recall.induction import InductionHeads
from tasks.recall.is_tree import IsTree
from tasks.recall.memorization import Memorization
from tasks.recall.mqar import MQAR, MQARConfig, check_mqar
from tasks.recall.needle import Needle
from tasks.recall.passkey import Passkey
from tasks.recall.phonebook import Phonebook
from tasks.recall.position import Index
from tasks.recall.selective_copying import SelectiveCopying
from tasks.recall.set_disjointness import SetDisjointness
from tasks.recall.task import Recall
from tests.tiny import tiny_model

RECIPE = Recipe(batch_size=2, max_steps=10, lr=1e-3)
OF_LENGTH_16 = {"seq_len": 16, "vocab_size": 48}
TASKS = [
    (MQAR, {**OF_LENGTH_16, "num_kv_pairs": 2}, 4),
    (ForgettingMQAR, {**OF_LENGTH_16, "num_kv_pairs": 2, "num_updates": 1}, 6),
    (CompositionalMQAR, {"seq_len": 24, "vocab_size": 48, "num_kv_pairs": 4}, 12),
    (AssociativeRecall, {"seq_len": 15, "vocab_size": 48}, 14),
    (InductionHeads, OF_LENGTH_16, 15),
    (SetDisjointness, {"vocab_size": 48, "first": 3, "second": 5}, 10),
    (Passkey, {"seq_len": 16}, 11),
    (Needle, {"seq_len": 16, "num_needles": 2, "num_queries": 2}, 12),
    (Phonebook, {"num_entries": 3}, 33),
    (Index, {"seq_len": 16, "num_positions": 14, "num_symbols": 8}, 14),
    (CGramRetrieval, {"seq_len": 16, "num_symbols": 8}, 13),
    (Counting, {"seq_len": 16, "num_symbols": 8}, 13),
    (SelectiveCopying, {"seq_len": 16, "vocab_size": 16, "num_tokens": 4}, 11),
    (ContinuousMQAR, {**OF_LENGTH_16, "num_kv_pairs": 2}, 2),
    (IsTree, {"num_nodes": 6}, 16),
    (IsTree, {"num_nodes": 6, "thought": "search"}, 16),
]
REFUSING = [
    (Memorization, {"seq_len": 16, "vocab_size": 32}),
    (InContextRecall, {"seq_len": 15, "vocab_size": 16}),
    (NoisyRecall, {"seq_len": 15, "vocab_size": 32, "noise_ids": 16, "noise_fraction": 0.2}),
    (FuzzyRecall, {"seq_len": 32, "vocab_size": 16}),
    (Circuits, {"circuit": "parity", "seq_len": 16}),
    (Compression, {"seq_len": 16, "vocab_size": 16}),
]


def made(task, **options):
    own = {name: options[name] for name in options if name in ("seq_len", "num_kv_pairs")}
    part = [{"num_examples": 30, **own}]
    circuit = [options.pop("circuit")] if "circuit" in options else []  # not one of every slice
    rest = {name: x for name, x in options.items() if name not in own}
    made = task(*circuit, part, part, RECIPE, **rest)
    made.prepare()
    return made


def mqar(**options):
    return made(MQAR, vocab_size=96, seq_len=16, num_kv_pairs=2, **options)


@pytest.mark.parametrize(
    ("task", "options", "context"), TASKS, ids=lambda x: getattr(x, "name", "")
)
def test_a_repeated_context_has_no_question_in_it(task, options, context):
    (part,) = made(task, **options).slices("test").values()
    assert part.context == context
    twice = repeat_context(part, 2)
    assert (twice.labels[:, : 2 * context] == IGNORED).all()
    assert np.array_equal(twice.labels[:, 2 * context :], part.labels[:, context:])
    assert np.array_equal(twice.inputs[:, context:], part.inputs)
    assert np.array_equal(twice.inputs[:, :context], part.inputs[:, :context])
    assert repeat_context(part, 1) is part


def test_mqar_shown_twice_is_mqar_of_two_passes():
    (part,) = mqar(random_non_queries=False).slices("test").values()
    twice = repeat_context(part, 2)
    check_mqar(twice.inputs, twice.labels, MQARConfig(96, 20, 2, 0.01, False, num_passes=2))


def test_every_task_is_shown_twice_or_refuses():
    known = {task for task, *_ in [*TASKS, *REFUSING]}
    assert known == {
        task for task in Recall.__subclasses__() if task.__module__.startswith("tasks.")
    }


@pytest.mark.parametrize(("task", "options"), REFUSING, ids=lambda x: getattr(x, "name", ""))
def test_a_task_with_questions_in_its_context_cannot_be_shown_twice(task, options):
    task = made(task, **options)
    with pytest.raises(ConfigError, match=r"eval\.num_passes=2: slice .* allowed: 1"):
        chosen_slices(task, "test", Settings(num_passes=2))


def test_lengths_add_slices_of_the_same_difficulty():
    task = mqar()
    found = chosen_slices(task, "test", Settings(lengths=[16, 32, 64]))
    assert [part.name for part in found] == ["L16_K2", "L32_K2", "L64_K2"]
    assert [part.groups for part in found] == [
        ("length 16",),
        ("length 32",),
        ("length 64",),
    ]
    for part, length in zip(found, (16, 32, 64), strict=True):
        check_mqar(part.inputs, part.labels, MQARConfig(96, length, 2))
    again = chosen_slices(task, "test", Settings(lengths=[64, 32]))
    assert np.array_equal(again[1].inputs, found[2].inputs)  # whatever else is asked for


def test_accuracy_stands_beside_the_bytes_of_the_state():
    task = mqar()
    model = tiny_model(["conv", "attention"], vocab_size=96)
    result = evaluate(model, task, "test", Settings(cost=False, lengths=[64], num_passes=2))
    rows = {row["slice"]: row for row in [*result["slices"], *result["groups"], result["all"]]}
    assert rows["L64_K2"]["length"] == 68  # four positions are shown again
    assert rows["L64_K2"]["state_bytes"] == model.state_bytes(1, 68)
    assert rows["all"]["state_bytes"] == rows["length 64"]["state_bytes"]
    assert rows["L16_K2"]["state_bytes"] < rows["L64_K2"]["state_bytes"]
    console = Console(file=io.StringIO(), width=120)
    print_table(result, console)
    printed = console.file.getvalue()
    assert "length 64" in printed
    assert "shown 2 times (JRT-Prompt)" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slices": ["L16_K3"]}, r"eval.slices=L16_K3: no such slice; did you mean L16_K2\?"),
        ({"lengths": [2]}, r"eval.lengths=2: seq_len=2: expected at least 8"),
        ({"lengths": [128]}, r"eval.lengths=128: vocab_size=96: expected more than seq_len=128"),
        ({"lengths": [17]}, r"eval.lengths=17: seq_len=17: expected an even number"),
    ],
)
def test_what_cannot_be_scored_is_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        chosen_slices(mqar(), "test", Settings(**options))
    assert "\n" not in str(error.value)


def test_a_task_whose_length_follows_from_other_options_has_no_lengths():
    task = made(Phonebook, num_entries=3)
    with pytest.raises(ConfigError, match=r"eval.lengths: task=phonebook has no option seq_len"):
        chosen_slices(task, "test", Settings(lengths=[64]))


def test_a_model_is_not_asked_for_more_than_it_reads():
    model = tiny_model("hyena", vocab_size=96)
    for mixer in model.mixers:
        mixer.max_len, mixer.beyond = 32, "refuse"
    assert evaluate(model, mqar(), "test", Settings(cost=False, lengths=[32]))["all"]
    with pytest.raises(ConfigError, match=r"slice L64_K2: 64 positions; this model reads 32"):
        evaluate(model, mqar(), "test", Settings(cost=False, lengths=[64]))
