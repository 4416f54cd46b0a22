"""Prefix linear attention as chunked linear attention started from the prefix's sums."""

import torch
from torch import Tensor

from kernels.linear_attention import linear_attention
from kernels.linear_attention.reference import State
from kernels.precision import accumulation_dtype, outside_autocast


@outside_autocast
def prefix_linear_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    *,
    eps: float,
    segments: Tensor | None,
) -> tuple[Tensor, State]:
    dtype = accumulation_dtype(q, k, v)
    keys, values = k_prefix.to(dtype), v_prefix.to(dtype)
    S = torch.einsum("bmhk,bmhv->bhkv", keys, values)
    y, state = linear_attention(
        q,
        k,
        v,
        eps=eps,
        initial_state=(S, keys.sum(1)),
        return_state=True,
        segments=segments,
        backend="torch",
    )
    return y, state
