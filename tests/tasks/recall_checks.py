"""What each recall task promises of an example, checked row by row and written apart from the
generators: every checker reads the inputs alone, as a solver would, except where it says so.

x, y are the inputs and labels (L,) of a row.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from tasks.base import IGNORED
from tasks.recall.difficulty import Difficulty

Row = np.ndarray


def check(inputs: np.ndarray, labels: np.ndarray, config: Difficulty) -> None:
    """Raise ValueError when a row of a batch (N, L) is no example of `config`."""
    if inputs.shape != labels.shape or inputs.shape[1:] != (config.seq_len,):
        raise ValueError(f"inputs {inputs.shape} and labels {labels.shape}: expected two (N, L)")
    for i, (x, y) in enumerate(zip(inputs.astype(int), labels.astype(int), strict=True)):
        try:
            require(((x >= 0) & (x < config.num_inputs)).all(), "a token beyond the vocabulary")
            expected = SOLVERS[type(config).__name__](config, x, y)
        except ValueError as error:
            raise ValueError(f"row {i}: {error}") from None
        if not np.array_equal(expected, y):
            raise ValueError(f"row {i}: a label is wrong")


def require(holds: Any, said: str) -> None:
    if not holds:
        raise ValueError(said)


def ignored(x: Row) -> Row:
    return np.full(len(x), IGNORED)


def at_the_end(x: Row, answer: int) -> Row:
    y = ignored(x)
    y[-1] = answer
    return y


def forgetting(config: Any, x: Row, y: Row) -> Row:
    """Noise may look like a query: the labels say which positions are asked for."""
    half, context = config.vocab_size // 2, config.context
    pairs = list(zip(x[:context:2].tolist(), x[1:context:2].tolist(), strict=True))
    first, updates = pairs[: config.num_kv_pairs], pairs[config.num_kv_pairs :]
    require(all(1 <= k < half <= v for k, v in pairs), "a key or value of a wrong range")
    value = dict(first)
    require(len(value) == len(first) == len(set(value.values())), "a pair is not distinct")
    require(len({k for k, _ in updates}) == config.num_updates, "a key is updated twice")
    for key, new in updates:
        require(key in value and value[key] != new, "an update changes nothing")
        value[key] = new
    touched = {k for k, _ in updates}
    wanted = {
        "all": set(value),
        "updated": touched,
        "untouched": set(value) - touched,
    }[config.scored]
    asked = np.flatnonzero(y != IGNORED)
    require((asked >= context).all() and (asked % 2 == 0).all(), "a label off the slots")
    require(sorted(x[asked]) == sorted(wanted), "not every key is asked for once")
    if not config.random_non_queries:
        rest = x[context:][x[context:] != 0]
        require(sorted(rest) == sorted(value), "something else than the queries is no filler")
    expected = ignored(x)
    expected[asked] = [value[k] for k in x[asked]]
    return expected


def compositional(config: Any, x: Row, y: Row) -> Row:
    """Noise may look like a query: the labels say which positions are asked for."""
    k, second, values = config.num_kv_pairs, config.vocab_size // 3, 2 * config.vocab_size // 3
    triples = [tuple(each) for each in x[: 3 * k].reshape(k, 3).tolist()]
    require(
        all(1 <= a < second <= b < values <= v for a, b, v in triples), "a key of a wrong range"
    )
    value = {(a, b): v for a, b, v in triples}
    require(len(value) == len(set(value.values())) == k, "a triple is not distinct")
    firsts, seconds = {a for a, _ in value}, {b for _, b in value}
    require(len(firsts) == len(seconds) == round(k**0.5), "not all pairs of keys stand there")
    asked = np.flatnonzero(y != IGNORED)
    require((asked >= 3 * k).all() and (asked % 3 == 1).all(), "a label off the slots")
    queries = list(zip(x[asked - 1].tolist(), x[asked].tolist(), strict=True))
    require(sorted(queries) == sorted(value), "not every pair of keys is asked for once")
    if not config.random_non_queries:
        require((x[3 * k :] != 0).sum() == 2 * k, "something else than the queries is no filler")
    expected = ignored(x)
    expected[asked] = [value[query] for query in queries]
    return expected


def continuous(config: Any, x: Row, y: Row) -> Row:
    """A position is a key and a value in one number; without a value the key is asked for."""
    k, v = config.num_kv_pairs, config.vocab_size
    keys, values = x // v, x % v
    require((values[k:] == 0).all(), "a value stands among the questions")
    require((keys[:k] > 0).all() and (keys < v // 2).all(), "a key of a wrong range")
    require((values[:k] >= v // 2).all(), "a value of a wrong range")
    value = dict(zip(keys[:k].tolist(), values[:k].tolist(), strict=True))
    require(len(value) == len(set(value.values())) == k, "a pair is not distinct")
    asked = k + np.flatnonzero(keys[k:])
    require(sorted(keys[asked]) == sorted(value), "not every key is asked for once")
    expected = ignored(x)
    expected[asked] = [value[key] for key in keys[asked].tolist()]
    return expected


def compression(config: Any, x: Row, y: Row) -> Row:
    marker = config.vocab_size - 1
    require(x[-1] == marker and (x[:-1] < marker).all(), "the marker does not stand at the end")
    return x


def associative(config: Any, x: Row, y: Row) -> Row:
    half = config.vocab_size // 2
    value: dict[int, int] = {}
    for key, v in zip(x[:-1:2].tolist(), x[1::2].tolist(), strict=True):
        require(key < half <= v, "a key or value of a wrong range")
        require(value.setdefault(key, v) == v, "a key has two values")
    require(x[-1] in value, "the query is no key of the sequence")
    return at_the_end(x, value[x[-1]])


def induction(config: Any, x: Row, y: Row) -> Row:
    marker = config.vocab_size - 1
    places = np.flatnonzero(x == marker)
    require(len(places) == 2 and places[1] == len(x) - 1, "the marker does not stand twice")
    require(places[0] < len(x) - 2, "nothing stands behind the marker")
    return at_the_end(x, x[places[0] + 1])


def circuit(config: Any, x: Row, y: Row) -> Row:
    if config.circuit.startswith("cumulative"):
        require((x < 2).all(), "a token is no bit")
        if config.circuit == "cumulative_parity":
            return np.array([x[: t + 1].sum() % 2 for t in range(len(x))])
        return np.array([int(2 * x[: t + 1].sum() >= t + 1) for t in range(len(x))])
    symbols = x[:-1]
    require(x[-1] == config.num_symbols, "the end is missing")
    require((symbols < config.num_symbols).all(), "the end stands early")
    if config.circuit == "parity":
        return at_the_end(x, symbols.sum() % 2)
    if config.circuit == "majority":
        return at_the_end(x, int((symbols == 1).sum() > (symbols == 0).sum()))
    ranked = Counter(symbols.tolist()).most_common(2)
    require(len(ranked) < 2 or ranked[0][1] > ranked[1][1], "two symbols are most frequent")
    return at_the_end(x, ranked[0][0])


def disjointness(config: Any, x: Row, y: Row) -> Row:
    a, shown = config.first, x[:-1].reshape(config.num_passes, -1)
    sets = shown[0]
    require((shown == sets).all(), "the sets differ between passes")
    require((sets[0], sets[a + 1], x[-1]) == (1, 2, 3), "a mark is missing")
    first, second = set(sets[1 : a + 1].tolist()), set(sets[a + 2 :].tolist())
    require(min(first | second) > 3, "an element is a mark")
    require((len(first), len(second)) == (a, config.second), "an element stands twice in a set")
    require(len(first & second) == 1, "the sets do not share one element")
    return at_the_end(x, (first & second).pop())


def in_context(config: Any, x: Row, y: Row) -> Row:
    """With targets="next" the last token's label is its value and is known from the pairs."""
    marker = [] if config.multi_query else [config.vocab_size - 1]
    plain = config.vocab_size - len(marker) - config.noise_ids
    noise = range(plain, plain + config.noise_ids)
    half = plain // 2
    end = len(x) - 1 - len(marker)
    value: dict[int, int] = {}
    expected = ignored(x)
    quiet = 0
    for t in range(0, end, 2):
        key, v = x[t : t + 2].tolist()
        if key in noise:
            require(v in noise, "half a pair is noise")
            continue
        quiet += 1
        require(key < half <= v < plain, "a key or value of a wrong range")
        if key in value and config.multi_query:
            expected[t] = value[key]
        require(value.setdefault(key, v) == v, "a key has two values")
    require(quiet > 0, "every pair is noise")
    require(x[end:-1].tolist() == marker, "the marker is missing")
    require(x[-1] in value, "the query is no key of the sequence")
    expected[-1] = value[x[-1]]
    return np.append(x[1:], value[x[-1]]) if config.targets == "next" else expected


