"""Routing attention in C++ (runs.cpp): what it is told, and what becomes of its results.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, D head width,
N lines: B * H, or clusters.
"""

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.native import DTYPES
from kernels.precision import accumulation_dtype

SOURCE = Path(__file__).with_name("runs.cpp")
ONE_THREAD = 1 << 20  # multiply-adds from which on a second thread is worth its start


_RUNS = ("q_rows", "k_rows", "low", "high", "own")


def _fields(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


class _Sources(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "lines", "heads", "queries", "keys", "window", "causal"),
        *_fields(ctypes.c_int64, "threads"),
        *_fields(ctypes.c_void_p, "q_groups", "k_groups", "asking", "members", *_RUNS),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "lines", "queries", "keys", "width", "dtype", "last_resort"),
        *_fields(ctypes.c_int64, "threads"),
        *_fields(ctypes.c_double, "scale"),
        *_fields(ctypes.c_void_p, "q", "k", "v", *_RUNS, "y", "log_sum"),
        *_fields(ctypes.c_void_p, "grad_y", "dq", "dk", "dv"),
    )


class _Choice(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "rows", "candidates", "slots", "dtype", "threads"),
        *_fields(ctypes.c_void_p, "scores", "index", "taken"),
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
    q_groups, k_groups = q_groups.contiguous(), k_groups.contiguous()
    low, high, own = (torch.empty(B * H, T, dtype=torch.int32) for _ in range(3))
    q_rows = torch.empty(B * H, T, dtype=torch.int64)
    k_rows = torch.empty(B * H, S, dtype=torch.int64)
    threads = _threads(B * H * (S + T) * 64)  # a sort and some walks, about
    sources = _Sources(
        B * H, H, T, S, window, causal, threads,
        q_groups.data_ptr(), k_groups.data_ptr(), None, None,
        *(x.data_ptr() for x in (q_rows, k_rows, low, high, own)),
    )  # fmt: skip
    library.make_runs(ctypes.byref(sources))
    most = min(window if causal else 2 * window, S)
    return Lines(S, most, low, high, own, q_rows, k_rows)


def lines_of_members(
    library: ctypes.CDLL, members: Tensor, asking: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """low, high and own, int32 (N, Q), as in runs.Runs."""
    (N, Q), M = asking.shape, members.shape[1]
    members, asking = members.contiguous(), asking.contiguous()
    low, high, own = (torch.empty(N, Q, dtype=torch.int32) for _ in range(3))
    sources = _Sources(
        N, 1, Q, M, M, causal, _threads(N * (M + Q)),
        None, None, asking.data_ptr(), members.data_ptr(),
        None, None, *(x.data_ptr() for x in (low, high, own)),
    )  # fmt: skip
    library.make_runs(ctypes.byref(sources))
    return low, high, own


def choose_members(library: ctypes.CDLL, scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The largest of scores (..., C): their places (..., slots), and how many they are (..., 1)."""
    scores = scores.to(accumulation_dtype(scores)).contiguous()
    *shape, C = scores.shape
    index = torch.empty(*shape, slots, dtype=torch.int64)
    taken = torch.empty(*shape, 1, dtype=torch.int64)
    threads = _threads(16 * scores.numel())  # the numbers are counted about so often
    choice = _Choice(
        taken.numel(), C, slots, DTYPES.index(scores.dtype), threads,
        scores.data_ptr(), index.data_ptr(), taken.data_ptr(),
    )  # fmt: skip
    library.choose_members(ctypes.byref(choice))
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
    q, k, v = _readable(q, k, v)
    y = torch.empty_like(q)
    log_sum = q.new_empty(*q.shape[:-1], 1, dtype=accumulation_dtype(q))
    problem = _problem(q, k, v, lines, last_resort, scale)
    problem.y, problem.log_sum = y.data_ptr(), log_sum.data_ptr()
    library.attend(ctypes.byref(problem))
    return y, log_sum


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
    q, k, v, y, grad = _readable(q, k, v, y, grad)
    log_sum = log_sum.contiguous()
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    problem = _problem(q, k, v, lines, last_resort, scale)
    problem.y, problem.log_sum, problem.grad_y = (x.data_ptr() for x in (y, log_sum, grad))
    problem.dq, problem.dk, problem.dv = (x.data_ptr() for x in (dq, dk, dv))
    library.differentiate(ctypes.byref(problem))
    return dq, dk, dv


def _readable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous, of one dtype that C++ reads."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES:
        dtype = accumulation_dtype(*tensors)
    return tuple(x.to(dtype).contiguous() for x in tensors)


def _problem(
    q: Tensor, k: Tensor, v: Tensor, lines: Lines, last_resort: bool, scale: float
) -> _Problem:
    """What both passes read; the caller keeps the tensors alive."""
    (N, T), D = lines.low.shape, q.shape[-1]
    pointers = (q, k, v, lines.q_rows, lines.k_rows, lines.low, lines.high, lines.own)
    return _Problem(
        N, T, lines.keys, D, DTYPES.index(q.dtype), last_resort, _threads(N * T * lines.most * D),
        scale, *(None if x is None else x.data_ptr() for x in pointers),
    )  # fmt: skip


def _threads(work: int) -> int:
    return 1 if work < ONE_THREAD else torch.get_num_threads()
