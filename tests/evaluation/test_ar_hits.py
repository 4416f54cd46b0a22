"""Perplexity where a text asks for recall."""

import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from rich.console import Console

from evaluation import Settings, evaluate, print_table
from evaluation.ar_hits import earlier_places
from evaluation.protocols import score_carried, score_windowed
from evaluation.text import prompt_text
from schema.errors import ConfigError
from tasks.base import Document
from tests.tasks.corpora import small_task
from tests.tiny import tiny_model

V = 7


def documents(lengths) -> list[Document]:
    rng = np.random.default_rng(0)
    return [Document(rng.integers(0, V, n + 1), n, n, f"document {n}") for n in lengths]


def by_hand(document: Document, train, below: int) -> list[int]:
    ids, pairs = document.ids.tolist(), list(pairwise(train))
    found = []
    for i in range(len(ids) - 1):
        pair = (ids[i], ids[i + 1])
        before = [j for j in range(i) if (ids[j], ids[j + 1]) == pair]
        found.append(max(before, default=-1) if pairs.count(pair) < below else -1)
    return found


@pytest.mark.parametrize("below", [1, 2, 4, 1000])
def test_places_are_those_of_a_plain_search(below):
    train = np.random.default_rng(1).integers(0, V, 120)
    given = documents([1, 2, 13, 40])
    for each, places in zip(given, earlier_places(given, train, V, below), strict=True):
        assert places.tolist() == by_hand(each, train.tolist(), below)


def test_training_text_is_counted_across_blocks(monkeypatch):
    monkeypatch.setattr("evaluation.ar_hits._BLOCK", 7)
    train = np.random.default_rng(1).integers(0, V, 120)
    (given,) = documents([40])
    (places,) = earlier_places([given], train, V, 3)
    assert places.tolist() == by_hand(given, train.tolist(), 3)


def test_nothing_repeats_nothing():
    assert earlier_places([Document(np.arange(5), 4, 4, "")], np.arange(3), V, 10)[0].max() == -1


@torch.no_grad()
def test_hits_are_summed_where_the_pair_is_in_reach():
    """Carried: anywhere before; windowed: from the start of the window on."""
    model = tiny_model("attention", vocab_size=V).eval().double()
    given = documents([30, 9])
    places = earlier_places(given, np.array([], np.int64), V, 1)
    nats = []
    for each in given:
        ids = torch.from_numpy(each.ids)
        nats.append(
            torch.nn.functional.cross_entropy(
                model(ids[None, :-1])[0][0], ids[1:], reduction="none"
            ).numpy()
        )
    carried = score_carried(model, given, chunk=7, earlier=places)
    for score, loss, at in zip(carried.documents, nats, places, strict=True):
        assert score.hits == (at >= 0).sum()
        assert score.hit_nll == pytest.approx(loss[at >= 0].sum(), rel=1e-9)  # fp64
    slices = carried.ar_slices
    assert slices["ar_hits"]["tokens"] + slices["others"]["tokens"] == carried.tokens
    assert slices["ar_hits"]["nll"] + slices["others"]["nll"] == pytest.approx(carried.nll)
    windowed = score_windowed(model, given, window=8, stride=8, earlier=places)
    expected = sum(int(at[i] >= i - i % 8) for at in places for i in range(len(at)))
    assert sum(score.hits for score in windowed.documents) == expected
    assert expected < sum(score.hits for score in carried.documents)
    assert score_carried(model, given).ar_slices == {}


def test_both_parts_are_printed_with_counts(tmp_path):
    task = small_task(tmp_path, seq_len=8)
    task.prepare()
    model = tiny_model("linear_attention", vocab_size=task.vocab_size)
    result = evaluate(model, task, "test", Settings(samples=0, cost=False, ar_hits=1000))
    parts = result["protocols"]["carried"]["ar_slices"]
    hits = parts["ar_hits"]
    assert 0 < hits["tokens"] < result["text"]["tokens"]
    assert hits["token_perplexity"] == pytest.approx(math.exp(hits["nll"] / hits["tokens"]))
    console = Console(file=io.StringIO(), width=120)
    print_table(result, console)
    printed = " ".join(console.file.getvalue().split())
    assert f"ar hits {hits['tokens']} tokens" in printed
    assert f"others {parts['others']['tokens']} tokens" in printed
    assert "fewer than 1,000 times" in printed


def test_a_prompt_is_shown_as_often_as_asked():
    assert prompt_text(Settings()) == ""
    assert prompt_text(Settings(prompt="D")) == "D"
    assert prompt_text(Settings(prompt="D", num_passes=2)) == "D\nD"
    assert prompt_text(Settings(prompt="D", question="Q")) == "D Q"
    assert prompt_text(Settings(prompt="D", question="Q", num_passes=2)) == "Q D\nD Q"
    with pytest.raises(ConfigError, match=r"eval\.question without eval\.prompt"):
        Settings(question="Q")
