"""The product as two batched matrix products.

Autograd keeps x, the weights and what lies between the products, and nothing else.
"""

import torch
from torch import Tensor


def monarch_blocks(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """x (..., k p) -> (..., s l)."""
    (k, _, p), (blocks, s, r) = w1.shape, w2.shape
    rows = x.reshape(-1, k, p)
    middle = torch.bmm(rows.transpose(0, 1), w1.mT)  # (k, rows, q)
    middle = middle.transpose(0, 1).reshape(-1, r, blocks)  # index f = a q + . = r' l + j
    out = torch.bmm(middle.permute(2, 0, 1).contiguous(), w2.mT)  # (l, rows, s)
    return out.permute(1, 2, 0).reshape(*x.shape[:-1], s * blocks)
