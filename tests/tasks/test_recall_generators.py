"""Every generator beside MQAR: its properties, by checkers that reject what lacks one of them."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation.recall import last_labels
from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.associative import AssociativeConfig
from tasks.recall.cgram import CGramConfig
from tasks.recall.circuits import CircuitConfig
from tasks.recall.compositional import CompositionalConfig
from tasks.recall.compression import CompressionConfig
from tasks.recall.continuous import ContinuousConfig
from tasks.recall.counting import CountingConfig
from tasks.recall.difficulty import ROWS, Difficulty, distinct, repeats
from tasks.recall.forgetting import ForgettingConfig
from tasks.recall.fuzzy import FuzzyConfig
from tasks.recall.in_context import InContextConfig
from tasks.recall.induction import InductionConfig
from tasks.recall.is_tree import IsTreeConfig, depth_first
from tasks.recall.memorization import MemorizationConfig
from tasks.recall.needle import NeedleConfig
from tasks.recall.passkey import PasskeyConfig
from tasks.recall.phonebook import PhonebookConfig
from tasks.recall.position import IndexConfig
from tasks.recall.selective_copying import SelectiveCopyingConfig
from tasks.recall.set_disjointness import DisjointnessConfig
from tests.tasks.recall_checks import SOLVERS, check

CASES: dict[str, Difficulty] = {
    "forgetting": ForgettingConfig(64, 40, 6, 3),
    "forgetting_updated": ForgettingConfig(64, 40, 6, 3, scored="updated"),
    "forgetting_untouched": ForgettingConfig(64, 40, 6, 3, 1.0, False, "untouched"),
    "forgetting_all": ForgettingConfig(64, 24, 4, 4, random_non_queries=False),
    "compositional": CompositionalConfig(96, 60, 9),
    "compositional_silent": CompositionalConfig(32, 24, 4, 1.0, False),
    "continuous": ContinuousConfig(64, 24, 6),
    "continuous_tight": ContinuousConfig(16, 14, 7, 1.0),
    "compression": CompressionConfig(16, 32),
    "associative": AssociativeConfig(12, 21),
    "induction": InductionConfig(20, 13),
    **{
        name: CircuitConfig(name, 24)
        for name in ("parity", "cumulative_parity", "majority", "cumulative_majority")
    },
    "majority_odd": CircuitConfig("majority", 25),
    "vocabulary_majority": CircuitConfig("vocabulary_majority", 18, 5),
    "disjointness": DisjointnessConfig(64, 4, 16),
    "disjointness_full": DisjointnessConfig(24, 15, 5),
    "disjointness_one": DisjointnessConfig(64, 1, 8),
    "disjointness_twice": DisjointnessConfig(64, 3, 8, num_passes=2),
    "in_context": InContextConfig(16, 31),
    "in_context_train": InContextConfig(16, 31, "next"),
    "in_context_single": InContextConfig(15, 30, multi_query=False),
    "noisy": InContextConfig(32, 41, noise_ids=16, noise_fraction=0.4),
    "noisy_train": InContextConfig(32, 41, "next", noise_ids=16, noise_fraction=1.0),
    "fuzzy": FuzzyConfig(16, 64),
    "fuzzy_train": FuzzyConfig(16, 64, key_sizes="any", targets="next"),
    "fuzzy_short": FuzzyConfig(9, 11, key_sizes="any"),
    "copying": SelectiveCopyingConfig(16, 40, 8),
    "copying_tight": SelectiveCopyingConfig(16, 17, 8),
    "memorization": MemorizationConfig(32, 16),
    "passkey": PasskeyConfig(40),
    "passkey_deep": PasskeyConfig(41, 75),
    "passkey_tight": PasskeyConfig(12, 100),
    "needle": NeedleConfig(40, depth=25),
    "needles": NeedleConfig(64, 6, 3),
    "needles_tight": NeedleConfig(21, 4, 4, num_keys=4),
    "phonebook": PhonebookConfig(6),
    "phonebook_small": PhonebookConfig(4, 2),
    "index": IndexConfig(18, 8, 20),
    "cgram": CGramConfig(30, 8, 3),
    "cgram_pair": CGramConfig(30, 16, 2),
    "counting": CountingConfig(30, 8, 4),
    "is_tree": IsTreeConfig(7),
    "is_tree_random": IsTreeConfig(9, "random", vocab_nodes=12),
    "is_tree_search": IsTreeConfig(7, thought="search"),
    "is_tree_random_search": IsTreeConfig(9, "random", "search"),
    "is_tree_silent": IsTreeConfig(6, "random", "none"),
}
every_case = pytest.mark.parametrize("case", CASES)


def made(config: Difficulty, n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return config.generate(n, np.random.default_rng(seed))


def test_every_generator_has_a_checker_and_a_case():
    assert {type(config).__name__ for config in CASES.values()} == set(SOLVERS)


@every_case
def test_what_is_generated_is_accepted(case):
    config = CASES[case]
    inputs, labels = made(config, 300)
    check(inputs, labels, config)
    assert inputs.dtype == labels.dtype == np.int16
    assert len(inputs) == 300


@every_case
def test_the_seed_decides_over_several_parts(case):
    config = CASES[case]
    one, two, other = (made(config, ROWS + 3, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, two)
    assert (one[0][: ROWS // 2] != other[0][: ROWS // 2]).any()
    check(one[0][-5:], one[1][-5:], config)


def wrong_label(labels: np.ndarray, config: Difficulty) -> None:
    t = np.flatnonzero(labels[3] != IGNORED)[-1]
    labels[3, t] = (labels[3, t] + 1) % config.vocab_size


def labels_one_later(labels: np.ndarray, config: Difficulty) -> None:
    labels[3] = np.roll(labels[3], 1)


def label_missing(labels: np.ndarray, config: Difficulty) -> None:
    labels[3, np.flatnonzero(labels[3] != IGNORED)[0]] = IGNORED


def labels_of_the_neighbour(labels: np.ndarray, config: Difficulty) -> None:
    other = next(row for row in labels[4:] if not np.array_equal(row, labels[3]))
    labels[3] = other


@every_case
@pytest.mark.parametrize(
    "mutate", [wrong_label, labels_one_later, label_missing, labels_of_the_neighbour]
)
def test_mutated_labels_are_rejected(case, mutate):
    inputs, labels = made(CASES[case])
    mutate(labels, CASES[case])
    with pytest.raises(ValueError, match="row 3: "):
        check(inputs, labels, CASES[case])


@every_case
def test_tokens_beyond_the_vocabulary_are_rejected(case):
    inputs, labels = made(CASES[case])
    inputs[3, 0] = CASES[case].num_inputs
    with pytest.raises(ValueError, match="row 3: a token beyond the vocabulary"):
        check(inputs, labels, CASES[case])


@every_case
def test_labels_of_other_inputs_are_rejected(case):
    """A label that does not follow from the inputs before it would be no task."""
    config = CASES[case]
    inputs, labels = made(config)
    with pytest.raises(ValueError, match="row"):
        check(np.roll(inputs, 1, axis=0), labels, config)


def put(**places: int) -> Callable[[np.ndarray], None]:
    """A mutation of inputs (L,) that writes tokens at places, t3=7 or, from the end, e1=7."""

    def mutate(x: np.ndarray) -> None:
        for place, token in places.items():
            x[int(place[1:]) if place[0] == "t" else -int(place[1:])] = token

    return mutate


def copy(source: int, target: int) -> Callable[[np.ndarray], None]:
    def mutate(x: np.ndarray) -> None:
        x[target] = x[source]

    return mutate


def name_of_the_first_line(x: np.ndarray) -> None:
    x[11:13] = x[:2]


@pytest.mark.parametrize(
    ("case", "mutate", "said"),
    [
        ("forgetting", copy(0, 2), "a pair is not distinct"),
        ("forgetting", copy(12, 14), "a key is updated twice"),
        ("forgetting", put(t1=1), "a key or value of a wrong range"),
        ("forgetting_untouched", put(e1=7), "something else than the queries"),
        ("compositional", put(t0=40), "a key of a wrong range"),
        ("compositional", copy(2, 5), "a triple is not distinct"),
        ("continuous", put(t0=2), "a key of a wrong range"),
        ("continuous", put(t0=64), "a value of a wrong range"),
        ("continuous", put(e1=64 + 40), "a value stands among the questions"),
        ("continuous", copy(0, 1), "a pair is not distinct"),
        ("continuous", put(e1=64, e2=64), "not every key is asked for once"),
        ("compression", put(e1=0), "the marker does not stand at the end"),
        ("compression", put(t0=15), "the marker does not stand at the end"),
        ("associative", put(t1=2), "a key or value of a wrong range"),
        ("associative", put(e1=11), "the query is no key"),
        ("induction", put(e1=0), "the marker does not stand twice"),
        ("parity", put(e1=0), "the end is missing"),
        ("parity", put(t1=2), "the end stands early"),
        ("cumulative_parity", put(t1=2), "a token is no bit"),
        ("vocabulary_majority", put(e1=1), "the end is missing"),
        ("disjointness", put(e1=9), "a mark is missing"),
        ("disjointness", copy(1, 2), "an element stands twice in a set"),
        ("disjointness", put(t1=3), "an element is a mark"),
        ("disjointness_twice", put(t14=3), "the sets differ between passes"),
        ("in_context", put(t1=0), "a key or value of a wrong range"),
        ("in_context_single", put(e2=0), "the marker is missing"),
        ("noisy", put(t0=31, t1=0), "half a pair is noise"),
        ("fuzzy", put(e4=15), "padding stands inside"),
        ("fuzzy", put(e1=15), "padding stands inside"),
        ("copying", put(e1=0), "what is to be filled is not blank"),
        ("copying", put(e9=0), "the marker is missing"),
        ("copying", put(e10=14), "there are not C data tokens"),
        ("memorization", put(t1=0), "the marker is missing"),
        ("passkey", put(e5=20), "BEGIN or ASK is missing"),
        ("passkey", put(e4=3, e3=3, e2=3, e1=12), "another number is read at the end"),
        ("needles", put(e2=100), "BEGIN or ASK is missing"),
        ("needles", copy(-1, -3), "a query is no needle's key"),
        ("phonebook", name_of_the_first_line, "a name stands twice"),
        ("phonebook", put(t2=0), "COLON or END is missing"),
        ("index", put(e2=0), "the separator is missing"),
        ("index", put(e1=25), "the position is none"),
        ("cgram", put(e3=0), "the separator is missing"),
        ("counting", put(e1=0), "the threshold is none"),
        ("counting", put(e3=0), "the separator is missing"),
        ("is_tree", put(t0=0), "BEGIN or an edge is missing"),
        ("is_tree", put(t2=0), "BEGIN or an edge is missing"),
        ("is_tree", put(t1=16), "an edge is not from the larger to the smaller"),
        ("is_tree", put(t19=4), "EOS is missing"),
        ("is_tree", put(t20=18), "the tour does not begin at node 0"),
        ("is_tree_search", put(t21=3), "the search is another"),
        ("is_tree_search", put(t25=16), "the search is another"),
        ("is_tree_silent", put(t16=4), "EOS is missing"),
    ],
)
def test_mutated_inputs_are_rejected(case, mutate, said):
    inputs, labels = made(CASES[case])
    mutate(inputs[3])
    with pytest.raises(ValueError, match=f"row 3: {said}"):
        check(inputs, labels, CASES[case])


@every_case
def test_the_chance_of_the_vocabulary_is_one_of_all_answers(case):
    """With targets="next" a few tokens are never an answer: the chance is a lower bound."""
    config = CASES[case]
    labels = made(config, 4000)[1]
    answers = len(np.unique(labels[labels != IGNORED]))
    if config.answer_after is not None:
        answers = len(np.unique(last_labels(labels)))
    if getattr(config, "targets", None) == "next":
        assert answers <= round(1 / config.chance_of_vocabulary)
    else:
        assert answers == round(1 / config.chance_of_vocabulary)


def own_values(config: Any, x: np.ndarray) -> np.ndarray:
    return x[:, 1 : config.context : 2]


def values_of_the_first_key(config: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, K, R): for every query, what stands with its first key."""
    k = config.num_kv_pairs
    first, value = x[:, : 3 * k : 3], x[:, 2 : 3 * k : 3]
    _, t = np.nonzero(y != IGNORED)
    asked = np.take_along_axis(x, t.reshape(len(x), k) - 1, axis=1)
    same = asked[:, :, None] == first[:, None, :]
    return np.broadcast_to(value[:, None], same.shape)[same].reshape(len(x), k, -1)


