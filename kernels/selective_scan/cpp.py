"""The selective scan in C++ (scan.cpp): what it is told, and what becomes of its results.

B batch, D channels, L time, N state, G groups.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.native import DTYPES, Call, fields
from kernels.selective_scan.chunked import Gradients, new_gradients
from kernels.selective_scan.tiles import STEPS, Scan

SOURCE = Path(__file__).with_name("scan.cpp")
RESTART, PADDING = 1, 2  # as in scan.cpp


class _Array(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *fields(ctypes.c_int64, "dtype", "batch", "group", "row", "time"),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_int64, "batch", "channels", "length", "states", "groups", "steps"),
        *fields(ctypes.c_int64, "threads", "delta_softplus"),
        *fields(_Array, "u", "delta", "B", "C", "z"),
        *fields(ctypes.c_void_p, "A", "D", "delta_bias", "initial_state", "flags", "kept"),
        *fields(_Array, "y"),
        *fields(ctypes.c_void_p, "last"),
        *fields(_Array, "grad_y", "grad_u", "grad_delta", "grad_z"),
        *fields(ctypes.c_void_p, "grad_last", "grad_initial", "parts_A", "parts_D"),
        *fields(ctypes.c_void_p, "parts_bias", "parts_B", "parts_C"),
    )


class _Scan(Call):
    """What both passes read."""

    def __init__(self, library: ctypes.CDLL, scan: Scan) -> None:
        (batch, channels, length), (groups, N) = scan.u.shape, scan.B.shape[1:3]
        sizes = (batch, channels, length, N, groups, STEPS)
        problem = _Problem(*sizes, delta_softplus=scan.delta_softplus)
        states = batch * channels * length * N
        super().__init__(library, problem, work=8 * states)  # with the exponentials, about
        self.dtype = scan.dtype
        for name in ("u", "delta", "B", "C", "z"):
            given = getattr(scan, name)
            if given is not None:
                self.array(name, given if given.dtype in DTYPES else given.to(scan.dtype))
        for name in ("A", "D", "delta_bias", "initial_state"):
            given = getattr(scan, name)
            if given is not None:
                self.point(name, given, self.dtype)
        if scan.segments is not None and scan.restarts is not None:
            flags = RESTART * scan.restarts.to(torch.uint8)
            self.point("flags", flags.masked_fill_(scan.segments < 0, PADDING), torch.uint8)

    def array(self, name: str, tensor: Tensor) -> None:
        """A tensor (B, D, L) or (B, G, N, L) of any strides."""
        batch, *group, row, time = tensor.stride()
        dtype = DTYPES.index(tensor.dtype)
        self.describe(
            name, tensor, _Array(tensor.data_ptr(), dtype, batch, *(group or [0]), row, time)
        )

    def result(self, name: str, *shape: int) -> Tensor:
        """Room for a result in the dtype of states."""
        return self.room(name, shape, self.dtype)

    def run(self, function: str) -> int:
        """Call `function` for the dtype of states."""
        return super().run(f"{function}{8 * self.dtype.itemsize}")


def forward(library: ctypes.CDLL, scan: Scan, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As chunked.forward, with the same states in front of the same tiles."""
    (batch, channels, _), N = scan.u.shape, scan.A.shape[1]
    call = _Scan(library, scan)
    y = torch.empty_like(scan.u)
    out = y if y.dtype in DTYPES else torch.empty_like(y, dtype=scan.dtype)
    call.array("y", out)
    last = call.result("last", batch, channels, N)
    states = last.new_empty(0)
    if keep_states:
        states = call.result("kept", len(scan.starts), batch, N, channels)
    call.run("forward")
    return (y if out is y else y.copy_(out)), last, states


def backward(
    library: ctypes.CDLL, scan: Scan, states: Tensor, grad_y: Tensor, grad_last: Tensor
) -> Gradients:
    """As chunked.backward.

    Sums over channels are taken in parts of the same channels whatever the number of threads, so
    that results repeat to the bit.
    """
    (batch, channels, length), (_, groups, N, _) = scan.u.shape, scan.B.shape
    call = _Scan(library, scan)
    grads = new_gradients(scan, grad_last)
    wide = {}
    for name in ("u", "delta", "z"):
        if getattr(scan, name) is not None:
            grad = getattr(grads, name)
            wide[name] = grad if grad.dtype in DTYPES else torch.empty_like(grad, dtype=scan.dtype)
            call.array(f"grad_{name}", wide[name])
    call.array("grad_y", grad_y if grad_y.dtype in DTYPES else grad_y.to(scan.dtype))
    call.point("kept", states, call.dtype)
    call.point("grad_last", grad_last, call.dtype)
    initial = call.result("grad_initial", batch, channels, N)
    chunks = call.run("chunks")
    parts = {
        "A": call.result("parts_A", batch, channels, N),
        "D": call.result("parts_D", batch, channels),
        "delta_bias": call.result("parts_bias", batch, channels),
        "B": call.result("parts_B", chunks, batch, groups, length, N),
        "C": call.result("parts_C", chunks, batch, groups, length, N),
    }
    call.run("backward")
    for name, part in parts.items():
        total = part.sum(0)
        getattr(grads, name).copy_(total.mT if name in ("B", "C") else total)
    grads.initial_state.copy_(initial)
    for name, grad in wide.items():
        if grad is not getattr(grads, name):
            getattr(grads, name).copy_(grad)
    return grads
