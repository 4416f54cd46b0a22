"""Routing attention on a GPU: Triton kernels, forward and backward.

    P_ts = exp(scale q_t.k_s - l_t),  y_t = sum_s P_ts v_s,  l_t the log of the sum of exponentials
    dP = dY V^T,  dS = P (dP - dy.y),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dY

over the keys s of query t's run among the sorted keys, and its own key (in the top-w form the
keys are a cluster's members, and the own key may not be among them). A block of sorted queries
walks over the keys from its first run to the end of its last; rows are gathered by their positions
where they are loaded, and results are stored to them. The own key is taken apart from the run,
where it would be masked: it may lie outside, or count only where a run is empty. The backward pass
makes P again twice, for a block of queries and for a block of keys, so that each gradient is
summed by one program, in a fixed order.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, N = B * H,
D head width.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.spans import readers
from kernels.launch import block_of, ceil_div, launch
from kernels.routing_attention.runs import Runs, make_runs
from kernels.tiles import dot, dot_dtype, load_rows, load_tile, store_rows, store_tile

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def run_of(lows, highs, owns, line, at, T, LAST_RESORT: tl.constexpr):
    """First place and end of what the queries `at` see, own key's place, whether that counts.

    Without an own key its place is -1.
    """
    there = at < T
    low = tl.load(lows + line * T + at, mask=there, other=0)
    high = tl.load(highs + line * T + at, mask=there, other=0)
    own = tl.load(owns + line * T + at, mask=there, other=-1)
    inside = (own >= low) & (own < high)
    counts = own >= 0
    if LAST_RESORT:
        counts = counts & (high - low == inside.to(tl.int32))
    return low, high, own, counts


@triton.jit
def first_place(low, high, S):
    """Where the walk over the keys begins: before any run that is not empty."""
    return tl.min(tl.where(low < high, low, S))


@triton.jit
def attend(
    q, k, v, queries, keys, lows, highs, owns, y, log_sum,
    scale, T, S, D: tl.constexpr, LAST_RESORT: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Outputs of a block of sorted queries and their l, (B, T, H), over (N, blocks)."""
    line, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    at = tl.program_id(1) * BT + tl.arange(0, BT)
    low, high, own, counts = run_of(lows, highs, owns, line, at, T, LAST_RESORT)
    rows = tl.load(queries + line * T + at, mask=at < T, other=0)
    own_rows = tl.load(keys + line * S + own, mask=counts, other=0)
    q_b = load_tile(q, rows, at < T, columns, D)
    own_score = tl.sum(q_b * load_tile(k, own_rows, counts, columns, D), 1) * (scale * LOG2_E)
    most = tl.where(counts, own_score, -float("inf"))
    total = counts.to(tl.float32)
    out = load_tile(v, own_rows, counts, columns, D)
    for i in range(first_place(low, high, S), tl.max(high), BS):
        places = i + tl.arange(0, BS)
        key_rows = tl.load(keys + line * S + places, mask=places < S, other=0)
        k_b = load_tile(k, key_rows, places < S, columns, D)
        v_b = load_tile(v, key_rows, places < S, columns, D)
        seen = (places[None] >= low[:, None]) & (places[None] < high[:, None])
        seen = seen & (places[None] != own[:, None])
        scores = dot(q_b, tl.trans(k_b), DOT) * (scale * LOG2_E)
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        shift = tl.where(higher == -float("inf"), 0, higher)  # nothing has been seen yet
        weights, shrink = tl.exp2(scores - shift[:, None]), tl.exp2(most - shift)
        out = out * shrink[:, None] + dot(weights, v_b, DOT)
        total = total * shrink + tl.sum(weights, 1)
        most = higher
    some = total > 0
    total = tl.where(some, total, 1)
    store_tile(y, out / total[:, None], rows, at < T, columns, D)
    store_rows(log_sum, tl.where(some, most + tl.log2(total), 0) * LN_2, rows, at < T)