CANDIDATES: dict[str, Callable[[Any, np.ndarray, np.ndarray], np.ndarray]] = {
    "forgetting": lambda c, x, y: own_values(c, x),
    "compositional": values_of_the_first_key,
    "continuous": lambda c, x, y: x[:, : c.context] % c.vocab_size,
    "associative": lambda c, x, y: x[:, 1::2],
    "induction": lambda c, x, y: x[:, :-1],
    "majority_odd": lambda c, x, y: np.zeros((len(x), 1)),
    "majority": lambda c, x, y: np.zeros((len(x), 1)),
    "cumulative_majority": lambda c, x, y: np.ones((len(x), 1)),
    "disjointness": lambda c, x, y: x[:, 1:5],
    "copying": lambda c, x, y: x[:, :-9],
    "needles": lambda c, x, y: x[:, 1:-6],
    "index": lambda c, x, y: x[:, :-2],
    "cgram": lambda c, x, y: x[:, :-3],
}


@pytest.mark.parametrize("case", CANDIDATES)
def test_a_guesser_is_at_chance(case):
    """The expected accuracy of one of the candidates drawn uniformly, averaged over rows."""
    config = CASES[case]
    x, y = made(config, 4000)
    candidates = CANDIDATES[case](config, x, y)
    allowed = np.isin(candidates, y[y != IGNORED])  # markers and filler are no candidates
    asked = y[y != IGNORED].reshape(len(y), -1, 1)
    if candidates.ndim == 2:
        candidates, allowed = candidates[:, None], allowed[:, None]
    right = ((candidates == asked) & allowed).sum(axis=2) / allowed.sum(axis=2)
    # 4000 sequences of standard deviation below 1/2: 0.008, of which three.
    assert right.mean() == pytest.approx(config.chance, abs=0.024)


