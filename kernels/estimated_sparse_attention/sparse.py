"""Softmax attention over chosen cells: rows of columns, never a (T, S) matrix.

Queries go tile by tile. A tile's chosen cells become a list of entries, one for each token that a
cell covers, sorted by query and head. Two products with sparse matrices do all the rest, and both
are sums over bags of an embedding table: entry -> q.k, and entries -> weighted sum of rows.

B batch, T queries, S keys, H heads, G key heads, D head width, V value width, K cells, E entries,
R = B t H rows of a tile of t queries.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from kernels.estimated_sparse_attention.flops import attended_pairs
from kernels.estimated_sparse_attention.resize import cell_start
from kernels.estimated_sparse_attention.select import choose_cells
from kernels.estimated_sparse_attention.visible import Visible, visible
from kernels.precision import accumulation_dtype, outside_autocast

_ENTRIES = 1 << 19  # entries of a tile, about


class Entries(NamedTuple):
    """The entries of one tile.

    row (E,): which of the R rows, in order. key (E,): index into keys flattened to (B S G).
    offsets (R,): first entry of each row.
    """

    row: Tensor
    key: Tensor
    offsets: Tensor


@outside_autocast
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
    """y (B, T, H, V) in v's dtype, the cells chosen bool (B, H, T, K), and the logarithm of each
    softmax's denominator (B, T, H) in float32 or float64."""
    (B, T, H, _), S = q.shape, k.shape[1]
    exact = accumulation_dtype(q, k, v)
    seen = visible(B, T, S, causal=causal, segments=segments, device=q.device)
    cells = choose_cells(probs, seen, k_cells, grouping)
    y = v.new_zeros(B, T, H, v.shape[3])
    log_sum = torch.zeros(B, T, H, dtype=exact, device=q.device)
    slots = None if segments is None else seen.slots()
    pairs = B * attended_pairs(T, H, cells.shape[3], k_cells, S, causal, grouping)
    for rows in _tiles(T, pairs):
        entries = list_entries(
            cells[:, :, rows], seen.rows(rows.start, rows.stop), slots, k.shape[2]
        )
        if len(entries.row) == 0:
            continue
        keys, values, entries = _tables(k, v, entries, exact)
        scores = _products(q[:, rows].to(exact) * scale, keys, entries)
        weights, log_sum_b = _softmax(scores, entries)
        out = _sums(weights, values, entries)
        y[:, rows] = out.view(B, -1, H, v.shape[3]).to(y.dtype)
        log_sum[:, rows] = log_sum_b.view(B, -1, H)
    return y, cells, log_sum


@outside_autocast
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
    """Gradients of q, k and v: with dA = dY V^T on the entries, dS = A (dA - sum(dY Y))."""
    (B, T, H, D), S = q.shape, k.shape[1]
    exact = accumulation_dtype(q, k, v)
    seen = visible(B, T, S, causal=causal, segments=segments, device=q.device)
    slots = None if segments is None else seen.slots()
    dq = torch.zeros(q.shape, dtype=exact, device=q.device)
    keys, values = (x.to(exact).reshape(-1, x.shape[3]) for x in (k, v))
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    pairs = B * attended_pairs(T, H, cells.shape[3], k_cells, S, causal, grouping)
    # The sums over keys go through all of them in every tile: a tile is to have as many entries.
    for rows in _tiles(T, pairs, at_least=len(keys)):
        entries = list_entries(
            cells[:, :, rows], seen.rows(rows.start, rows.stop), slots, k.shape[2]
        )
        if len(entries.row) == 0:
            continue
        q_b, g = q[:, rows].to(exact) * scale, grad_y[:, rows].to(exact)
        weights = (_products(q_b, keys, entries) - log_sum[:, rows].flatten()[entries.row]).exp()
        inner = torch.linalg.vecdot(g, y[:, rows].to(exact)).flatten()
        d_scores = weights * (_products(g, values, entries) - inner[entries.row])
        dq[:, rows] = _sums(d_scores, keys, entries).view(B, -1, H, D) * scale
        by_key, order = transposed(entries, len(keys))
        dk += _sums(d_scores[order], q_b.reshape(-1, D), by_key)
        dv += _sums(weights[order], g.reshape(-1, v.shape[3]), by_key)
    return dq.to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


