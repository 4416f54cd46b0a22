"""Launching Triton kernels: with fixed settings, and through one place that can be watched.

A kernel runs on a GPU, or on the CPU where Triton interprets it (TRITON_INTERPRET=1). Tests guard
the memory around its arguments, and the static figures record how it is called, by standing in for
the launcher.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

Grid = tuple[int, ...]
Launcher = Callable[..., None]


def _run(kernel: Any, grid: Grid, args: tuple, settings: dict[str, Any]) -> None:
    kernel[grid](*args, **settings)


_launcher: Launcher = _run


def launch(
    kernel: Any, grid: Grid, *args: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Run `kernel` over `grid`.

    Args:
        args: its arguments in order; tensors are contiguous.
        warps, stages: warps of a program, and loads in flight of a pipelined loop.
        constants: its compile-time arguments by name.
    """
    _launcher(kernel, grid, args, {**constants, "num_warps": warps, "num_stages": stages})


@contextmanager
def launching_through(launcher: Launcher) -> Iterator[None]:
    """Have `launcher(kernel, grid, args, settings)` called in place of every launch."""
    global _launcher
    before, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = before


def launch_plainly(kernel: Any, grid: Grid, args: tuple, settings: dict[str, Any]) -> None:
    """What happens to a launch that nobody watches."""
    _run(kernel, grid, args, settings)


def why_not_triton(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """The reason why Triton forms cannot take such tensors, None where they can."""
    if not _installed():
        return "the package triton is not installed"
    if dtype == torch.float64 or (dtype is not None and dtype.is_complex):
        return (
            f"its Triton kernels sum in float32, and {str(dtype).removeprefix('torch.')} was given"
        )
    watched = _launcher is not _run
    if device.type != "cuda" and not interpreting() and not watched:
        return f"Triton needs a GPU, or TRITON_INTERPRET=1 to be interpreted on the {device.type}"
    return None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton interprets its kernels in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def block_of(width: int, most: int, least: int = 16) -> int:
    """The power of two that covers `width`, between the least that a dot takes and `most`."""
    return max(least, min(most, 1 << (max(1, width) - 1).bit_length()))