def test_naming_the_first_value_is_right_for_untouched_keys_alone():
    for scored, expected in (("updated", 0.0), ("untouched", 1.0), ("all", 0.5)):
        config = ForgettingConfig(64, 40, 6, 3, scored=scored)
        x, y = made(config, 400)
        right = []
        for row, label in zip(x, y, strict=True):
            first = dict(zip(row[:12:2].tolist(), row[1:12:2].tolist(), strict=True))
            asked = np.flatnonzero(label != IGNORED)
            right.append(np.mean([first[int(row[t])] == label[t] for t in asked]))
        assert np.mean(right) == expected


def test_disjoint_sets_may_hold_any_element_in_either_set():
    """Membership cannot be learnt from an id: both sets draw from all elements."""
    x, _ = made(DisjointnessConfig(24, 4, 4), 4000)
    assert set(x[:, 1:5].ravel()) == set(x[:, 6:10].ravel()) == set(range(4, 24))


def test_blanks_stand_before_data_tokens_chosen_at_random():
    """The gaps of a multinomial draw: their mean, and their variance m p (1 - p)."""
    config = SelectiveCopyingConfig(16, 97, 8)
    x, _ = made(config, 4000)
    places = np.nonzero(x[:, :-9] < 14)[1].reshape(-1, 8)
    gaps = np.diff(places, axis=1, prepend=-1) - 1
    np.testing.assert_allclose(gaps.mean(0), 10, atol=0.2)  # standard error 0.05
    np.testing.assert_allclose(gaps.var(0), 80 / 8 * 7 / 8, rtol=0.15)  # 2%