def fuzzy(config: Any, x: Row, y: Row) -> Row:
    """The last value is not read whole: its ids are those its key had before."""
    pad, half = config.vocab_size - 1, (config.vocab_size - 1) // 2
    start = int((x != pad).argmax())
    require(pad not in x[start:], "padding stands inside")
    body = x[start:].tolist()
    motifs: list[tuple[int, ...]] = []  # of keys and values in turn
    for t, token in enumerate(body):
        if t and (body[t - 1] < half) == (token < half):
            motifs[-1] = (*motifs[-1], token)
        else:
            motifs.append((token,))
    require(body[0] < half, "the first motif is none of keys")
    require(all(len(set(m)) == len(m) for m in motifs), "an id stands twice in a motif")
    keys, values = motifs[::2], motifs[1::2]
    lowest = config.key_size if config.key_sizes == "largest" else 1
    require(all(lowest <= len(k) <= config.key_size for k in keys), "a key of a wrong size")
    require(all(len(v) <= config.value_size for v in values), "a value of a wrong size")
    expected, value, t = ignored(x), {}, start
    for i, key in enumerate(keys):
        t += len(key)
        seen = key in value
        if i == len(keys) - 1:
            require(seen, "the last key did not come up before")
            read = values[i] if i < len(values) else ()
            require(read == value[key][:-1], "the last value is not read up to its last id")
        else:
            require(value.setdefault(key, values[i]) == values[i], "a key has two values")
        if seen:
            expected[t - 1 : t - 1 + len(value[key])] = value[key]
        t += len(values[i]) if i < len(values) else 0
    if config.targets == "next":
        expected = np.append(x[1:], value[keys[-1]][-1])
        expected[:start] = pad
    return expected