def _tiles(length: int, pairs: int, *, at_least: int = 0) -> Iterator[slice]:
    """Queries, in runs of about _ENTRIES entries of the `pairs` in all."""
    step = max(1, max(_ENTRIES, at_least) * length // max(1, pairs))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def list_entries(cells: Tensor, seen: Visible, slots: Tensor | None, kv_heads: int) -> Entries:
    """Every token that the chosen `cells` (B, H, t, K) cover, sorted by query, head and token."""
    B, H, t, K = cells.shape
    S = seen.index.shape[1]
    b, i, h, cell = cells.transpose(1, 2).nonzero().unbind(1)
    length = seen.lengths[b, i]
    start, end = cell_start(cell, length, K), cell_start(cell + 1, length, K)
    count = end - start
    rows = (b * t + i) * H + h
    which = torch.arange(len(cell), device=cells.device).repeat_interleave(count)
    token = torch.arange(len(which), device=cells.device) - (count.cumsum(0) - count - start)[which]
    token = token + seen.first[b, i][which]
    slot = token if slots is None else slots[b[which], token]
    key = (b[which] * S + slot) * kv_heads + (h // (H // kv_heads))[which]
    per_row = torch.zeros(B * t * H, dtype=torch.int64, device=cells.device)
    per_row.index_add_(0, rows, count)
    return Entries(rows[which], key, per_row.cumsum(0) - per_row)


def _tables(
    k: Tensor, v: Tensor, entries: Entries, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Entries]:
    """Keys and values as tables, and the entries that index them.

    A few queries of a long past copy the rows that they read and not all of it.
    """
    B, S, G, _ = k.shape
    if len(entries.key) >= B * S * G:
        keys, values = (x.to(dtype).reshape(-1, x.shape[3]) for x in (k, v))
        return keys, values, entries
    at = (entries.key // (S * G), entries.key // G % S, entries.key % G)
    order = torch.arange(len(entries.key), device=k.device)
    return k[at].to(dtype), v[at].to(dtype), entries._replace(key=order)


def _products(x: Tensor, table: Tensor, entries: Entries) -> Tensor:
    """(E,) x_row . table_key of every entry; x (B, t, H, D)."""
    # The gradient of a weighted sum over bags to its weights is exactly this.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.reshape(-1, x.shape[-1]), table, entries.key, entries.offsets, entries.row, 0
    )


def _sums(weights: Tensor, table: Tensor, entries: Entries) -> Tensor:
    """(R, .) sum of weight table_key over the entries of each row, zero for a row of none."""
    return embedding_bag(
        entries.key, table, entries.offsets, mode="sum", per_sample_weights=weights
    )


def _softmax(scores: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
    """Weights (E,) that sum to 1 in each row, and the logarithm of each row's sum (R,)."""
    rows = len(entries.offsets)
    top = scores.new_zeros(rows).scatter_reduce(0, entries.row, scores, "amax", include_self=False)
    weights = (scores - top[entries.row]).exp()
    total = scores.new_zeros(rows).index_add_(0, entries.row, weights)
    log_sum = top + total.clamp(min=torch.finfo(total.dtype).tiny).log()
    return weights / total[entries.row], log_sum


def transposed(entries: Entries, num_keys: int) -> tuple[Entries, Tensor]:
    """The same entries as sums over the rows of each key, and the order that sorts them so."""
    key, order = entries.key.sort(stable=True)
    per_key = torch.bincount(key, minlength=num_keys)
    return Entries(key, entries.row[order], per_key.cumsum(0) - per_key), order
