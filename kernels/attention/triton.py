"""Softmax attention on a GPU: Triton kernels, forward and backward, that keep no scores.

    P_ts = exp(scale q_t.k_s - l_t),  y_t = sum_s P_ts v_s,  l_t the log of the sum of exponentials
    dP = dY V^T,  dS = P (dP - dy.y + dl),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dY

Source: Dao et al. 2022 (FlashAttention), algorithms 1 and 4; the order of loops is that of Dao
2023 (FlashAttention-2). A block of queries walks over the run of keys that it sees, in blocks;
those in the middle, which all of its queries see whole, take no mask. Only l is kept for the
backward pass, which makes P again twice: for a block of queries over its keys, and for a block of
keys over the queries that see it. So each gradient is summed by one program, in a fixed order.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, G key heads,
D head width.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.spans import readers, spans
from kernels.launch import block_of, ceil_div, launch
from kernels.tiles import dot, dot_dtype, load_rows, load_tile, store_rows, store_tile

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def span(lows, highs, window, row, at, T, S, CAUSAL: tl.constexpr):
    """First key and end of what the queries `at` see, padding aside; the end is 0 outside of T.

    `row` is the offset of the batch row in `lows` and `highs` (B, T), which may be None.
    """
    if lows is not None:
        low = tl.load(lows + row + at, mask=at < T, other=S)
        high = tl.load(highs + row + at, mask=at < T, other=0)
    else:
        low = tl.zeros_like(at)
        high = low + S
        if CAUSAL:
            high = at + (S - T + 1)
        if window is not None:
            low = tl.maximum(high - window, 0)
        high = tl.where(at < T, high, 0)
    return low, high


@triton.jit
def there(segments, row, keys, S):
    """Whether a key is no padding."""
    inside = keys < S
    if segments is not None:
        inside = tl.load(segments + row + keys, mask=inside, other=-1) >= 0
    return inside


@triton.jit
def parts(begin, end, low, high, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Of the blocks from `begin` to `end` those before, inside (PART 1), behind `low` to `high`."""
    first = tl.minimum(begin + tl.cdiv(tl.maximum(low - begin, 0), BLOCK) * BLOCK, end)
    last = first + tl.maximum(tl.minimum(high, end) - first, 0) // BLOCK * BLOCK
    if PART == 0:
        return begin, first
    elif PART == 1:
        return first, last
    else:
        return last, end


