"""The Triton form of the Monarch product as a torch operator: seqmix::monarch.

x (rows, k p), w1 (k, q, p), w2 (l, s, r).
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import implementation
from kernels.precision import autocast_dtype


def monarch_triton(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """x (..., k p) -> (..., s l), as monarch_blocks."""
    low = autocast_dtype(x.device)
    if low is not None:
        x, w1, w2 = x.to(low), w1.to(low), w2.to(low)
    y = _forward(x.reshape(-1, x.shape[-1]), w1, w2)
    return y.view(*x.shape[:-1], y.shape[-1])


@custom_op("seqmix::monarch", mutates_args=())
def _forward(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return implementation(__package__, "triton").forward(x, w1, w2)


@_forward.register_fake
def _(x, w1, w2):
    return x.new_empty(len(x), w2.shape[0] * w2.shape[1])


@custom_op("seqmix::monarch_backward", mutates_args=())
def _backward(grad_y: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return implementation(__package__, "triton").backward(grad_y, w1, w2)


@_backward.register_fake
def _(grad_y, w1, w2):
    return grad_y.new_empty(len(grad_y), w1.shape[0] * w1.shape[2])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """The weights' gradients are plain batched products, which torch's own do best."""
    x, w1, w2 = ctx.saved_tensors
    (k, q, p), (blocks, s, r) = w1.shape, w2.shape
    dx = _backward(grad_y, w1, w2) if ctx.needs_input_grad[0] else None
    if not any(ctx.needs_input_grad[1:]):
        return dx, None, None
    x_blocks = x.view(-1, k, p).transpose(0, 1)  # (k, rows, p)
    d_out = grad_y.view(-1, s, blocks).permute(2, 0, 1)  # (l, rows, s)
    middle = torch.bmm(x_blocks, w1.mT).transpose(0, 1).reshape(-1, r, blocks)
    d_w2 = torch.bmm(d_out.mT, middle.permute(2, 0, 1))
    d_middle = torch.bmm(d_out, w2).permute(1, 2, 0).reshape(-1, k, q)
    return dx, torch.bmm(d_middle.permute(1, 2, 0), x_blocks), d_w2


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula([torch.ops.seqmix.monarch, torch.ops.seqmix.monarch_backward])
def _(x: Any, w1: Any, w2: Any, out_shape: Any = None) -> int:
    (k, q, p), (blocks, s, r) = w1, w2
    return 2 * x[0] * (k * q * p + blocks * s * r)
