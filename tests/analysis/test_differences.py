"""What is claimed, on sweeps whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from analysis.budget import flags
from analysis.comparison import compare
from analysis.differences import perplexity_ratio
from analysis.sections import Settings
from tests.analysis.sweeps import recall_evaluation, text_evaluation, text_sweep, write_run


def test_a_real_difference_is_claimed_in_a_sentence(tmp_path):
    text_sweep(tmp_path, {"attention": 3.20, "hedgehog": 3.14})
    (found,) = compare([str(tmp_path)]).sections
    (difference,) = found.differences
    ours, theirs = (row.chosen.values for row in (difference.a, difference.b))
    expected = stats.ttest_rel([ours[s] for s in range(3)], [theirs[s] for s in range(3)])
    assert difference.a.name == "hedgehog"
    assert difference.seeds.p == pytest.approx(expected.pvalue)
    assert difference.documents is not None
    assert difference.p == max(difference.seeds.p, difference.documents.p)
    assert difference.adjusted == difference.p  # the only comparison
    low, high = expected.confidence_interval(0.95)
    assert found.headline.startswith(
        f"hedgehog beats attention by {-difference.seeds.mean:.2f} ± {(high - low) / 2:.2f} "
        f"perplexity (95%, n=3, Holm-adjusted p={difference.adjusted:.2g})."
    )


def test_equal_models_are_not_told_apart(tmp_path):
    text_sweep(tmp_path, {"attention": 3.2, "hedgehog": 3.2, "conv": 3.2})
    (found,) = compare([str(tmp_path)]).sections
    assert len(found.differences) == 3
    assert all(each.winner is None for each in found.differences)
    assert found.headline.startswith("No difference in perplexity can be claimed (Holm-adjusted p=")


def test_a_baseline_needs_fewer_corrections(tmp_path):
    text_sweep(tmp_path, {"attention": 3.2, "hedgehog": 3.1, "conv": 3.4, "mamba": 3.15})
    (every,) = compare([str(tmp_path)]).sections
    (against,) = compare([str(tmp_path)], Settings(baseline="attention")).sections
    assert (len(every.differences), len(against.differences)) == (6, 3)
    assert {each.b.name for each in against.differences} == {"attention"}
    assert "hedgehog beats attention" in against.headline
    assert "attention beats conv" in " ".join(against.sentences)
    p = {each.a.name: each.adjusted for each in against.differences}
    q = {(each.a.name, each.b.name): each.adjusted for each in every.differences}
    assert p["hedgehog"] <= q["hedgehog", "attention"]


def test_one_seed_supports_no_claim_about_a_pattern(tmp_path):
    text_sweep(tmp_path, {"attention": 3.4, "hedgehog": 3.0}, seeds=1)
    comparison = compare([str(tmp_path)])
    (found,) = comparison.sections
    said = "No difference in perplexity can be claimed (fewer than two seeds)."
    assert found.headline.startswith(said)
    assert "Of the trained models alone, of which another seed may differ" in found.sentences[0]
    assert any("fewer than two seeds, so no interval" in line for line in comparison.problems)


def test_documents_are_paired_within_the_shared_seeds(tmp_path):
    text_sweep(tmp_path, {"attention": 3.2, "hedgehog": 3.1})
    (difference,) = compare([str(tmp_path)], Settings(metric="loss")).sections[0].differences
    # Of the same runs and documents: the difference in nats is the same number either way.
    assert difference.documents.mean == pytest.approx(difference.seeds.mean, rel=1e-9)
    ratio, low, high = perplexity_ratio(difference.documents)
    assert low < ratio < high < 1
    assert difference.documents.n == 30


def test_few_documents_are_not_resampled(tmp_path):
    for pattern, loss in (("attention", 3.2), ("conv", 3.1)):
        for seed in range(3):
            evaluation = text_evaluation(loss + 0.01 * seed, seed, documents=5)
            write_run(tmp_path / f"{pattern}{seed}", pattern, seed, evaluation)
    (difference,) = compare([str(tmp_path)]).sections[0].differences
    assert difference.documents is None
    assert difference.p == difference.seeds.p


def test_seeds_that_are_not_shared_are_independent_samples(tmp_path):
    rng = np.random.default_rng(0)
    values = {"attention": rng.normal(0.5, 0.01, 3), "conv": rng.normal(0.7, 0.02, 4)}
    for i, (pattern, scores) in enumerate(values.items()):
        for j, score in enumerate(scores):
            write_run(tmp_path / f"{pattern}{j}", pattern, 10 * i + j, recall_evaluation(score))
    (difference,) = compare([str(tmp_path)]).sections[0].differences
    expected = stats.ttest_ind(values["conv"], values["attention"], equal_var=False)
    assert difference.seeds.method.startswith("Welch")
    assert difference.p == pytest.approx(expected.pvalue)


def test_a_row_with_a_diverged_run_cannot_win_but_can_lose(tmp_path):
    text_sweep(tmp_path, {"attention": 3.2, "conv": 3.1, "hedgehog": 3.3})
    error = "TrainingError: step 3: loss or gradient is not finite"
    write_run(tmp_path / "x", "conv", 3, None, status="failed", error=error)
    (found,) = compare([str(tmp_path)]).sections
    conv, attention, hedgehog = found.section.rows
    assert (conv.name, found.section.reference) == ("conv", attention)
    assert "1 of 4 diverged" in flags(conv, found.section)
    assert found.to_reference(conv).winner is None
    assert found.to_reference(conv).why_not == "not every run of conv has a result"
    assert found.to_reference(hedgehog).winner is attention
    write_run(tmp_path / "y", "hedgehog", 3, None, status="failed", error=error)
    (found,) = compare([str(tmp_path)]).sections
    assert found.to_reference(found.section.rows[2]).winner.name == "attention"


def test_a_model_that_sees_the_future_cannot_win(tmp_path):
    text_sweep(tmp_path, {"attention": 3.2, "routing_topw": 2.0})
    (found,) = compare([str(tmp_path)]).sections
    assert found.section.rows[0].name == "routing_topw"
    assert found.section.reference.name == "attention"
    assert found.headline.startswith("No difference")
    assert "routing_topw sees the future" in found.headline
    assert "leaky: sees the future" in flags(found.section.rows[0], found.section)


def test_budgets_that_do_not_match_are_flagged(tmp_path):
    text_sweep(tmp_path, {"hedgehog": 3.0, "attention": 3.2, "mamba": 3.3})
    (found,) = compare([str(tmp_path)]).sections
    told = {row.name: flags(row, found.section) for row in found.section.rows}
    assert told["hedgehog"] == []
    # 120,000 against 121,000 parameters is within 1%.
    assert told["attention"] == ["FLOPs/token −21%", "state +297%"]
    assert told["mamba"] == ["parameters +25%", "FLOPs/token −27%", "state −72%"]
    assert found.headline.endswith(
        "At equal tokens seen; parameters, FLOPs/token and state differ by more than 1%."
    )


def test_accuracies_without_spread_are_not_tested(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"a{seed}", "attention", seed, recall_evaluation(1.0))
        write_run(tmp_path / f"c{seed}", "conv", seed, recall_evaluation(0.5))
    (found,) = compare([str(tmp_path)]).sections
    assert found.differences[0].winner is None
    assert "the seeds do not differ among themselves" in found.headline


@pytest.mark.slow
def test_claims_about_equal_models_are_rare(tmp_path):
    """Of families of ten comparisons without a difference, 5% may hold a claim, not 40%."""
    rng, families, wrong = np.random.default_rng(0), 60, 0
    names = ("attention", "conv", "hedgehog", "mamba", "lru")
    for i in range(families):
        for pattern in names:
            for seed in range(3):
                score = rng.normal(0.5, 0.02)
                path = tmp_path / str(i) / f"{pattern}{seed}"
                write_run(path, pattern, seed, recall_evaluation(score))
        (found,) = compare([str(tmp_path / str(i))]).sections
        wrong += any(each.winner for each in found.differences)
    # P(more than 7 of 60) is below 1% at a rate of 5%.
    assert wrong <= 7
