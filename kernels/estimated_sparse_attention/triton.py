"""Softmax attention over chosen cells on a GPU: Triton kernels, forward and backward.

    P_e = exp(scale q_t.k_s - l_t),  y_t = sum_e P_e v_s,  l_t the log of the sum of exponentials
    dP_e = dy_t.v_s,  dS = P (dP - dy.y),  dq_t = scale sum_e dS_e k_s,  dk_s = scale sum_e dS_e q_t

over the entries e = (t, s): one for each token that a chosen cell covers, as row offsets and
columns. Each query and head has keys of its own, so that there is no product of tiles: a program
walks over one row, gathering keys where it loads them, with an online softmax. The backward pass
walks over the rows again, and over the same entries sorted by key, so that each gradient is summed
by one program, in a fixed order. No scores are kept: memory is that of the entries.

B batch, T queries, S keys, H heads, G key heads, D head width, V value width, E entries.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.estimated_sparse_attention.select import choose_cells
from kernels.estimated_sparse_attention.sparse import Entries, list_entries, transposed
from kernels.estimated_sparse_attention.visible import visible
from kernels.launch import block_of, launch

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def load_row(x, row, columns, width):
    """x[row] of a row-major (., width) in float32."""
    return tl.load(x + row * width + columns, mask=columns < width, other=0).to(tl.float32)


@triton.jit
def gather(x, indices, there, columns, width):
    """x[indices] of a row-major (., width) in float32, zero where it is not there."""
    mask = there[:, None] & (columns[None] < width)
    at = indices.to(tl.int64)[:, None] * width + columns[None]
    return tl.load(x + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def attend(
    q, k, v, offsets, keys, y, log_sum,
    scale, D: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The output of a query and head and its l, over (B T H); zero where it has no entry."""
    row = tl.program_id(0).to(tl.int64)
    at_d, at_v = tl.arange(0, BD), tl.arange(0, BV)
    q_r = load_row(q, row, at_d, D) * (scale * LOG2_E)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    most = tl.full((1,), -float("inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    out = tl.zeros((BV,), tl.float32)
    for i in range(begin, end, BE):
        at = i + tl.arange(0, BE)
        key = tl.load(keys + at, mask=at < end, other=0)
        k_e = gather(k, key, at < end, at_d, D)
        v_e = gather(v, key, at < end, at_v, V)
        scores = tl.where(at < end, tl.sum(k_e * q_r[None], 1), -float("inf"))
        higher = tl.maximum(most, tl.max(scores, 0))
        weights, shrink = tl.exp2(scores - higher), tl.exp2(most - higher)
        out = out * shrink + tl.sum(weights[:, None] * v_e, 0)
        total = total * shrink + tl.sum(weights, 0)
        most = higher
    some = total > 0
    total = tl.where(some, total, 1)
    tl.store(y + row * V + at_v, (out / total).to(y.dtype.element_ty), mask=at_v < V)
    sums = tl.where(some, most + tl.log2(total), 0) * LN_2
    tl.store(log_sum + row + tl.arange(0, 1), sums)


@triton.jit
def differentiate_q(
    q, k, v, y, grad_y, log_sum, offsets, keys, dq, inners,
    scale, D: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient of a query and head, and its dy.y for the other kernel, over (B T H)."""
    row = tl.program_id(0).to(tl.int64)
    at_d, at_v = tl.arange(0, BD), tl.arange(0, BV)
    q_r, g = load_row(q, row, at_d, D) * (scale * LOG2_E), load_row(grad_y, row, at_v, V)
    inner = tl.sum(g * load_row(y, row, at_v, V), 0)
    tl.store(inners + row, inner)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    sums = tl.load(log_sum + row) * LOG2_E
    dq_r = tl.zeros((BD,), tl.float32)
    for i in range(begin, end, BE):
        at = i + tl.arange(0, BE)
        key = tl.load(keys + at, mask=at < end, other=0)
        k_e = gather(k, key, at < end, at_d, D)
        v_e = gather(v, key, at < end, at_v, V)
        exponents = tl.where(at < end, tl.sum(k_e * q_r[None], 1) - sums, -float("inf"))
        d_scores = tl.exp2(exponents) * (tl.sum(v_e * g[None], 1) - inner)
        dq_r += tl.sum(d_scores[:, None] * k_e, 0)
    tl.store(dq + row * D + at_d, (dq_r * scale).to(dq.dtype.element_ty), mask=at_d < D)


@triton.jit
def differentiate_kv(
    q, k, v, grad_y, log_sum, inners, offsets, rows, dk, dv,
    scale, D: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of one key and its value, over (B S G); `offsets` and `rows` are those of keys."""
    key = tl.program_id(0).to(tl.int64)
    at_d, at_v = tl.arange(0, BD), tl.arange(0, BV)
    k_r, v_r = load_row(k, key, at_d, D) * (scale * LOG2_E), load_row(v, key, at_v, V)
    begin, end = tl.load(offsets + key), tl.load(offsets + key + 1)
    dk_r = tl.zeros((BD,), tl.float32)
    dv_r = tl.zeros((BV,), tl.float32)
    for i in range(begin, end, BE):
        at = i + tl.arange(0, BE)
        row = tl.load(rows + at, mask=at < end, other=0)
        q_e = gather(q, row, at < end, at_d, D)
        g = gather(grad_y, row, at < end, at_v, V)
        sums = tl.load(log_sum + row, mask=at < end, other=0) * LOG2_E
        exponents = tl.where(at < end, tl.sum(q_e * k_r[None], 1) - sums, -float("inf"))
        weights = tl.exp2(exponents)
        inner = tl.load(inners + row, mask=at < end, other=0)
        d_scores = weights * (tl.sum(g * v_r[None], 1) - inner)
        dk_r += tl.sum(d_scores[:, None] * q_e, 0)
        dv_r += tl.sum(weights[:, None] * g, 0)
    tl.store(dk + key * D + at_d, (dk_r * scale).to(dk.dtype.element_ty), mask=at_d < D)
    tl.store(dv + key * V + at_v, dv_r.to(dv.dtype.element_ty), mask=at_v < V)


def forward(
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
    """As the sparse form: y (B, T, H, V), the cells chosen, and l (B, T, H) in float32."""
    (B, T, H, D), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
    seen = visible(B, T, S, causal=causal, segments=segments, device=q.device)
    cells = choose_cells(probs, seen, k_cells, grouping)
    entries = list_entries(cells, seen, None if segments is None else seen.slots(), G)
    y, log_sum = v.new_empty(B, T, H, V), q.new_empty(B, T, H, dtype=torch.float32)
    launch(
        attend, (B * T * H,),
        *(x.contiguous() for x in (q, k, v)), _bounds(entries), entries.key, y, log_sum,
        scale, D, V, **_tiles(D, V),
    )  # fmt: skip
    return y, cells, log_sum


def backward(
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
    grouping: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    (B, T, H, D), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
    seen = visible(B, T, S, causal=causal, segments=segments, device=q.device)
    entries = list_entries(cells, seen, None if segments is None else seen.slots(), G)
    q, k, v, y, grad_y, log_sum = (x.contiguous() for x in (q, k, v, y, grad_y, log_sum))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    inners, tiles = torch.empty_like(log_sum), _tiles(D, V)
    launch(
        differentiate_q, (B * T * H,),
        q, k, v, y, grad_y, log_sum, _bounds(entries), entries.key, dq, inners,
        scale, D, V, **tiles,
    )  # fmt: skip
    by_key, _ = transposed(entries, B * S * G)
    launch(
        differentiate_kv, (B * S * G,),
        q, k, v, grad_y, log_sum, inners, _bounds(by_key), by_key.key, dk, dv,
        scale, D, V, **tiles,
    )  # fmt: skip
    return dq, dk, dv


def _bounds(entries: Entries) -> Tensor:
    """int64 (R + 1,): where the entries of each row begin, and where the last end."""
    return torch.cat([entries.offsets, entries.offsets.new_tensor([len(entries.key)])])


def _tiles(D: int, V: int) -> dict[str, int]:
    """Entries taken at once, and what covers a key and a value."""
    wide = max(D, V) > 64
    return {
        "BE": 32,
        "BD": block_of(D, 1 << 30),
        "BV": block_of(V, 1 << 30),
        "warps": 4 if wide else 2,
    }
