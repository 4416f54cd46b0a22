"""The Triton form as torch operators: seqmix::attention and its gradient.

The torch form needs none: torch differentiates and counts its own attention. B batch, T queries,
S keys, H heads, G key heads, D head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from kernels.attention.flops import attention_flops
from kernels.dispatch import implementation

Shape = Sequence[int]


def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
    segments: Tensor | None,
) -> Tensor:
    """The form "triton" of `attention`."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    y, _ = _attend(q, k, v, segments, causal, window, scale)
    return y


@custom_op("seqmix::attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    forward = implementation(__package__, "triton").forward
    return forward(q, k, v, segments, causal, window, scale)


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@custom_op("seqmix::attention_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    y: Tensor,
    log_sum: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    backward = implementation(__package__, "triton").backward
    return backward(grad_y, q, k, v, segments, y, log_sum, causal, window, scale)


@_backward.register_fake
def _(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    y: Tensor,
    log_sum: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.window, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad_y: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    dq, dk, dv = _backward(grad_y, *ctx.saved_tensors, ctx.causal, ctx.window, ctx.scale)
    return dq, dk, dv, None, None, None, None


_attend.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.seqmix.attention)
def _(
    q: Shape,
    k: Shape,
    v: Shape,
    segments: Shape | None,
    causal: bool,
    window: int | None,
    scale: float,
    out_shape: Any = None,
) -> int:
    B, T, H, D = q
    return attention_flops(B, T, H, D, key_length=k[1], causal=causal, window=window)


@register_flop_formula(torch.ops.seqmix.attention_backward)
def _(
    grad_y: Shape,
    q: Shape,
    k: Shape,
    v: Shape,
    segments: Shape | None,
    y: Shape,
    log_sum: Shape,
    causal: bool,
    window: int | None,
    scale: float,
    out_shape: Any = None,
) -> int:
    B, T, H, D = q
    forward = attention_flops(B, T, H, D, key_length=k[1], causal=causal, window=window)
    return forward * 5 // 2  # the scores again, then the gradients of P, v, q, k
