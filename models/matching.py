"""Sizes at which two networks cost the same."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf

from models.build import build_model
from schema.errors import ConfigError
from schema.names import check_pattern

Quantity = Literal["params", "flops", "state"]
TOLERANCE = 0.01  # relative
LARGEST = 1 << 14  # the widest network looked at
UNITS = {"params": "parameters", "flops": "forward FLOPs per token", "state": "state bytes"}


def resize(cfg: DictConfig, *, vocab_size: int, length: int) -> dict[str, Any] | None:
    """Set the key cfg.match.key so that the network costs what cfg.match.to says.

    Args:
        length: tokens of a training sequence.

    Returns:
        For the record: quantity, to, target, key, the value chosen and what the network costs
        with it. None where nothing is to be matched.

    Raises:
        ConfigError: `to` is missing, or see `match`.
    """
    wanted = cfg.match
    if wanted.quantity is None:
        return None
    if wanted.to is None or OmegaConf.select(cfg, wanted.key, default=cfg) is cfg:
        raise ConfigError(
            f"match={OmegaConf.to_container(wanted)}: expected `to`, a pattern or a number, and "
            "`key`, a key of this configuration that sets a size"
        )
    target = wanted.to
    if not isinstance(target, (int, float)):
        other = copy.deepcopy(cfg)
        other.pattern = wanted.to
        check_pattern(OmegaConf.to_container(other).get("pattern"), cfg.mixers)  # type: ignore
        target = measure(other, wanted.quantity, vocab_size=vocab_size, length=length)
    value, cost = match(
        cfg, wanted.quantity, target, key=wanted.key, vocab_size=vocab_size, length=length
    )
    OmegaConf.update(cfg, wanted.key, value)
    to = OmegaConf.to_container(wanted)["to"]  # type: ignore
    chosen = {"quantity": wanted.quantity, "to": to, "target": target}
    return {**chosen, "key": wanted.key, "value": value, "cost": cost}


def measure(cfg: DictConfig, quantity: Quantity, *, vocab_size: int, length: int) -> float:
    """`quantity` of the network that `cfg` describes, built without memory for its weights.

    Args:
        length: tokens of the sequence that FLOPs per token and state bytes are of.
    """
    with torch.device("meta"):
        model = build_model(cfg, vocab_size)
    if quantity == "params":
        return sum(p.numel() for p in model.parameters())
    if quantity == "flops":
        return model.flops(1, length) / length
    return model.state_bytes(1, length)


def match(
    cfg: DictConfig,
    quantity: Quantity,
    target: float,
    *,
    key: str = "model.d_model",
    vocab_size: int,
    length: int,
) -> tuple[int, float]:
    """The value of `key` at which `quantity` is nearest to `target`, and what it is there.

    The quantity must grow with the value. Values at which the network cannot be built, because a
    width does not divide, are passed over. `cfg` is left as it was.

    Raises:
        ConfigError: none is within 1% of the target; says the nearest.
    """
    found: dict[int, float] = {}

    def cost(value: int) -> float | None:
        tried = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
        OmegaConf.update(tried, key, value)
        try:
            found[value] = measure(tried, quantity, vocab_size=vocab_size, length=length)  # type: ignore
        except ValueError:  # what a layer does not allow
            return None
        return found[value]

    step = _step(cfg, key)
    _search(cost, target, step, LARGEST // step)
    if not found:
        raise ConfigError(f"match.key={key}: the network can be built with no value of it")
    best = min(found, key=lambda value: (abs(found[value] - target), value))
    error = abs(found[best] - target) / target
    if error > TOLERANCE:
        raise ConfigError(
            f"match.quantity={quantity} of {target:,.0f}: the nearest is {key}={best} with "
            f"{found[best]:,.0f} {UNITS[quantity]}, {error:.1%} away; allowed: within "
            f"{TOLERANCE:.0%}; match.key=channel_mixer.hidden, where there is one, is finer"
        )
    return best, found[best]


def _step(cfg: DictConfig, key: str) -> int:
    """Widths are multiples of twice the heads, so that a head can be rotated; others any."""
    return 2 * cfg.model.num_heads if key == "model.d_model" else 1


def _search(cost: Callable[[int], float | None], target: float, step: int, largest: int) -> None:
    """Evaluate `cost` at multiples of `step` on both sides of `target`, by bisection."""
    low, high = 1, largest
    while low < high:
        middle = (low + high) // 2
        known = _next(cost, middle, high, step)
        if known is None:
            high = middle
            continue
        place, value = known
        if value < target:
            low = place + 1
        else:
            high = middle
    for each in range(max(1, low - 2), min(largest, low + 2) + 1):
        cost(each * step)


def _next(
    cost: Callable[[int], float | None], start: int, end: int, step: int
) -> tuple[int, float] | None:
    """The first multiple from `start` on, below `end`, that can be built."""
    for place in range(start, min(end, start + 16)):
        value = cost(place * step)
        if value is not None:
            return place, value
    return None
