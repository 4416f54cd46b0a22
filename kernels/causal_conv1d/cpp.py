"""The convolution in C++ (conv.cpp): what it is told, and what becomes of its results.

B batch, T time, D channels, W taps.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.causal_conv1d.documents import Documents
from kernels.native import DTYPES, Call, fields
from kernels.precision import accumulation_dtype, outside_autocast

SOURCE = Path(__file__).with_name("conv.cpp")
CHUNK = 256  # tokens of a stretch, if that is not fewer than W


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *fields(ctypes.c_int64, "dtype", "batch", "time"),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_int64, "batch", "length", "channels", "width", "silu", "chunk", "threads"),
        *fields(_Rows, "x", "y", "grad_y", "dx"),
        *fields(ctypes.c_void_p, "taps", "bias", "state", "reach"),
        *fields(ctypes.c_void_p, "d_state", "parts_taps", "parts_bias"),
    )


@outside_autocast
def forward(
    library: ctypes.CDLL,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
) -> Tensor:
    """y (B, T, D), as shifted.forward."""
    call = _Convolution(library, x, weight, bias, state, segments, silu)
    y = call.rows("y", torch.empty(x.shape, dtype=call.stored))
    call.run("forward")
    return call.documents.restore(y).to(x.dtype)


@outside_autocast
def backward(
    library: ctypes.CDLL,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As shifted.backward."""
    call = _Convolution(library, x, weight, bias, state, segments, silu)
    (B, _, D), W = x.shape, weight.shape[1]
    call.rows("grad_y", call.documents.arrange(grad_y).to(call.stored))
    dx = call.rows("dx", torch.empty(x.shape, dtype=call.stored))
    d_state = call.sums("d_state", B, W - 1, D)
    d_taps = call.sums("parts_taps", call.stretches, W, D)
    d_bias = call.sums("parts_bias", call.stretches, D)
    call.run("backward")
    d_weight = d_taps.sum(0).T.to(weight.dtype).contiguous()
    return call.documents.restore(dx).to(x.dtype), d_weight, d_bias.sum(0), d_state


class _Convolution(Call):
    """What both passes read."""

    def __init__(
        self,
        library: ctypes.CDLL,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        segments: Tensor | None,
        silu: bool,
    ) -> None:
        (B, T, D), W = x.shape, weight.shape[1]
        self.dtype = accumulation_dtype(x, weight)
        self.stored = x.dtype if x.dtype in DTYPES else self.dtype
        self.documents = Documents(segments, W)
        chunk = max(CHUNK, W)
        self.stretches = B * -(-T // chunk)
        super().__init__(library, _Problem(B, T, D, W, silu, chunk), work=B * T * D * W)
        self.rows("x", self.documents.arrange(x).to(self.stored))
        for name, given in (("taps", weight.T), ("bias", bias), ("state", state)):
            if given is not None:
                self.point(name, given, self.dtype)
        if self.documents.reach is not None:
            self.point("reach", self.documents.reach, torch.int32)

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor (B, T, D), its channels side by side."""
        if tensor.stride(2) != 1:
            tensor = tensor.contiguous()
        kind = DTYPES.index(tensor.dtype)
        described = _Rows(tensor.data_ptr(), kind, tensor.stride(0), tensor.stride(1))
        return self.describe(name, tensor, described)

    def sums(self, name: str, *shape: int) -> Tensor:
        """Room for a result in the dtype of sums."""
        return self.room(name, shape, self.dtype)

    def run(self, function: str) -> int:
        """Call `function` for the dtype of sums."""
        return super().run(f"{function}{8 * self.dtype.itemsize}")
