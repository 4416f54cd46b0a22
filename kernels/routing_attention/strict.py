"""Strict routing attention in blocks of sorted keys, forward and backward.

B batch, T queries, S keys, H heads, D head width, N = B * H, C block, M chunks per row,
J keys that a chunk reads, p chunks in a piece.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.precision import accumulation_dtype, matmul_dtype, outside_autocast
from kernels.routing_attention.plan import Plan, make_plan

# Bytes of one piece's (C, J) squares: the second-level caches of two cores; a GPU wants long runs.
_SQUARES = {"cpu": 2 << 20}
_SQUARES_ELSEWHERE = 64 << 20


class Piece(NamedTuple):
    """Some chunks, with what they read. Queries are scaled; any query stands in an empty slot."""

    span: slice  # of the N * M chunks
    rows: Tensor  # (p * C,) of the queries
    blocks: Tensor  # (p, J / C) of the sorted keys
    q: Tensor  # (p, C, D)
    k: Tensor  # (p, J, D)
    own_k: Tensor  # (p, C, D) the queries' own keys
    seen: Tensor  # (p, C, J) bool
    alone: Tensor  # (p, C, 1) bool, whether the own key counts


@outside_autocast
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
    """y (B, T, H, D) and the logarithm of each query's sum of weights, (B, T, H, 1)."""
    (B, T, H, D), exact = q.shape, accumulation_dtype(q, k, v)
    plan = make_plan(q_groups, k_groups, window, causal, shared)
    dtype = matmul_dtype(q, k, v)
    shape = plan.queries.shape
    y, lse = q.new_empty(*shape, D), q.new_empty(*shape, 1, dtype=exact)
    sorted_v, own_v = _sorted(v, plan, dtype), _own(v, T)
    for piece in _pieces(q, k, plan, last_resort, scale, dtype):
        scores, own = _scores(piece, exact)
        most = torch.maximum(scores.amax(-1, keepdim=True), own)
        weights, own = scores.sub_(most).exp_(), own.sub_(most).exp_()
        total = weights.sum(-1, keepdim=True).add_(own)
        values = _read(sorted_v, piece.blocks)
        out = torch.bmm(weights.to(dtype), values).to(exact)
        out.addcmul_(own, _gather(own_v, piece, exact)).div_(total)
        y[piece.span], lse[piece.span] = out, most.add_(total.log_())
    return _from_slots(y, plan).view(B, T, H, D), _from_slots(lse, plan).view(B, T, H, 1)


@outside_autocast
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
    """Gradients of q, k and v; the weights are made again from their sums."""
    (_, T, _, D), exact = q.shape, accumulation_dtype(q, k, v)
    plan = make_plan(q_groups, k_groups, window, causal, shared)
    dtype = matmul_dtype(q, k, v)
    sorted_v, own_v = _sorted(v, plan, dtype), _own(v, T)
    dq = q.new_empty(*plan.queries.shape, D, dtype=exact)
    own_dk, own_dv = torch.empty_like(dq), torch.empty_like(dq)
    sorted_dk, sorted_dv = (torch.zeros_like(sorted_v, dtype=exact) for _ in range(2))
    flat_grad, flat_y, flat_lse = grad.reshape(-1, D), y.reshape(-1, D), lse.reshape(-1, 1)
    for piece in _pieces(q, k, plan, last_resort, scale, dtype):
        scores, own = _scores(piece, exact)
        sums = _gather(flat_lse, piece, exact)
        weights, own = scores.sub_(sums).exp_(), own.sub_(sums).exp_()
        g = _gather(flat_grad, piece, exact)
        mean = (g * _gather(flat_y, piece, exact)).sum(-1, keepdim=True)
        own_g = (g * _gather(own_v, piece, exact)).sum(-1, keepdim=True).sub_(mean).mul_(own)
        values = _read(sorted_v, piece.blocks)
        low_g = g.to(dtype)
        _add(sorted_dv, piece, torch.bmm(weights.to(dtype).mT, low_g))
        d_scores = torch.bmm(low_g, values.mT).to(exact).sub_(mean).mul_(weights).to(dtype)
        _add(sorted_dk, piece, torch.bmm(d_scores.mT, piece.q))
        d_q = torch.bmm(d_scores, piece.k).to(exact).addcmul_(own_g, piece.own_k.to(exact))
        dq[piece.span] = d_q.mul_(scale)
        own_dk[piece.span], own_dv[piece.span] = own_g * piece.q, own * g
    dk, dv = _unsorted(sorted_dk, own_dk, plan, k), _unsorted(sorted_dv, own_dv, plan, v)
    return _from_slots(dq, plan).view(q.shape).to(q.dtype), dk, dv


