"""The recurrence in C++ (recurrence.cpp): what it is told, and what becomes of its results.

B batch, T time, D width. Complex numbers are pairs of real ones there.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.native import Call, fields

SOURCE = Path(__file__).with_name("recurrence.cpp")


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *fields(ctypes.c_int64, "batch", "time"),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_int64, "batch", "length", "width", "is_double", "is_complex", "threads"),
        *fields(_Rows, "a", "b", "h"),
        *fields(ctypes.c_void_p, "h0"),
        *fields(_Rows, "grad", "d_a", "d_b"),
        *fields(ctypes.c_void_p, "d_h0"),
    )


def forward(library: ctypes.CDLL, a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """As blocked.forward."""
    call = _Recurrence(library, a, h0)
    call.rows("b", b)
    h = call.rows("h", torch.empty(b.shape, dtype=b.dtype))
    call.run("forward")
    return h


def backward(
    library: ctypes.CDLL, grad: Tensor, a: Tensor, h: Tensor, h0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As blocked.backward."""
    call = _Recurrence(library, a, h0)
    call.rows("grad", grad)
    call.rows("h", h)
    d_a, d_b = (call.rows(name, torch.empty(h.shape, dtype=h.dtype)) for name in ("d_a", "d_b"))
    d_h0 = torch.empty(h0.shape, dtype=h0.dtype)
    call.point("d_h0", _real(d_h0), d_h0.dtype.to_real())
    call.run("backward")
    return d_a, d_b, d_h0


class _Recurrence(Call):
    """What both passes read."""

    def __init__(self, library: ctypes.CDLL, a: Tensor, h0: Tensor) -> None:
        (B, T, D), pairs = a.shape, a.is_complex()
        exact = a.dtype.to_real()
        numbers = D * (1 + pairs)
        problem = _Problem(B, T, numbers, exact == torch.float64, pairs)
        super().__init__(library, problem, work=8 * B * T * numbers)  # it waits for memory
        self.rows("a", a)
        self.point("h0", _real(h0), exact)

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor (B, T, D), its numbers side by side."""
        if tensor.stride(2) != 1:
            tensor = tensor.contiguous()
        real = _real(tensor)
        self.describe(name, real, _Rows(real.data_ptr(), real.stride(0), real.stride(1)))
        return tensor


def _real(x: Tensor) -> Tensor:
    """Complex (..., D) as real (..., 2D)."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x