def test_noise_replaces_its_fraction_of_the_pairs_but_one():
    x, _ = made(InContextConfig(32, 81, noise_ids=16, noise_fraction=0.5), 2000)
    noisy = (x[:, :-1:2] >= 16).mean()
    assert noisy == pytest.approx(0.5 * 39 / 40, abs=0.01)  # standard error 0.002


def test_counts_are_balanced_and_near_every_threshold():
    config = CountingConfig(30, 8, 4)
    x, y = made(config, 8000)
    count = (x[:, :-3] == x[:, -2:-1]).sum(1)
    threshold = x[:, -1] - 10
    assert np.bincount(count - threshold + 1) / 8000 == pytest.approx(np.full(4, 0.25), abs=0.02)
    assert (y[:, -1] == 10).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("family", ["binary", "random"])
def test_half_of_the_graphs_are_trees(family):
    """Hubs are drawn alike; a random forest's last edge joins its two trees now and then."""
    _, y = made(IsTreeConfig(12, family), 4000)
    share = (last_labels(y) == 6).mean()
    assert share == pytest.approx(0.5, abs=0.04) if family == "binary" else 0.5 < share < 0.8


def test_the_tour_of_a_graph_by_hand():
    assert depth_first(4, [(0, 2), (1, 2), (3, 0)]) == ([0, 2, 1, 2, 0, 3, 0], 4)
    assert depth_first(4, [(3, 0), (1, 2), (0, 2)]) == ([0, 3, 0, 2, 1, 2, 0], 4)
    assert depth_first(4, [(0, 1), (1, 2), (0, 2)]) == ([0, 1, 2, 0], 3)  # a cycle; 3 is apart
    assert depth_first(4, [(1, 2), (2, 3), (1, 3)]) == ([0], 1)


