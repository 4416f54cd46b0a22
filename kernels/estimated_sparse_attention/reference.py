"""Estimated sparse attention as its definition has it: one query at a time, dense masks.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, G key heads,
D head width, K cells, k tokens per query and head, L tokens that a query sees.
"""

from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor

from kernels.precision import accumulation_dtype, outside_autocast

Cell = tuple[int, int, int]  # head, query, cell


@outside_autocast
def estimated_sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probs: Tensor,
    *,
    k_cells: int,
    causal: bool,
    grouping: str,
    scale: float,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, V) and the cells chosen, bool (B, H, T, K)."""
    (B, T, H, _), S = q.shape, k.shape[1]
    dtype, groups = accumulation_dtype(q, k, v), H // k.shape[2]
    if segments is None:
        segments = torch.zeros(B, S, dtype=torch.int64)
    cells = torch.zeros(probs.shape, dtype=torch.bool)
    mask = torch.zeros(B, H, T, S, dtype=torch.bool)
    for b, row in enumerate(segments.tolist()):
        seen = [_seen(row, S - T + t, causal) for t in range(T)]
        for h, t, cell in _chosen(probs[b].tolist(), seen, row[S - T :], k_cells, grouping):
            cells[b, h, t, cell] = True
            start, end = (_border(c, len(seen[t]), probs.shape[3]) for c in (cell, cell + 1))
            mask[b, h, t, seen[t][start:end]] = True
    keys = k.to(dtype).repeat_interleave(groups, dim=2)
    values = v.to(dtype).repeat_interleave(groups, dim=2)
    mask, cells = mask.to(q.device), cells.to(q.device)
    scores = torch.einsum("bthd,bshd->bhts", q.to(dtype) * scale, keys)
    some = mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask & some, float("-inf"))  # a row of nothing stays finite
    weights = scores.softmax(-1) * some
    return torch.einsum("bhts,bshd->bthd", weights, values).to(v.dtype), cells


def _seen(row: list[int], here: int, causal: bool) -> list[int]:
    """The positions that the query at `here` sees."""
    end = here + 1 if causal else len(row)
    return [s for s in range(end) if row[s] == row[here] >= 0]


def _border(cell: int, length: int, num_cells: int) -> int:
    return int(Fraction(cell * length, num_cells) + Fraction(1, 2))


def _chosen(
    probs: list, seen: list[list[int]], names: list[int], k_cells: int, grouping: str
) -> Iterable[Cell]:
    """The cells of one row of the batch."""
    H, T, K = len(probs), len(seen), len(probs[0][0])
    groups: dict[tuple[int, ...], list[Cell]] = {}
    for h in range(H):
        for t in range(T):
            name = {
                "causal_batch": (t,), "query": (t, h), "head": (names[t], h), "batch": (names[t],)
            }[grouping]  # fmt: skip
            if seen[t]:
                groups.setdefault(name, []).extend((h, t, cell) for cell in range(K))
    for members in groups.values():
        # Pairs of query and head; the last query sees the most. Fractions round half to even.
        pairs, length = len(members) // K, len(seen[members[-1][1]])
        budget = min(max(1, round(Fraction(pairs * k_cells * K, length))), len(members))
        yield from sorted(members, key=lambda c: (-probs[c[0]][c[1]][c[2]], c))[:budget]
