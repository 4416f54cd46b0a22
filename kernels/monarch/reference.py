"""The product by the dense matrix, entry by entry from the definition."""

import torch
from torch import Tensor


def monarch_reference(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """x (..., n) times the transpose of the dense matrix."""
    return x @ dense(w1, w2).mT


def dense(w1: Tensor, w2: Tensor) -> Tensor:
    """The (l s, k p) matrix of w1 (k, q, p) and w2 (l, s, r)."""
    (k, q, p), (blocks, s, _) = w1.shape, w2.shape
    matrix = w1.new_zeros(s, blocks, k, p)  # output index b l + j, input index a p + i
    for a in range(k):
        for f in range(a * q, (a + 1) * q):
            r, j = divmod(f, blocks)
            entry = torch.zeros_like(matrix)
            entry[:, j, a] = w2[j, :, r, None] * w1[a, f - a * q]
            matrix = matrix + entry
    return matrix.reshape(s * blocks, k * p)
