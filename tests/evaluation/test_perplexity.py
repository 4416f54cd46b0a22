"""From sums to figures."""

import math

import pytest

from evaluation.perplexity import DocumentScore, TextScore, rates


def test_figures_follow_from_sums_over_documents():
    score = TextScore(
        "windowed",
        (DocumentScore("a", 10.0, 4, 2, 30), DocumentScore("b", 20.0, 6, 3, 20)),
        window=8,
        stride=2,
    )
    assert (score.nll, score.tokens, score.words, score.bytes) == (30.0, 10, 5, 50)
    summary = score.summary()
    assert summary["token_perplexity"] == pytest.approx(math.exp(3.0))
    assert summary["word_perplexity"] == pytest.approx(math.exp(6.0))
    assert summary["bits_per_byte"] == pytest.approx(30 / math.log(2) / 50)
    assert summary["context"] == "6-8 tokens"


def test_a_diverged_model_has_an_infinite_perplexity_and_a_nan_one_stays_nan():
    assert rates(1e6, 10, 10, 10)["token_perplexity"] == math.inf
    assert math.isnan(rates(math.nan, 10, 10, 10)["token_perplexity"])


def test_the_sum_does_not_lose_small_documents():
    documents = tuple(DocumentScore("", x, 1, 1, 1) for x in (1e16, 1.0, 1.0))
    assert TextScore("carried", documents).nll == 1e16 + 2
