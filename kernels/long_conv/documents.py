"""Documents of a batch as rows of their own.

B batch, S positions, R documents, L the longest of them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def bundles(segments: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Documents of similar length together, one to a row, without their padding.

    Lengths in a bundle differ by less than a factor of two, so that all bundles together have less
    than twice the positions.

    Args:
        segments: int (B, S).

    Yields:
        index int64 (R, L) into the flattened B * S positions, and real bool (R, L), False beyond
        a document's end, where the index repeats its first position. Every valid position is real
        in exactly one place.
    """
    where = (segments >= 0).flatten().nonzero().squeeze(1)
    if where.numel() == 0:
        return
    row, number = where // segments.shape[1], segments.flatten()[where]
    new = torch.ones_like(where, dtype=torch.bool)
    new[1:] = (row[1:] != row[:-1]) | (number[1:] != number[:-1])
    starts = new.nonzero().squeeze(1)
    lengths = torch.cat([starts[1:], starts.new_tensor([where.numel()])]) - starts
    size = torch.frexp(lengths.double()).exponent
    for s in size.unique().tolist():
        start, length = starts[size == s, None], lengths[size == s, None]
        offset = torch.arange(int(length.max()), device=segments.device)
        real = offset < length
        yield where[torch.where(real, start + offset, start)], real
