"""The Triton form as torch operators: seqmix::attention and its gradient.

The torch form needs none: torch differentiates and counts its own attention. Beside the output the
operator has each query's l, the log of its sum of exponentials, which can be differentiated, and
on request the key of its largest score. B batch, T queries, S keys, H heads, G key heads, D head
width.
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
    y, _, _ = _attend(q, k, v, segments, causal, window, scale, False)
    return y


def attention_and_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, D) of sliding-window attention, l in float32 and the key of the largest score.

    The key is int32; both are (B, H, T), and 0 where a query sees no key.
    """
    return _attend(q, k, v, segments, True, window, scale, True)


@custom_op("seqmix::attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    find: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    forward = implementation(__package__, "triton").forward
    return forward(q, k, v, segments, causal, window, scale, find)


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    find: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, _ = q.shape
    log_sum = q.new_empty(B, H, T, dtype=torch.float32)
    return q.new_empty(q.shape), log_sum, q.new_empty(B, H, T * find, dtype=torch.int32)


@custom_op("seqmix::attention_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_log_sum: Tensor | None,
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
    return backward(grad_y, grad_log_sum, q, k, v, segments, y, log_sum, causal, window, scale)


@_backward.register_fake
def _(
    grad_y: Tensor,
    grad_log_sum: Tensor | None,
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.window, ctx.scale, _ = inputs
    y, log_sum, largest = output
    ctx.mark_non_differentiable(largest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, y, log_sum)


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_log_sum: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        grad_y = torch.zeros_like(ctx.saved_tensors[4])
    dq, dk, dv = _backward(
        grad_y, grad_log_sum, *ctx.saved_tensors, ctx.causal, ctx.window, ctx.scale
    )
    return dq, dk, dv, None, None, None, None, None


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
    find: bool,
    out_shape: Any = None,
) -> int:
    B, T, H, D = q
    return attention_flops(B, T, H, D, key_length=k[1], causal=causal, window=window)


@register_flop_formula(torch.ops.seqmix.attention_backward)
def _(
    grad_y: Shape,
    grad_log_sum: Shape | None,
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