def copying(config: Any, x: Row, y: Row) -> Row:
    blank, c = config.vocab_size - 2, config.num_tokens
    head, tail = x[: -c - 1], x[-c:]
    require(x[-c - 1] == config.vocab_size - 1, "the marker is missing")
    require((tail == blank).all(), "what is to be filled is not blank")
    data = head[head != blank]
    require(len(data) == c and (data < blank).all(), "there are not C data tokens")
    require(head[-1] != blank, "a blank stands behind the data")
    return np.concatenate([ignored(x)[:-c], data])


def memorization(config: Any, x: Row, y: Row) -> Row:
    marker = config.vocab_size - 1
    require((x[1::2] == marker).all() and (x[::2] < marker).all(), "the marker is missing")
    require(sorted(config.mapping) == list(range(marker)), "the map is no bijection")
    expected = ignored(x)
    expected[1::2] = config.mapping[x[::2]]
    return expected


def passkey(config: Any, x: Row, y: Row) -> Row:
    begin, mark, ask, digits, filler = 0, 1, 2, range(3, 13), 13
    require(x[0] == begin and x[-5] == ask, "BEGIN or ASK is missing")
    places = np.flatnonzero(x == mark)
    require(len(places) == 1, "the key does not stand there once")
    place = int(places[0])
    key = x[place + 1 : place + 6]
    require(all(d in digits for d in key), "the key is no number")
    require(list(x[-4:]) == list(key[:-1]), "another number is read at the end")
    rest = np.concatenate([x[1:place], x[place + 6 : -5]])
    require((rest >= filler).all(), "the rest is no filler")
    if config.depth is not None:
        require(place - 1 == round(config.depth / 100 * len(rest)), "the key is not at its depth")
    return np.concatenate([ignored(x)[:-5], key])


