"""The prefix's sums by linear attention's Triton kernel, as an operator: seqmix::prefix_sums.

B batch, M prefix positions, H heads, K features, V value width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import implementation
from kernels.linear_attention.reference import State


def prefix_sums_triton(k_prefix: Tensor, v_prefix: Tensor) -> State:
    """As prefix_sums, in float32."""
    both, V = _sums(k_prefix, v_prefix), v_prefix.shape[3]
    return both[..., :V], both[..., V]


@custom_op("seqmix::prefix_sums", mutates_args=())
def _sums(k: Tensor, v: Tensor) -> Tensor:
    return implementation("kernels.linear_attention", "triton").sums(k, v)


@_sums.register_fake
def _(k, v):
    B, _, H, K = k.shape
    return k.new_empty(B, H, K, v.shape[3] + 1, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Two plain batched products, which torch's own do best."""
    k, v = ctx.saved_tensors
    grad = grad.to(k.dtype)
    dk = torch.einsum("bmhv,bhkv->bmhk", v.to(k.dtype), grad[..., :-1]) + grad[:, None, :, :, -1]
    return dk, torch.einsum("bmhk,bhkv->bmhv", k, grad[..., :-1]).to(v.dtype)


_sums.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.seqmix.prefix_sums)
def _(k: Any, v: Any, out_shape: Any = None) -> int:
    B, M, H, K = k
    return 2 * B * M * H * K * v[3]
