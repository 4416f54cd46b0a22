"""Attention document by document: no mask, and no work on pairs that may not see each other.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, D head width.
"""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.compiler.disable()  # how many documents there are depends on the data
def attend_by_document(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
) -> Tensor:
    """Run `attend` on each document's q (1, t, H, D), k, v (1, s, G, D); padding gives zeros.

    Tokens of all rows are put in one line, padding left out, and split: the gradient of a split
    is one concatenation, that of a slice a tensor of full size per document.

    Args:
        segments: int (B, S), as in `attention`.
    """
    B, T = q.shape[:2]
    valid = segments >= 0
    valid_q = valid[:, -T:]
    key_counts, query_counts = _lengths(segments, valid, T)
    asking = [c for c in query_counts if c]
    if not asking:
        return torch.zeros_like(q)
    queries = _line(q, valid_q).split(asking, 1)
    keys, values = (_line(x, valid).split(key_counts, 1) for x in (k, v))
    pairs = ((ks, vs) for ks, vs, n in zip(keys, values, query_counts, strict=True) if n)
    y = torch.cat([attend(qs, *kv) for qs, kv in zip(queries, pairs, strict=True)], 1)
    if y.shape[1] < B * T:
        place = valid_q.flatten().nonzero().squeeze(1)
        y = y.new_zeros(1, B * T, *y.shape[2:]).index_copy(1, place, y)
    return y.view(q.shape)


def _line(x: Tensor, valid: Tensor) -> Tensor:
    """The valid tokens of x (B, S, ...), row after row, as (1, tokens, ...)."""
    line = x.flatten(0, 1)
    place = valid.flatten().nonzero().squeeze(1)
    if len(place) < len(line):
        line = line.index_select(0, place)
    return line[None]


def _lengths(segments: Tensor, valid: Tensor, T: int) -> tuple[list[int], list[int]]:
    """Keys and queries of every document, row after row."""
    B, S = segments.shape
    row = torch.arange(B, device=segments.device)[:, None]
    name = (row * (segments.amax() + 1).clamp(min=1) + segments)[valid]
    _, which, counts = name.unique_consecutive(return_inverse=True, return_counts=True)
    asks = (torch.arange(S, device=segments.device) >= S - T).expand(B, S)[valid]
    queries = torch.zeros_like(counts).index_add_(0, which, asks.to(counts.dtype))
    both = torch.stack([counts, queries]).tolist()  # one wait for the device
    return both[0], both[1]
