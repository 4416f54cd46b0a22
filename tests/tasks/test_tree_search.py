"""The search calls of IsTree: what the environment answers, and the thought that asks it."""

import numpy as np
import pytest

from tasks.base import IGNORED
from tasks.recall.is_tree import BEGIN, FALSE, TRUE, IsTreeConfig
from tasks.recall.tree_search import (
    CHILD,
    EDGE,
    END,
    EOS,
    FAILED,
    NODES,
    START,
    answer_calls,
    longest,
    search,
)


def n(*nodes: int) -> list[int]:
    return [NODES + u for u in nodes]


def graph(*edges: tuple[int, int], shown: int = 1) -> list[int]:
    text = [BEGIN, *(token for u, v in edges for token in (NODES + u, EDGE, NODES + v))]
    return [*text * shown, EOS]


def asked(read: list[int], *query: int) -> int:
    (told,) = answer_calls(np.array([[*read, START, *query, END]]))
    return int(told)


@pytest.mark.parametrize("shown", [1, 2])
def test_neighbours_come_in_the_order_of_the_edges(shown):
    """Shown twice (JRT-Prompt), an edge is still one."""
    read = graph((2, 0), (2, 1), (3, 2), shown=shown)
    assert asked(read, *n(2), EDGE) == NODES + 0
    assert asked(read, *n(2), EDGE, *n(0)) == NODES + 1
    assert asked(read, *n(2), EDGE, *n(1)) == NODES + 3
    assert asked(read, *n(2), EDGE, *n(3)) == FAILED
    assert asked(read, *n(1), EDGE) == NODES + 2
    assert asked(read, *n(1), EDGE, *n(3)) == FAILED  # no edge
    assert asked(read, *n(5), EDGE) == FAILED


def test_a_father_is_what_was_written_down():
    read = [*graph((1, 0), (2, 1)), *n(1), CHILD, *n(0), START, *n(2), CHILD, END, FAILED]
    assert asked(read, *n(1), CHILD) == NODES + 0
    assert asked(read, *n(2), CHILD) == FAILED  # asked for before, and never told
    assert asked(read, *n(0), CHILD) == FAILED


def test_what_is_no_call_fails_and_only_calls_are_answered():
    read = graph((1, 0))
    for query in ([], n(1), [CHILD], [*n(1), EDGE, *n(0), *n(0)], [*n(1), EOS]):
        assert asked(read, *query) == FAILED
    assert answer_calls(np.array([[*read, END]])).tolist() == [FAILED]
    rows = [[*graph((1, 0)), START, *n(0), EDGE, END], [*graph((1, 0)), START, *n(0), EDGE, EDGE]]
    assert answer_calls(np.array(rows)).tolist() == [NODES + 1, -1]


def test_the_search_of_a_path_by_hand():
    thought, reached = search(3, [(1, 2), (0, 1)])
    expected = [
        [*n(0), START, *n(0), CHILD, END, FAILED, START, *n(0), EDGE, END, *n(1)],
        [START, *n(1), CHILD, END, FAILED, *n(1), CHILD, *n(0)],
        [*n(1), START, *n(1), CHILD, END, *n(0), START, *n(1), EDGE, END, *n(2)],
        [START, *n(2), CHILD, END, FAILED, *n(2), CHILD, *n(1)],
        [*n(2), START, *n(2), CHILD, END, *n(1), START, *n(2), EDGE, END, *n(1)],
        [START, *n(2), EDGE, *n(1), END, FAILED],  # behind its father comes nothing
        [*n(1), START, *n(1), CHILD, END, *n(0), START, *n(1), EDGE, *n(2), END, *n(0)],
        [START, *n(1), EDGE, *n(0), END, FAILED],
        [*n(0), START, *n(0), CHILD, END, FAILED, START, *n(0), EDGE, *n(1), END, FAILED],
    ]
    assert thought == [token for visit in expected for token in visit]
    assert reached == 3
    assert len(thought) == longest(3)


@pytest.mark.parametrize("family", ["binary", "random"])
def test_the_environment_gives_every_answer_of_the_thought(family):
    """From what stands before it alone; the label there is nobody's."""
    inputs, labels = IsTreeConfig(9, family, "search").generate(60, np.random.default_rng(0))
    for x, y in zip(inputs, labels, strict=True):
        calls = np.flatnonzero(x == END)
        assert (y[calls] == IGNORED).all()
        for t in calls:
            assert answer_calls(x[None, : t + 1]) == x[t + 1]
    said = labels.max(axis=1, where=np.isin(labels, [TRUE, FALSE]), initial=0)
    assert set(said.tolist()) == {TRUE, FALSE}


def test_no_search_is_longer_than_a_tree_s():
    config = IsTreeConfig(8, "random", "search")
    _, labels = config.generate(400, np.random.default_rng(1))
    ends = (labels != IGNORED)[:, -1]
    trees = (labels == TRUE).any(axis=1)
    assert (ends == trees).all()  # a tree's labels reach the last position, and no other's do
