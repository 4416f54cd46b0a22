"""Learning-rate schedules against their closed forms, and what they refuse."""

import math
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from schema.errors import ConfigError
from training.schedules import constant, cosine, wsd

WARMUP, TOTAL = 10, 100


@pytest.mark.parametrize("schedule", [constant, cosine, wsd])
def test_warm_up_is_linear_and_its_last_update_has_the_whole_rate(schedule) -> None:
    factors = [schedule(step, warmup_steps=WARMUP, total_steps=TOTAL) for step in range(WARMUP)]
    assert factors == pytest.approx([(step + 1) / WARMUP for step in range(WARMUP)], abs=1e-12)


def test_constant_stays() -> None:
    assert all(constant(s, warmup_steps=WARMUP, total_steps=TOTAL) == 1 for s in range(9, 300))


@pytest.mark.parametrize("low", [0.0, 0.1])
def test_cosine(low: float) -> None:
    schedule = partial(cosine, warmup_steps=WARMUP, total_steps=TOTAL, min_ratio=low)
    assert schedule(WARMUP) == 1.0
    assert schedule((WARMUP + TOTAL) // 2) == pytest.approx((1 + low) / 2)
    assert schedule(TOTAL) == pytest.approx(low, abs=1e-12)
    for step in range(WARMUP, TOTAL):
        angle = math.pi * (step - WARMUP) / (TOTAL - WARMUP)
        # cos^2(x/2) = (1 + cos x) / 2
        assert schedule(step) == pytest.approx(low + (1 - low) * math.cos(angle / 2) ** 2)


@pytest.mark.parametrize("low", [0.0, 0.1])
def test_wsd(low: float) -> None:
    schedule = partial(wsd, warmup_steps=WARMUP, total_steps=TOTAL, decay_ratio=0.2, min_ratio=low)
    assert all(schedule(step) == 1 for step in range(WARMUP, 81))
    assert schedule(90) == pytest.approx((1 + low) / 2)
    steps = range(80, TOTAL)
    falls = [schedule(s) - schedule(s + 1) for s in steps]
    assert falls == pytest.approx([(1 - low) / 20] * 20)
    assert schedule(TOTAL) == pytest.approx(low)


@pytest.mark.parametrize("schedule", [cosine, wsd])
def test_beyond_its_end_a_schedule_keeps_its_last_factor(schedule) -> None:
    whole = partial(schedule, warmup_steps=WARMUP, total_steps=TOTAL, min_ratio=0.25)
    assert whole(TOTAL) == whole(10 * TOTAL) == pytest.approx(0.25)


def test_no_warm_up_and_no_decay_are_allowed() -> None:
    assert cosine(0, warmup_steps=0, total_steps=1) == 1.0
    assert wsd(99, warmup_steps=0, total_steps=100, decay_ratio=0.0) == 1.0
    assert cosine(4, warmup_steps=5, total_steps=5) == 1.0


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (cosine, {"warmup_steps": 101}, r"warmup_steps=101: allowed: 0 to .*total_steps=100"),
        (constant, {"warmup_steps": -1}, "warmup_steps=-1"),
        (cosine, {"min_ratio": 1.5}, "min_ratio=1.5: allowed: 0 to 1"),
        (wsd, {"decay_ratio": -0.1}, "decay_ratio=-0.1: allowed: 0 to 1"),
        (wsd, {"decay_ratio": 0.95}, "take 105 steps; there are scheduler.total_steps=100"),
    ],
)
def test_impossible_options_are_named(schedule, options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule(0, **{"warmup_steps": WARMUP, "total_steps": TOTAL} | options)


def test_the_optimizer_gets_the_factor_of_its_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    scheduler = LambdaLR(optimizer, partial(cosine, warmup_steps=2, total_steps=6))
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2 * cosine(s, warmup_steps=2, total_steps=6) for s in range(6)])
