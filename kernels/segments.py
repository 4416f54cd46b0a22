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
