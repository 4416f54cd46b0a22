"""Routing attention as its definitions have it, by a dense mask or one cluster at a time.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, D head width,
K clusters, W window.
"""

import itertools

import torch
from torch import Tensor

from kernels.precision import accumulation_dtype, outside_autocast
from kernels.routing_attention.balanced import Members, no_members


@outside_autocast
def cluster_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_groups: Tensor,
    k_groups: Tensor,
    *,
    window: int,
    causal: bool,
    last_resort: bool,
    shared: bool,
    scale: float,
) -> Tensor:
    """Each query over the newest W keys of its group, and over its own key."""
    T, S = q.shape[1], k.shape[1]
    position = torch.arange(S, device=q.device)
    own = position == position[S - T :, None]  # (T, S)
    same = (q_groups[:, :, None] == k_groups[:, None]) & (k_groups[:, None] >= 0)  # (B, T, S, H)
    past = (position <= position[S - T :, None])[:, :, None]
    ahead = (position >= position[S - T :, None])[:, :, None]
    newer = (same & past).flip(2).cumsum(2).flip(2)  # keys of the group from here to the query
    seen = same & past & (newer <= window)
    if not causal:
        seen = seen | (same & ahead & ((same & ahead).cumsum(2) <= window))
    seen = _with_own(seen.permute(0, 3, 1, 2), own, last_resort)
    return _attend(q, k, v, seen, scale).to(q.dtype)


@outside_autocast
def balanced_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scores: Tensor | None,
    k_scores: Tensor,
    *,
    window: int,
    causal: bool,
    last_resort: bool,
    scale: float,
    segments: Tensor | None,
    past: Members | None,
    filled: Tensor | None,
    want_members: bool,
) -> tuple[Tensor, Tensor, Members | None]:
    """One row, head, document and cluster after another."""
    (B, T, H, _), K = q.shape, k_scores.shape[2]
    segments = torch.zeros(B, T, dtype=torch.int64) if segments is None else segments
    total = torch.zeros_like(q, dtype=accumulation_dtype(q, k, v))
    count = torch.zeros(B, T, H, dtype=torch.int64, device=q.device)
    after = (past or no_members(q, q_scores, k_scores, window)).map(Tensor.clone)
    for b, h, c in itertools.product(range(B), range(H), range(K)):
        numbers = [n for n in segments[b].unique().tolist() if n >= 0]
        for number in numbers:
            at = (segments[b] == number).nonzero().squeeze(1)
            old = int(filled[b]) if filled is not None and number == numbers[0] else 0
            keys, values, scores, q_rank = _candidates(
                k, v, q_scores, k_scores, past, (b, h, c), at, old
            )
            held, asking = _best(scores, window), _best(q_rank, window)
            queries = [i for i in asking if i >= old]
            for i in queries:
                seen = [j for j in held if j <= i or not causal]
                if last_resort and seen != [i]:
                    seen = [j for j in seen if j != i]
                if seen:
                    t = at[i - old]
                    weights = (keys[seen] @ q[b, t, h].to(keys.dtype) * scale).softmax(0)
                    total[b, t, h] += weights @ values[seen]
                    count[b, t, h] += 1
            if number == numbers[-1]:
                _hold(
                    after, (b, h, c), (keys, held), (values, held), (scores, held), (q_rank, asking)
                )
    y = (total / count.clamp(min=1)[..., None]).to(q.dtype)
    return y, count, after if want_members else None


def _candidates(
    k: Tensor,
    v: Tensor,
    q_scores: Tensor | None,
    k_scores: Tensor,
    past: Members | None,
    cluster: tuple[int, int, int],
    at: Tensor,
    old: int,
) -> list[Tensor]:
    """Keys, values and both scores of the `old` newest past members and of the positions `at`."""
    b, h, c = cluster
    by_query = k_scores if q_scores is None else q_scores
    new = [k[b, at, h], v[b, at, h], k_scores[b, h, c, at], by_query[b, h, c, at]]
    if past is not None and old:
        by_query = past.scores if past.q_scores is None else past.q_scores
        before = [past.k, past.v, past.scores, by_query]
        new = [
            torch.cat([p[b, h, c, -old:].to(n.dtype), n]) for p, n in zip(before, new, strict=True)
        ]
    return [new[0].to(accumulation_dtype(k)), new[1].to(accumulation_dtype(v)), *new[2:]]


def _best(scores: Tensor, window: int) -> list[int]:
    """The `window` largest, the earliest among equals, in the order of time."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
    return sorted(ranked[:window])


def _hold(after: Members, cluster: tuple[int, int, int], *parts: tuple[Tensor, list[int]]) -> None:
    """Write what the cluster holds to its slots."""
    for slots, (x, held) in zip(after, parts, strict=True):
        if slots is not None:
            slots[cluster] = 0
            slots[cluster][-len(held) :] = x[held].to(slots.dtype)


def _with_own(seen: Tensor, own: Tensor, last_resort: bool) -> Tensor:
    """Add the own key, always or where nothing else is seen."""
    others = seen & ~own
    return others | (own & ~others.any(-1, keepdim=True) if last_resort else own)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Softmax attention (B, T, H, D) over what `seen` (B, H, T, S) allows."""
    dtype = accumulation_dtype(q, k, v)
    scores = torch.einsum("bthd,bshd->bhts", q.to(dtype) * scale, k.to(dtype))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v.to(dtype))
