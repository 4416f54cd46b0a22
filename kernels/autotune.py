"""Warps and stages of Triton kernels by measurement on the GPU at hand, for those who ask for it.

Kernels are launched with fixed settings, which the static figures are about. Within `autotuned`
each is timed once for every shape that it is given, and launched with what was fastest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kernels.launch import Grid, launch_plainly, launching_through

WARPS, STAGES = (2, 4, 8), (1, 2, 3)

Choices = dict[str, list[int]]  # a kernel with what it was given -> [warps, stages]
Timer = Callable[[Callable[[], None]], float]


@contextmanager
def autotuned(choices: Choices | None = None, timer: Timer | None = None) -> Iterator[Choices]:
    """Launch every kernel of the block with the fastest of WARPS and STAGES.

    Trials run on copies of a kernel's arguments, which takes memory for one more of each. Settings
    change the order of sums: results may differ in rounding from those of the fixed settings, and
    between two tunings.

    Args:
        choices: of an earlier tuning on the same GPU, kept as they are.
        timer: from a launch to its time; that of triton.testing.do_bench by default.

    Yields:
        The choices, to which the block adds.

    Raises:
        RuntimeError: there is no GPU, and no `timer`.
    """
    if timer is None and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU to measure on")
    chosen: Choices = {} if choices is None else choices
    measure = _milliseconds if timer is None else timer

    def launcher(kernel: Any, grid: Grid, args: tuple, settings: dict[str, Any]) -> None:
        key = _key(kernel, args, settings)
        if key not in chosen:
            chosen[key] = _fastest(kernel, grid, args, settings, measure)
        launch_plainly(kernel, grid, args, _with(settings, *chosen[key]))

    with launching_through(launcher):
        yield chosen


def _fastest(
    kernel: Any, grid: Grid, args: tuple, settings: dict[str, Any], measure: Timer
) -> list[int]:
    """[warps, stages]; the fixed settings where nothing is faster."""
    from triton.runtime.errors import OutOfResources

    copies = tuple(x.clone() if isinstance(x, Tensor) else x for x in args)
    fixed = (settings["num_warps"], settings["num_stages"])
    times = {}
    for pair in (fixed, *(p for p in product(WARPS, STAGES) if p != fixed)):
        tried = _with(settings, *pair)
        try:
            times[pair] = measure(lambda tried=tried: launch_plainly(kernel, grid, copies, tried))
        except OutOfResources:  # more shared memory than the GPU has
            continue
    return list(min(times, key=lambda pair: times[pair], default=fixed))


def _with(settings: dict[str, Any], warps: int, stages: int) -> dict[str, Any]:
    return {**settings, "num_warps": warps, "num_stages": stages}


def _key(kernel: Any, args: tuple, settings: dict[str, Any]) -> str:
    """The kernel, the shapes, dtypes and integers that it was given, and its constants."""
    given = [_told(x) for x in args if not isinstance(x, float)]
    constants = [
        f"{name}={_told(x)}"
        for name, x in settings.items()
        if name not in ("num_warps", "num_stages")
    ]
    return f"{kernel.__module__}.{kernel.__name__}({', '.join([*given, *constants])})"


def _told(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    return str(x)


def _milliseconds(run: Callable[[], None]) -> float:
    from triton.testing import do_bench

    milliseconds: Any = do_bench(run, warmup=5, rep=20, return_mode="median")
    return milliseconds
