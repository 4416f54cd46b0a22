"""Attention of a cluster's queries to its members by Triton or C++: seqmix::member_attention.

Members stand in the order of time, so that what a query sees of them is a run: the kernels are
those of the strict form. N clusters of all rows and heads, Q queries, M members, D head width.
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
from kernels.routing_attention.runs import Runs

Shape = Sequence[int]


def member_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    members: Tensor,
    asking: Tensor,
    *,
    causal: bool,
    last_resort: bool,
    scale: float,
    form: str = "triton",
) -> tuple[Tensor, Tensor]:
    """Outputs (N, Q, D), zero where nothing is seen, and bool (N, Q) where something is.

    Args:
        q: (N, Q, D).
        k, v: (N, M, D).
        members: int64 (N, M) candidates that the members are, ascending, -1 in slots in front.
        asking: int64 (N, Q) candidates that the queries are, ascending, -1 for one that is none.
        form: "triton", or "cpp" on the CPU.
    """
    low, high, own = _runs(members, asking, causal, form)
    y, _ = _attend(q, k, v, low, high, own, last_resort, scale, form)
    return y, high > low


@custom_op("seqmix::member_runs", mutates_args=())
def _runs(
    members: Tensor, asking: Tensor, causal: bool, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What each query sees: low, high and own, int32 (N, Q), as in runs.Runs."""
    library = library_for("balanced_attention", cpp.SOURCE, form, members.device)
    if library is not None:
        return cpp.lines_of_members(library, members, asking, causal)
    low = (members < 0).sum(1, keepdim=True).expand_as(asking)
    place = torch.searchsorted(members, asking)
    if causal:
        high = torch.searchsorted(members, asking, right=True)
    else:
        high = torch.full_like(low, members.shape[1])
    found = members.gather(1, place.clamp(max=members.shape[1] - 1)) == asking
    own = torch.where(found & (asking >= 0), place, -1)
    high = torch.where(asking >= 0, high, 0)
    low, high, own = (x.to(torch.int32, copy=True).contiguous() for x in (low, high, own))
    return low, high, own


@_runs.register_fake
def _(members: Tensor, asking: Tensor, causal: bool, form: str) -> tuple[Tensor, Tensor, Tensor]:
    low, high, own = (asking.new_empty(asking.shape, dtype=torch.int32) for _ in range(3))
    return low, high, own


def _as_they_stand(low: Tensor, high: Tensor, own: Tensor, M: int) -> Runs:
    """Queries and members as they stand."""
    N, Q = low.shape
    row = torch.arange(N, device=low.device)[:, None]
    queries, keys = (row * n + torch.arange(n, device=low.device) for n in (Q, M))
    askers = torch.full((N, M + 1), -1, device=low.device)  # the last one is thrown away
    askers.scatter_(1, torch.where(own >= 0, own, M).long(), queries)
    return Runs(queries, keys, askers[:, :M].contiguous(), low, high, own)


@custom_op("seqmix::member_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    own: Tensor,
    last_resort: bool,
    scale: float,
    form: str = "triton",
) -> tuple[Tensor, Tensor]:
    library = library_for("balanced_attention", cpp.SOURCE, form, q.device)
    if library is not None:
        lines = cpp.Lines(k.shape[1], k.shape[1], low, high, own)
        return cpp.attend(library, q, k, v, lines, last_resort, scale)
    forward = implementation(__package__, "triton").attend_runs
    q, k, v, low, high, own = (x.contiguous() for x in (q, k, v, low, high, own))
    return forward(q, k, v, _as_they_stand(low, high, own, k.shape[1]), last_resort, scale)


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    own: Tensor,
    last_resort: bool,
    scale: float,
    form: str = "triton",
) -> tuple[Tensor, Tensor]:
    exact = torch.float32 if form == "triton" else accumulation_dtype(q)
    return q.new_empty(q.shape), q.new_empty(*q.shape[:2], 1, dtype=exact)


@custom_op("seqmix::member_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    own: Tensor,
    y: Tensor,
    log_sum: Tensor,
    last_resort: bool,
    scale: float,
    form: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    library = library_for("balanced_attention", cpp.SOURCE, form, q.device)
    if library is not None:
        lines = cpp.Lines(k.shape[1], k.shape[1], low, high, own)
        return cpp.differentiate(library, grad, q, k, v, lines, y, log_sum, last_resort, scale)
    backward = implementation(__package__, "triton").differentiate_runs
    low, high, own = (x.contiguous() for x in (low, high, own))
    runs = _as_they_stand(low, high, own, k.shape[1])
    grad, q, k, v, y, log_sum = (x.contiguous() for x in (grad, q, k, v, y, log_sum))
    return backward(grad, q, k, v, runs, y, log_sum, last_resort, scale)


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    own: Tensor,
    y: Tensor,
    log_sum: Tensor,
    last_resort: bool,
    scale: float,
    form: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.options = inputs[6:]


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    dq, dk, dv = _backward(grad, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, *[None] * 6


_attend.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.seqmix.member_attention)
def _(
    q: Shape,
    k: Shape,
    v: Shape,
    low: Shape,
    high: Shape,
    own: Shape,
    last_resort: bool,
    scale: float,
    form: str = "triton",
    out_shape: Any = None,
) -> int:
    N, Q, D = q
    return 4 * N * Q * k[1] * D  # as the masked product of the torch form


@register_flop_formula(torch.ops.seqmix.member_attention_backward)
def _(
    grad: Shape,
    q: Shape,
    k: Shape,
    v: Shape,
    low: Shape,
    high: Shape,
    own: Shape,
    y: Shape,
    log_sum: Shape,
    last_resort: bool,
    scale: float,
    form: str = "triton",
    out_shape: Any = None,
) -> int:
    N, Q, D = q
    return 10 * N * Q * k[1] * D  # the scores again, then the gradients of the weights, v, q, k
