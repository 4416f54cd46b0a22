"""What a step leaves behind in the module, and what the meter makes of it."""

from functools import partial

import pytest
import torch

from tests.tiny import tiny_model
from training.callbacks.meter import Meter
from training.errors import TrainingError
from training.module import Training
from training.objectives import NextToken
from training.optim import adamw
from training.schedules import constant


def module() -> Training:
    schedule = partial(constant, warmup_steps=0, total_steps=1)
    return Training(tiny_model("attention"), NextToken(), partial(adamw, lr=0.5), schedule)


def batch(rows: int = 2) -> dict[str, torch.Tensor]:
    tokens = torch.randint(31, (rows, 6), generator=torch.Generator().manual_seed(0))
    return {"inputs": tokens, "labels": tokens.roll(-1, dims=1)}


@pytest.mark.parametrize("bound", [None, 1e-3, 1e9])
def test_clipping_bounds_the_gradient_and_keeps_the_norm_of_before(bound: float | None) -> None:
    training = module()
    optimizer = training.configure_optimizers()["optimizer"]
    training.training_step(batch(), 0).backward()
    flat = torch.cat([p.grad.flatten() for p in training.parameters() if p.grad is not None])
    before = flat.double().norm().item()
    training.configure_gradient_clipping(optimizer, bound)
    flat = torch.cat([p.grad.flatten() for p in training.parameters() if p.grad is not None])
    # an fp32 norm of a few thousand squares
    assert training.gradient_norm.item() == pytest.approx(before, rel=1e-5)
    assert training.lr == 0.5
    after = before if bound is None else min(before, bound)
    assert flat.double().norm().item() == pytest.approx(after, rel=1e-4)


def test_padding_is_not_counted_as_tokens() -> None:
    training, data = module(), batch()
    training.training_step(data, 0)
    assert int(training.tokens) == 12
    data["segments"] = torch.tensor([[0, 0, 1, 1, -1, -1], [-1, 0, 0, 0, 0, 0]])
    training.training_step(data, 0)
    assert int(training.tokens) == 9


def test_the_meter_names_the_first_step_that_was_not_finite() -> None:
    training, meter = module(), Meter()
    training.training_step(batch(), 0)
    for step, norm in enumerate((1.0, float("inf"), float("nan"), 1.0), 1):
        training.gradient_norm = torch.tensor(norm)
        meter.watch(training, step)
        if step == 1:
            meter.check()
    with pytest.raises(TrainingError, match=r"^step 2: .* not finite; every single gradient is$"):
        meter.check()


def test_the_meter_goes_on_from_its_state() -> None:
    training = module()
    whole, first, second = Meter(), Meter(), Meter()
    for n in range(5):
        training.training_step(batch(rows=n + 1), 0)
        whole.add(training, seconds=0.5)
        (first if n < 2 else second).add(training, seconds=0.5)
        if n == 1:
            second.load_state_dict(first.state_dict())
    assert second.take() == whole.take()
    assert whole.take() == ({}, 0, 0.0)
