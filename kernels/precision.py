"""Which dtype an operator computes in, whatever the autocast around it."""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is float64, else float32: the dtype of states and sums."""
    if any(t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks products on `device` for, None where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def matmul_dtype(*tensors: Tensor, low: torch.dtype | None = None) -> torch.dtype:
    """The dtype in which products of `tensors` run: as stored, unless the CPU is faster in float32.

    A CPU without AMX tiles multiplies 16-bit matrices at about half its float32 rate, and float32
    loses nothing, so there 16-bit inputs are widened block by block.

    Args:
        low: the dtype to lower float32 to, as autocast asks.
    """
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    if low is not None and dtype == torch.float32:
        dtype = low
    if dtype.itemsize == 2 and tensors[0].device.type == "cpu" and not has_amx():
        return torch.float32
    return dtype


@cache
def has_amx() -> bool:
    """Whether this CPU multiplies 16-bit matrices in tiles, several times faster than float32.

    From the first call on this process may use the tiles' registers.
    """
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def outside_autocast(fn: Callable[P, R]) -> Callable[P, R]:
    """Run `fn` with autocast off: it chooses its dtypes itself."""

    @wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        if not torch.is_autocast_enabled(device):
            return fn(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    return wrapped
