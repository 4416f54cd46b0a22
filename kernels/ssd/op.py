"""Chunked SSD as a torch operator: one call for compilers, one node for autograd.

B batch, L time, H heads, P width per head, N state, G groups.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import implementation
from kernels.native import library_for
from kernels.precision import accumulation_dtype, outside_autocast
from kernels.ssd import chunked, cpp
from kernels.ssd.flops import ssd_backward_flops, ssd_flops
from kernels.ssd.spans import Arguments


@torch.library.custom_op("seqmix::ssd", mutates_args=())
@outside_autocast
def _forward(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    documents: Tensor | None,
    chunk_size: int,
    keep_states: bool,
    form: str = "chunked",
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = Arguments(x, dt, log_decay, B, C, D, z, initial_states, documents, chunk_size)
    library = library_for("ssd", cpp.SOURCE, form, x.device)
    if library is not None:
        return cpp.forward(library, arguments, keep_states)
    return implementation(__package__, form, "chunked").forward(arguments, keep_states)


@_forward.register_fake
def _(
    x, dt, log_decay, B, C, D, z, initial_states, documents, chunk_size, keep_states, form="chunked"
):
    (batch, length, H, P), (G, N) = x.shape, B.shape[2:]
    dtype = accumulation_dtype(x)
    y, last = x.new_empty(x.shape), x.new_empty(batch, H, P, N, dtype=dtype)
    if not keep_states:
        return y, last, x.new_empty(0, dtype=dtype)
    if form == "triton":
        return y, last, implementation(__package__, form).kept_states(x, B, C)
    chunks = -(-length // chunk_size)
    return y, last, x.new_empty(batch, chunks, G, N, H // G * P, dtype=dtype)


@torch.library.custom_op("seqmix::ssd_backward", mutates_args=())
@outside_autocast
def _backward(
    grad_y: Tensor,
    grad_last: Tensor,
    kept: Tensor,
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    documents: Tensor | None,
    chunk_size: int,
    form: str = "chunked",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = Arguments(x, dt, log_decay, B, C, D, z, initial_states, documents, chunk_size)
    library = library_for("ssd", cpp.SOURCE, form, x.device)
    if library is not None:
        return cpp.backward(library, arguments, kept, grad_y, grad_last)
    return implementation(__package__, form, "chunked").backward(arguments, kept, grad_y, grad_last)


@_backward.register_fake
def _(
    grad_y, grad_last, kept,
    x, dt, log_decay, B, C, D, z, initial_states, documents, chunk_size, form="chunked",
):  # fmt: skip
    arguments = (x, dt, log_decay, B, C, D, z, initial_states, documents, chunk_size)
    return chunked.new_gradients(Arguments(*arguments), grad_last)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, chunk_size, _, form = inputs
    _, last, kept = output
    ctx.save_for_backward(kept, *tensors)
    ctx.chunk_size, ctx.form, ctx.state_shape = chunk_size, form, last.shape
    ctx.set_materialize_grads(False)  # `kept` would get a gradient of zeros of its own size


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: None) -> tuple:
    kept, *tensors = ctx.saved_tensors
    x, dt, log_decay, _, _, D, z, initial_states, _ = tensors
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    if grad_last is None:
        grad_last = x.new_zeros(ctx.state_shape, dtype=accumulation_dtype(x))
    grads = chunked.Gradients(
        *_backward(grad_y, grad_last, kept, *tensors, ctx.chunk_size, ctx.form)
    )
    grad_D = grad_initial = None
    if D is not None:
        grad_D = (grads.D if D.ndim == 2 else grads.D.sum(1)).to(D.dtype)
    if initial_states is not None:
        grad_initial = grads.initial_states.to(initial_states.dtype)
    return (
        grads.x,
        grads.dt.to(dt.dtype),
        grads.log_decay.to(log_decay.dtype),
        grads.B,
        grads.C,
        grad_D,
        None if z is None else grads.z,
        grad_initial,
        None,
        None,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("seqmix::ssd_step", mutates_args=())
def _step(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    form: str = "step",
) -> tuple[Tensor, Tensor]:
    return implementation(__package__, form).step(x, dt, log_decay, B, C, D, z, initial_states)


@_step.register_fake
def _(x, dt, log_decay, B, *others):
    (batch, _, H, P), N = x.shape, B.shape[3]
    return x.new_empty(x.shape), x.new_empty(batch, H, P, N, dtype=accumulation_dtype(x))


@register_flop_formula(torch.ops.seqmix.ssd_step)
def _(x_shape: Any, dt_shape: Any, decay_shape: Any, B_shape: Any, *_: Any, **__: Any) -> int:
    (batch, _, H, P), (G, N) = x_shape, B_shape[2:]
    return ssd_flops(batch, 1, H, P, N, G)


@register_flop_formula(torch.ops.seqmix.ssd)
def _(x_shape: Any, dt_shape: Any, decay_shape: Any, B_shape: Any, *rest: Any, **_: Any) -> int:
    (batch, length, H, P), (G, N), chunk_size = x_shape, B_shape[2:], rest[5]
    return ssd_flops(batch, length, H, P, N, G, chunk_size)


@register_flop_formula(torch.ops.seqmix.ssd_backward)
def _(
    grad_y_shape: Any,
    grad_last_shape: Any,
    kept_shape: Any,
    x_shape: Any,
    dt_shape: Any,
    decay_shape: Any,
    B_shape: Any,
    C_shape: Any,
    D_shape: Any,
    z_shape: Any,
    *rest: Any,
    **_: Any,
) -> int:
    (batch, length, H, P), (G, N), chunk_size = x_shape, B_shape[2:], rest[2]
    return ssd_backward_flops(batch, length, H, P, N, G, chunk_size, gated=z_shape is not None)


def ssd_torch(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    documents: Tensor | None,
    chunk_size: int,
    form: str = "chunked",
) -> tuple[Tensor, Tensor]:
    """ssd_reference by chunks, or as a single step where there is no gradient to keep.

    Args:
        form: the module of this package that does the chunks, "chunked" or "triton"; "cpp"; or
            "auto", see kernels.native.library_for, and "chunked" where that is not C++.
    """
    given = (x, dt, log_decay, B, C, D, z, initial_states)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if x.shape[1] == 1 and not grad:
        return _step(*given, "triton_step" if form == "triton" else "step")
    y, last, _ = _forward(*given, documents, chunk_size, grad, form)
    return y, last