def test_the_depth_of_a_passkey_is_uniform_without_one():
    x, _ = made(PasskeyConfig(22), 11_000)
    seen = np.bincount(np.nonzero(x == 1)[1] - 1)
    assert ((seen - 1000) ** 2 / 1000).sum() < 33  # 10 degrees of freedom, one in 3000


@given(cards=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_distinct_is(cards, share, seed):
    count = max(1, round(share * cards))
    drawn = distinct(7, count, cards, np.random.default_rng(seed))
    assert drawn.shape == (7, count)
    assert not repeats(drawn).any()
    assert ((drawn >= 0) & (drawn < cards)).all()


@pytest.mark.parametrize("few", [0, 8])
@pytest.mark.parametrize(("count", "cards"), [(2, 4), (3, 4)])
def test_every_draw_without_replacement_is_equally_likely(few, count, cards, monkeypatch):
    """Each of the three ways to draw; chi-square over all ordered results."""
    monkeypatch.setattr("tasks.recall.difficulty._FEW", few)
    drawn = distinct(24_000, count, cards, np.random.default_rng(0))
    codes = drawn @ cards ** np.arange(count)
    _, seen = np.unique(codes, return_counts=True)
    results = 12 if count == 2 else 24
    assert len(seen) == results
    expected = 24_000 / results
    assert ((seen - expected) ** 2 / expected).sum() < 60  # at most 23 degrees, one in 10^4


DIGEST = """
import hashlib
from tests.tasks.test_recall_generators import CASES, made
total = hashlib.sha256()
for config in CASES.values():
    for array in made(config):
        total.update(array.tobytes())
print(total.hexdigest())
"""


def test_another_process_makes_the_same():
    import hashlib

    total = hashlib.sha256()
    for config in CASES.values():
        for array in made(config):
            total.update(array.tobytes())
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", DIGEST], cwd=root, capture_output=True, text=True)
    assert run.stdout.strip() == total.hexdigest(), run.stderr


def test_workers_read_the_same():
    from tasks.base import Recipe
    from tasks.recall.passkey import Passkey

    task = Passkey(
        [{"seq_len": 16, "num_examples": 10}, {"seq_len": 20, "num_examples": 10}],
        [{"seq_len": 20, "num_examples": 4}],
        Recipe(2, 1, 0.1),
    )
    task.prepare()
    batches = [
        list(
            torch.utils.data.DataLoader(
                task.train_set(), batch_size=4, collate_fn=task.collate, num_workers=workers
            )
        )
        for workers in (0, 2)
    ]
    assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in zip(*batches, strict=True))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: ForgettingConfig(64, 28, 6, 3), "seq_len=28: expected an even number"),
        (lambda: ForgettingConfig(8, 40, 6, 3), "vocab_size=8: expected at least 14"),
        (lambda: ForgettingConfig(64, 40, 4, 5), "num_updates=5: expected at most 4"),
        (lambda: ForgettingConfig(64, 40, 4, 4, scored="untouched"), "num_updates=4: expected at"),
        (lambda: ForgettingConfig(64, 40, 4, 2, scored="some"), "scored='some': allowed: all, up"),  # type: ignore
        (lambda: CompositionalConfig(96, 60, 8), "num_kv_pairs=8: expected a square"),
        (lambda: CompositionalConfig(96, 50, 9), "seq_len=50: expected at least 54"),
        (lambda: CompositionalConfig(20, 60, 9), "vocab_size=20: expected thirds"),
        (lambda: ContinuousConfig(64, 11, 6), "seq_len=11: expected at least 12"),
        (lambda: ContinuousConfig(12, 24, 6), "vocab_size=12: expected at least 14"),
        (lambda: ContinuousConfig(64, 24, 6, 0.0), "power_a=0.0: expected more than 0"),
        (lambda: CompressionConfig(2, 8), "vocab_size=2: expected at least 3"),
        (lambda: CompressionConfig(16, 1), "seq_len=1: expected at least 2"),
        (lambda: AssociativeConfig(12, 20), "seq_len=20: expected an odd number"),
        (lambda: AssociativeConfig(3, 21), "vocab_size=3: expected at least 4"),
        (lambda: InductionConfig(2, 21), "vocab_size=2: expected at least 3"),
        (lambda: CircuitConfig("xor", 9), "circuit='xor': allowed: parity, cumulative_parity"),  # type: ignore
        (lambda: CircuitConfig("parity", 9, 3), "num_symbols=3: expected 2 with circuit='parity'"),
        (lambda: DisjointnessConfig(24, 15, 6), "vocab_size=24: expected at least 25"),
        (lambda: InContextConfig(16, 30), "seq_len=30: expected an odd number"),
        (lambda: InContextConfig(16, 31, noise_ids=15), "vocab_size=16: expected at least 17"),
        (lambda: InContextConfig(16, 31, noise_fraction=0.2), "noise_fraction=0.2: expected more"),
        (lambda: FuzzyConfig(6, 64), "vocab_size=6: expected at least 7"),
        (lambda: FuzzyConfig(16, 10), "seq_len=10: expected at least 11"),
        (lambda: SelectiveCopyingConfig(16, 16, 8), "seq_len=16: expected at least 17"),
        (lambda: MemorizationConfig(32, 15), "seq_len=15: expected an even number"),
        (lambda: PasskeyConfig(11), "seq_len=11: expected at least 12"),
        (lambda: PasskeyConfig(40, 101), "depth=101: expected 0 to 100 percent or null"),
        (lambda: NeedleConfig(20, 4, 4), "seq_len=20: expected at least 21"),
        (lambda: NeedleConfig(64, 2, 3), "num_queries=3: expected at most num_needles=2"),
        (lambda: NeedleConfig(64, 5, num_keys=4), "num_keys=4: expected at least num_needles=5"),
        (lambda: NeedleConfig(64, 5, 2, depth=0), "depth=0: expected null with several"),
        (lambda: PhonebookConfig(5, 2), "num_names=2: expected a square of at least num_entries=5"),
        (lambda: PhonebookConfig(2), "num_entries=2: expected at least 3"),
        (lambda: IndexConfig(18, 8, 15), "num_positions=15: expected at least 16"),
        (lambda: CGramConfig(5, 8, 3), "seq_len=5: expected at least 6 with c=3"),
        (lambda: CGramConfig(20, 2, 2), "seq_len=20: expected at most 10; of num_symbols=2"),
        (lambda: CountingConfig(8, 8, 4), "seq_len=8: expected at least 9"),
    ],
)
def test_impossible_sizes_are_told_at_construction(build, said):
    with pytest.raises(ConfigError, match=said):
        build()


