"""Which runs are one row, what it is called, and how its tuned keys are chosen."""

import pytest

from analysis.comparison import Comparison, compare
from analysis.sections import Settings
from schema.errors import ConfigError
from tests.analysis.sweeps import (
    recall_evaluation,
    text_evaluation,
    text_sweep,
    write_point,
    write_run,
)


def rows(comparison: Comparison) -> dict:
    return {row.name: row for row in comparison.sections[0].section.rows}


def test_a_row_is_a_configuration_over_its_seeds(tmp_path):
    text_sweep(tmp_path, {"attention": 3.2, "hedgehog": 3.1})
    found = rows(compare([str(tmp_path)]))
    assert list(found) == ["hedgehog", "attention"]  # from best to worst
    assert [found[name].estimate.n for name in found] == [3, 3]
    assert found["attention"].chosen.name == ""  # nothing was tuned


def test_rows_of_one_pattern_are_told_apart_by_what_differs(tmp_path):
    for seed in range(2):
        for width in (64, 128):
            options = {"model.d_model": width, "mixers.attention.d_model": width}
            path = tmp_path / f"{width}_{seed}"
            write_run(path, "attention", seed, text_evaluation(3.0), options=options)
        unused = {"mixers.attention.rotary": False, "trainer.num_workers": seed}
        write_run(tmp_path / f"c{seed}", ["conv"], seed, text_evaluation(3.0), options=unused)
    names = set(rows(compare([str(tmp_path)])))
    assert names == {"attention model.d_model=64", "attention model.d_model=128", "conv"}


def grid(root, test: dict, validation: dict, seeds=(0, 1, 2), evaluation=text_evaluation) -> None:
    for lr in test:
        for seed in seeds:
            write_run(
                root / f"{lr}_{seed}",
                "conv",
                seed,
                evaluation(test[lr] + 0.01 * seed),
                options={"optimizer.lr": lr},
                validation=validation[lr],
            )


def test_settings_are_chosen_on_validation_whatever_the_test_says(tmp_path):
    grid(tmp_path, test={1e-3: 3.2, 1e-2: 3.0}, validation={1e-3: 3.1, 1e-2: 3.3})
    (row,) = rows(compare([str(tmp_path)], Settings(metric="loss"))).values()
    assert row.chosen.name == "lr=0.001"
    assert row.estimate.mean == pytest.approx(3.21)
    assert len(row.settings) == 2
    apart = rows(compare([str(tmp_path)], Settings(tuned=())))
    assert set(apart) == {"conv optimizer.lr=0.001", "conv optimizer.lr=0.01"}


def test_a_higher_accuracy_is_better(tmp_path):
    grid(tmp_path, {1e-3: 0.5, 1e-2: 0.4}, {1e-3: 0.4, 1e-2: 0.5}, evaluation=recall_evaluation)
    (row,) = rows(compare([str(tmp_path)])).values()
    assert row.chosen.name == "lr=0.01"


def test_settings_are_compared_on_seeds_that_all_have(tmp_path):
    """Seed 1 is an easy one, which the first setting was not tried with."""
    for lr, seed, validation in ((1e-3, 0, 3.0), (1e-2, 0, 3.1), (1e-2, 1, 2.0)):
        path = tmp_path / f"{lr}_{seed}"
        options = {"optimizer.lr": lr}
        evaluation = text_evaluation(3.0)
        write_run(path, "conv", seed, evaluation, options=options, validation=validation)
    (row,) = rows(compare([str(tmp_path)])).values()
    assert (row.chosen.name, row.shared_seeds) == ("lr=0.001", (0,))


def test_a_setting_that_diverged_for_a_seed_is_not_chosen(tmp_path):
    grid(tmp_path, {1e-3: 3.2}, {1e-3: 3.3})
    grid(tmp_path, {1e-2: 3.0}, {1e-2: 3.0}, seeds=(0, 1))
    error = "TrainingError: step 3: loss or gradient is not finite"
    options = {"optimizer.lr": 1e-2}
    write_run(tmp_path / "x", "conv", 2, None, options=options, status="failed", error=error)
    (row,) = rows(compare([str(tmp_path)])).values()
    assert row.chosen.name == "lr=0.001"
    assert row.may_win
    assert [len(setting.failed) for setting in row.settings] == [0, 1]


