"""Prefix linear attention as chunked linear attention started from the prefix's sums."""

import torch
from torch import Tensor

from kernels.linear_attention.op import linear_attention_op
from kernels.linear_attention.reference import State
from kernels.precision import accumulation_dtype, outside_autocast
from kernels.prefix_linear_attention.op import prefix_sums_triton


@outside_autocast
def prefix_sums(k_prefix: Tensor, v_prefix: Tensor) -> State:
    """S (B, H, K, V) and z (B, H, K) over k_prefix (B, M, H, K) and v_prefix (B, M, H, V).

    Linear attention started from them is prefix linear attention. float32, or float64 for
    float64 inputs.
    """
    dtype = accumulation_dtype(k_prefix, v_prefix)
    keys = k_prefix.to(dtype)
    return torch.einsum("bmhk,bmhv->bhkv", keys, v_prefix.to(dtype)), keys.sum(1)


def prefix_linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    *,
    eps: float,
    segments: Tensor | None,
    form: str = "chunked",
) -> tuple[Tensor, State | None]:
    """Linear attention in `form`, see linear_attention_op, from the prefix's sums."""
    sums = prefix_sums_triton if form == "triton" else prefix_sums
    return linear_attention_op(
        q,
        k,
        v,
        scale=1.0,
        normalize=True,
        eps=eps,
        initial_state=sums(k_prefix, v_prefix),
        segments=segments,
        return_state=True,
        form=form,
    )
