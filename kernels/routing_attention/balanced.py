"""Top-w routing attention: every cluster holds the W positions that score highest.

B batch, T new positions, P past members of a cluster, H heads, D head width, K clusters, W window,
M = min(W, P + T) members, Q = min(T, M) queries of a cluster.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad, scaled_dot_product_attention

from kernels.long_conv.documents import bundles
from kernels.native import library_for, library_on
from kernels.routing_attention import cpp
from kernels.routing_attention.members import member_attention


class Members(NamedTuple):
    """What the clusters of the last document hold, oldest first, against the right edge of W slots.

    Slots in front hold zeros; every cluster of a row uses as many, min(W, tokens seen).
    """

    k: Tensor  # (B, H, K, W, D)
    v: Tensor  # (B, H, K, W, D)
    scores: Tensor  # (B, H, K, W)
    q_scores: Tensor | None  # of the members among the queries; None: they are the same

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Members":
        """`fn` of every tensor."""
        q_scores = None if self.q_scores is None else fn(self.q_scores)
        return Members(fn(self.k), fn(self.v), fn(self.scores), q_scores)

    def with_rows(self, rows: Tensor, other: "Members", chosen: Tensor) -> "Members":
        """These with the rows `chosen` of `other` in the place of `rows`."""

        def put(x: Tensor, y: Tensor) -> Tensor:
            return x.index_put((rows,), y[chosen])

        q_scores = None
        if self.q_scores is not None and other.q_scores is not None:
            q_scores = put(self.q_scores, other.q_scores)
        k, v = put(self.k, other.k), put(self.v, other.v)
        return Members(k, v, put(self.scores, other.scores), q_scores)


class Selection(NamedTuple):
    """Which of a cluster's candidates it holds, ascending, against the right edge."""

    index: Tensor  # (B, H, K, M)
    real: Tensor  # (B, H, K, M) bool, False in slots that nobody fills


def select(scores: Tensor, window: int, form: str = "torch") -> Selection:
    """The `window` largest of scores (..., C), the earliest among equals; -inf is never taken.

    Args:
        form: "cpp", or another, which is torch.
    """
    slots = min(window, scores.shape[-1])
    index, taken = _choose(scores, slots) if form == "cpp" else _choose_torch(scores, slots)
    return Selection(index, torch.arange(slots, device=scores.device) >= slots - taken)


def _choose_torch(scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """As cpp.choose_members."""
    least = scores.topk(slots, dim=-1).values[..., -1:]
    above, level = scores > least, scores == least
    room = slots - above.sum(-1, keepdim=True)
    taken = (above | (level & (level.cumsum(-1) <= room))) & (scores > -torch.inf)
    rank = taken.cumsum(-1)
    count = rank[..., -1:]
    slot = torch.where(taken, slots - count + rank - 1, slots)  # the last one is thrown away
    position = torch.arange(scores.shape[-1], device=scores.device).expand_as(slot)
    index = slot.new_zeros(*slot.shape[:-1], slots + 1).scatter_(-1, slot, position)[..., :-1]
    return index, count


@custom_op("seqmix::choose_members", mutates_args=())
def _choose(scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    library = library_on("balanced_attention", cpp.SOURCE, scores.device)
    return cpp.choose_members(library, scores, slots)


@_choose.register_fake
def _(scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    shape = scores.shape[:-1]
    index = scores.new_empty(*shape, slots, dtype=torch.int64)
    return index, scores.new_empty(*shape, 1, dtype=torch.int64)


def balanced_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scores: Tensor | None,
    k_scores: Tensor,
    *,
    segments: Tensor | None,
    past: Members | None,
    filled: Tensor | None,
    want_members: bool,
    form: str = "torch",
    **options,
) -> tuple[Tensor, Tensor, Members | None]:
    """All clusters at once, document by document where there are several.

    Args:
        form: what attends to the members: "torch", "triton", "cpp", or "auto", see
            kernels.native.library_for, and "torch" where that is not C++.
    """
    options["form"] = _best_form(q.device.type) if form == "auto" else form
    parts = (q, k, v, q_scores, k_scores)
    if segments is None:
        return _one_document(*parts, None, past, filled, want_members, **options)
    return _documents(*parts, segments, past, filled, want_members, **options)


@torch.compiler.assume_constant_result  # a compiler is there, or it is not
def _best_form(device: str) -> str:
    library = library_for("balanced_attention", cpp.SOURCE, "auto", torch.device(device))
    return "torch" if library is None else "cpp"


@torch.compiler.disable()  # how many documents there are depends on the data
def _documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scores: Tensor | None,
    k_scores: Tensor,
    segments: Tensor,
    past: Members | None,
    filled: Tensor | None,
    want_members: bool,
    **options,
) -> tuple[Tensor, Tensor, Members | None]:
    """Every document as a row of its own."""
    B, T, H, D = q.shape
    y, count = q.new_zeros(B * T, H, D), k_scores.new_zeros(B * T, H, dtype=torch.int64)
    members = past
    if members is None and want_members:
        members = no_members(q, q_scores, k_scores, options["window"])
    first, last = _first_and_last(segments)

    def rows(x: Tensor, index: Tensor) -> Tensor:
        return x.flatten(0, 1)[index]

    def score_rows(x: Tensor, index: Tensor) -> Tensor:
        return rows(x.permute(0, 3, 1, 2), index).permute(0, 2, 3, 1)

    for index, real in bundles(segments):
        row = index[:, 0] // T
        opens = first[row] == index[:, 0]
        own_past = own_filled = None
        if past is not None and filled is not None:
            own_past = past.map(lambda x, row=row: x[row])
            own_filled = torch.where(opens, filled[row], 0)
        part, seen, held = _one_document(
            rows(q, index),
            rows(k, index),
            rows(v, index),
            None if q_scores is None else score_rows(q_scores, index),
            score_rows(k_scores, index),
            real,
            own_past,
            own_filled,
            want_members,
            **options,
        )
        y = y.index_put((index[real],), part[real])
        count[index[real]] = seen[real]
        if members is not None and held is not None:
            ends = last[row] == segments.flatten()[index[:, 0]]
            members = members.with_rows(row[ends], held, ends)
    return y.view(q.shape), count.view(B, T, H), members if want_members else None


def _first_and_last(segments: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) place of each row's first valid position among all B * T, and its last document."""
    B, T = segments.shape
    start = torch.arange(B, device=segments.device) * T
    return start + (segments >= 0).int().argmax(1), segments.amax(1)


def no_members(q: Tensor, q_scores: Tensor | None, k_scores: Tensor, window: int) -> Members:
    """Clusters that hold nothing."""
    B, H, K, _ = k_scores.shape
    empty = q.new_zeros(B, H, K, window, q.shape[3])
    scores = k_scores.new_zeros(B, H, K, window)
    return Members(empty, empty, scores, None if q_scores is None else scores)


def _one_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scores: Tensor | None,
    k_scores: Tensor,
    real: Tensor | None,
    past: Members | None,
    filled: Tensor | None,
    want_members: bool,
    *,
    window: int,
    causal: bool,
    last_resort: bool,
    scale: float,
    form: str,
) -> tuple[Tensor, Tensor, Members | None]:
    """`real` (B, T): which positions there are, the first of each row; None: all."""
    T = q.shape[1]
    P = 0 if past is None else past.k.shape[3]
    candidates = _candidates(k_scores, real, None if past is None else past.scores, filled)
    held = select(candidates, window, form)
    asking = held
    if q_scores is not None:
        past_scores = None if past is None else past.q_scores
        q_candidates = _candidates(q_scores, real, past_scores, filled)
        asking = select(q_candidates, window, form)
    keys, values = (
        _take(x, None if past is None else getattr(past, name), held)
        for name, x in (("k", k), ("v", v))
    )
    query, where, asks = _queries(q, asking, P)
    attend = _attend if form == "torch" else partial(_attend_by_runs, form=form)
    options = {"causal": causal, "last_resort": last_resort, "scale": scale}
    out, alive = attend(query, keys, values, held, where, asks, **options)
    y, count = _average(out, where - P, alive, T)
    members = None
    if want_members:
        unused = window - held.index.shape[-1]
        q_held = None
        if q_scores is not None:
            q_held = _held_scores(q_candidates, asking, unused)
        members = Members(
            _pad_slots(keys, held, unused),
            _pad_slots(values, held, unused),
            _held_scores(candidates, held, unused),
            q_held,
        )
    return y.to(q.dtype), count, members


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    held: Selection,
    where: Tensor,
    asks: Tensor,
    *,
    causal: bool,
    last_resort: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, K, Q, D) of queries that are candidates `where`; which saw anything.

    The others' are zero.
    """
    index = held.index[..., None, :]  # (B, H, K, 1, M)
    seen = held.real[..., None, :] & asks[..., None]
    if causal:
        seen = seen & (index <= where[..., None])
    if last_resort:
        own = seen & (index == where[..., None])
        seen = seen & ~(own & (seen & ~own).any(-1, keepdim=True))
    alive = seen.any(-1)
    out = scaled_dot_product_attention(
        query.flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        attn_mask=(seen | ~alive[..., None]).flatten(0, 1),  # no row of the mask is empty
        scale=scale,
    )
    return torch.where(alive[..., None], out.view(query.shape), 0), alive


def _attend_by_runs(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    held: Selection,
    where: Tensor,
    asks: Tensor,
    **options,
) -> tuple[Tensor, Tensor]:
    """The same by the kernels of members.py."""
    members = torch.where(held.real, held.index, -1)
    asking = torch.where(asks, where, -1)
    parts = (x.flatten(0, 2).contiguous() for x in (query, keys, values, members, asking))
    out, alive = member_attention(*parts, **options)
    return out.view(query.shape), alive.view(where.shape)


def _candidates(
    scores: Tensor, real: Tensor | None, past: Tensor | None, filled: Tensor | None
) -> Tensor:
    """Scores (B, H, K, P + T) of the past's members and the new positions, -inf for neither."""
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None], -torch.inf)
    if past is None or filled is None:
        return scores
    P = past.shape[3]
    empty = torch.arange(P, device=past.device) < P - filled[:, None]
    return torch.cat([past.masked_fill(empty[:, None, None], -torch.inf), scores], 3)


def _take(x: Tensor, past: Tensor | None, chosen: Selection) -> Tensor:
    """(B, H, K, M, D): the chosen of x (B, T, H, D), or of the past's members before it."""
    (B, T, H, D), (*_, K, M) = x.shape, chosen.index.shape
    P = 0 if past is None else past.shape[3]
    row = torch.arange(B, device=x.device).view(-1, 1, 1, 1) * T
    head = torch.arange(H, device=x.device).view(1, -1, 1, 1)
    place = (row + (chosen.index - P).clamp(min=0)) * H + head
    new = x.reshape(-1, D).index_select(0, place.flatten()).view(B, H, K, M, D)
    if past is None:
        return new
    index = chosen.index[..., None]
    old = past.to(x.dtype).gather(3, index.clamp(max=P - 1).expand(-1, -1, -1, -1, D))
    return torch.where(index < P, old, new)


def _queries(q: Tensor, chosen: Selection, P: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every cluster the queries (B, H, K, Q, D), their candidates' numbers, and which ask.

    Where there are no more positions than slots, every position has one in every cluster.
    """
    (B, T, H, _), (*_, K, M) = q.shape, chosen.index.shape
    new = chosen.real & (chosen.index >= P)
    if T > M:
        return _take(q, None, Selection((chosen.index - P).clamp(min=0), new)), chosen.index, new
    query = q.transpose(1, 2)[:, :, None].expand(-1, -1, K, -1, -1)
    where = torch.arange(P, P + T, device=q.device).expand(B, H, K, T)
    place = torch.where(new, chosen.index - P, T)
    asks = torch.zeros(B, H, K, T + 1, dtype=torch.bool, device=q.device)
    return query, where, asks.scatter_(3, place, True)[..., :T]


def _average(out: Tensor, where: Tensor, alive: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Mean (B, T, H, D) over the clusters in which a query saw anything; their number.

    Args:
        out: (B, H, K, Q, D), zero where it saw nothing.
        where: (B, H, K, Q) positions.
        alive: (B, H, K, Q) bool.
    """
    B, H, _, Q, D = out.shape
    if Q == T:  # a slot for every position
        total, count = out.sum(2), alive.sum(2)
    else:
        row = torch.arange(B * H, device=out.device).view(B, H, 1, 1) * T
        place = (row + where.clamp(min=0)).flatten()
        # Deterministic on the CPU, and on a GPU where torch is asked to be.
        total = out.new_zeros(B * H * T, D).index_add_(0, place, out.reshape(-1, D))
        count = place.new_zeros(B * H * T).index_add_(0, place, alive.flatten().to(place.dtype))
        total, count = total.view(B, H, T, D), count.view(B, H, T)
    y = total / count.clamp(min=1)[..., None]
    return y.transpose(1, 2), count.transpose(1, 2)


def _pad_slots(x: Tensor, held: Selection, unused: int) -> Tensor:
    """Members (B, H, K, M, D) in W slots."""
    return pad(torch.where(held.real[..., None], x, 0), (0, 0, unused, 0))


def _held_scores(candidates: Tensor, held: Selection, unused: int) -> Tensor:
    """Scores of the members in W slots, zero in the others."""
    return pad(torch.where(held.real, candidates.gather(3, held.index), 0), (unused, 0))