@triton.jit
def differentiate_q(
    q, k, v, y, grad_y, log_sum, queries, keys, lows, highs, owns, dq, inners, own_weights,
    own_grads, scale, T, S, D: tl.constexpr, LAST_RESORT: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of sorted queries, over (N, blocks).

    For the other kernel also, all (B, T, H): dy.y, the own key's weight and its score's gradient.
    """
    line, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    at = tl.program_id(1) * BT + tl.arange(0, BT)
    low, high, own, counts = run_of(lows, highs, owns, line, at, T, LAST_RESORT)
    rows = tl.load(queries + line * T + at, mask=at < T, other=0)
    own_rows = tl.load(keys + line * S + own, mask=counts, other=0)
    q_b = load_tile(q, rows, at < T, columns, D)
    g = load_tile(grad_y, rows, at < T, columns, D)
    inner = tl.sum(g * load_tile(y, rows, at < T, columns, D), 1)
    sums = load_rows(log_sum, rows, at < T) * LOG2_E
    own_k = load_tile(k, own_rows, counts, columns, D)
    own_exponent = tl.sum(q_b * own_k, 1) * (scale * LOG2_E) - sums
    weight = tl.exp2(tl.where(counts, own_exponent, -float("inf")))
    grad = weight * (tl.sum(g * load_tile(v, own_rows, counts, columns, D), 1) - inner)
    store_rows(inners, inner, rows, at < T)
    store_rows(own_weights, weight, rows, at < T)
    store_rows(own_grads, grad, rows, at < T)
    dq_b = grad[:, None] * own_k
    for i in range(first_place(low, high, S), tl.max(high), BS):
        places = i + tl.arange(0, BS)
        key_rows = tl.load(keys + line * S + places, mask=places < S, other=0)
        k_b = load_tile(k, key_rows, places < S, columns, D)
        v_b = load_tile(v, key_rows, places < S, columns, D)
        seen = (places[None] >= low[:, None]) & (places[None] < high[:, None])
        seen = seen & (places[None] != own[:, None])
        exponents = dot(q_b, tl.trans(k_b), DOT) * (scale * LOG2_E) - sums[:, None]
        weights = tl.exp2(tl.where(seen, exponents, -float("inf")))
        d_weights = dot(g, tl.trans(v_b), DOT) - inner[:, None]
        dq_b += dot(weights * d_weights, k_b, DOT)
    store_tile(dq, dq_b * scale, rows, at < T, columns, D)


@triton.jit
def differentiate_kv(
    q, k, v, grad_y, log_sum, inners, own_weights, own_grads, queries, keys, askers, lows, highs,
    owns, firsts, lasts, dk, dv, scale, T, S, D: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of sorted keys and values, over (N, blocks)."""
    line, block, columns = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BD)
    places = block * BS + tl.arange(0, BS)
    key_rows = tl.load(keys + line * S + places, mask=places < S, other=0)
    k_b = load_tile(k, key_rows, places < S, columns, D)
    v_b = load_tile(v, key_rows, places < S, columns, D)
    asker = tl.load(askers + line * S + places, mask=places < S, other=-1)
    own_q = load_tile(q, asker, asker >= 0, columns, D)
    dk_b = load_rows(own_grads, asker, asker >= 0)[:, None] * own_q
    own_g = load_tile(grad_y, asker, asker >= 0, columns, D)
    dv_b = load_rows(own_weights, asker, asker >= 0)[:, None] * own_g
    readers_at = line * tl.cdiv(S, BS) + block
    for i in range(tl.load(firsts + readers_at), tl.load(lasts + readers_at), BT):
        at = i + tl.arange(0, BT)
        low, high, own, _ = run_of(lows, highs, owns, line, at, T, False)
        rows = tl.load(queries + line * T + at, mask=at < T, other=0)
        q_b = load_tile(q, rows, at < T, columns, D)
        g = load_tile(grad_y, rows, at < T, columns, D)
        seen = (places[:, None] >= low[None]) & (places[:, None] < high[None])
        seen = seen & (places[:, None] != own[None])
        sums = load_rows(log_sum, rows, at < T) * LOG2_E
        exponents = dot(k_b, tl.trans(q_b), DOT) * (scale * LOG2_E) - sums[None]
        weights = tl.exp2(tl.where(seen, exponents, -float("inf")))
        dv_b += dot(weights, g, DOT)
        d_weights = dot(v_b, tl.trans(g), DOT) - load_rows(inners, rows, at < T)[None]
        dk_b += dot(weights * d_weights, q_b, DOT)
    store_tile(dk, dk_b * scale, key_rows, places < S, columns, D)
    store_tile(dv, dv_b, key_rows, places < S, columns, D)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_groups: Tensor,
    k_groups: Tensor,
    window: int,
    causal: bool,
    last_resort: bool,
    shared: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, D) and the log of each query's sum of exponentials, float32 (B, T, H, 1)."""
    runs = make_runs(q_groups, k_groups, window, causal)
    return attend_runs(q, k, v, runs, last_resort, scale)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_groups: Tensor,
    k_groups: Tensor,
    y: Tensor,
    lse: Tensor,
    window: int,
    causal: bool,
    last_resort: bool,
    shared: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    runs = make_runs(q_groups, k_groups, window, causal)
    return differentiate_runs(grad, q, k, v, runs, y, lse, last_resort, scale)