LONG: dict[str, Difficulty] = {
    "forgetting": ForgettingConfig(8192, 256, 32, 16),
    "compositional": CompositionalConfig(8192, 256, 36),
    "continuous": ContinuousConfig(8192, 256, 64),
    "compression": CompressionConfig(128, 256),
    "associative": AssociativeConfig(40, 257),
    "induction": InductionConfig(40, 256),
    "parity": CircuitConfig("parity", 256),
    "vocabulary_majority": CircuitConfig("vocabulary_majority", 256, 16),
    "disjointness": DisjointnessConfig(2048, 16, 237),
    "in_context": InContextConfig(16, 255),
    "noisy": InContextConfig(32, 255, noise_ids=16, noise_fraction=0.2),
    "fuzzy": FuzzyConfig(16, 256),
    "fuzzy_train": FuzzyConfig(16, 256, key_sizes="any", targets="next"),
    "copying": SelectiveCopyingConfig(16, 256),
    "memorization": MemorizationConfig(256, 256),
    "passkey": PasskeyConfig(256),
    "needles": NeedleConfig(256, 8, 8),
    "phonebook": PhonebookConfig(20),
    "index": IndexConfig(256, 64, 254),
    "cgram": CGramConfig(256, 32),
    "counting": CountingConfig(256, 32),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG)
def test_100_000_examples_of_length_256_in_under_ten_seconds(case):
    """Process time, so that other work on the machine does not count."""
    start = time.process_time()
    made(LONG[case], 100_000)
    assert time.process_time() - start < 10
