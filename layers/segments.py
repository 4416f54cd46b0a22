"""Document numbers: how the documents of one call join the past, and positions inside them.

B batch, T time. Document numbers are -1 for padding and else non-decreasing along a row.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

NO_DOCUMENT = -1


class DocumentState(Protocol):
    """What every state says about the document it ended in."""

    @property
    def segment(self) -> Tensor:
        """(B,) int64 number of that document, NO_DOCUMENT for the empty past."""
        ...

    @property
    def length(self) -> Tensor:
        """(B,) int64 tokens of it that were seen."""
        ...


class Continuation(NamedTuple):
    """`carry` (B,) bool: the row's first document goes on from the state (None: every row does).
    `last` (B,) int64: the document that the row's state ends in after this call."""

    carry: Tensor | None
    last: Tensor


class Place(NamedTuple):
    """Where the tokens of one call stand.

    `carry` and `last` as in Continuation; `positions` int64 (B, T), or (T,) where every row is
    alike, of every token inside its own document; `length` (B,) int64 tokens of document `last`
    seen so far, this call's included.
    """

    carry: Tensor | None
    last: Tensor
    positions: Tensor
    length: Tensor


def join(previous: Tensor, segments: Tensor | None) -> Continuation:
    """Compare the document the state ended in, `previous` (B,), with those of this call.

    `segments=None` continues every row's document. A row of padding alone leaves its state as it
    is. `previous` is NO_DOCUMENT for the empty past.
    """
    if segments is None:
        return Continuation(None, previous.clamp(min=0))
    valid = segments >= 0
    some = valid.any(1)
    first = segments.gather(1, valid.int().argmax(1, keepdim=True)).squeeze(1)
    last = torch.where(some, segments.amax(1), previous)
    return Continuation(~some | (first == previous), last.to(torch.int64))


def place(x: Tensor, state: DocumentState | None, segments: Tensor | None) -> Place:
    """Where the tokens of `x` (B, T, D) stand, after the past that `state` holds."""
    B, T = x.shape[:2]
    if state is None:
        previous = torch.full((B,), NO_DOCUMENT, device=x.device)
        offset = torch.zeros(B, dtype=torch.int64, device=x.device)
    else:
        previous, offset = state.segment, state.length
    carry, last = join(previous, segments)
    if segments is None or carry is None:
        where = torch.arange(T, device=x.device)
        return Place(carry, last, where if state is None else offset[:, None] + where, offset + T)
    # Numbers do not decrease: a row that ends in the document it came from saw no other.
    stays = carry & (last == previous)
    here = belongs(segments, last).sum(1)
    where = positions(segments, T, offset, carry)
    return Place(carry, last, where, here + torch.where(stays, offset, 0))


def belongs(segments: Tensor, document: Tensor) -> Tensor:
    """(B, T) bool: the position is a token of its row's `document` (B,); padding never is."""
    return (segments == document[:, None]) & (segments >= 0)


def keep_rows(keep: Tensor | None, x: Tensor) -> Tensor:
    """`x` (B, ...) with zeros in the rows where `keep` (B,) is False; None keeps every row."""
    if keep is None:
        return x
    return torch.where(keep.view(-1, *[1] * (x.ndim - 1)), x, 0)


def forward_fill(segments: Tensor) -> Tensor:
    """Padding takes the number of the document before it (NO_DOCUMENT where there is none)."""
    return segments.cummax(1).values


def positions(
    segments: Tensor | None, length: int, offset: Tensor, carry: Tensor | None = None
) -> Tensor:
    """Position of every token inside its own document, (B, T) int64; padding does not count.

    Args:
        segments: (B, T) or None, one document.
        length: T, used when `segments` is None.
        offset: (B,) tokens of the current document that the state has seen.
        carry: (B,) of `join`; rows where it is False start at 0.
    """
    if segments is None:
        return offset[:, None] + torch.arange(length, device=offset.device)
    valid = segments >= 0
    index = valid.cumsum(1) - 1  # (B, T) count of valid tokens before this one
    filled = forward_fill(segments)
    before = torch.cat([torch.full_like(filled[:, :1], NO_DOCUMENT), filled[:, :-1]], dim=1)
    starts = valid & (filled != before)
    past = offset if carry is None else torch.where(carry, offset, 0)
    first_start = starts & (index == 0)
    base = torch.where(starts & ~first_start, index, -past[:, None])
    return (index - base.cummax(1).values).clamp(min=0)


def inside_prefix(prefix_len: Tensor, batch: int, length: int, segments: Tensor | None) -> Tensor:
    """(B, T) bool: the token is one of the first `prefix_len` (B,) of its row's first document.

    Padding is not counted, so that left padding moves a prefix and does not shorten it; a prefix
    longer than the document is all of it.

    Raises:
        ValueError: `prefix_len` is not (B,) integers of at least 0.
    """
    if prefix_len.shape != (batch,) or prefix_len.is_floating_point() or int(prefix_len.min()) < 0:
        raise ValueError(
            f"prefix_len is {prefix_len.dtype} {tuple(prefix_len.shape)}, at least "
            f"{prefix_len.min()}; expected integers ({batch},) of at least 0"
        )
    inside = positions(segments, length, torch.zeros_like(prefix_len)) < prefix_len[:, None]
    if segments is None:
        return inside
    first = segments.gather(1, (segments >= 0).int().argmax(1, keepdim=True))
    return inside & (segments == first) & (segments >= 0)