def needle(config: Any, x: Row, y: Row) -> Row:
    q, first_value = config.num_queries, 3 + config.num_keys
    filler = first_value + config.num_values
    body, questions = x[1 : -2 * q], x[-2 * q :]
    require(x[0] == 0 and (questions[::2] == 2).all(), "BEGIN or ASK is missing")
    places = np.flatnonzero(body == 1)
    require(len(places) == config.num_needles, "there are not K needles")
    require((places < len(body) - 2).all() and (np.diff(places) > 2).all(), "a needle is cut")
    value = {int(body[p + 1]): int(body[p + 2]) for p in places}
    require(len(value) == config.num_needles, "a key stands in two needles")
    require(all(3 <= k < first_value <= v < filler for k, v in value.items()), "a wrong range")
    require((body >= filler).sum() == len(body) - 3 * len(value), "the rest is no filler")
    asked = questions[1::2].tolist()
    require(len(set(asked)) == q and set(asked) <= set(value), "a query is no needle's key")
    if config.depth is not None:
        place = int(np.flatnonzero(body == asked[0])[0])
        before = int((body[:place] >= filler).sum())
        require(before == round(config.depth / 100 * config.filler), "not at its depth")
    expected = ignored(x)
    expected[-2 * q + 1 :: 2] = [value[key] for key in asked]
    return expected


def phonebook(config: Any, x: Row, y: Row) -> Row:
    lines = np.append(x, [0, 10]).reshape(-1, 11)
    require((lines[:, 2] == 11).all() and (lines[:, 10] == 10).all(), "COLON or END is missing")
    require((lines[:, :2] >= 12).all() and (lines[:, 3:10] < 10).all(), "a name or number is none")
    book = {(a, b): tuple(rest[1:8]) for a, b, *rest in lines[: config.num_entries].tolist()}
    require(len(book) == config.num_entries, "a name stands twice")
    shown = [((a, b), tuple(rest[1:8])) for a, b, *rest in lines[config.num_entries :].tolist()]
    require(len({name for name, _ in shown}) == 3, "the question is an example")
    require(all(book.get(name) == number for name, number in shown[:2]), "an example is wrong")
    name, number = shown[2]
    require(name in book and book[name][:6] == number[:6], "the question is not of the book")
    return np.concatenate([ignored(x)[:-7], book[name]])


def index(config: Any, x: Row, y: Row) -> Row:
    s, n = config.num_symbols, len(x) - 2
    require((x[:n] < s).all() and x[n] == s, "the separator is missing")
    place = x[-1] - s - 1
    require(0 <= place < n, "the position is none of the sequence")
    return at_the_end(x, x[place])


def cgram(config: Any, x: Row, y: Row) -> Row:
    s, c = config.num_symbols, config.c
    symbols, gram = x[:-c], x[1 - c :]
    require(x[-c] == s and (symbols < s).all(), "the separator is missing")
    text = symbols.tolist()
    places = [t for t in range(len(text) - c + 2) if np.array_equal(symbols[t : t + c - 1], gram)]
    require(len(places) == 1, "the gram does not stand there once")
    require(places[0] + c - 1 < len(text), "nothing stands behind the gram")
    return at_the_end(x, text[places[0] + c - 1])


def counting(config: Any, x: Row, y: Row) -> Row:
    s = config.num_symbols
    symbols, (separator, query, asked) = x[:-3], x[-3:]
    require((symbols < s).all() and separator == s and query < s, "the separator is missing")
    threshold = asked - s - 2
    require(1 <= threshold <= config.max_threshold, "the threshold is none")
    count = int((symbols == query).sum())
    require(-1 <= count - threshold <= 2, "the count is not near the threshold")
    return at_the_end(x, s + 2 if count > threshold else s + 1)


