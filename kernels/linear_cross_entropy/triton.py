"""The softmax of the chunked loss on a GPU: one Triton kernel over the logits of a chunk.

The products stay torch's; between them the logits are read twice and overwritten by their gradient.
c tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import block_of, launch

_MOST = 4096  # logits of a row that a program holds at once
# Where there is no logit: below all, and unlike infinity its difference to itself is a number.
LOWEST = tl.constexpr(-1e38)


@triton.jit
def softmax_row(logits, targets, losses, share, V, GRADIENT: tl.constexpr, BV: tl.constexpr):
    """log sum exp(row) - row[target]; the row becomes share (softmax(row) - onehot(target))."""
    token = tl.program_id(0).to(tl.int64)
    row, target = logits + token * V, tl.load(targets + token).to(tl.int32)
    top = tl.full((BV,), LOWEST, tl.float32)  # of each lane, which takes every BV-th logit
    total = tl.zeros((BV,), tl.float32)
    chosen = tl.zeros((BV,), tl.float32)
    for start in range(0, V, BV):
        at = start + tl.arange(0, BV)
        x = tl.load(row + at, mask=at < V, other=LOWEST).to(tl.float32)
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
        chosen += tl.where(at == target, x, 0)
    most = tl.max(top, 0)
    total_sum = tl.sum(total * tl.exp(top - most), 0)
    tl.store(losses + token, most + tl.log(total_sum) - tl.sum(chosen, 0))
    if GRADIENT:
        for start in range(0, V, BV):
            at = start + tl.arange(0, BV)
            x = tl.load(row + at, mask=at < V, other=LOWEST).to(tl.float32)
            g = share * (tl.exp(x - most) / total_sum - (at == target).to(tl.float32))
            tl.store(row + at, g.to(row.dtype.element_ty), mask=at < V)


def softmax_rows(
    logits: Tensor, targets: Tensor, exact: torch.dtype, share: float | None
) -> tuple[Tensor, Tensor]:
    """As the chunked form's; the gradient takes the place of the logits, in their dtype."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    BV = block_of(logits.shape[1], _MOST)
    launch(
        softmax_row, (len(logits),),
        logits, targets.contiguous(), losses, 0.0 if share is None else share, logits.shape[1],
        GRADIENT=share is not None, BV=BV, warps=max(4, BV // 512),
    )  # fmt: skip
    return losses, logits.new_empty(0) if share is None else logits