def test_runs_without_a_result_are_counted(tmp_path):
    text_sweep(tmp_path, {"conv": 3.0, "attention": 3.1}, seeds=2)
    infinite = text_evaluation(3.0)
    infinite["protocols"]["windowed"]["token_perplexity"] = float("inf")
    write_run(tmp_path / "a", "conv", 7, infinite)
    write_run(tmp_path / "b", "conv", 8, None, status="failed", error="OSError: full")
    write_run(tmp_path / "c", "conv", 9, None, status="running")
    write_point(tmp_path / "d", "failed", "killed", ["pattern=conv", "seed=10"])
    write_point(tmp_path / "e", "failed", "killed", ["pattern=mamba", "seed=10"])
    comparison = compare([str(tmp_path)])
    row = rows(comparison)["conv"]
    counts = (row.estimate.n, row.attempted, row.diverged, row.failures, len(row.chosen.unfinished))
    assert counts == (2, 6, 1, 3, 1)
    assert not row.may_win
    assert any("e: fits no row or several, pattern=mamba" in line for line in comparison.problems)


def test_unfinished_runs_do_not_speak_against_a_row(tmp_path):
    text_sweep(tmp_path, {"conv": 3.0})
    write_run(tmp_path / "c", "conv", 9, None, status="running")
    assert rows(compare([str(tmp_path)]))["conv"].may_win


def test_tasks_and_data_are_compared_each_for_itself(tmp_path):
    text_sweep(tmp_path / "text", {"conv": 3.0, "attention": 3.1})
    for seed in range(2):
        write_run(tmp_path / f"m{seed}", "conv", seed, recall_evaluation(0.5))
    write_run(tmp_path / "n", "conv", 0, recall_evaluation(0.5), data="b")
    comparison = compare([str(tmp_path)])
    names = [each.section.name.split(",")[0] for each in comparison.sections]
    assert names == ["mqar", "mqar", "text"]
    assert [len(each.section.runs) for each in comparison.sections] == [2, 1, 6]
    said = "\n".join(comparison.problems)
    assert "2 tasks, each is compared for itself: mqar, text" in said
    assert "mqar: 2 different data sets or ways of evaluation" in said


def test_another_way_of_evaluation_is_another_comparison(tmp_path):
    text_sweep(tmp_path, {"conv": 3.0})
    other = text_evaluation(2.0)
    other["protocols"]["windowed"]["stride"] = 1
    write_run(tmp_path / "other", "attention", 0, other)
    comparison = compare([str(tmp_path)])
    assert [len(each.section.rows) for each in comparison.sections] == [1, 1]
    assert "stride 1" in comparison.sections[1].section.name


def test_the_later_of_two_equal_runs_counts(tmp_path):
    for name, started, loss in (("a", "2026-02-01", 3.0), ("b", "2026-01-01", 4.0)):
        write_run(tmp_path / name, "conv", 0, text_evaluation(loss), record={"started": started})
    comparison = compare([str(tmp_path)], Settings(metric="loss"))
    assert rows(comparison)["conv"].estimate.mean == pytest.approx(3.0)
    assert "b: left out" in comparison.problems[0]


def test_names_that_are_not_there(tmp_path):
    text_sweep(tmp_path, {"conv": 3.0})
    with pytest.raises(ConfigError, match="metric=perplexity: no such metric; did you mean"):
        compare([str(tmp_path)], Settings(metric="perplexity"))
    with pytest.raises(ConfigError, match=r"baseline=con: no such row; did you mean conv\?"):
        compare([str(tmp_path)], Settings(baseline="con"))


def test_a_protocol_that_was_not_evaluated(tmp_path):
    text_sweep(tmp_path, {"conv": 3.0})
    comparison = compare([str(tmp_path)], Settings(protocol="carried"))
    assert comparison.sections[0].headline == "No run has a result."
    (row,) = comparison.sections[0].section.rows
    assert "not evaluated under protocol=carried, but windowed" in row.chosen.failed[0].failure
