"""Prefix linear attention as it is written: a sum over the prefix, then the causal recurrence.

B batch, T time, M prefix positions, H heads, K features per head, V value width per head.
"""

from torch import Tensor

from kernels.linear_attention.reference import State, linear_attention_reference
from kernels.precision import accumulation_dtype, outside_autocast


@outside_autocast
def prefix_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    *,
    eps: float,
    segments: Tensor | None,
) -> tuple[Tensor, State]:
    """S_0 = sum_{j < M} k'_j v'_j^T, z_0 = sum_{j < M} k'_j; then linear attention from there."""
    (B, M, H, K), V = k_prefix.shape, v_prefix.shape[3]
    dtype = accumulation_dtype(q, k, v)
    S, z = q.new_zeros(B, H, K, V, dtype=dtype), q.new_zeros(B, H, K, dtype=dtype)
    for j in range(M):
        S = S + k_prefix[:, j, :, :, None].to(dtype) * v_prefix[:, j, :, None, :].to(dtype)
        z = z + k_prefix[:, j].to(dtype)
    return linear_attention_reference(q, k, v, eps=eps, initial_state=(S, z), segments=segments)
