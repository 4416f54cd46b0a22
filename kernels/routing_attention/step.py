"""One query of strict routing attention, over keys in time order: nothing to sort.

B batch, S keys, H heads, D head width.
"""

import torch
from torch import Tensor

from kernels.precision import accumulation_dtype, matmul_dtype, outside_autocast


@outside_autocast
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_groups: Tensor,
    k_groups: Tensor,
    *,
    window: int,
    last_resort: bool,
    scale: float,
) -> Tensor:
    """y (B, 1, H, D) of q (B, 1, H, D), whose own key is the last of the S."""
    dtype, exact = matmul_dtype(q, k, v), accumulation_dtype(q, k, v)
    low_k, low_v = k.transpose(1, 2).to(dtype), v.transpose(1, 2).to(dtype)  # (B, H, S, D)
    own = torch.zeros(k.shape[1], dtype=torch.bool, device=k.device)
    own[-1] = True
    same = (k_groups == q_groups) & (k_groups >= 0)  # (B, S, H)
    newer = same.flip(1).cumsum(1).flip(1)
    seen = (same & (newer <= window)).transpose(1, 2)
    others = (seen & ~own).any(-1, keepdim=True)
    seen = torch.where(own, ~others if last_resort else True, seen)
    scores = torch.matmul(q.transpose(1, 2).to(dtype), low_k.mT).to(exact) * scale  # (B, H, 1, S)
    weights = scores.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
    return torch.matmul(weights.to(dtype), low_v).transpose(1, 2).to(q.dtype)
