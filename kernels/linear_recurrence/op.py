"""The recurrence as torch operators: seqmix::linear_recurrence and its gradient.

Being operators, they are counted by FlopCounterMode through their formulas and are not traced by
torch.compile. B batch, T time, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import implementation
from kernels.linear_recurrence import cpp
from kernels.linear_recurrence.flops import linear_recurrence_flops
from kernels.native import library_for
from kernels.precision import outside_autocast


@custom_op("seqmix::linear_recurrence", mutates_args=())
def linear_recurrence_op(a: Tensor, b: Tensor, h0: Tensor, form: str = "blocked") -> Tensor:
    """a, b (B, T, D), h0 (B, D), all of one type -> every state (B, T, D).

    Args:
        form: the module of this package that computes, "blocked" or "triton"; "cpp"; or "auto",
            see kernels.native.library_for, and "blocked" where that is not C++.
    """
    library = library_for("linear_recurrence", cpp.SOURCE, form, b.device)
    if library is not None:
        return cpp.forward(library, a, b, h0)
    return outside_autocast(implementation(__package__, form, "blocked").forward)(a, b, h0)


@linear_recurrence_op.register_fake
def _(a: Tensor, b: Tensor, h0: Tensor, form: str = "blocked") -> Tensor:
    return b.new_empty(b.shape)


@custom_op("seqmix::linear_recurrence_backward", mutates_args=())
def _backward(
    grad: Tensor, a: Tensor, h: Tensor, h0: Tensor, form: str = "blocked"
) -> tuple[Tensor, Tensor, Tensor]:
    library = library_for("linear_recurrence", cpp.SOURCE, form, grad.device)
    if library is not None:
        return cpp.backward(library, grad, a, h, h0)
    return outside_autocast(implementation(__package__, form, "blocked").backward)(grad, a, h, h0)


@_backward.register_fake
def _(
    grad: Tensor, a: Tensor, h: Tensor, h0: Tensor, form: str = "blocked"
) -> tuple[Tensor, Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape), h0.new_empty(h0.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, h0, ctx.form = inputs
    ctx.save_for_backward(a, output, h0)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors, ctx.form), None)


linear_recurrence_op.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.seqmix.linear_recurrence, get_raw=True)
def _(a: Tensor, *_: Any, **__: Any) -> int:
    return linear_recurrence_flops(*a.shape, is_complex=a.is_complex())


@register_flop_formula(torch.ops.seqmix.linear_recurrence_backward, get_raw=True)
def _(grad: Tensor, *_: Any, **__: Any) -> int:
    # The reverse recurrence, and the product that is the gradient of a.
    product = grad.numel() * (6 if grad.is_complex() else 1)
    return linear_recurrence_flops(*grad.shape, is_complex=grad.is_complex()) + product
