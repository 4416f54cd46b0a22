"""Accuracy per slice: three ways to count, and the interval."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import binomtest

from evaluation import Settings, evaluate, print_table
from evaluation.recall import SliceScore, answers, last_labels, score_slice, wilson
from schema.errors import ConfigError
from tasks.base import Recipe
from tasks.recall.is_tree import IsTree
from tasks.recall.mqar import MQAR
from tests.tiny import tiny_model


def test_three_accuracies_differ_where_sequences_differ_in_labels():
    score = SliceScore("k2", 0.5, 0.1, right=np.array([1, 3, 0]), labels=np.array([1, 4, 1]))
    assert score.sequence_accuracy == pytest.approx((1 + 0.75 + 0) / 3)
    assert score.token_accuracy == pytest.approx(4 / 6)
    assert score.exact_accuracy == pytest.approx(1 / 3)
    summary = score.summary()
    assert (summary["sequences"], summary["positions"]) == (3, 6)
    low, high = summary["sequence_accuracy_interval"]
    assert low < score.sequence_accuracy < high


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (1, 1), (3, 10), (997, 1000)])
def test_wilson_is_scipys(k, n):
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.fixture(scope="module")
def task():
    slices = [{"seq_len": 16, "num_kv_pairs": k, "num_examples": 300} for k in (2, 4)]
    recipe = Recipe(batch_size=2, max_steps=10, lr=1e-3)
    task = MQAR(slices, slices, recipe, vocab_size=64)
    task.prepare()
    return task


@torch.no_grad()
def test_counts_are_those_of_the_argmax_over_all_logits(task):
    model = tiny_model(["conv", "attention"], vocab_size=64).eval()
    for part in task.slices("test").values():
        logits, _ = model(torch.from_numpy(part.inputs))
        asked = torch.from_numpy(part.labels) != -100
        right = (logits.argmax(-1) == torch.from_numpy(part.labels)) & asked
        for batch_size, chunk in ((7, 16), (50, 7), (100, 512)):
            score = score_slice(model, part, batch_size, chunk)
            assert np.array_equal(score.right, right.sum(1).numpy())
            assert np.array_equal(score.labels, asked.sum(1).numpy())


def test_an_untrained_model_is_near_the_chance_of_the_vocabulary(task):
    result = evaluate(tiny_model("conv", vocab_size=64), task, "test", Settings(cost=False))
    assert [row["slice"] for row in result["slices"]] == ["L16_K2", "L16_K4"]
    assert [row["chance"] for row in result["slices"]] == [1 / 2, 1 / 4]
    everything = result["all"]
    assert everything["sequences"] == 600
    assert everything["positions"] == 300 * 2 + 300 * 4
    assert everything["chance_of_vocabulary"] == 1 / 32
    # 1,800 guesses at 1/32 have a standard error of 0.004; keys' embeddings sway them together.
    assert everything["token_accuracy"] < 1 / 32 + 0.03
    assert json.loads(json.dumps(result)) == result
    console = Console(file=io.StringIO(), width=100)
    print_table(result, console)
    assert "L16_K4" in console.file.getvalue()


def test_a_recall_task_of_another_vocabulary_is_refused(task):
    with pytest.raises(ConfigError, match=r"vocabulary of 31 ids, task=mqar of 64"):
        evaluate(tiny_model("conv"), task)


def test_an_answer_is_read_behind_a_thought_of_the_model_s_own():
    """What stands behind the first end; nothing there, or no end, is no answer."""
    written = np.array([[1, 5, 6, 5, 7], [1, 2, 3, 4, 5], [5, 7, 0, 0, 0], [1, 2, 3, 5, 6]])
    assert answers(written, 5).tolist() == [6, -1, 7, 6]
    labels = np.array([[-100, 3, -100], [2, -100, 4]])
    assert last_labels(labels).tolist() == [3, 4]


@pytest.mark.parametrize("pattern", ["attention", ["mamba", "attention"]])
def test_a_thought_is_written_and_not_read_from_the_example(pattern):
    """The score is that of decoding anew from the prompt alone, row by row."""
    part = [{"num_nodes": 5, "num_examples": 12}]
    task = IsTree(part, part, Recipe(batch_size=2, max_steps=10, lr=1e-3))
    task.prepare()
    (each,) = task.slices("test").values()
    model = tiny_model(pattern, vocab_size=task.vocab_size).eval()
    score = score_slice(model, each, batch_size=5)
    expected = []
    for x, y in zip(each.inputs, each.labels, strict=True):
        ids = torch.from_numpy(x[: each.context + 1])[None]
        with torch.no_grad():
            while ids.shape[1] <= len(x):
                ids = torch.cat([ids, model(ids)[0][:, -1:].argmax(-1)], dim=1)
        own = ids[0, each.context + 1 :].tolist()
        said = own[own.index(5) + 1 : own.index(5) + 2] if 5 in own else []
        expected.append(said == [y[y != -100][-1]])
    assert score.right.tolist() == expected
    assert score.labels.tolist() == [1] * 12
    # Another thought in the example changes nothing: it is not read.
    other = replace(each, inputs=np.where(np.arange(len(x)) > each.context, 9, each.inputs))
    assert score_slice(model, other, batch_size=5).right.tolist() == expected
