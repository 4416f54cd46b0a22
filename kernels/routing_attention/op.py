"""Strict routing attention as torch operators: seqmix::cluster_attention and its gradient.

Being operators, they are counted by FlopCounterMode through their formulas, keep their inputs and
outputs only for the backward pass, and are not traced by torch.compile. B batch, T queries,
S keys, H heads, D head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import implementation
from kernels.native import library_for
from kernels.precision import accumulation_dtype
from kernels.routing_attention import cpp
from kernels.routing_attention.flops import (
    cluster_attention_backward_flops,
    cluster_attention_flops,
)
from kernels.routing_attention.step import step

Shape = Sequence[int]


def cluster_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_groups: Tensor,
    k_groups: Tensor,
    *,
    window: int,
    causal: bool,
    last_resort: bool,
    shared: bool,
    scale: float,
    form: str = "strict",
) -> Tensor:
    """The blocked form, or a single query at once.

    Args:
        form: the module of this package that does it, "strict" or "triton"; "cpp"; or "auto", see
            kernels.native.library_for, and "strict" where that is not C++.
    """
    if q.shape[1] == 1:
        return step(
            q, k, v, q_groups, k_groups, window=window, last_resort=last_resort, scale=scale
        )
    y, _ = _cluster(q, k, v, q_groups, k_groups, window, causal, last_resort, shared, scale, form)
    return y


@custom_op("seqmix::cluster_attention", mutates_args=())
def _cluster(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_groups: Tensor,
    k_groups: Tensor,
    window: int,
    causal: bool,
    last_resort: bool,
    shared: bool,
    scale: float,
    form: str = "strict",
) -> tuple[Tensor, Tensor]:
    library = library_for("cluster_attention", cpp.SOURCE, form, q.device)
    if library is not None:
        lines = cpp.lines_of_groups(library, q_groups, k_groups, window, causal)
        return cpp.attend(library, q, k, v, lines, last_resort, scale)
    forward = implementation(__package__, form, "strict").forward
    return forward(q, k, v, q_groups, k_groups, window, causal, last_resort, shared, scale)


@_cluster.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_groups: Tensor,
    k_groups: Tensor,
    window: int,
    causal: bool,
    last_resort: bool,
    shared: bool,
    scale: float,
    form: str = "strict",
) -> tuple[Tensor, Tensor]:
    exact = accumulation_dtype(q, k, v)
    return q.new_empty(q.shape), q.new_empty(*q.shape[:3], 1, dtype=exact)


@custom_op("seqmix::cluster_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_groups: Tensor,
    k_groups: Tensor,
    y: Tensor,
    lse: Tensor,
    window: int,
    causal: bool,
    last_resort: bool,
    shared: bool,
    scale: float,
    form: str = "strict",
) -> tuple[Tensor, Tensor, Tensor]:
    library = library_for("cluster_attention", cpp.SOURCE, form, q.device)
    if library is not None:
        lines = cpp.lines_of_groups(library, q_groups, k_groups, window, causal)
        return cpp.differentiate(library, grad, q, k, v, lines, y, lse, last_resort, scale)
    backward = implementation(__package__, form, "strict").backward
    return backward(
        grad, q, k, v, q_groups, k_groups, y, lse, window, causal, last_resort, shared, scale
    )


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_groups: Tensor,
    k_groups: Tensor,
    y: Tensor,
    lse: Tensor,
    window: int,
    causal: bool,
    last_resort: bool,
    shared: bool,
    scale: float,
    form: str = "strict",
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = _backward(grad, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, *[None] * 8


_cluster.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.seqmix.cluster_attention)
def _(
    q: Shape,
    k: Shape,
    v: Shape,
    q_groups: Shape,
    k_groups: Shape,
    window: int,
    causal: bool,
    last_resort: bool,
    shared: bool,
    scale: float,
    form: str = "strict",
    out_shape: Any = None,
) -> int:
    B, T, H, D = q
    return cluster_attention_flops(
        B, T, H, D, window=window, key_length=k[1], causal=causal, shared=shared
    )


@register_flop_formula(torch.ops.seqmix.cluster_attention_backward)
def _(
    grad: Shape,
    q: Shape,
    k: Shape,
    v: Shape,
    q_groups: Shape,
    k_groups: Shape,
    y: Shape,
    lse: Shape,
    window: int,
    causal: bool,
    last_resort: bool,
    shared: bool,
    scale: float,
    form: str = "strict",
    out_shape: Any = None,
) -> int:
    B, T, H, D = q
    return cluster_attention_backward_flops(
        B, T, H, D, window=window, key_length=k[1], causal=causal, shared=shared
    )
