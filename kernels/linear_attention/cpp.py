"""Steps of linear attention in C++ (step.cpp): decoding is call overhead, and this is one call.

B batch, T time, H heads, K features, V value width.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.native import DTYPES
from kernels.precision import accumulation_dtype

SOURCE = Path(__file__).with_name("step.cpp")
ONE_THREAD = 1 << 18  # numbers in the state from which on a second thread is worth its start

_SIZES = ("batch", "length", "heads", "K", "V", "dtype", "normalize", "threads")
_POINTERS = ("q", "k", "v", "S", "z", "padding", "y", "S_after", "z_after")


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_double) for name in ("scale", "eps")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


def steps(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    padding: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As step.steps."""
    (B, T, H, K), V = q.shape, v.shape[3]
    exact = accumulation_dtype(q, k, v)
    stored = v.dtype if v.dtype == q.dtype == k.dtype and v.dtype in DTYPES else exact
    q, k, values = _readable(q, stored), _readable(k, stored), _readable(v, stored)
    if S is not None and z is not None:
        S, z = _readable(S, exact), _readable(z, exact)
        S_after, z_after = torch.empty_like(S), torch.empty_like(z)
    else:
        S_after, z_after = q.new_empty(B, H, K, V, dtype=exact), q.new_empty(B, H, K, dtype=exact)
    if padding is not None:
        padding = padding.contiguous()
    y = torch.empty_like(values)
    threads = 1 if S_after.numel() < ONE_THREAD else torch.get_num_threads()
    problem = _Problem(
        B, T, H, K, V, DTYPES.index(stored), normalize, threads, scale, eps,
        q.data_ptr(), k.data_ptr(), values.data_ptr(), _address(S), _address(z), _address(padding),
        y.data_ptr(), S_after.data_ptr(), z_after.data_ptr(),
    )  # fmt: skip
    library.steps(ctypes.byref(problem))
    return y if stored == v.dtype else y.to(v.dtype), S_after, z_after


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Two calls that do nothing would cost as much as the step.
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
