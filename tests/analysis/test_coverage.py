"""How often the 95% intervals cover a known truth, over simulated runs."""

from collections.abc import Callable

import numpy as np
import pytest

import analysis.statistics as statistics
from analysis.statistics import Estimate, documents, mean, paired, welch

SEEDS = (2, 3, 5, 10)


def coverage(draw: Callable[[], Estimate], truth: float, simulations: int) -> float:
    inside = 0
    for _ in range(simulations):
        estimate = draw()
        assert estimate.low is not None
        assert estimate.high is not None
        inside += estimate.low <= truth <= estimate.high
    return inside / simulations


def tolerance(simulations: int) -> float:
    """Three standard errors of a share of 0.95: a correct interval is outside once in 370 tests."""
    return 3 * (0.95 * 0.05 / simulations) ** 0.5


class Corpus:
    """Documents with the lengths and the differences of two models that real ones have.

    Lengths are log-normal; the difference in nats per token has heavy tails and depends on the
    length, so that a mean over documents would be another number than the ratio of sums.
    """

    def __init__(self, rng: np.random.Generator, size: int = 400_000) -> None:
        self.rng = rng
        self.tokens = rng.lognormal(7, 0.8, size).astype(int) + 50
        gain = (0.006 + 0.015 * rng.standard_t(5, size)) * (1 + 200 / np.sqrt(self.tokens))
        self.gain = self.tokens * gain
        self.truth = self.gain.sum() / self.tokens.sum()

    def draw(self, n: int) -> Estimate:
        chosen = self.rng.integers(0, len(self.tokens), n)
        other = 5.0 * self.tokens[chosen]
        return documents(other + self.gain[chosen], other, self.tokens[chosen])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def test_students_interval_quickly(rng):
    simulations = 2000
    covered = coverage(lambda: mean(rng.normal(20, 0.4, 3)), 20, simulations)
    assert covered == pytest.approx(0.95, abs=tolerance(simulations))


def test_documents_quickly(rng, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    corpus, simulations = Corpus(rng, 50_000), 500
    covered = coverage(lambda: corpus.draw(60), corpus.truth, simulations)
    assert covered == pytest.approx(0.95, abs=tolerance(simulations))


@pytest.mark.slow
@pytest.mark.parametrize("n", SEEDS)
def test_seeds(rng, n):
    """Runs share the noise of a seed, as they do where it orders the same data."""

    def two() -> tuple[np.ndarray, np.ndarray]:
        seed = rng.normal(0, 0.4, n)
        return 20 + seed + rng.normal(0, 0.2, n), 18.8 + seed + rng.normal(0, 0.3, n)

    assert 0.93 < coverage(lambda: mean(two()[0]), 20, 4000) < 0.97
    assert 0.93 < coverage(lambda: paired(*two()), 1.2, 4000) < 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 10])
def test_seeds_that_are_not_shared(rng, n):
    def two() -> Estimate:
        return welch(rng.normal(20, 0.4, n), rng.normal(18.8, 0.6, n + 1))

    assert 0.93 < coverage(two, 1.2, 4000) < 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n", [10, 20, 60, 240])
def test_documents(rng, monkeypatch, n):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    corpus = Corpus(rng)
    assert 0.93 < coverage(lambda: corpus.draw(n), corpus.truth, 3000) < 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 12, 20])
def test_bootstrap_over_skewed_seeds(rng, monkeypatch, n):
    """Log-normal perplexities, of which a few are far above the others."""
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    truth = 20 * np.exp(0.3**2 / 2)
    draw = lambda: mean(20 * rng.lognormal(0, 0.3, n), "bootstrap")  # noqa: E731
    assert 0.93 < coverage(draw, truth, 3000) < 0.97
