"""A run's length, given as what it may cost instead of as a number of steps.

A FLOP budget counts training: three times the forward pass, two of them for the backward pass.
"""

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from models.matching import resize
from schema.errors import ConfigError
from tasks.base import Task
from training.data import loader_of, share_of
from training.module import Training, build_module
from training.rng import isolated_generators

KINDS = ("tokens", "flops", "seconds")
TRAINING_OVER_FORWARD = 3  # FLOPs
SAMPLED = 64  # examples, for their mean length
WARM_UP, TIMED = 2, 5  # steps, for the seconds of one


def fitted_to_config(cfg: DictConfig, task: Task) -> dict[str, Any]:
    """Set the size that cfg.match asks for, then the steps that cfg.budget pays for.

    Returns:
        For the record, where they ask for something: `match`, see models.matching.resize, and
        `budget`, see set_steps.

    Raises:
        ConfigError: one of them cannot be done.
    """
    entries: dict[str, Any] = {}
    if cfg.match.quantity is not None:
        length = round(mean_length(task))
        entries["match"] = resize(cfg, vocab_size=task.vocab_size, length=length)
    budget = set_steps(cfg, task)
    return entries if budget is None else {**entries, "budget": budget}


def set_steps(cfg: DictConfig, task: Task) -> dict[str, Any] | None:
    """Set cfg.trainer.max_steps to what cfg.budget pays for: as many whole steps as fit.

    Nothing is drawn from the global generators. Seconds are those of a few steps timed here and
    now, so that the same budget may be another number of steps on the next start; the run's
    configuration keeps the number, and a resumed run makes the same steps.

    Returns:
        For the record: kind, given, steps, and the tokens, training FLOPs and (of a budget of
        seconds) seconds they are expected to take. None without a budget.

    Raises:
        ConfigError: two budgets, or one that does not pay for a single step.
    """
    given = {kind: cfg.budget[kind] for kind in KINDS if cfg.budget[kind] is not None}
    if not given:
        return None
    if len(given) > 1:
        raise ConfigError(f"budget={given}: expected at most one of {', '.join(KINDS)}")
    ((kind, amount),) = given.items()
    length = mean_length(task)
    shares = share_of(cfg.trainer).world_size
    tokens = length * task.recipe.batch_size * cfg.trainer.accumulate * shares
    with isolated_generators():
        module = build_module(cfg, task.vocab_size)
        whole = max(1, round(length))
        flops = TRAINING_OVER_FORWARD * module.model.flops(1, whole) / whole * tokens
        seconds = _seconds_per_step(module, cfg, task) if kind == "seconds" else None
    cost = {"tokens": tokens, "flops": flops, "seconds": seconds}
    steps = int(amount / cost[kind])  # type: ignore[operator]
    if steps < 1:
        raise ConfigError(f"budget.{kind}={amount:g}: one step takes {cost[kind]:g}")
    cfg.trainer.max_steps = steps
    expected = {name: each * steps for name, each in cost.items() if each is not None}
    return {"kind": kind, "given": amount, "steps": steps, **expected}


def mean_length(task: Task) -> float:
    """T of the training examples; a mean over some, where a task mixes lengths."""
    dataset: Any = task.train_set()
    stride = max(1, len(dataset) // SAMPLED)
    chosen = range(0, len(dataset), stride)
    return sum(task.collate([dataset[i]])["inputs"].shape[1] for i in chosen) / len(chosen)


def _seconds_per_step(module: Training, cfg: DictConfig, task: Task) -> float:
    """Median time of an update on this machine, of a model that is thrown away."""
    device = torch.device("cpu" if cfg.trainer.accelerator == "cpu" else _accelerator())
    module.to(device)
    optimizer = module.configure_optimizers()["optimizer"]
    batches = iter(loader_of(task, cfg, step=0))
    times = []
    for _ in range(WARM_UP + TIMED):
        start = time.perf_counter()
        for batch in _some(batches, cfg.trainer.accumulate):
            on_device = {name: x.to(device) for name, x in batch.items()}
            module.training_step(on_device, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        float(module.loss["loss"])  # waits for the device
        times.append(time.perf_counter() - start)
    return median(times[WARM_UP:])


def _some(batches: Iterator[dict[str, Tensor]], count: int) -> Iterator[dict[str, Tensor]]:
    for _ in range(count):
        yield next(batches)


def _accelerator() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
