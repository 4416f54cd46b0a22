"""The choice of cells: grouped top-k under a budget that shrinks as rows grow (SEA, section 3.3).

B batch, H heads, T queries, S keys, K cells, k tokens per query and head, L tokens that a query
sees.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from kernels.checks import check_floating, check_segments, check_shape
from kernels.estimated_sparse_attention.visible import Visible, visible

Grouping = Literal["causal_batch", "query", "head", "batch"]
GROUPINGS: tuple[str, ...] = get_args(Grouping)

# Values that are ranked at once. Later queries have smaller budgets, and a tile is ranked as deep
# as its largest budget.
_TILE = 1 << 17


def cell_budget(lengths: Tensor, members: int, num_cells: int, k_cells: int) -> Tensor:
    """Cells of a group of `members` pairs of query and head: round(members k K / L), half to even.

    At least 1, at most all. `lengths` int64 (...), the L of the group's queries; none for L = 0.
    """
    share = members * k_cells * num_cells / lengths.clamp(min=1).to(torch.float64)
    budget = share.round().clamp(1, members * num_cells).to(torch.int64)
    return torch.where(lengths > 0, budget, 0)


def select_cells(
    probs: Tensor,
    k_cells: int,
    *,
    keys: int | None = None,
    causal: bool = True,
    grouping: Grouping = "causal_batch",
    segments: Tensor | None = None,
) -> Tensor:
    """The cells with the largest estimates in each group, as many as its budget allows.

        causal_batch    groups (b, t), all heads of a query compete: round(H k K / L) of H K cells
        query           groups (b, h, t): round(k K / L) of K cells
        head            groups (b, h), all queries compete: round(T k K / L) of T K cells
        batch           groups (b): round(T H k K / L) of H T K cells

    at least 1 and at most all of them; half rounds to even. A cell covers L / K tokens, so that a
    budget is k tokens per query and head; counting cells alone would be quadratic. Of equal
    estimates the first in the order (head, query, cell) goes first, so that every form, split and
    device chooses alike. In "head" and "batch" documents are groups of their own.

    Source: Lee et al. 2024 (SEA), section 3.3 and table 6, after its public code.

    Args:
        probs: (B, H, T, K) estimates; only their order counts.
        k_cells: k, at least 1.
        keys: S, the queries being the last T of S positions; T by default.
        causal: L is a query's position plus 1, and else the length of its document.
        grouping: "head" and "batch" let queries compete with later ones: not with `causal`.
        segments: int (B, S) document numbers; -1 is padding, which selects nothing.

    Returns:
        bool (B, H, T, K).

    Raises:
        ValueError: shapes or dtypes do not fit, k below 1, or a grouping that is unknown or sees
            the future.
    """
    name = "select_cells"
    check_floating(name, probs=probs)
    check_shape(name, "probs", probs, "(B, H, T, K)", None, None, None, None)
    check_choice(name, k_cells, causal, grouping)
    B, _, T, _ = probs.shape
    S = T if keys is None else keys
    if S < T:
        raise ValueError(f"{name}: keys={S}; expected at least probs' {T} queries")
    check_segments(name, segments, B, S)
    seen = visible(B, T, S, causal=causal, segments=segments, device=probs.device)
    return choose_cells(probs, seen, k_cells, grouping)


def check_choice(operator: str, k_cells: int, causal: bool, grouping: str) -> None:
    """Raise ValueError unless the budget and the grouping can be served."""
    if k_cells < 1:
        raise ValueError(f"{operator}: k_cells={k_cells}; expected at least 1")
    if grouping not in GROUPINGS:
        raise ValueError(f"{operator}: grouping={grouping!r}; allowed: {', '.join(GROUPINGS)}")
    if causal and grouping in ("head", "batch"):
        raise ValueError(
            f"{operator}: grouping={grouping!r} with causal=True lets queries compete with later "
            "ones; allowed: causal_batch, query"
        )


@torch.no_grad()
def choose_cells(probs: Tensor, seen: Visible, k_cells: int, grouping: str) -> Tensor:
    """`select_cells` once it is known what each query sees."""
    if grouping in ("head", "batch"):
        return _choose_among_queries(probs, seen, k_cells, grouping)
    B, H, T, K = probs.shape
    heads = H if grouping == "causal_batch" else 1
    budget = cell_budget(seen.lengths, heads, K, k_cells)  # (B, T)
    chosen = probs.new_empty(probs.shape, dtype=torch.bool)
    step = max(1, _TILE // (B * H * K))
    for start in range(0, T, step):
        rows = slice(start, min(start + step, T))
        part = probs[:, :, rows].transpose(1, 2)  # (B, t, H, K)
        groups = part.reshape(-1, heads * K)
        most = budget[:, rows].repeat_interleave(H // heads, dim=1).flatten()
        chosen[:, :, rows] = largest(groups, most).view(part.shape).transpose(1, 2)
    return chosen


def _choose_among_queries(probs: Tensor, seen: Visible, k_cells: int, grouping: str) -> Tensor:
    """Groups of all queries of a document, of one head or of all."""
    _, H, _, K = probs.shape
    heads = H if grouping == "batch" else 1
    chosen = probs.new_zeros(probs.shape, dtype=torch.bool)
    for b, (lengths, first) in enumerate(zip(seen.lengths, seen.first, strict=True)):
        for document in first[lengths > 0].unique().tolist():
            rows = ((first == document) & (lengths > 0)).nonzero().squeeze(1)
            part = probs[b, :, rows]  # (H, L, K)
            groups = part.reshape(H // heads, -1)
            most = cell_budget(lengths[rows[0]], heads * len(rows), K, k_cells)
            chosen[b, :, rows] = largest(groups, most.expand(len(groups))).view(part.shape)
    return chosen


def largest(x: Tensor, count: Tensor) -> Tensor:
    """bool (R, N): the `count` (R,) largest of each row of x, the earlier ones of equals."""
    most = min(int(count.max()), x.shape[1])
    if most == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    count = count.clamp(max=x.shape[1])[:, None]
    ranked = x.topk(most, dim=1).values
    # Ties are common (the decoder repeats columns) and topk breaks them as it likes.
    threshold = ranked.gather(1, (count - 1).clamp(min=0))
    above, equal = x > threshold, x == threshold
    room = count - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1) <= room))) & (count > 0)
