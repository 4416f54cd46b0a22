"""Timing side by side in one process, and what a timing is worth.

Contenders are called in turn, round after round, so that a slow moment of the machine hits all of
them; a figure is the median over the rounds, and a ratio the median of the ratios within rounds.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

# That one timing takes: what is faster is called several times in a row. Long beside the time for
# which the threads of the contender before spin on, some milliseconds.
LEAST_SECONDS = 2e-2


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one figure for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Over the rounds."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Median over fastest: 1 on a quiet machine."""
        return self.median / min(self.seconds)


def measure(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, Timing]:
    """The timings of all contenders, interleaved, after two calls of each that do not count."""
    calls = {}
    for name, run in contenders.items():
        run()
        calls[name] = max(1, math.ceil(LEAST_SECONDS / _time(run, 1, device)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        start = turn % len(names)  # nobody always comes first
        for name in names[start:] + names[:start]:
            seconds[name].append(_time(contenders[name], calls[name], device))
    return {name: Timing(tuple(each)) for name, each in seconds.items()}


def ratio(ours: Timing, other: Timing, max_spread: float) -> float | None:
    """How many times as long as ours the other takes; None where a timing is too noisy to say."""
    if max(ours.spread, other.spread) > max_spread:
        return None
    return median(b / a for a, b in zip(ours.seconds, other.seconds, strict=True))


def exponent(lengths: Sequence[int], timings: Sequence[Timing], max_spread: float) -> float | None:
    """The power of the length that the times grow with, by least squares over their logarithms.

    None with fewer than three lengths, or where a timing is too noisy.
    """
    if len(lengths) < 3 or any(timing.spread > max_spread for timing in timings):
        return None
    x = [math.log(length) for length in lengths]
    y = [math.log(timing.median) for timing in timings]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def _time(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds of one call: by CUDA events on a GPU, else by the clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls
