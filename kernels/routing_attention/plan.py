"""Which keys each query of strict routing attention sees, and in what blocks they are computed.

Keys are sorted by group (a cluster of a document), in time order inside each; what a query sees is
then one run of the sorted keys, of at most W before it. Cut into blocks of C, a run that ends in
block a begins at most `reach` blocks before. Queries are put into chunks of C with one `anchor`
block each, so that a chunk reads a fixed number of consecutive blocks, and all shapes depend on
the shapes of the inputs only.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, N = B * H,
W window, C block, M chunks per row, n blocks of keys per row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.routing_attention.tiles import Tiles

_ABSENT = 1 << 62  # sorts behind every group


class Plan(NamedTuple):
    """Indices of rows are into (B*S*H, .) for keys and (B*T*H, .) for queries, flattened."""

    tiles: Tiles
    keys: Tensor  # (N, (reach + n + ahead) * C) row of each sorted key; any row at the padding
    place: Tensor  # (N, S) where in `keys` each position's key stands
    queries: Tensor  # (N * M, C) row of each slot's query; any row in empty slots
    slots: Tensor  # (B*T*H,) slot of each query among all N * M * C
    anchor: Tensor  # (N * M,) first block in `keys`, over all N rows, that the chunk reads
    low: Tensor  # (N * M, C) first column of the chunk's keys that the query sees
    high: Tensor  # (N * M, C) the column after the last
    own: Tensor  # (N * M, C) the column of its own key, which may lie outside


def make_plan(q_groups: Tensor, k_groups: Tensor, window: int, causal: bool, shared: bool) -> Plan:
    """The plan for q_groups (B, T, H) and k_groups (B, S, H), int64, -1 for what is not there.

    `shared`: q_groups are the last T of k_groups.
    """
    (B, T, H), S = q_groups.shape, k_groups.shape[1]
    tiles = Tiles.of(T, S, window, causal, shared)
    C = tiles.block
    q_groups, k_groups = (
        g.transpose(1, 2).reshape(B * H, -1).contiguous() for g in (q_groups, k_groups)
    )
    ordered, order, index = sort_keys(k_groups)
    low, high = visible_places(ordered, q_groups, S, window, causal)
    own = index[:, S - T :]
    # A shared query's own key ends its run, and no block has more than C of them.
    last = own if shared else (_end_of_past(ordered, q_groups, S) - 1).clamp(min=0)
    ends = last // C
    slot = _slots(ends, tiles)

    def in_slots(x: Tensor, fill: int) -> Tensor:
        empty = x.new_full((B * H, tiles.chunks * C), fill)
        return empty.scatter_(1, slot, x).view(-1, C)

    block = in_slots(ends, 0).amax(1, keepdim=True)  # (N * M, 1), of the chunk
    first = (block - tiles.reach) * C  # the sorted key of column 0
    width = tiles.reach + tiles.blocks + tiles.ahead
    row = torch.arange(B * H, device=order.device)[:, None]
    keys = order.new_zeros(B * H, width * C)
    keys[:, tiles.reach * C : tiles.reach * C + S] = rows_at(order, B, H, S)
    positions = torch.arange(T, device=order.device).expand(B * H, T)
    return Plan(
        tiles,
        keys,
        index + tiles.reach * C,
        in_slots(rows_at(positions, B, H, T), 0),
        (row * tiles.chunks * C + slot).view(B, H, T).transpose(1, 2).flatten(),
        (row * width + block.view(B * H, -1)).flatten(),
        in_slots(low, 0) - first,
        in_slots(high, 0) - first,
        in_slots(own, -1) - first,
    )


def sort_keys(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted names group * S + position, the position at each place, the place of each position."""
    S = groups.shape[1]
    position = torch.arange(S, device=groups.device)
    names = torch.where(groups >= 0, groups * S, _ABSENT) + position
    ordered, order = names.sort(1)
    place = torch.empty_like(order).scatter_(1, order, position.expand_as(order))
    return ordered, order, place


def query_names(groups: Tensor, S: int) -> Tensor:
    """The queries' names among those of the keys."""
    T = groups.shape[1]
    return groups * S + torch.arange(S - T, S, device=groups.device)


def _end_of_past(ordered: Tensor, groups: Tensor, S: int) -> Tensor:
    """The place after each query's last key at or before it, its own group's or an earlier one."""
    return torch.searchsorted(ordered, query_names(groups, S), right=True)


def visible_places(
    ordered: Tensor, groups: Tensor, S: int, window: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """First place and end (N, T) of what each query sees; nothing for the group -1."""
    start = torch.searchsorted(ordered, groups * S)
    end = _end_of_past(ordered, groups, S)
    low = torch.maximum(start, end - window)
    if causal:
        return low, end
    close = torch.searchsorted(ordered, (groups + 1) * S)
    ahead = torch.searchsorted(ordered, query_names(groups, S)) + window
    return low, torch.minimum(close, ahead)


def _slots(anchor: Tensor, tiles: Tiles) -> Tensor:
    """Slot (N, T) of every query: those of one anchor block fill chunks of their own."""
    (N, T), C = anchor.shape, tiles.block
    by_anchor, order = anchor.sort(dim=1, stable=True)
    counts = anchor.new_zeros(N, tiles.blocks).scatter_add_(1, anchor, torch.ones_like(anchor))
    filled = (counts + C - 1) // C
    first_query = (counts.cumsum(1) - counts).gather(1, by_anchor)
    first_chunk = (filled.cumsum(1) - filled).gather(1, by_anchor)
    slot = first_chunk * C + torch.arange(T, device=anchor.device) - first_query
    return torch.empty_like(slot).scatter_(1, order, slot)


def rows_at(positions: Tensor, B: int, H: int, length: int) -> Tensor:
    """Rows of (B, length, H, .), flattened, at the positions (N, .) of each batch row and head."""
    heads = torch.arange(H, device=positions.device).repeat(B)[:, None]
    rows = torch.arange(B, device=positions.device).repeat_interleave(H)[:, None]
    return (rows * length + positions) * H + heads
