"""Timings side by side: a slowed peer changes the ratio, noise is refused, exponents are found."""

import time

import pytest
import torch

from benchmarks.harness import LEAST_SECONDS, Timing, exponent, measure, ratio

CPU = torch.device("cpu")


def asleep(seconds: float):
    """A call of this length, whatever else the machine computes."""
    return lambda: time.sleep(seconds)


def test_a_slowed_peer_changes_the_ratio():
    for slowed, expected in ((0.04, 1.0), (0.12, 3.0)):
        timings = measure({"ours": asleep(0.04), "peer": asleep(slowed)}, 5, CPU)
        # A sleep ends late by some milliseconds where other processes have the cores.
        assert ratio(timings["ours"], timings["peer"], 1.3) == pytest.approx(expected, rel=0.25)


def test_rounds_are_interleaved_and_nobody_always_comes_first():
    order = []
    calls = {
        name: lambda n=name: (order.append(n), time.sleep(1.5 * LEAST_SECONDS)) for name in "abc"
    }
    timings = measure(calls, 4, CPU)
    rounds = "".join(order[6:])  # after two calls of each that do not count
    assert rounds == "abc" + "bca" + "cab" + "abc"
    assert all(len(t.seconds) == 4 for t in timings.values())


def test_short_calls_are_repeated_within_a_timing():
    calls = []
    measure({"short": lambda: calls.append(1)}, 3, CPU)
    assert len(calls) > 1000


def test_a_ratio_is_the_median_within_rounds():
    # A slow moment doubles one round of both: the ratios of rounds do not notice.
    ours, peer = Timing((1.0, 2.0, 1.0)), Timing((3.0, 6.0, 3.0))
    assert ratio(ours, peer, 1.3) == 3.0


def test_a_noisy_timing_has_no_ratio_and_no_exponent():
    quiet, noisy = Timing((1.0, 1.1, 1.0)), Timing((1.0, 1.5, 1.6))
    assert noisy.spread == 1.5
    assert ratio(quiet, noisy, 1.3) is None
    assert ratio(noisy, quiet, 1.3) is None
    assert ratio(quiet, noisy, 1.6) is not None
    assert exponent([1, 2, 4], [quiet, quiet, noisy], 1.3) is None


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_the_exponent_is_found(power):
    lengths = [512, 2048, 8192]
    timings = [Timing((3e-6 * n**power,) * 3) for n in lengths]
    assert exponent(lengths, timings, 1.3) == pytest.approx(power)
    assert exponent(lengths[:2], timings[:2], 1.3) is None
