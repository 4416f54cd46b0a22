"""Multi-query associative recall: the generator's properties and a checker that rejects others."""

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.errors import ConfigError
from tasks.base import IGNORED
from tasks.recall.mqar import MQARConfig, check_mqar, generate

GOLDEN = Path(__file__).parents[1] / "golden" / "mqar_batches.npz"


def golden(case: str) -> tuple[np.ndarray, np.ndarray, MQARConfig]:
    with np.load(GOLDEN) as arrays:
        v, length, k, noise = map(int, arrays[f"{case}_cfg_vocab_len_kv_random"])
        config = MQARConfig(v, length, k, random_non_queries=bool(noise))
        return arrays[f"{case}_inputs"], arrays[f"{case}_labels"], config


def made(config: MQARConfig, n: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return generate(config, n, np.random.default_rng(seed))


@pytest.mark.parametrize("case", "abcd")
def test_the_checker_accepts_zoologys_batches(case):
    check_mqar(*golden(case))


def swap_pairs_tokens(inputs, labels):
    inputs[3, [0, 1]] = inputs[3, [1, 0]]


def wrong_label(inputs, labels):
    t = np.flatnonzero(labels[3] != IGNORED)[0]
    labels[3, t] = inputs[3, 1] if labels[3, t] != inputs[3, 1] else inputs[3, 3]


def label_one_later(inputs, labels):
    labels[3] = np.roll(labels[3], 1)


def query_moved_off_the_slots(inputs, labels):
    inputs[3, 8:] = np.roll(inputs[3, 8:], 1)
    labels[3, 8:] = np.roll(labels[3, 8:], 1)


def answer_shown(inputs, labels):
    t = np.flatnonzero(labels[3] != IGNORED)[0]
    inputs[3, t + 1] = labels[3, t]


def label_missing(inputs, labels):
    labels[3, np.flatnonzero(labels[3] != IGNORED)[0]] = IGNORED


def query_repeated(inputs, labels):
    first, second = np.flatnonzero(labels[3] != IGNORED)[:2]
    inputs[3, second], labels[3, second] = inputs[3, first], labels[3, first]


def query_not_of_the_context(inputs, labels):
    t = np.flatnonzero(labels[3] != IGNORED)[0]
    unused = set(range(1, 64)) - set(inputs[3, :8:2].tolist())
    inputs[3, t] = min(unused)


def key_repeated(inputs, labels):
    inputs[3, 2] = inputs[3, 0]


def value_repeated(inputs, labels):
    inputs[3, 3] = inputs[3, 1]


def key_is_filler(inputs, labels):
    old = inputs[3, 0]
    inputs[3, inputs[3] == old] = 0


def value_among_keys(inputs, labels):
    old = inputs[3, 1]
    inputs[3, 1] = 1
    labels[3, labels[3] == old] = 1


def token_beyond_the_vocabulary(inputs, labels):
    old = inputs[3, 1]
    inputs[3, 1] = 128
    labels[3, labels[3] == old] = 128


def label_in_the_context(inputs, labels):
    t = np.flatnonzero(labels[3] != IGNORED)[0]
    labels[3, 0], labels[3, t] = labels[3, t], IGNORED


@pytest.mark.parametrize(
    ("mutate", "said"),
    [
        (swap_pairs_tokens, "a key is not from"),
        (wrong_label, "a label is not the value of its key"),
        (label_one_later, "a label stands between two slots"),
        (query_moved_off_the_slots, "a label stands between two slots"),
        (answer_shown, "something else than filler"),
        (label_missing, "there are not 4 labels"),
        (query_repeated, "not every key is asked for once"),
        (query_not_of_the_context, "not every key is asked for once"),
        (key_repeated, "a key stands in two pairs"),
        (value_repeated, "a value stands in two pairs"),
        (key_is_filler, "a key is not from"),
        (value_among_keys, "a value is not from"),
        (token_beyond_the_vocabulary, "a token is not of the vocabulary"),
        (label_in_the_context, "a label stands among the pairs"),
    ],
)
def test_the_checker_rejects_each_mutation(mutate, said):
    inputs, labels, config = golden("a")
    mutate(inputs, labels)
    with pytest.raises(ValueError, match=f"row 3: {said}"):
        check_mqar(inputs, labels, config)


def test_the_checker_rejects_passes_that_differ():
    config = MQARConfig(128, 64, 4, num_passes=2)
    inputs, labels = made(config)
    inputs[5, 9] = inputs[5, 11]
    with pytest.raises(ValueError, match="row 5: the pairs differ between passes"):
        check_mqar(inputs, labels, config)


@given(
    k=st.integers(1, 8),
    passes=st.integers(1, 3),
    room=st.integers(0, 9),
    more=st.integers(1, 60),
    power=st.sampled_from([0.01, 0.5, 1.0]),
    noise=st.booleans(),
    n=st.sampled_from([1, 7, 2049]),
)
def test_whatever_is_generated_is_mqar(k, passes, room, more, power, noise, n):
    length = 2 * k * (passes + 1) + 2 * room
    config = MQARConfig(length + more, length, k, power, noise, passes)
    if config.vocab_size // 2 - 1 >= k:
        check_mqar(*made(config, n), config)


def test_every_slot_may_be_used():
    config = MQARConfig(66, 64, 16)
    inputs, labels = made(config)
    check_mqar(inputs, labels, config)
    assert (labels[:, 32::2] != IGNORED).all()


def test_the_seed_decides_and_another_differs():
    config = MQARConfig(256, 32, 4)
    np.testing.assert_array_equal(made(config, seed=5), made(config, seed=5))
    assert (made(config, seed=5)[0] != made(config, seed=6)[0]).any(axis=1).all()


def test_queries_fall_on_slots_with_the_weights_of_power_a():
    """Figures of the public generator for L = 64, K = 4: how often a slot is used."""
    n = 40_000
    config = MQARConfig(8192, 64, 4)
    inputs, labels = made(config, n)
    used = (labels != IGNORED).mean(axis=0)[8::2]
    # Standard error sqrt(p (1 - p) / n) < 0.0025; four of them, and the figures' two digits.
    np.testing.assert_allclose(used[:4], [0.72, 0.47, 0.34, 0.28], atol=0.01 + 0.005)
    first_key_first = ((inputs[:, 8] == inputs[:, 0]) & (labels[:, 8] != IGNORED)).mean()
    assert abs(first_key_first - 0.251) < 0.01
    uniform = made(MQARConfig(8192, 64, 4, power_a=1.0), n)[1]
    np.testing.assert_allclose((uniform != IGNORED).mean(axis=0)[8::2], 4 / 28, atol=0.01)


def test_slots_are_drawn_in_turn_by_weight_without_replacement():
    """The chance of every ordered pair of slots is p_i p_j / (1 - p_i), checked by chi-square."""
    n, config = 60_000, MQARConfig(32, 12, 2, power_a=0.3)
    inputs, labels = made(config, n)
    places = np.argsort(labels == IGNORED, axis=1, kind="stable")[:, :2]  # of the two queries
    first_is_first = np.take_along_axis(inputs, places, axis=1)[:, 0] == inputs[:, 0]
    slots = (places - config.context) // 2
    slots[~first_is_first] = slots[~first_is_first, ::-1]  # slot of key 0, of key 1
    p = np.arange(1.0, config.num_slots + 1) ** (config.power_a - 1)
    p /= p.sum()
    expected = n * p[:, None] * p[None, :] / (1 - p[:, None])
    seen = np.zeros_like(expected)
    np.add.at(seen, (slots[:, 0], slots[:, 1]), 1)
    assert (np.diag(seen) == 0).all()
    off = ~np.eye(config.num_slots, dtype=bool)
    chi_square = ((seen - expected)[off] ** 2 / expected[off]).sum()
    assert chi_square < 34.5  # 11 degrees of freedom, one in 3000


def test_keys_and_values_are_uniform():
    """Every card of the decks is drawn equally often at every place (chi-square per place)."""
    config = MQARConfig(42, 12, 3)
    n = 42_000
    inputs, _ = made(config, n)
    for place, low, cards in ((0, 1, 20), (4, 1, 20), (1, 21, 21), (5, 21, 21)):
        seen = np.bincount(inputs[:, place], minlength=42)[low : low + cards]
        assert seen.sum() == n
        expected = n / cards
        assert ((seen - expected) ** 2 / expected).sum() < 49  # 20 degrees, one in 3000


def test_noise_is_uniform_over_the_whole_vocabulary():
    config = MQARConfig(64, 32, 4)
    inputs, labels = made(config, 20_000)
    rest = inputs[:, 8:][labels[:, 8:] == IGNORED]
    expected = len(rest) / 64
    seen = np.bincount(rest, minlength=64)
    assert ((seen - expected) ** 2 / expected).sum() < 110  # 63 degrees, one in 3000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seq_len": 31}, "seq_len=31: expected an even number"),
        ({"vocab_size": 32}, "vocab_size=32: expected more than seq_len=32"),
        ({"num_kv_pairs": 9}, "seq_len=32: expected at least 36, .*num_kv_pairs=9"),
        ({"num_passes": 2, "num_kv_pairs": 6}, "seq_len=32: expected at least 36, .*num_passes=2"),
        ({"num_kv_pairs": 0}, "num_kv_pairs=0: expected at least 1"),
        ({"num_passes": 0}, "num_passes=0: expected at least 1"),
        ({"power_a": 0.0}, "power_a=0.0: expected more than 0"),
    ],
)
def test_errors_name_the_option(options, said):
    with pytest.raises(ConfigError, match=said):
        MQARConfig(**{"vocab_size": 256, "seq_len": 32, "num_kv_pairs": 4, **options})


def test_chance():
    config = MQARConfig(256, 32, 4)
    assert config.chance == 1 / 4
    assert config.chance_of_vocabulary == 1 / 128


@pytest.mark.slow
def test_100_000_examples_of_length_256_in_under_ten_seconds():
    """Process time, so that other work on the machine does not count; 1.7 s when written."""
    config = MQARConfig(8192, 256, 64)
    start = time.process_time()
    made(config, 100_000)
    assert time.process_time() - start < 10
