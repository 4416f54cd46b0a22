"""Intervals and corrections against scipy, closed forms and published examples."""

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import documents, holm, mean, paired, ratio, welch


def test_the_mean_has_students_interval():
    x = [3.1, 2.4, 2.9, 3.6]
    got = mean(x)
    expected = stats.ttest_1samp(x, 0)
    interval = expected.confidence_interval(0.95)
    assert (got.mean, got.n, got.spread) == pytest.approx((3.0, 4, np.std(x, ddof=1)))
    assert (got.low, got.high, got.p) == pytest.approx((*interval, expected.pvalue))
    assert got.half_width == pytest.approx((interval.high - interval.low) / 2)


def test_one_value_has_no_interval_and_none_is_refused():
    got = mean([2.0])
    assert (got.mean, got.n, got.low, got.p, got.half_width) == (2.0, 1, None, None, None)
    with pytest.raises(ValueError, match="expected at least one"):
        mean([])


def test_equal_values_have_no_width_and_claim_nothing():
    assert mean([1.0, 1.0, 1.0]).half_width == 0
    assert mean([1.0, 1.0, 1.0]).p is None
    assert paired([0.3, 0.4], [0.3, 0.4]).p == 1
    assert paired([0.3, 0.4, 0.9], [0.2, 0.3, 0.8]).p is None  # 0.1 up to rounding


def test_pairs_are_narrower_than_samples_that_share_their_noise():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=5)
    a, b = shared + 0.1 + 0.01 * rng.normal(size=5), shared
    assert paired(a, b).p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert paired(a, b).high < 0.2 < welch(a, b).high


def test_welch():
    a, b = [1.0, 2.0, 4.0, 2.5], [3.0, 9.0, 4.5]
    expected = stats.ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval(0.95)
    got = welch(a, b)
    assert (got.low, got.high, got.p, got.n) == pytest.approx((*interval, expected.pvalue, 3))
    assert welch([1.0], b).low is None


def test_holm():
    """Adjusted by hand: 4 x 0.005, 3 x 0.01, then 2 x 0.03, which 0.04 may not go below."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([None, 0.02]) == [None, 0.04]
    assert holm([]) == []


def test_documents_are_a_ratio_of_sums():
    rng = np.random.default_rng(1)
    tokens = rng.integers(50, 5000, 40)
    nll = tokens * rng.normal(5, 0.3, 40)
    other = nll - tokens * rng.normal(0.05, 0.05, 40)
    got = documents(nll, other, tokens)
    assert got.mean == pytest.approx((nll.sum() - other.sum()) / tokens.sum(), rel=1e-12)
    assert got.low < got.mean < got.high
    assert got.mean - got.low == pytest.approx(got.high - got.mean)
    assert documents(other, nll, tokens).mean == pytest.approx(-got.mean)
    assert got == documents(nll, other, tokens)  # the same bits
    with pytest.raises(ValueError, match="expected one shape"):
        documents(nll, other[1:], tokens)


@pytest.mark.parametrize("effect", [0.0, 0.05, 0.1, 0.15, 0.3])
def test_p_and_interval_say_the_same(effect):
    rng = np.random.default_rng(2)
    got = ratio(effect + rng.normal(0, 0.3, 30), np.ones(30))
    assert (got.p < 0.05) == (got.low > 0 or got.high < 0)


def test_the_bootstrap_of_a_mean_is_close_to_students_where_that_is_exact():
    x = np.random.default_rng(3).normal(1, 1, 60)
    # Both are of the same normal sample; 5% is the noise of a quantile of 9999 resamples, doubled.
    assert mean(x, "bootstrap").half_width == pytest.approx(mean(x).half_width, rel=0.05)
    with pytest.raises(ValueError, match="expected at least 8"):
        mean(x[:7], "bootstrap")


def test_the_same_model_twice_differs_by_nothing():
    nll, tokens = np.array([10.0, 20.0, 30.0]), np.array([3.0, 5.0, 9.0])
    got = documents(nll, nll, tokens)
    assert (got.mean, got.low, got.high, got.p) == (0, 0, 0, 1)


def test_with_many_documents_the_interval_is_the_linearised_one():
    rng = np.random.default_rng(4)
    tokens = rng.integers(100, 1000, 600).astype(float)
    values = tokens * rng.normal(0.01, 0.1, 600)
    got = ratio(values, tokens)
    error = np.sqrt(((values - got.mean * tokens) ** 2).sum()) / tokens.sum()
    # The central limit has set in; 4% is twice the noise of a quantile of 9999 resamples.
    assert got.half_width == pytest.approx(stats.norm.ppf(0.975) * error, rel=0.04)
