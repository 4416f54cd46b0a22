"""Prefix linear attention as its two sums are written. B batch, T time, M prefix, H heads,
K key width, V value width."""

import torch
from torch import Tensor

from kernels.linear_attention.reference import linear_attention_reference

State = tuple[Tensor, Tensor]


def prefix_linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, eps: float
) -> tuple[Tensor, State]:
    """The prefix is summed position by position and the causal recurrence starts from that sum."""
    batch, _, heads, width = k.shape
    kv = k.new_zeros(batch, heads, width, v.shape[-1])
    z = k.new_zeros(batch, heads, width)
    for j in range(k_prefix.shape[1]):
        kv = kv + k_prefix[:, j, :, :, None] * v_prefix[:, j, :, None, :]
        z = z + k_prefix[:, j]
    return linear_attention_reference(q, k, v, eps=eps, initial_state=(kv, z))
