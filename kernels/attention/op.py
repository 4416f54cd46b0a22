"""The Triton and the C++ form as torch operators: seqmix::attention and its gradient.

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

from kernels.attention import cpp
from kernels.attention.flops import attention_flops
from kernels.attention.sdpa import attention_torch
from kernels.dispatch import BackendError, implementation
from kernels.native import in_hardware, library_for
from kernels.precision import has_amx

Shape = Sequence[int]
_LEAST_QUERIES = 32  # that are worth laying keys and values out for


def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
    segments: Tensor | None,
    form: str = "triton",
) -> Tensor:
    """The form "triton" of `attention`, or "cpp".

    Raises:
        BackendError: "cpp" of another dtype than bfloat16, or see cpp.
    """
    if form == "cpp" and q.dtype != torch.bfloat16:
        raise BackendError(f"backend='cpp' for attention: q is {q.dtype}; expected torch.bfloat16")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    y, _, _ = _attend(q, k, v, segments, causal, window, scale, False, form)
    return y


def attention_auto(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The form "cpp" where this CPU has tiles for it and work for its threads, else "torch"."""
    if q.dtype == torch.bfloat16 and q.shape[1] >= _LEAST_QUERIES:
        threads = _threads_with_tiles(q.device.type)
        if threads and k.shape[0] * k.shape[2] >= threads:
            return attention_op(q, k, v, **options, form="cpp")
    return attention_torch(q, k, v, **options)


@torch.compiler.assume_constant_result  # a compiler is there, or it is not
def _threads_with_tiles(device: str) -> int:
    """How many threads multiply in AMX's tiles; 0 without those."""
    if not has_amx():
        return 0
    library = library_for("attention", cpp.SOURCE, "auto", torch.device(device))
    return 0 if library is None or not in_hardware(library) else torch.get_num_threads()


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
    return _attend(q, k, v, segments, True, window, scale, True, "triton")


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
    form: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    given = (q, k, v, segments, causal, window, scale)
    if form == "cpp":
        y, log_sum = cpp.forward(*given)
        return y, log_sum, log_sum.new_empty(*log_sum.shape[:2], 0, dtype=torch.int32)
    return implementation(__package__, form).forward(*given, find)


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
    form: str = "triton",
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
    form: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    given = (grad_y, grad_log_sum, q, k, v, segments, y, log_sum, causal, window, scale)
    if form == "cpp":
        return cpp.backward(*given)
    return implementation(__package__, form).backward(*given)


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
    form: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.window, ctx.scale, _, ctx.form = inputs
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
        grad_y, grad_log_sum, *ctx.saved_tensors, ctx.causal, ctx.window, ctx.scale, ctx.form
    )
    return dq, dk, dv, None, None, None, None, None, None


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
    form: str = "triton",
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
    form: str = "triton",
    out_shape: Any = None,
) -> int:
    B, T, H, D = q
    forward = attention_flops(B, T, H, D, key_length=k[1], causal=causal, window=window)
    return forward * 5 // 2  # the scores again, then the gradients of P, v, q, k