def is_tree(config: Any, x: Row, y: Row) -> Row:
    """Connected with n - 1 edges, by growing the set of what node 0 reaches."""
    begin, edge, pad, eos, answers, node = 11, 3, 4, 5, (7, 6), 16
    n = config.num_nodes
    edges = x[1 : 1 + 3 * (n - 1)].reshape(-1, 3)
    require(x[0] == begin and (edges[:, 1] == edge).all(), "BEGIN or an edge is missing")
    require((edges[:, 0] > edges[:, 2]).all(), "an edge is not from the larger to the smaller")
    pairs = [(int(u) - node, int(v) - node) for u, _, v in edges]
    require(all(0 <= v < u < n for u, v in pairs), "a node is none")
    require(len(set(pairs)) == n - 1, "an edge stands twice")
    reached, size = {0}, 0
    while size < len(reached):
        size = len(reached)
        reached |= {w for e in pairs if reached & set(e) for w in e}
    rest = x[1 + 3 * (n - 1) :]
    require(rest[0] == eos, "EOS is missing")
    end = len(rest) - 1 if config.thought == "none" else 1 + int(np.argmax(rest[1:] == eos))
    require((rest[end + 1 :] == pad).all(), "something stands behind the end")
    if config.thought != "none":
        require(rest[end] == eos, "the second EOS is missing")
    if config.thought == "dfs":
        tour(pairs, (rest[1:end] - node).tolist())
    if config.thought == "search":
        require(rest[1:end].tolist() == called(pairs), "the search is another")
    expected = ignored(x)
    start = 1 + 3 * (n - 1)
    expected[start : start + end + 1] = [*rest[1 : end + 1], answers[len(reached) == n]]
    expected[x == 13] = IGNORED  # behind a call the environment speaks
    return expected


def called(edges: list[tuple[int, int]]) -> list[int]:
    """The search of a graph with its calls, by recursion."""
    edge, begin, end, failed, child, node = 3, 12, 13, 14, 15, 16
    written: list[int] = []
    father: dict[int, int] = {0: failed}

    def call(*query: int, answer: int) -> int:
        written.extend([begin, *query, end, answer])
        return answer

    def following(u: int, after: int | None) -> int:
        around = [node + (b if a == u else a) for a, b in edges if u in (a, b)]
        left = around if after is None else around[around.index(after) + 1 :]
        return call(node + u, edge, *([] if after is None else [after]), answer=(*left, failed)[0])

    def visit(u: int) -> bool:
        after = None
        while True:
            written.append(node + u)
            own = call(node + u, child, answer=father[u])
            v = following(u, after)
            if v == own != failed:
                v = following(u, own)
            if v == failed:
                return True
            call(v, child, answer=father.get(v - node, failed))
            if v - node in father:
                return False
            written.extend([v, child, node + u])
            father[v - node] = node + u
            if not visit(v - node):
                return False
            after = v

    visit(0)
    return written


def tour(edges: list[tuple[int, int]], visited: list[int]) -> None:
    """A walk along edges from node 0, which ends at a cycle or back where it began, and in which a
    node is taken before those whose edges come later."""
    require(visited[0] == 0, "the tour does not begin at node 0")
    path, done = [0], {0}
    for at, following in enumerate(visited[1:], start=1):
        node, parent = path[-1], path[-2] if len(path) > 1 else None
        around = [v if u == node else u for u, v in edges if node in (u, v)]
        left = [v for v in around if v != parent and (node, v) not in done]
        if not left:
            require(following == parent, "the tour does not return")
            path.pop()
            continue
        require(following == left[0], "another neighbour comes first")
        done |= {(node, following), (following, node)}
        if following in done:
            require(at == len(visited) - 1, "the tour goes on behind a cycle")
            return
        done.add(following)
        path.append(following)
    around = [v if u == 0 else u for u, v in edges if 0 in (u, v)]
    require(path == [0] and all((0, v) in done for v in around), "the tour ends early")


SOLVERS: dict[str, Callable[[Any, Row, Row], Row]] = {
    "ForgettingConfig": forgetting,
    "CompositionalConfig": compositional,
    "ContinuousConfig": continuous,
    "CompressionConfig": compression,
    "AssociativeConfig": associative,
    "InductionConfig": induction,
    "CircuitConfig": circuit,
    "DisjointnessConfig": disjointness,
    "InContextConfig": in_context,
    "FuzzyConfig": fuzzy,
    "SelectiveCopyingConfig": copying,
    "MemorizationConfig": memorization,
    "PasskeyConfig": passkey,
    "NeedleConfig": needle,
    "PhonebookConfig": phonebook,
    "IndexConfig": index,
    "CGramConfig": cgram,
    "CountingConfig": counting,
    "IsTreeConfig": is_tree,
}
