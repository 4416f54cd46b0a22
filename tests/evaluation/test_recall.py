"""Accuracy per slice: three ways to count, and the interval."""

import numpy as np
import pytest
from scipy.stats import binomtest

from evaluation.recall import SliceScore, wilson


def test_three_accuracies_differ_where_sequences_differ_in_labels():
    score = SliceScore("k2", 0.5, 0.1, right=np.array([1, 3, 0]), labels=np.array([1, 4, 1]))
    assert score.sequence_accuracy == pytest.approx((1 + 0.75 + 0) / 3)
    assert score.token_accuracy == pytest.approx(4 / 6)
    assert score.exact_accuracy == pytest.approx(1 / 3)
    summary = score.summary()
    assert (summary["sequences"], summary["positions"]) == (3, 6)
    low, high = summary["sequence_accuracy_interval"]
    assert low < score.sequence_accuracy < high


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (1, 1), (3, 10), (997, 1000)])
def test_wilson_is_scipys(k, n):
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