@triton.jit
def attend(
    q, k, v, segments, lows, highs, y, log_sum, largest,
    scale, window, T, S, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Outputs of a block of queries and their l, (B, H, T), over (blocks, H, B).

    `largest`, (B, H, T) or None, takes the first key that has a query's largest score.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys go first
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, columns = tl.arange(0, BT), tl.arange(0, BD)
    at, start = block * BT + rows, (batch * T + block * BT) * H + head
    low, high = span(lows, highs, window, batch * T, at, T, S, CAUSAL)
    q_b = load_tile(q + start * D, rows * H, at < T, columns, D)
    most = tl.full((BT,), -float("inf"), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    out = tl.zeros((BT, BD), tl.float32)
    best = tl.zeros((BT,), tl.int32)
    for part in tl.static_range(0 if WINDOWED else 1, 3):
        first, last = parts(tl.min(low), tl.max(high), tl.max(low), tl.min(high), part, BS)
        for i in range(first, last, BS):
            keys, key = i + tl.arange(0, BS), (batch * S + i) * G + head // (H // G)
            k_b = load_tile(k + key * D, tl.arange(0, BS) * G, keys < S, columns, D)
            v_b = load_tile(v + key * D, tl.arange(0, BS) * G, keys < S, columns, D)
            scores = dot(q_b, tl.trans(k_b), DOT) * (scale * LOG2_E)
            if part != 1:
                seen = (keys[None] >= low[:, None]) & (keys[None] < high[:, None])
                scores = tl.where(seen, scores, -float("inf"))
            if segments is not None:
                valid = there(segments, batch * S, keys, S)
                scores = tl.where(valid[None], scores, -float("inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            shift = tl.where(higher == -float("inf"), 0, higher)  # nothing has been seen yet
            weights, shrink = tl.exp2(scores - shift[:, None]), tl.exp2(most - shift)
            out = out * shrink[:, None] + dot(weights, v_b, DOT)
            total = total * shrink + tl.sum(weights, 1)
            if largest is not None:
                best = tl.where(higher > most, i + tl.argmax(scores, 1), best)
            most = higher
    some = total > 0
    total = tl.where(some, total, 1)
    store_tile(y + start * D, out / total[:, None], rows * H, at < T, columns, D)
    sums = tl.where(some, most + tl.log2(total), 0) * LN_2
    store_rows(log_sum + (batch * H + head) * T, sums, at, at < T)
    if largest is not None:
        store_rows(largest + (batch * H + head) * T, best, at, at < T)


@triton.jit
def differentiate_q(
    q, k, v, y, grad_y, grad_log_sum, log_sum, segments, lows, highs, dq, inners,
    scale, window, T, S, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries, and their dy.y - dl, (B, H, T), over (blocks, H, B)."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, columns = tl.arange(0, BT), tl.arange(0, BD)
    at, start = block * BT + rows, (batch * T + block * BT) * H + head
    low, high = span(lows, highs, window, batch * T, at, T, S, CAUSAL)
    g = load_tile(grad_y + start * D, rows * H, at < T, columns, D)
    inner = tl.sum(g * load_tile(y + start * D, rows * H, at < T, columns, D), 1)
    if grad_log_sum is not None:
        inner -= load_rows(grad_log_sum + (batch * H + head) * T, at, at < T)
    store_rows(inners + (batch * H + head) * T, inner, at, at < T)
    sums = load_rows(log_sum + (batch * H + head) * T, at, at < T) * LOG2_E
    q_b = load_tile(q + start * D, rows * H, at < T, columns, D)
    dq_b = tl.zeros((BT, BD), tl.float32)
    for i in range(tl.min(low), tl.max(high), BS):
        keys, key = i + tl.arange(0, BS), (batch * S + i) * G + head // (H // G)
        k_b = load_tile(k + key * D, tl.arange(0, BS) * G, keys < S, columns, D)
        v_b = load_tile(v + key * D, tl.arange(0, BS) * G, keys < S, columns, D)
        exponents = dot(q_b, tl.trans(k_b), DOT) * (scale * LOG2_E) - sums[:, None]
        seen = (keys[None] >= low[:, None]) & (keys[None] < high[:, None])
        seen = seen & there(segments, batch * S, keys, S)[None]
        weights = tl.exp2(tl.where(seen, exponents, -float("inf")))
        d_weights = dot(g, tl.trans(v_b), DOT) - inner[:, None]
        dq_b += dot(weights * d_weights, k_b, DOT)
    store_tile(dq + start * D, dq_b * scale, rows * H, at < T, columns, D)


@triton.jit
def readers_of(firsts, lasts, window, batch, block, T, S, CAUSAL: tl.constexpr, BS: tl.constexpr):
    """First query and end that see a key of the block."""
    begin, end = 0, T
    if firsts is not None:
        place = batch * tl.cdiv(S, BS) + block
        begin, end = tl.load(firsts + place), tl.load(lasts + place)
    elif CAUSAL:
        begin = tl.maximum(block * BS - (S - T), 0)
        if window is not None:
            end = tl.minimum((block + 1) * BS - 1 + window - (S - T), T)
    return begin, end


@triton.jit
def differentiate_kv(
    q, k, v, grad_y, log_sum, inners, segments, lows, highs, firsts, lasts, dk, dv,
    scale, window, T, S, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, over (blocks, G, B); scores are (keys, queries)."""
    block, key_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, columns, columns_t = tl.arange(0, BS), tl.arange(0, BD), tl.arange(0, BT)
    keys, start = block * BS + rows, (batch * S + block * BS) * G + key_head
    k_b = load_tile(k + start * D, rows * G, keys < S, columns, D)
    v_b = load_tile(v + start * D, rows * G, keys < S, columns, D)
    valid = there(segments, batch * S, keys, S)
    begin, end = readers_of(firsts, lasts, window, batch, block, T, S, CAUSAL, BS)
    dk_b = tl.zeros((BS, BD), tl.float32)
    dv_b = tl.zeros((BS, BD), tl.float32)
    for head in range(key_head * (H // G), (key_head + 1) * (H // G)):
        line = (batch * H + head) * T
        for i in range(begin, end, BT):
            at, query = i + columns_t, (batch * T + i) * H + head
            q_b = load_tile(q + query * D, columns_t * H, at < T, columns, D)
            g = load_tile(grad_y + query * D, columns_t * H, at < T, columns, D)
            sums = load_rows(log_sum + line, at, at < T) * LOG2_E
            exponents = dot(k_b, tl.trans(q_b), DOT) * (scale * LOG2_E) - sums[None]
            low, high = span(lows, highs, window, batch * T, at, T, S, CAUSAL)
            seen = (keys[:, None] >= low[None]) & (keys[:, None] < high[None]) & valid[:, None]
            weights = tl.exp2(tl.where(seen, exponents, -float("inf")))
            dv_b += dot(weights, g, DOT)
            d_weights = dot(v_b, tl.trans(g), DOT) - load_rows(inners + line, at, at < T)[None]
            dk_b += dot(weights * d_weights, q_b, DOT)
    store_tile(dk + start * D, dk_b * scale, rows * G, keys < S, columns, D)
    store_tile(dv + start * D, dv_b, rows * G, keys < S, columns, D)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    find: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, D), the log of each query's sum of exponentials, float32 (B, H, T), and the key
    of its largest score, int32 (B, H, T); nothing without `find`."""
    B, T, H = q.shape[:3]
    call = _Call(q, k, v, segments, causal, window)
    y, log_sum = q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)
    largest = q.new_empty(B, H, T * find, dtype=torch.int32)
    tiles = call.tiles[attend]
    launch(
        attend, (ceil_div(T, tiles["BT"]), H, B),
        *call.inputs, call.segments, *call.spans, y, log_sum, largest if find else None,
        scale, call.window, *call.sizes, CAUSAL=causal, WINDOWED=call.windowed,
        **tiles, **call.widths,
    )  # fmt: skip
    return y, log_sum, largest


def backward(
    grad_y: Tensor,
    grad_log_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    y: Tensor,
    log_sum: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of y and, if it was used, of l."""
    (B, T, H), (S, G) = q.shape[:3], k.shape[1:3]
    call = _Call(q, k, v, segments, causal, window)
    dq, dk, dv = (torch.empty_like(x) for x in call.inputs)
    grad_y, y, log_sum = (x.contiguous() for x in (grad_y, y, log_sum))
    grad_log_sum = None if grad_log_sum is None else grad_log_sum.contiguous()
    inners = torch.empty_like(log_sum)
    tiles = call.tiles[differentiate_q]
    launch(
        differentiate_q, (ceil_div(T, tiles["BT"]), H, B),
        *call.inputs, y, grad_y, grad_log_sum, log_sum, call.segments, *call.spans, dq, inners,
        scale, call.window, *call.sizes, CAUSAL=causal, **tiles, **call.widths,
    )  # fmt: skip
    tiles = call.tiles[differentiate_kv]
    firsts = lasts = None
    if segments is not None:
        firsts, lasts = readers(*call.spans, S, tiles["BS"])
    launch(
        differentiate_kv, (ceil_div(S, tiles["BS"]), G, B),
        *call.inputs, grad_y, log_sum, inners, call.segments, *call.spans, firsts, lasts, dk, dv,
        scale, call.window, *call.sizes, CAUSAL=causal, **tiles, **call.widths,
    )  # fmt: skip
    return dq, dk, dv


def _tiles(width: int, dtype: tl.dtype, documents: bool) -> dict[Any, dict[str, int]]:
    """Queries and keys of a block, and warps, for each kernel: the largest that spill nowhere."""
    if dtype == tl.float32 or width > 128:
        sizes = {attend: (32, 32, 4), differentiate_q: (32, 32, 4), differentiate_kv: (32, 32, 4)}
    elif width > 64:
        keys = 32 if documents else 64
        sizes = {attend: (64, 32, 4), differentiate_q: (64, 32, 4), differentiate_kv: (32, keys, 4)}
    else:
        first = (64, 64, 4) if documents else (128, 64, 8)
        sizes = {attend: first, differentiate_q: (64, 64, 4), differentiate_kv: (32, 64, 4)}
    return {kernel: {"BT": t, "BS": s, "warps": w} for kernel, (t, s, w) in sizes.items()}


class _Call:
    """What one call's kernels share: contiguous inputs, sizes of tiles, the runs of keys."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Tensor | None,
        causal: bool,
        window: int | None,
    ) -> None:
        (_, T, H, D), (S, G) = q.shape, k.shape[1:3]
        self.inputs = [x.contiguous() for x in (q, k, v)]
        self.sizes = (T, S, H, G, D)
        self.widths = {"BD": block_of(D, 1 << 30), "DOT": dot_dtype(q, k, v)}
        self.tiles = _tiles(D, self.widths["DOT"], segments is not None)
        self.window = window if window is not None and window < S else None
        self.windowed = self.window is not None or segments is not None
        self.segments, self.spans = segments, (None, None)
        if segments is not None:
            self.segments = segments.contiguous()
            self.spans = spans(self.segments, T, causal, self.window)