def attend_runs(
    q: Tensor, k: Tensor, v: Tensor, runs: Runs, last_resort: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """y and l over given runs."""
    (N, T), S, D = runs.queries.shape, runs.keys.shape[1], q.shape[-1]
    y, log_sum = q.new_empty(q.shape), q.new_empty(*q.shape[:-1], 1, dtype=torch.float32)
    tiles = _tiles(D, dot_dtype(q, k, v))
    launch(
        attend, (N, ceil_div(T, tiles["BT"])),
        *(x.contiguous() for x in (q, k, v)),
        runs.queries, runs.keys, runs.low, runs.high, runs.own, y, log_sum,
        scale, T, S, D, LAST_RESORT=last_resort, **tiles,
    )  # fmt: skip
    return y, log_sum


def differentiate_runs(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Runs,
    y: Tensor,
    lse: Tensor,
    last_resort: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v over given runs."""
    (N, T), S, D = runs.queries.shape, runs.keys.shape[1], q.shape[-1]
    q, k, v, y, grad, lse = (x.contiguous() for x in (q, k, v, y, grad, lse))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    inners, own_weights, own_grads = (torch.empty_like(lse) for _ in range(3))
    tiles = _tiles(D, dot_dtype(q, k, v))
    launch(
        differentiate_q, (N, ceil_div(T, tiles["BT"])),
        q, k, v, y, grad, lse, runs.queries, runs.keys, runs.low, runs.high, runs.own,
        dq, inners, own_weights, own_grads,
        scale, T, S, D, LAST_RESORT=last_resort, **tiles,
    )  # fmt: skip
    firsts, lasts = readers(runs.low, runs.high, S, tiles["BS"])
    launch(
        differentiate_kv, (N, ceil_div(S, tiles["BS"])),
        q, k, v, grad, lse, inners, own_weights, own_grads, runs.queries, runs.keys, runs.askers,
        runs.low, runs.high, runs.own, firsts, lasts, dk, dv, scale, T, S, D, **tiles,
    )  # fmt: skip
    return dq, dk, dv


def _tiles(width: int, dtype: tl.dtype) -> dict[str, Any]:
    """Queries and keys of a block, and warps: the largest that spill nowhere."""
    small = dtype == tl.float32 or width > 64
    size = 32 if small else 64
    return {"BT": 32, "BS": size, "BD": block_of(width, 1 << 30), "DOT": dtype, "warps": 4}
