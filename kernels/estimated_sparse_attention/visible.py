"""What each query may see, as positions inside its own document.

B batch, T queries, S keys (the queries are the last T of S positions), L tokens that a query sees.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.segments import restarts


class Visible(NamedTuple):
    """Key s is token number `index[s] - first[t]` of the document of query t.

    The query sees it where that number is at least 0 and below `lengths[t]`.

    lengths: (B, T) int64 L; 0 at padding, which sees nothing.
    first: (B, T) int64 tokens of the row before the query's document.
    index: (B, S) int64 number of the key among the row's tokens; -1 at padding.
    """

    lengths: Tensor
    first: Tensor
    index: Tensor

    def rows(self, start: int, end: int) -> "Visible":
        """The queries from `start` to `end`."""
        return Visible(self.lengths[:, start:end], self.first[:, start:end], self.index)

    def numbers(self) -> tuple[Tensor, Tensor]:
        """(B, T, S) the number of each key in each query's document, and whether it is seen."""
        number = self.index[:, None] - self.first[..., None]
        return number, (number >= 0) & (number < self.lengths[..., None])

    def slots(self) -> Tensor:
        """(B, S) where the i-th token of each row stands; what follows the last is of no use."""
        padding = self.index < 0
        return padding.to(torch.uint8).argsort(dim=1, stable=True)


def visible(
    batch: int,
    queries: int,
    keys: int,
    *,
    causal: bool,
    segments: Tensor | None,
    device: torch.device,
) -> Visible:
    """What the last `queries` of `keys` positions see.

    Args:
        segments: int (B, S) document numbers, -1 for padding, or None for one document.
    """
    if segments is None:
        index = torch.arange(keys, device=device).expand(batch, -1)
        seen = index[:, keys - queries :] + 1 if causal else torch.full_like(index, keys)
        return Visible(seen[:, -queries:], torch.zeros_like(seen[:, -queries:]), index)
    valid = segments >= 0
    index = valid.cumsum(1) - 1
    starts = restarts(segments)
    first = torch.where(starts, index, 0).cummax(1).values
    last = index if causal else _last_of_document(index, starts)
    lengths = torch.where(valid, last - first + 1, 0)
    asks = slice(keys - queries, None)
    return Visible(lengths[:, asks], first[:, asks], torch.where(valid, index, -1))


def _last_of_document(index: Tensor, starts: Tensor) -> Tensor:
    """(B, S) number of the last token of each position's document."""
    end = index[:, -1:]
    before_start = torch.where(starts, index - 1, end)  # the token before each new document
    later = torch.cat([before_start[:, 1:], end], 1)
    return later.flip(1).cummin(1).values.flip(1)
