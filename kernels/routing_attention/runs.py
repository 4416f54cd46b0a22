"""Strict routing attention as runs of sorted keys, one for every query.

Queries and keys are sorted by group (a cluster of a document), in time order inside each. What a
query sees is then one run of the sorted keys, and the runs of later queries begin and end later.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, N = B * H.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.routing_attention.plan import query_names, rows_at, sort_keys, visible_places


class Runs(NamedTuple):
    """Places are among the sorted; rows are of (B*S*H, .) for keys, (B*T*H, .) for queries."""

    queries: Tensor  # int64 (N, T) row of each sorted query
    keys: Tensor  # int64 (N, S) row of each sorted key
    askers: Tensor  # int64 (N, S) row of the query whose own key it is, -1 for none
    low: Tensor  # int32 (N, T) first place of the keys that a sorted query sees
    high: Tensor  # int32 (N, T) the place after the last
    own: Tensor  # int32 (N, T) the place of its own key, which may lie outside; -1 for none


def make_runs(q_groups: Tensor, k_groups: Tensor, window: int, causal: bool) -> Runs:
    """The runs for q_groups (B, T, H) and k_groups (B, S, H), int64, -1 for what is not there."""
    (B, T, H), S = q_groups.shape, k_groups.shape[1]
    q_groups, k_groups = (
        g.transpose(1, 2).flatten(0, 1).contiguous() for g in (q_groups, k_groups)
    )
    ordered, order, place = sort_keys(k_groups)
    low, high = visible_places(ordered, q_groups, S, window, causal)
    queries = query_names(q_groups, S).argsort(1)
    low, high, own = (x.gather(1, queries).int() for x in (low, high, place[:, S - T :]))
    asker = order - (S - T)
    askers = torch.where(asker >= 0, rows_at(asker, B, H, T), -1)
    return Runs(rows_at(queries, B, H, T), rows_at(order, B, H, S), askers, low, high, own)
