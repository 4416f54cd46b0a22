"""What HMT remembers of the documents it is reading.

B rows, C memories, D model width, W recent tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layers.segments import NO_DOCUMENT
from models.language_model import ModelState


@dataclass
class HMTState:
    """The past of every row: memories, and the segment that is being read.

    A segment is closed, and its memory made, when the token behind it comes; until then the row
    has it open, if it is full.
    """

    memories: Tensor  # (B, C, D) newest last, zeros before a row's own where it has fewer
    closed: Tensor  # (B,) int64 segments of the document before the open one
    offset: Tensor  # (B,) int64 tokens read of the open segment; 0 in the empty past alone
    recent: Tensor  # (B, W) int64 the document's last tokens, newest last, zeros before them
    prompt: Tensor  # (B, D) memory embedding around the open segment
    backbone: ModelState | None  # after what was read of the open segments
    number: Tensor  # (B,) int64 document that the backbone's state ended in: one a segment
    segment: Tensor  # (B,) int64 document that the row ended in


def empty_state(
    batch: int, width: int, recent: int, device: torch.device, dtype: torch.dtype
) -> HMTState:
    """The past of `batch` rows that have read nothing."""
    none = torch.zeros(batch, dtype=torch.int64, device=device)
    return HMTState(
        memories=torch.zeros(batch, 0, width, device=device, dtype=dtype),
        closed=none,
        offset=none,
        recent=torch.zeros(batch, recent, dtype=torch.int64, device=device),
        prompt=torch.zeros(batch, width, device=device, dtype=dtype),
        backbone=None,
        number=torch.full_like(none, NO_DOCUMENT),
        segment=torch.full_like(none, NO_DOCUMENT),
    )
