"""What a recall study says of its runs."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from evaluation.study import Plan, outcome, over_seeds, print_rows
from schema.compose import compose
from schema.errors import ConfigError
from train import train

TINY = (
    "task.vocab_size=32",
    "task.train=[{seq_len: 16, num_kv_pairs: 2, num_examples: 60}]",
    "task.test=[{seq_len: 16, num_kv_pairs: 2, num_examples: 16}]",
    "task.recipe.batch_size=4",
    "task.recipe.max_steps=3",
    "task.recipe.warmup_steps=1",
    "task.recipe.eval_interval=3",
    "model.d_model=8",
)
OPTIONS = {
    "common": TINY,
    "arms": {"small state": ("pattern=[conv,based]", "mixers.based.key_dim=2")},
    "lrs": (1e-3, 1e-2),
    "seeds": (0, 1),
    "columns": ("L16_K2",),
}


def test_an_interval_of_seeds_is_student_s():
    values = [0.8, 0.9, 0.95]
    expected = ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = over_seeds(values, (0, 0))
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(expected.low)
    assert found.high == min(1.0, expected.high)
    assert over_seeds([0.5], (0.4, 0.6)) == (0.5, 0.4, 0.6)  # one seed: that of its examples


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, r"study\.arms=\[\]: expected at least one, each once"),
        ({"seeds": (0, 0)}, r"study\.seeds=\[0, 0\]: expected at least one, each once"),
    ],
)
def test_a_plan_that_compares_nothing_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Plan(**{**OPTIONS, **changes})


def test_the_rate_is_chosen_by_validation_and_the_test_is_of_that_rate(tmp_path):
    plan = Plan(**OPTIONS)
    points = plan.points(tmp_path)
    assert [p.path.name for p in points][:2] == [
        "small-state_lr0.001_seed0",
        "small-state_lr0.001_seed1",
    ]
    tests, validation = {}, {}
    for point in points:
        overrides = [*plan.overrides(point), f"run_dir={point.path}"]
        tests[point] = train(compose("config", overrides))["accuracy"]
        rows = (Path(point.path) / "metrics.csv").read_text().splitlines()
        last = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
        validation[point] = float(last["validation/accuracy"])
    (row,) = outcome(plan, points)
    means = {lr: np.mean([validation[p] for p in points if p.lr == lr]) for lr in plan.lrs}
    assert row.lr == max(plan.lrs, key=lambda lr: means[lr])
    expected = [tests[p] for p in points if p.lr == row.lr]
    assert row.by_seed["L16_K2"] == pytest.approx(expected)
    assert row.state_bytes > 0
    assert print_rows([row], plan).row_count == 1
    with pytest.raises(ConfigError, match=r"study\.columns=L99: .* allowed: L16_K2, all"):
        outcome(Plan(**{**OPTIONS, "columns": ("L99",)}), points)