def _pieces(
    q: Tensor, k: Tensor, plan: Plan, last_resort: bool, scale: float, dtype: torch.dtype
) -> Iterator[Piece]:
    """All chunks, as many at once as fit the cache."""
    (_, T, _, D), tiles = q.shape, plan.tiles
    C, J = tiles.block, tiles.columns
    sorted_k, own_k, flat_q = _sorted(k, plan, dtype), _own(k, T), q.reshape(-1, D)
    budget = _SQUARES.get(q.device.type, _SQUARES_ELSEWHERE)
    step = max(1, budget // (C * J * accumulation_dtype(q, k).itemsize))
    offset = torch.arange(J // C, device=q.device)
    column = torch.arange(J, device=q.device)
    for start in range(0, len(plan.anchor), step):
        span = slice(start, start + step)
        rows = plan.queries[span].flatten()
        low, high, own = (x[span, :, None] for x in (plan.low, plan.high, plan.own))
        blocks = plan.anchor[span, None] + offset
        seen = (column >= low) & (column < high) & (column != own)
        alone = ~seen.any(-1, keepdim=True) if last_resort else torch.ones_like(seen[..., :1])
        shape = (-1, C, D)
        yield Piece(
            span,
            rows,
            blocks,
            flat_q.index_select(0, rows).to(dtype).mul_(scale).view(shape),
            _read(sorted_k, blocks),
            own_k.index_select(0, rows).to(dtype).view(shape),
            seen,
            alone,
        )


def _scores(piece: Piece, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores (p, C, J) of the keys seen, and (p, C, 1) of the own key; -inf where not seen."""
    scores = torch.bmm(piece.q, piece.k.mT).to(exact).masked_fill_(~piece.seen, -torch.inf)
    own = (piece.q.to(exact) * piece.own_k).sum(-1, keepdim=True)
    return scores, own.masked_fill_(~piece.alone, -torch.inf)


def _sorted(x: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """x (B, S, H, D) in the order of the keys, in blocks: (blocks of all rows, C, D)."""
    rows = x.reshape(-1, x.shape[3]).index_select(0, plan.keys.flatten())
    return rows.to(dtype).view(-1, plan.tiles.block, x.shape[3])


def _read(blocks: Tensor, ids: Tensor) -> Tensor:
    """(p, J, D): the blocks (., C, D) that each of p chunks reads, ids (p, J / C), in a row."""
    return blocks.index_select(0, ids.flatten()).view(len(ids), -1, blocks.shape[2])


def _from_slots(x: Tensor, plan: Plan) -> Tensor:
    """(B*T*H, .): the queries' rows of x (N * M, C, .)."""
    return x.flatten(0, 1).index_select(0, plan.slots)


def _own(x: Tensor, T: int) -> Tensor:
    """x (B, S, H, D) at the queries' positions: (B*T*H, D)."""
    return x[:, -T:].reshape(-1, x.shape[3])


def _gather(x: Tensor, piece: Piece, exact: torch.dtype) -> Tensor:
    """Rows of x (B*T*H, .) for the piece's queries: (p, C, .)."""
    return x.index_select(0, piece.rows).to(exact).view(*piece.alone.shape[:2], -1)


def _add(total: Tensor, piece: Piece, part: Tensor) -> None:
    """Add part (p, J, D) to the blocks (., C, D) that the piece's chunks read, in a fixed order."""
    C = total.shape[1]
    for j, ids in enumerate(piece.blocks.unbind(1)):
        total.index_add_(0, ids, part[:, j * C : (j + 1) * C].to(total.dtype))


def _unsorted(total: Tensor, own: Tensor, plan: Plan, x: Tensor) -> Tensor:
    """Gradient of x (B, S, H, D): that of its sorted copy, and of the queries' own keys."""
    B, S, H, D = x.shape
    width = plan.keys.shape[1]
    row = torch.arange(B * H, device=x.device)[:, None] * width
    place = (row + plan.place).view(B, H, S).transpose(1, 2).flatten()
    grad = total.view(-1, D).index_select(0, place).view(B, S, H, D)
    own = _from_slots(own, plan).view(B, -1, H, D)
    grad[:, S - own.shape[1] :] += own
    return grad.to(x.dtype)
