"""The documents of one call, each in a row of its own.

Documents do not see one another, so that those that share a row can be read side by side.

B rows, T time, S streams (documents), U tokens of the longest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layers.segments import NO_DOCUMENT, forward_fill, positions


@dataclass(frozen=True)
class Packing:
    """Which row each stream comes from, and where it stood there.

    Attributes:
        row: (S,) the row of each stream.
        carried: (S,) bool, the stream goes on from its row's state.
        last: (B,) the stream that each row ends in.
        stream, position: (B, T) where each token of the call stands among the streams.
        valid: (B, T) bool, the position is no padding.
    """

    row: Tensor
    carried: Tensor
    last: Tensor
    stream: Tensor
    position: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Streams:
    """Documents against the left edge, in the order in which the rows of the call hold them.

    A row has at least one stream; one without a token where the row is padding.

    Attributes:
        tokens: (S, U), zeros behind a stream's end.
        lengths: tokens of each stream.
        packing: None where streams are the rows as they were.
    """

    tokens: Tensor
    lengths: list[int]
    packing: Packing | None = None


def unpack(tokens: Tensor, segments: Tensor | None, carry: Tensor | None) -> Streams:
    """The streams of tokens (B, T) with document numbers `segments` (B, T).

    How many there are and how long is told to the host, which waits for the device.

    Args:
        carry: bool (B,), the row's first document goes on from the row's state; None: all do.
    """
    B, T = tokens.shape
    if segments is None:
        return Streams(tokens, [T] * B)
    valid = segments >= 0
    filled = forward_fill(segments)
    before = torch.cat([torch.full_like(filled[:, :1], NO_DOCUMENT), filled[:, :-1]], dim=1)
    starts = valid & (filled != before)
    per_row = starts.sum(1).clamp(min=1)
    last = per_row.cumsum(0) - 1
    first = last - per_row + 1
    stream = first[:, None] + (starts.cumsum(1) - 1).clamp(min=0)
    position = positions(segments, T, torch.zeros_like(first))
    row = torch.arange(B, device=tokens.device).repeat_interleave(per_row)
    lengths = torch.bincount(stream[valid], minlength=len(row)).tolist()
    left = tokens.new_zeros(len(row), max(1, *lengths))
    left[stream[valid], position[valid]] = tokens[valid]
    carried = torch.zeros_like(row, dtype=torch.bool)
    carried[first] = True if carry is None else carry
    return Streams(left, lengths, Packing(row, carried, last, stream, position, valid))
