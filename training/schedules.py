"""Learning-rate schedules as pure functions of the step.

Each gives the factor of the learning rate for the update that follows `step` completed ones,
step = 0, 1, ..., total_steps - 1. Warm-up is linear: update 0 has 1 / warmup_steps of the rate and
update warmup_steps - 1 all of it. A run that goes on past total_steps keeps the last factor.
"""

import math

from schema.errors import ConfigError


def constant(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Warm-up, then 1."""
    _check(warmup_steps, total_steps)
    return _warmup(step, warmup_steps)


def cosine(step: int, *, warmup_steps: int, total_steps: int, min_ratio: float = 0.0) -> float:
    """Warm-up, then half a cosine from 1 at the end of warm-up to `min_ratio` at total_steps.

    Loshchilov and Hutter 2017 (SGDR), equation 5, without restarts.
    """
    _check(warmup_steps, total_steps, min_ratio)
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    part = (min(step, total_steps) - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * part))


def wsd(
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    decay_ratio: float = 0.2,
    min_ratio: float = 0.0,
) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM): 1, then linear down to `min_ratio`.

    The decay takes the last `decay_ratio` of total_steps. The paper's own decay is exponential;
    the linear one is that of Haegele et al. 2024.
    """
    _check(warmup_steps, total_steps, min_ratio)
    if not 0 <= decay_ratio <= 1:
        raise ConfigError(f"scheduler.decay_ratio={decay_ratio}: allowed: 0 to 1")
    decay_steps = round(decay_ratio * total_steps)
    if warmup_steps + decay_steps > total_steps:
        raise ConfigError(
            f"scheduler.warmup_steps={warmup_steps} and scheduler.decay_ratio={decay_ratio} take "
            f"{warmup_steps + decay_steps} steps; there are scheduler.total_steps={total_steps}"
        )
    left = max(0, total_steps - step)
    if left >= decay_steps:
        return _warmup(step, warmup_steps)
    return min_ratio + (1 - min_ratio) * left / decay_steps


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / max(1, warmup_steps))


def _check(warmup_steps: int, total_steps: int, min_ratio: float = 0.0) -> None:
    if not 0 <= warmup_steps <= total_steps:
        raise ConfigError(
            f"scheduler.warmup_steps={warmup_steps}: allowed: 0 to scheduler.total_steps="
            f"{total_steps}"
        )
    if not 0 <= min_ratio <= 1:
        raise ConfigError(f"scheduler.min_ratio={min_ratio}: allowed: 0 to 1")
