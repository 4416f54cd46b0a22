"""Budgets: the steps they pay for, and what they refuse."""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from models.build import build_model
from schema.check import check
from schema.compose import compose
from schema.errors import ConfigError
from tasks.base import Task
from tests.e2e.runs import TINY, train_here
from training.budget import set_steps

TOKENS = 2 * 4 * 16  # of a step of TINY: accumulate, batch size, length


def given(*overrides: str) -> tuple[DictConfig, Task]:
    cfg = compose("config", [*TINY, *overrides])
    check(cfg)
    task: Task = instantiate(cfg.task)
    task.prepare()
    return cfg, task


@pytest.mark.parametrize(("tokens", "steps"), [(TOKENS, 1), (10 * TOKENS, 10), (1919, 14)])
def test_tokens_pay_for_whole_steps(tokens: int, steps: int) -> None:
    cfg, task = given(f"budget.tokens={tokens}")
    record = set_steps(cfg, task)
    assert record is not None
    assert cfg.trainer.max_steps == cfg.scheduler.total_steps == record["steps"] == steps
    assert record["tokens"] == steps * TOKENS <= tokens


def test_flops_are_equal_across_patterns_and_steps_are_not() -> None:
    amount, spent, steps = 3e8, [], []
    for pattern in ("attention", "mamba"):
        cfg, task = given(f"budget.flops={amount}", f"pattern={pattern}")
        record = set_steps(cfg, task)
        assert record is not None
        model = build_model(cfg, task.vocab_size)
        assert record["flops"] == 3 * model.flops(1, 16) / 16 * record["tokens"]
        spent.append(record["flops"])
        steps.append(record["steps"])
    assert steps[0] != steps[1]
    # what is left would not have paid for another step
    for each, count in zip(spent, steps, strict=True):
        assert amount * count / (count + 1) < each <= amount


def test_seconds_pay_for_steps_and_nothing_is_drawn() -> None:
    cfg, task = given("budget.seconds=1")
    before = torch.get_rng_state()
    record = set_steps(cfg, task)
    assert torch.equal(torch.get_rng_state(), before)
    assert record is not None
    assert record["steps"] == cfg.trainer.max_steps >= 1
    assert record["seconds"] <= 1


def test_without_a_budget_the_steps_stay() -> None:
    cfg, task = given()
    assert set_steps(cfg, task) is None
    assert cfg.trainer.max_steps == 60


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget.tokens=127"], r"budget\.tokens=127: one step takes 128"),
        (["budget.tokens=1e6", "budget.seconds=1"], "expected at most one of tokens"),
    ],
)
def test_what_cannot_be_paid(overrides: list[str], message: str) -> None:
    cfg, task = given(*overrides)
    with pytest.raises(ConfigError, match=message):
        set_steps(cfg, task)


def test_the_run_reads_what_its_record_says(tmp_path) -> None:
    from records.folder import RunFolder

    train_here(*TINY, f"budget.tokens={10 * TOKENS}", f"run_dir={tmp_path / 'run'}")
    record = RunFolder.open(tmp_path / "run").record()
    assert record["steps"] == record["budget"]["steps"] == 10
    assert record["tokens"] == record["budget"]["tokens"] == 10 * TOKENS
