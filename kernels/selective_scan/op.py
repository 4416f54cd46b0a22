"""The selective scan as a torch operator: one call for compilers, one node for autograd.

The operator's `form` says what computes it: "torch" (tiles), "triton", "cpp", or "auto", which is
C++ on a CPU where it can be compiled. All keep states for the backward pass, Triton's
further apart.

B batch, D channels, L time, N state, G groups.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import implementation, observed
from kernels.native import library_for
from kernels.precision import accumulation_dtype, outside_autocast
from kernels.selective_scan import chunked, cpp
from kernels.selective_scan.flops import selective_scan_backward_flops, selective_scan_flops
from kernels.selective_scan.reference import selective_scan_reference
from kernels.selective_scan.step import step
from kernels.selective_scan.tiles import STEPS, Scan


@torch.library.custom_op("seqmix::selective_scan", mutates_args=())
@outside_autocast
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    segments: Tensor | None,
    keep_states: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    scan = Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, segments)
    if form == "triton":
        return implementation(__package__, form).forward(scan, keep_states)
    library = library_for("selective_scan", cpp.SOURCE, form, u.device)
    if library is None:
        return chunked.forward(scan, keep_states)
    return cpp.forward(library, scan, keep_states)


@_forward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial, segments, keep_states, form):
    (batch, channels, length), N = u.shape, A.shape[1]
    dtype = accumulation_dtype(u)
    last = u.new_empty(batch, channels, N, dtype=dtype)
    if not keep_states:
        return torch.empty_like(u), last, u.new_empty(0, dtype=dtype)
    steps = implementation(__package__, form).STEPS if form == "triton" else STEPS
    tiles = -(-length // steps)
    return torch.empty_like(u), last, u.new_empty(tiles, batch, N, channels, dtype=dtype)


@torch.library.custom_op("seqmix::selective_scan_backward", mutates_args=())
@outside_autocast
def _backward(
    grad_y: Tensor,
    grad_last: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    segments: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    scan = Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, segments)
    if form == "triton":
        return implementation(__package__, form).backward(scan, states, grad_y, grad_last)
    library = library_for("selective_scan", cpp.SOURCE, form, u.device)
    if library is None:
        return chunked.backward(scan, states, grad_y, grad_last)
    return cpp.backward(library, scan, states, grad_y, grad_last)


@_backward.register_fake
def _(grad_y, grad_last, states, *arguments):
    return chunked.new_gradients(Scan(*arguments[:-1]), grad_last)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    u, delta, A, B, C, D, z, delta_bias, softplus, initial_state, segments, _, form = inputs
    _, last, states = output
    ctx.save_for_backward(states, u, delta, A, B, C, D, z, delta_bias, initial_state, segments)
    ctx.delta_softplus, ctx.state_shape, ctx.form = softplus, last.shape, form
    ctx.set_materialize_grads(False)  # `states` would get a gradient of zeros of its own size


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: None) -> tuple:
    states, u, delta, A, B, C, D, z, delta_bias, initial_state, segments = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(u)
    if grad_last is None:
        grad_last = states.new_zeros(ctx.state_shape)
    grads = chunked.Gradients(
        *_backward(
            grad_y, grad_last, states, u, delta, A, B, C, D, z, delta_bias,
            ctx.delta_softplus, initial_state, segments, ctx.form,
        )
    )  # fmt: skip

    def of(name: str, given: Tensor | None) -> Tensor | None:
        return None if given is None else getattr(grads, name).to(given.dtype)

    return (
        grads.u,
        grads.delta,
        of("A", A),
        of("B", B),
        of("C", C),
        of("D", D),
        of("z", z),
        of("delta_bias", delta_bias),
        None,
        of("initial_state", initial_state),
        None,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("seqmix::selective_scan_step", mutates_args=())
def _step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return step(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, segments)


@_step.register_fake
def _(u, delta, A, *others):
    return u.new_empty(u.shape), u.new_empty(*u.shape[:2], A.shape[1], dtype=accumulation_dtype(u))


@register_flop_formula([torch.ops.seqmix.selective_scan, torch.ops.seqmix.selective_scan_step])
def _(u_shape: Any, delta_shape: Any, A_shape: Any, *_: Any, **__: Any) -> int:
    batch, channels, length = u_shape
    return selective_scan_flops(batch, length, channels, A_shape[1])


@register_flop_formula(torch.ops.seqmix.selective_scan_backward)
def _(grad_y_shape: Any, grad_last_shape: Any, *_: Any, **__: Any) -> int:
    batch, channels, length = grad_y_shape
    return selective_scan_backward_flops(batch, length, channels, grad_last_shape[2])


def _scan(
    form: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan by `form`; a single step by itself, for "auto" also where it has gradients."""
    if B.ndim == 3:
        B, C = B[:, None], C[:, None]
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, segments)
    if u.shape[2] == 1 and not grad and form != "triton":  # whose one kernel is a step as well
        return _step(*arguments)
    if u.shape[2] == 1 and grad and form == "auto" and not observed():
        return selective_scan_reference(*arguments)
    y, last, _ = _forward(*arguments, grad, form)
    return y, last


selective_scan_auto, selective_scan_torch, selective_scan_cpp, selective_scan_triton = (
    partial(_scan, form) for form in ("auto", "torch", "cpp", "triton")
)
