"""Estimated sparse attention as torch operators: seqmix::estimated_sparse_attention*.

Being operators, they are counted by FlopCounterMode through their formulas and are not traced by
torch.compile. B batch, T queries, S keys, H heads, G key heads, D head width, K cells.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import implementation
from kernels.estimated_sparse_attention import cpp
from kernels.estimated_sparse_attention.flops import estimated_sparse_attention_flops
from kernels.native import library_for
from kernels.precision import accumulation_dtype

Shape = Sequence[int]


def estimated_sparse_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probs: Tensor,
    *,
    k_cells: int,
    causal: bool,
    grouping: str,
    scale: float,
    segments: Tensor | None,
    form: str = "sparse",
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, V) and the cells chosen, bool (B, H, T, K).

    Args:
        form: the module of this package that does it, "sparse" or "triton"; "cpp"; or "auto", see
            kernels.native.library_for, and "sparse" where that is not C++.
    """
    options = (k_cells, causal, grouping, scale, form)
    y, cells, _ = _attend(q, k, v, probs.detach(), segments, *options)
    return y, cells


@custom_op("seqmix::estimated_sparse_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probs: Tensor,
    segments: Tensor | None,
    k_cells: int,
    causal: bool,
    grouping: str,
    scale: float,
    form: str = "sparse",
) -> tuple[Tensor, Tensor, Tensor]:
    library = library_for("estimated_sparse_attention", cpp.SOURCE, form, q.device)
    if library is not None:
        return cpp.forward(library, q, k, v, probs, segments, k_cells, causal, grouping, scale)
    forward = implementation(__package__, form, "sparse").forward
    return forward(q, k, v, probs, segments, k_cells, causal, grouping, scale)


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probs: Tensor,
    segments: Tensor | None,
    k_cells: int,
    causal: bool,
    grouping: str,
    scale: float,
    form: str = "sparse",
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, _ = q.shape
    return (
        v.new_empty(B, T, H, v.shape[3]),
        probs.new_empty(probs.shape, dtype=torch.bool),
        q.new_empty(B, T, H, dtype=accumulation_dtype(q, k, v)),
    )


@custom_op("seqmix::estimated_sparse_attention_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    cells: Tensor,
    y: Tensor,
    log_sum: Tensor,
    k_cells: int,
    causal: bool,
    grouping: str,
    scale: float,
    form: str = "sparse",
) -> tuple[Tensor, Tensor, Tensor]:
    library = library_for("estimated_sparse_attention", cpp.SOURCE, form, q.device)
    if library is not None:
        parts = (grad_y, q, k, v, segments, cells, y, log_sum)
        return cpp.backward(library, *parts, k_cells, causal, scale)
    backward = implementation(__package__, form, "sparse").backward
    return backward(grad_y, q, k, v, segments, cells, y, log_sum, k_cells, causal, grouping, scale)


@_backward.register_fake
def _(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    cells: Tensor,
    y: Tensor,
    log_sum: Tensor,
    k_cells: int,
    causal: bool,
    grouping: str,
    scale: float,
    form: str = "sparse",
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, segments, *ctx.options = inputs
    y, cells, log_sum = output
    ctx.mark_non_differentiable(cells, log_sum)
    ctx.save_for_backward(q, k, v, segments, cells, y, log_sum)


def _differentiate(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dq, dk, dv = _backward(grad_y, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, *[None] * 7


_attend.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.seqmix.estimated_sparse_attention)
def _(
    q: Shape,
    k: Shape,
    v: Shape,
    probs: Shape,
    segments: Shape | None,
    k_cells: int,
    causal: bool,
    grouping: str,
    scale: float,
    form: str = "sparse",
    out_shape: Any = None,
) -> int:
    B, T, H, D = q
    return estimated_sparse_attention_flops(
        B, T, H, D, probs[3], k_cells, key_length=k[1], causal=causal, grouping=grouping
    )


@register_flop_formula(torch.ops.seqmix.estimated_sparse_attention_backward)
def _(
    grad_y: Shape,
    q: Shape,
    k: Shape,
    v: Shape,
    segments: Shape | None,
    cells: Shape,
    y: Shape,
    log_sum: Shape,
    k_cells: int,
    causal: bool,
    grouping: str,
    scale: float,
    form: str = "sparse",
    out_shape: Any = None,
) -> int:
    B, T, H, D = q
    forward = estimated_sparse_attention_flops(
        B, T, H, D, cells[3], k_cells, key_length=k[1], causal=causal, grouping=grouping
    )
    return forward * 5 // 2  # scores again, then the gradients of the weights, v, q and k
