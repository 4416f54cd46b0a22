"""The retrieval-augmented thought of IsTree: a search of a graph that calls for what it needs.

n nodes. Source: Wen et al. 2024, "RNNs are not Transformers (Yet)", in-context retrieval, and its
public code. A model writes a call, an environment the one token behind it, which it finds in what
the model has read and written so far.
"""

import numpy as np

EDGE, EOS, START, END, FAILED, CHILD = 3, 5, 12, 13, 14, 15  # as in the public code
NODES = 16  # the id of node 0


def search(num_nodes: int, edges: list[tuple[int, int]]) -> tuple[list[int], int]:
    """The tokens of a depth-first search from node 0, and how many nodes it reaches.

    On every visit of a node u its name, then calls, each with its answer behind it:

        START u CHILD END        u's father, FAILED for node 0
        START u EDGE [p] END     u's neighbour behind p in the order of the edges, without p the
                                 first; once more where that is the father; FAILED: no more
        START v CHILD END        FAILED: v is new, or node 0; then `v CHILD u` is written down,
                                 else v closes a cycle, and the thought ends

    With n - 1 edges a graph is a tree if and only if n nodes are reached.
    """
    neighbours: list[list[int]] = [[] for _ in range(num_nodes)]
    for u, v in edges:
        neighbours[u].append(v)
        neighbours[v].append(u)
    written: list[int] = []
    father: dict[int, int | None] = {0: None}
    path, before = [0], None  # the nodes from node 0 to this one; the one that was visited last

    def ask(*query: int, answer: int | None) -> None:
        written.extend([START, *query, END, _name(answer)])

    while path:
        u, parent = path[-1], father[path[-1]]
        written.append(_name(u))
        ask(_name(u), CHILD, answer=parent)
        after = None if before == parent else before
        v = _behind(neighbours[u], after)
        ask(_name(u), EDGE, *([] if after is None else [_name(after)]), answer=v)
        if v is not None and v == parent:
            v = _behind(neighbours[u], parent)
            ask(_name(u), EDGE, _name(parent), answer=v)
        if v is None:
            before = path.pop()
            continue
        ask(_name(v), CHILD, answer=father.get(v))
        if v in father:
            break
        written += [_name(v), CHILD, _name(u)]
        father[v], before = u, u
        path.append(v)
    return written, len(father)


def longest(num_nodes: int) -> int:
    """Tokens of the search of a tree, which no other search exceeds.

    First visits of 11 tokens and n - 1 returns of 12; 6 to pass over the father and 8 to find a
    child, for each node but one.
    """
    return 11 * num_nodes + (12 + 6 + 8) * (num_nodes - 1)


def answer_calls(read: np.ndarray) -> np.ndarray:
    """What the environment puts behind rows (N, T) that end with a call, -1 behind the others."""
    told = np.full(len(read), -1)
    for i in np.flatnonzero(read[:, -1] == END):
        told[i] = _answer(read[i].tolist())
    return told


def _answer(read: list[int]) -> int:
    """The answer to the call at the end; FAILED to one that has none or is no call."""
    if START not in read:
        return FAILED
    begin = len(read) - read[::-1].index(START)
    match read[begin:-1]:
        case [u, sign] if sign == CHILD:
            written = zip(read, read[1:], read[2:], strict=False)
            return next((f for v, s, f in written if (v, s) == (u, CHILD) and f >= NODES), FAILED)
        case [u, sign, *after] if sign == EDGE and len(after) < 2:
            found = _behind(_around(u, read), after[0] if after else None)
            return FAILED if found is None else found
    return FAILED


def _around(u: int, read: list[int]) -> list[int]:
    """The neighbours of u in the order of the edges, each once however often they are shown."""
    edges = read[: read.index(EOS)] if EOS in read else read
    pairs = [(edges[i - 1], edges[i + 1]) for i in range(1, len(edges) - 1) if edges[i] == EDGE]
    return list(dict.fromkeys(b if a == u else a for a, b in pairs if u in (a, b)))


def _behind(row: list[int], after: int | None) -> int | None:
    """What follows `after` in a row, what it begins with for None; None where nothing does."""
    if after is not None and after not in row:
        return None
    place = 0 if after is None else row.index(after) + 1
    return row[place] if place < len(row) else None


def _name(node: int | None) -> int:
    return FAILED if node is None else NODES + node
