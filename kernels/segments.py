"""Document numbers inside an operator: -1 is padding, otherwise non-decreasing along a row.

B batch, T time.
"""

from torch import Tensor


def first_document(segments: Tensor) -> Tensor:
    """(B,) number of each row's first valid document, -1 for a row of padding."""
    first = (segments >= 0).int().argmax(1, keepdim=True)
    return segments.gather(1, first).squeeze(1)


def last_document(segments: Tensor) -> Tensor:
    """(B,) number of each row's last valid document, -1 for a row of padding."""
    return segments.amax(1)
