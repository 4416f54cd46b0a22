"""Estimated sparse attention in C++ (cells.cpp): what it is told, and what becomes of its results.

B batch, T queries, S keys, H heads, G key heads, D head width, V value width, K cells.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.estimated_sparse_attention.select import cell_budget, choose_cells
from kernels.estimated_sparse_attention.visible import Visible, visible
from kernels.native import DTYPES
from kernels.precision import accumulation_dtype, outside_autocast

SOURCE = Path(__file__).with_name("cells.cpp")
ONE_THREAD = 1 << 20  # multiply-adds, about, from which on a second thread is worth its start


def _fields(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


class _Problem(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "batch", "queries", "keys", "heads", "kv_heads", "width"),
        *_fields(ctypes.c_int64, "value_width", "cells", "group_heads", "dtype", "probs_dtype"),
        *_fields(ctypes.c_int64, "threads"),
        *_fields(ctypes.c_double, "scale"),
        *_fields(ctypes.c_void_p, "q", "k", "v", "probs", "lengths", "first", "slots", "budget"),
        *_fields(ctypes.c_void_p, "chosen", "y", "log_sum", "grad_y", "dq", "dk", "dv"),
    )


@outside_autocast
def forward(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probs: Tensor,
    segments: Tensor | None,
    k_cells: int,
    causal: bool,
    grouping: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As sparse.forward."""
    (B, T, H, _), K = q.shape, probs.shape[3]
    call = _Call(library, q, k, v, segments, causal, K, scale)
    if grouping in ("causal_batch", "query"):
        heads = H if grouping == "causal_batch" else 1
        probs = call.read("probs", probs.to(accumulation_dtype(probs)))
        call.problem.probs_dtype, call.problem.group_heads = DTYPES.index(probs.dtype), heads
        call.read("budget", cell_budget(call.seen.lengths, heads, K, k_cells))
        cells = call.read("chosen", torch.empty(probs.shape, dtype=torch.bool))
        call.run("choose_cells", 16 * probs.numel())  # the numbers are counted about so often
    else:
        cells = call.read("chosen", choose_cells(probs, call.seen, k_cells, grouping))
    y = call.read("y", torch.empty(*q.shape[:3], v.shape[3], dtype=call.stored))
    log_sum = call.read("log_sum", torch.empty(B, T, H, dtype=call.exact))
    call.run("attend", q.numel() * k_cells)
    return y.to(v.dtype), cells, log_sum


@outside_autocast
def backward(
    library: ctypes.CDLL,
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    cells: Tensor,
    y: Tensor,
    log_sum: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As sparse.backward."""
    call = _Call(library, q, k, v, segments, causal, cells.shape[3], scale)
    call.read("chosen", cells)
    call.read("log_sum", log_sum)
    call.read("y", y.to(call.stored))
    call.read("grad_y", grad_y.to(call.stored))
    dq = call.read("dq", torch.empty(q.shape, dtype=call.stored))
    dk = call.read("dk", torch.zeros(k.shape, dtype=call.exact))
    dv = call.read("dv", torch.zeros(v.shape, dtype=call.exact))
    call.run("differentiate", q.numel() * k.shape[1])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _Call:
    """A problem, and the tensors that it points to, which live as long."""

    def __init__(
        self,
        library: ctypes.CDLL,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Tensor | None,
        causal: bool,
        cells: int,
        scale: float,
    ) -> None:
        (B, T, H, D), (_, S, G, V) = q.shape, v.shape
        self.library = library
        self.exact = accumulation_dtype(q, k, v)
        same = q.dtype == k.dtype == v.dtype and q.dtype in DTYPES
        self.stored = q.dtype if same else self.exact
        self.seen: Visible = visible(B, T, S, causal=causal, segments=segments, device=q.device)
        self.held: list[Tensor] = []
        self.problem = _Problem(
            B, T, S, H, G, D, V, cells, H, DTYPES.index(self.stored), 0, 1, scale
        )  # fmt: skip
        for name, given in (("q", q), ("k", k), ("v", v)):
            self.read(name, given.to(self.stored))
        self.read("lengths", self.seen.lengths)
        self.read("first", self.seen.first)
        if segments is not None:
            self.read("slots", self.seen.slots())

    def read(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, contiguous, for the field `name` of the problem."""
        tensor = tensor.contiguous()
        setattr(self.problem, name, tensor.data_ptr())
        self.held.append(tensor)
        return tensor

    def run(self, function: str, work: int) -> None:
        """Call a function of the library, with all threads if it has so much to do."""
        self.problem.threads = 1 if work < ONE_THREAD else torch.get_num_threads()
        getattr(self.library, function)(ctypes.byref(self.problem))
