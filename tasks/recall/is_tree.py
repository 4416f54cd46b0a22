"""Is a graph a tree? With a chain of thought (Wen et al. 2024, "RNNs are not Transformers (Yet)").

N examples, L length, n nodes of a graph.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import numpy as np

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty, in_parts, require_at_least, require_choice
from tasks.recall.task import Recall
from tasks.recall.tree_search import EDGE, END, EOS, NODES, answer_calls, longest, search

PAD, TRUE, FALSE, BEGIN = 4, 6, 7, 11  # as in the public code

Family = Literal["binary", "random"]
Thought = Literal["none", "dfs", "search"]


@dataclass(frozen=True)
class IsTreeConfig(Difficulty):
    """One difficulty: BEGIN, the n - 1 edges u - v with u > v in random order, EOS, a thought, EOS
    and TRUE or FALSE; padding follows. Labels stand from the first EOS on, for the next token.

    The thought "dfs" is the tour of a depth-first search from node 0 that takes neighbours in the
    order of the edges and names a node again on each return. It ends when all is done, or after it
    has named a node that it knows and does not return to: a cycle. In "search" the same search
    asks for fathers and neighbours instead of knowing them (tasks/recall/tree_search.py); the token
    behind a call is given to the model, and has no label. A model is graded on the last token
    alone, behind a thought of its own; without a thought there is one EOS.

    Family "binary" hangs every node on one of two hubs and joins two of the others: a tree if they
    hang on different hubs, else a triangle and a part that cannot be reached. Family "random" is
    a recursive random tree, or with probability 1/2 two of them and one more edge anywhere.

    Differs from the public code: a graph is a tree if it has n - 1 edges and is connected, which
    there is not asked of random ones; no edge stands twice.

    Attributes:
        num_nodes: n.
        family: of graphs.
        thought: "dfs", "search" or "none".
        vocab_nodes: ids that are nodes, as many as the largest graph of the task needs; None is n.
    """

    letters: ClassVar = {"num_nodes": "n"}
    guess: ClassVar = "naming TRUE or FALSE"

    num_nodes: int
    family: Family = "binary"
    thought: Thought = "dfs"
    vocab_nodes: int | None = None
    vocab_size: int = field(init=False)
    seq_len: int = field(init=False)

    def __post_init__(self) -> None:
        require_at_least(self, num_nodes=4)
        require_choice(self, "family", get_args(Family))
        require_choice(self, "thought", get_args(Thought))
        nodes = self.num_nodes if self.vocab_nodes is None else self.vocab_nodes
        if nodes < self.num_nodes:
            raise ConfigError(f"vocab_nodes={nodes}: expected at least num_nodes={self.num_nodes}")
        object.__setattr__(self, "vocab_size", NODES + nodes)
        n = self.num_nodes
        behind = {"none": 0, "dfs": 2 * n + 1, "search": longest(n) + 1}[self.thought]
        object.__setattr__(self, "seq_len", self.context + 1 + behind)

    @property
    def context(self) -> int:
        """See Difficulty: BEGIN and the edges."""
        return 1 + 3 * (self.num_nodes - 1)

    @property
    def answer_after(self) -> int | None:
        """See Difficulty."""
        return None if self.thought == "none" else EOS

    @property
    def environment(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """See Difficulty."""
        return answer_calls if self.thought == "search" else None

    @property
    def chance(self) -> float:
        """See Difficulty."""
        return 1 / 2

    @property
    def chance_of_vocabulary(self) -> float:
        """See Difficulty."""
        return 1 / 2

    def generate(
        self, num_examples: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Difficulty."""
        return in_parts(self._draw, num_examples, rng, self.vocab_size)

    def _draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        inputs = np.full((rows, self.seq_len), PAD)
        labels = np.full_like(inputs, IGNORED)
        make = _binary if self.family == "binary" else _random
        for i in range(rows):
            edges = make(self.num_nodes, rng)
            rng.shuffle(edges)
            thought, reached = self._think(edges)
            is_tree = reached == self.num_nodes
            body = [BEGIN]
            for u, v in edges:
                body += [NODES + max(u, v), EDGE, NODES + min(u, v)]
            after = [EOS] if self.thought == "none" else [EOS, *thought, EOS]
            whole = [*body, *after, TRUE if is_tree else FALSE]
            inputs[i, : len(whole) - 1] = whole[:-1]
            labels[i, len(body) : len(whole) - 1] = whole[len(body) + 1 :]
        labels[inputs == END] = IGNORED
        return inputs, labels

    def _think(self, edges: list[tuple[int, int]]) -> tuple[list[int], int]:
        if self.thought == "search":
            return search(self.num_nodes, edges)
        tour, reached = depth_first(self.num_nodes, edges)
        return [NODES + u for u in tour], reached


def depth_first(num_nodes: int, edges: list[tuple[int, int]]) -> tuple[list[int], int]:
    """The tour from node 0, and how many nodes it reaches; it ends early at a cycle.

    With n - 1 edges a graph is a tree if and only if n nodes are reached.
    """
    neighbours: list[list[int]] = [[] for _ in range(num_nodes)]
    for u, v in edges:
        neighbours[u].append(v)
        neighbours[v].append(u)
    tour, seen, path = [0], {0}, [(0, iter(neighbours[0]))]
    while path:
        left = path[-1][1]
        parent = path[-2][0] if len(path) > 1 else None
        following = next((v for v in left if v != parent), None)
        if following is None:
            path.pop()
            if path:
                tour.append(path[-1][0])
            continue
        tour.append(following)
        if following in seen:
            return tour, len(seen)
        seen.add(following)
        path.append((following, iter(neighbours[following])))
    return tour, len(seen)


def _binary(n: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    names = rng.permutation(n).tolist()
    hubs = rng.integers(2, size=n)
    edges = [(names[i], names[hubs[i]]) for i in range(2, n)]
    i = int(rng.integers(2, n - 1))
    return [*edges, (names[i], names[i + 1])]


def _random(n: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    names = rng.permutation(n).tolist()
    roots = 1 + int(rng.integers(2))
    edges = [(names[i], names[int(rng.integers(i))]) for i in range(roots, n)]
    known = {frozenset(edge) for edge in edges}
    while len(edges) < n - 1:
        u, v = rng.choice(n, 2, replace=False).tolist()
        if frozenset((u, v)) not in known:
            edges.append((u, v))
    return edges


class IsTree(Recall):
    """Whether a graph is a tree, as a task."""

    name = "is_tree"
    difficulty = IsTreeConfig
