"""The selective scan in C++ (scan.cpp): what it is told, and what becomes of its results.

B batch, D channels, L time, N state, G groups.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.native import DTYPES
from kernels.selective_scan.chunked import Gradients, new_gradients
from kernels.selective_scan.tiles import STEPS, Scan

SOURCE = Path(__file__).with_name("scan.cpp")
RESTART, PADDING = 1, 2  # as in scan.cpp


class _Array(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("dtype", "batch", "group", "row", "time")),
    )


def _fields(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


class _Problem(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "batch", "channels", "length", "states", "groups", "steps"),
        *_fields(ctypes.c_int64, "threads", "delta_softplus"),
        *_fields(_Array, "u", "delta", "B", "C", "z"),
        *_fields(ctypes.c_void_p, "A", "D", "delta_bias", "initial_state", "flags", "kept"),
        *_fields(_Array, "y"),
        *_fields(ctypes.c_void_p, "last"),
        *_fields(_Array, "grad_y", "grad_u", "grad_delta", "grad_z"),
        *_fields(ctypes.c_void_p, "grad_last", "grad_initial", "parts_A", "parts_D"),
        *_fields(ctypes.c_void_p, "parts_bias", "parts_B", "parts_C"),
    )


class _Call:
    """One call: a problem, and the tensors it points to, which live as long."""

    def __init__(self, library: ctypes.CDLL, scan: Scan) -> None:
        (batch, channels, length), groups = scan.u.shape, scan.B.shape[1]
        self.library, self.dtype = library, scan.dtype
        self.held: list[Tensor] = []
        self.problem = _Problem(
            batch, channels, length, scan.A.shape[1], groups, STEPS,
            torch.get_num_threads(), scan.delta_softplus,
        )  # fmt: skip
        for name in ("u", "delta", "B", "C", "z"):
            given = getattr(scan, name)
            if given is not None:
                self.array(name, given if given.dtype in DTYPES else given.to(scan.dtype))
        for name in ("A", "D", "delta_bias", "initial_state"):
            given = getattr(scan, name)
            if given is not None:
                self.states(name, given)
        if scan.segments is not None and scan.restarts is not None:
            flags = RESTART * scan.restarts.to(torch.uint8)
            self._pointer("flags", flags.masked_fill_(scan.segments < 0, PADDING).contiguous())

    def array(self, name: str, tensor: Tensor) -> None:
        """A tensor (B, D, L) or (B, G, N, L) of any strides."""
        batch, *group, row, time = tensor.stride()
        dtype = DTYPES.index(tensor.dtype)
        described = _Array(tensor.data_ptr(), dtype, batch, *(group or [0]), row, time)
        setattr(self.problem, name, described)
        self.held.append(tensor)

    def states(self, name: str, tensor: Tensor) -> None:
        """A tensor that the kernel wants contiguous, in the dtype of states; read only."""
        self._pointer(name, tensor.to(self.dtype).contiguous())

    def result(self, name: str, *shape: int) -> Tensor:
        """Room for a result in the dtype of states."""
        made = torch.empty(shape, dtype=self.dtype)
        self._pointer(name, made)
        return made

    def run(self, function: str) -> int:
        """`function` in the dtype of states."""
        bits = 8 * self.dtype.itemsize
        return getattr(self.library, f"{function}{bits}")(ctypes.byref(self.problem))

    def _pointer(self, name: str, tensor: Tensor) -> None:
        setattr(self.problem, name, tensor.data_ptr())
        self.held.append(tensor)


def forward(library: ctypes.CDLL, scan: Scan, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As chunked.forward, with the same states in front of the same tiles."""
    (batch, channels, _), N = scan.u.shape, scan.A.shape[1]
    call = _Call(library, scan)
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
    call = _Call(library, scan)
    grads = new_gradients(scan, grad_last)
    wide = {}
    for name in ("u", "delta", "z"):
        if getattr(scan, name) is not None:
            grad = getattr(grads, name)
            wide[name] = grad if grad.dtype in DTYPES else torch.empty_like(grad, dtype=scan.dtype)
            call.array(f"grad_{name}", wide[name])
    call.array("grad_y", grad_y if grad_y.dtype in DTYPES else grad_y.to(scan.dtype))
    call.states("kept", states)
    call.states("grad_last", grad_last)
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
