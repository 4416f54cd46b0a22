"""Attention over the memories of earlier segments, without values and output projection.

R rows, C memories, D model width, K recall width.
"""

import math

import torch
from torch import Tensor, nn

from layers.marks import mark


class MemoryRecall(nn.Module):
    """A convex combination of memories, weighted by how they fit a summary.

        a = softmax_c( (s W_q^T) (C W_k^T)^T / sqrt(K) ),   p = a C

    Source: He et al. 2024 (HMT: Hierarchical memory transformer), memory recall. As there is
    neither a value nor an output projection, p can be read like any memory. The scale is sqrt(K)
    at every width, where the public code divides by K in the forward pass of wide models alone.

    The query is carried back through W_k, (s W_q^T) W_k, and meets the memories themselves: the
    same scores, and no projected keys to compute or to keep.

    Args:
        d_model: D.
        recall_dim: K.

    Parameters: q_proj.weight, k_proj.weight (K, D), uniform in +-1/sqrt(D) as in the public code.
    """

    def __init__(self, d_model: int, recall_dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(d_model, recall_dim, bias=False)
        self.k_proj = nn.Linear(d_model, recall_dim, bias=False)
        for projection in (self.q_proj, self.k_proj):
            nn.init.uniform_(projection.weight, -(d_model**-0.5), d_model**-0.5)
            mark(projection, "weight", own_init=True)

    def queries(self, summaries: Tensor) -> Tensor:
        """(R, D) summaries -> (R, D) what memories are compared with, the scale included."""
        with torch.autocast(summaries.device.type, enabled=False):
            scale = 1 / math.sqrt(self.q_proj.out_features)
            summaries = summaries.to(self.q_proj.weight.dtype)
            return self.q_proj(summaries) @ self.k_proj.weight * scale

    def forward(
        self, queries: Tensor, memories: Tensor, held: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Recall what fits.

        Args:
            queries: (R, D), of `queries`.
            memories: (R, C, D), newest last.
            held: int (R,), at least 1: the row's own memories are its last `held`; None: all.

        Returns:
            p (R, D) and the weights a (R, C).
        """
        with torch.autocast(queries.device.type, enabled=False):
            scores = torch.einsum("rd,rcd->rc", queries, memories)
            if held is not None:
                slots = torch.arange(memories.shape[1], device=memories.device)
                empty = slots < memories.shape[1] - held[:, None]
                scores = scores.masked_fill(empty, -torch.inf)
            weights = scores.softmax(dim=-1)
            return torch.einsum("rc,rcd->rd", weights, memories), weights

    def flops(self, rows: int) -> int:
        """FLOPs of `queries`."""
        return 4 * rows * self.q_proj.weight.numel()
