"""Document numbers inside an operator: -1 is padding, otherwise non-decreasing along a row.

B batch, T time.
"""

from torch import Tensor
from torch.nn.functional import pad


def first_document(segments: Tensor) -> Tensor:
    """(B,) number of each row's first valid document, -1 for a row of padding."""
    first = (segments >= 0).int().argmax(1, keepdim=True)
    return segments.gather(1, first).squeeze(1)


def last_document(segments: Tensor) -> Tensor:
    """(B,) number of each row's last valid document, -1 for a row of padding."""
    return segments.amax(1)


def restarts(segments: Tensor) -> Tensor:
    """(B, T) bool: a document starts here that is not the first of its row, so states reset."""
    seen = segments.cummax(1).values[:, :-1]  # the document before each later position
    later = segments[:, 1:]
    return pad((later >= 0) & (seen >= 0) & (later != seen), (1, 0))


def documents_between(segments: Tensor, chunk: int) -> Tensor:
    """(B, n + 1) int32: the document of the state before each of n chunks, and after the last.

    Before the first valid token it is the first document, which a given state belongs to.
    """
    B, T = segments.shape
    ends = pad(segments, (0, -T % chunk), value=-1).view(B, -1, chunk).amax(2).cummax(1).values
    first = first_document(segments)[:, None]
    return pad(ends.maximum(first), (1, 0)).index_copy(1, ends.new_zeros(1), first).int()
