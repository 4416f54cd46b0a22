"""Routing attention in C++ (runs.cpp): what it is told, and what becomes of its results.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, D head width,
N lines: B * H, or clusters.
"""

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.native import DTYPES, Call, fields, stored_dtype
from kernels.precision import accumulation_dtype

SOURCE = Path(__file__).with_name("runs.cpp")
_RUNS = ("q_rows", "k_rows", "low", "high", "own")


class _Sources(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_int64, "lines", "heads", "queries", "keys", "window", "causal", "threads"),
        *fields(ctypes.c_void_p, "q_groups", "k_groups", "asking", "members", *_RUNS),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_int64, "lines", "queries", "keys", "width", "dtype", "last_resort"),
        *fields(ctypes.c_int64, "threads"),
        *fields(ctypes.c_double, "scale"),
        *fields(ctypes.c_void_p, "q", "k", "v", *_RUNS, "y", "log_sum"),
        *fields(ctypes.c_void_p, "grad_y", "dq", "dk", "dv"),
    )


class _Choice(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_int64, "rows", "candidates", "slots", "dtype", "threads"),
        *fields(ctypes.c_void_p, "scores", "index", "taken"),
    )


class Lines(NamedTuple):
    """What the queries of each line see, as in runs.Runs; rows None: in the order of lines."""

    keys: int  # S of a line
    most: int  # keys that one query sees
    low: Tensor  # int32 (N, T)
    high: Tensor
    own: Tensor
    q_rows: Tensor | None = None  # int64 (N, T)
    k_rows: Tensor | None = None  # int64 (N, S)


def lines_of_groups(
    library: ctypes.CDLL, q_groups: Tensor, k_groups: Tensor, window: int, causal: bool
) -> Lines:
    """As runs.make_runs."""
    (B, T, H), S = q_groups.shape, k_groups.shape[1]
    sorts = B * H * (S + T) * 64  # and some walks, about
    call = Call(library, _Sources(B * H, H, T, S, window, causal), sorts)
    call.point("q_groups", q_groups, torch.int64)
    call.point("k_groups", k_groups, torch.int64)
    q_rows = call.room("q_rows", (B * H, T), torch.int64)
    k_rows = call.room("k_rows", (B * H, S), torch.int64)
    low, high, own = (call.room(name, (B * H, T), torch.int32) for name in ("low", "high", "own"))
    call.run("make_runs")
    most = min(window if causal else 2 * window, S)
    return Lines(S, most, low, high, own, q_rows, k_rows)


def lines_of_members(
    library: ctypes.CDLL, members: Tensor, asking: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """low, high and own, int32 (N, Q), as in runs.Runs."""
    (N, Q), M = asking.shape, members.shape[1]
    call = Call(library, _Sources(N, 1, Q, M, M, causal), work=N * (M + Q))
    call.point("members", members, torch.int64)
    call.point("asking", asking, torch.int64)
    low, high, own = (call.room(name, (N, Q), torch.int32) for name in ("low", "high", "own"))
    call.run("make_runs")
    return low, high, own


def choose_members(library: ctypes.CDLL, scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The largest of scores (..., C): their places (..., slots), and how many they are (..., 1)."""
    *shape, C = scores.shape
    exact = accumulation_dtype(scores)
    choice = _Choice(scores.numel() // C, C, slots, DTYPES.index(exact))
    call = Call(library, choice, work=16 * scores.numel())  # they are counted about so often
    call.point("scores", scores, exact)
    index = call.room("index", (*shape, slots), torch.int64)
    taken = call.room("taken", (*shape, 1), torch.int64)
    call.run("choose_members")
    return index, taken


def attend(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lines: Lines,
    last_resort: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y and the logarithm of each query's sum of weights, as triton.attend_runs."""
    call = _Attention(library, q, k, v, lines, last_resort, scale)
    y = call.room("y", q.shape, call.stored)
    log_sum = call.room("log_sum", (*q.shape[:-1], 1), call.exact)
    call.run("attend")
    return y.to(q.dtype), log_sum


def differentiate(
    library: ctypes.CDLL,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lines: Lines,
    y: Tensor,
    log_sum: Tensor,
    last_resort: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, as triton.differentiate_runs."""
    call = _Attention(library, q, k, v, lines, last_resort, scale)
    call.point("y", y, call.stored)
    call.point("log_sum", log_sum, call.exact)
    call.point("grad_y", grad, call.stored)
    dq, dk, dv = (
        call.room(f"d{n}", x.shape, call.stored) for n, x in (("q", q), ("k", k), ("v", v))
    )
    call.run("differentiate")
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _Attention(Call):
    """What both passes read."""

    def __init__(
        self,
        library: ctypes.CDLL,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lines: Lines,
        last_resort: bool,
        scale: float,
    ) -> None:
        (N, T), D = lines.low.shape, q.shape[-1]
        self.exact = accumulation_dtype(q, k, v)
        self.stored = stored_dtype(self.exact, q, k, v)
        kind = DTYPES.index(self.stored)
        problem = _Problem(N, T, lines.keys, D, kind, last_resort, scale=scale)
        super().__init__(library, problem, work=N * T * lines.most * D)
        for name, given in (("q", q), ("k", k), ("v", v)):
            self.point(name, given, self.stored)
        for name in _RUNS:
            given = getattr(lines, name)
            if given is not None:
                self.point(name, given, given.dtype)
