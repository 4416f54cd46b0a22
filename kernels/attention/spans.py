"""Which run of keys each query sees, where a row holds documents and padding.

Documents do not decrease along a row, so that a query's keys lie in one run, padding aside, and
the runs of later queries begin and end later. B batch, T queries, S keys (the queries are the last
T of S positions).
"""

import torch
from torch import Tensor


def spans(segments: Tensor, queries: int, causal: bool, window: int | None) -> tuple[Tensor, ...]:
    """int32 (B, T) first key and end of what each query sees, but for the padding in between.

    A query that is padding sees the keys from S to 0.

    Args:
        segments: int (B, S), as in `attention`.
    """
    S = segments.shape[1]
    valid = segments >= 0
    document = segments.cummax(1).values  # padding belongs to the document before it
    asking = segments[:, S - queries :].contiguous()
    low = torch.searchsorted(document, asking)
    if causal:
        high = torch.arange(S - queries + 1, S + 1, device=segments.device).expand_as(low)
    else:
        high = torch.searchsorted(document, asking, right=True)
    if window is not None:
        place = valid.cumsum(1)  # padding takes no place in a window
        oldest = place[:, S - queries :] - window + 1
        low = torch.maximum(low, torch.searchsorted(place, oldest))
    padding = asking < 0
    return low.masked_fill(padding, S).int(), high.masked_fill(padding, 0).int()


def readers(low: Tensor, high: Tensor, keys: int, block: int) -> tuple[Tensor, Tensor]:
    """int32 (B, n) first and end of the queries that see a key of each of n blocks of keys.

    Args:
        low, high: int32 (B, T), of `spans`.
        keys: S.
    """
    nothing = high == 0
    low, high = (x.masked_fill(nothing, 0).cummax(1).values for x in (low, high))
    start = torch.arange(0, keys, block, device=low.device, dtype=torch.int32)
    start = start.expand(len(low), -1).contiguous()
    first = torch.searchsorted(high, start, right=True, out_int32=True)
    end = torch.searchsorted(low, start + (block - 1), right=True, out_int32=True)
    return first, end
