"""Estimated sparse attention in C++ (cells.cpp): what it is told, and what becomes of its results.

B batch, T queries, S keys, H heads, G key heads, D head width, V value width, K cells.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.estimated_sparse_attention.select import cell_budget, choose_cells
from kernels.estimated_sparse_attention.visible import Visible, visible
from kernels.native import DTYPES, Call, fields, stored_dtype
from kernels.precision import accumulation_dtype, outside_autocast

SOURCE = Path(__file__).with_name("cells.cpp")


class _Problem(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_int64, "batch", "queries", "keys", "heads", "kv_heads", "width"),
        *fields(ctypes.c_int64, "value_width", "cells", "group_heads", "dtype", "probs_dtype"),
        *fields(ctypes.c_int64, "threads"),
        *fields(ctypes.c_double, "scale"),
        *fields(ctypes.c_void_p, "q", "k", "v", "probs", "lengths", "first", "slots", "budget"),
        *fields(ctypes.c_void_p, "chosen", "y", "log_sum", "grad_y", "dq", "dk", "dv"),
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
    call = _Attention(library, q, k, v, segments, K, k_cells, causal, scale)
    if grouping in ("causal_batch", "query"):
        heads = H if grouping == "causal_batch" else 1
        call.problem.group_heads = heads
        exact = accumulation_dtype(probs)
        call.problem.probs_dtype = DTYPES.index(exact)
        call.point("probs", probs, exact)
        call.point("budget", cell_budget(call.seen.lengths, heads, K, k_cells), torch.int64)
        cells = call.room("chosen", probs.shape, torch.bool)
        call.run("choose_cells")
    else:
        cells = call.point("chosen", choose_cells(probs, call.seen, k_cells, grouping), torch.bool)
    y = call.room("y", (*q.shape[:3], v.shape[3]), call.stored)
    log_sum = call.room("log_sum", (B, T, H), call.exact)
    call.run("attend")
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
    k_cells: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As sparse.backward."""
    call = _Attention(library, q, k, v, segments, cells.shape[3], k_cells, causal, scale)
    call.point("chosen", cells, torch.bool)
    call.point("log_sum", log_sum, call.exact)
    call.point("y", y, call.stored)
    call.point("grad_y", grad_y, call.stored)
    dq = call.room("dq", q.shape, call.stored)
    dk = call.room("dk", k.shape, call.exact).zero_()
    dv = call.room("dv", v.shape, call.exact).zero_()
    call.run("differentiate")
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _Attention(Call):
    """What both passes read."""

    problem: _Problem

    def __init__(
        self,
        library: ctypes.CDLL,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Tensor | None,
        cells: int,
        k_cells: int,
        causal: bool,
        scale: float,
    ) -> None:
        (B, T, H, D), (_, S, G, V) = q.shape, v.shape
        self.exact = accumulation_dtype(q, k, v)
        self.stored = stored_dtype(self.exact, q, k, v)
        self.seen: Visible = visible(B, T, S, causal=causal, segments=segments, device=q.device)
        kind = DTYPES.index(self.stored)
        problem = _Problem(B, T, S, H, G, D, V, cells, H, kind, scale=scale)
        super().__init__(library, problem, work=B * T * H * k_cells * S / cells * (D + V))
        for name, given in (("q", q), ("k", k), ("v", v)):
            self.point(name, given, self.stored)
        self.point("lengths", self.seen.lengths, torch.int64)
        self.point("first", self.seen.first, torch.int64)
        if segments is not None:
            self.point("slots", self.seen.slots(), torch.int64)
