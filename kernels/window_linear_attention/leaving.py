"""Which key leaves a sliding window at each query.

B batch, T queries, S keys (the queries are the last T of S positions), W window.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def leaving(
    window: int, length: int, segments: Tensor | None, *keys: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The key `window` places before each of the last `length` positions of its document.

    Args:
        length: T.
        segments: int (B, S) document numbers, or None; padding takes no place.
        keys: each (B, S, ...).

    Returns:
        Each (B, T, ...), and bool (B, T) or (1, T): whether there is such a key. Where there is
        none, another one stands in its place.
    """
    S = keys[0].shape[1]
    if segments is None:
        first = S - length - window  # the place of the first query's, before 0 if it has none
        there = torch.arange(first, first + length, device=keys[0].device) >= 0
        return [_shifted(x, first, length) for x in keys], there[None]
    valid = segments >= 0
    rank = valid.cumsum(1)  # of a valid position among those of its row, from 1
    order = valid.to(torch.uint8).argsort(dim=1, stable=True)  # padding, then the valid positions
    wanted = rank[:, S - length :] - window
    padding = S - rank[:, -1:]
    index = order.gather(1, (padding + wanted - 1).clamp(min=0))
    own = segments[:, S - length :]
    there = (wanted >= 1) & (own >= 0) & (segments.gather(1, index) == own)
    rows = torch.arange(segments.shape[0], device=segments.device)[:, None]
    return [x[rows, index] for x in keys], there


def _shifted(x: Tensor, first: int, length: int) -> Tensor:
    """Positions `first` to `first + length - 1` of x, zeros for those before 0."""
    before = min(max(0, -first), length)
    part = x[:, max(0, first) : max(0, first + length)]
    return pad(part, (0, 0) * (x.ndim - 2) + (before, 0)) if before else part
