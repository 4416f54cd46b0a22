"""The convolution and its steps as torch operators: seqmix::causal_conv1d*.

Being operators, they are counted by FlopCounterMode through their formulas and are not traced by
torch.compile. B batch, T time, D channels, W taps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from kernels.causal_conv1d import cpp
from kernels.causal_conv1d.documents import last_inputs
from kernels.causal_conv1d.flops import causal_conv1d_flops
from kernels.causal_conv1d.reference import causal_conv1d_reference
from kernels.dispatch import implementation, observed
from kernels.native import library_for
from kernels.precision import accumulation_dtype, outside_autocast

Shape = Sequence[int]
_MOST_STEPS = 3  # from here on the shifted sums are faster


def causal_conv1d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    return_state: bool,
    form: str = "shifted",
) -> tuple[Tensor, Tensor | None]:
    """The convolution, or plain steps for a few tokens with no gradient to keep.

    Args:
        form: "shifted" or "triton", the module of this package that sums; "cpp"; or "auto", see
            kernels.native.library_for, shifted sums where that is not C++, and the plain loop for
            a few tokens with gradients.
    """
    silu = activation == "silu"
    given = (x, weight, bias, initial_state)
    kept = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    state = initial_state
    if state is None and (return_state or not kept):
        state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    few = x.shape[1] <= (_MOST_STEPS if segments is None else 1)
    if few and kept and form == "auto" and not observed():
        return causal_conv1d_reference(
            x, weight, bias, activation=activation, initial_state=initial_state, segments=segments
        )
    if few and not kept and state is not None:
        padding = None if segments is None else segments < 0
        return torch.ops.seqmix.causal_conv1d_steps(x, weight, bias, state, padding, silu)
    y = _convolve(x, weight, bias, initial_state, segments, silu, form)
    if not return_state or state is None:
        return y, None
    return y, last_inputs(x, state, segments)


@custom_op("seqmix::causal_conv1d", mutates_args=())
def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
    form: str = "shifted",
) -> Tensor:
    library = library_for("causal_conv1d", cpp.SOURCE, form, x.device)
    if library is not None:
        return cpp.forward(library, x, weight, bias, state, segments, silu)
    forward = implementation(__package__, form, "shifted").forward
    return forward(x, weight, bias, state, segments, silu)


@_convolve.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
    form: str = "shifted",
) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("seqmix::causal_conv1d_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
    form: str = "shifted",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    library = library_for("causal_conv1d", cpp.SOURCE, form, x.device)
    if library is not None:
        return cpp.backward(library, grad_y, x, weight, bias, state, segments, silu)
    backward = implementation(__package__, form, "shifted").backward
    return backward(grad_y, x, weight, bias, state, segments, silu)


@_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
    form: str = "shifted",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = accumulation_dtype(x, weight)
    (B, _, D), W = x.shape, weight.shape[1]
    return (
        x.new_empty(x.shape),
        weight.new_empty(D, W),
        x.new_empty(D, dtype=exact),
        x.new_empty(B, W - 1, D, dtype=exact),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu, ctx.form = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, state, segments = ctx.saved_tensors
    dx, d_weight, d_bias, d_state = _backward(
        grad_y, x, weight, bias, state, segments, ctx.silu, ctx.form
    )
    d_bias = None if bias is None else d_bias.to(bias.dtype)
    d_state = None if state is None else d_state.to(state.dtype)
    return dx, d_weight, d_bias, d_state, None, None, None


_convolve.register_autograd(_differentiate, setup_context=_save)


@outside_autocast
def _steps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    padding: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, T, D) and the state after it; `padding` bool (B, 1), for a single token only."""
    T, W = x.shape[1], weight.shape[1]
    inputs = torch.cat([state.to(x.dtype), x], 1)
    u = (inputs.to(accumulation_dtype(x, weight)).unfold(1, W, 1) * weight).sum(-1)
    if bias is not None:
        u += bias
    after = inputs[:, T:]
    if padding is not None:
        after = torch.where(padding[..., None], state.to(x.dtype), after)
    u = torch.nn.functional.silu(u) if silu else u
    return u.to(x.dtype).contiguous(), after.contiguous()


# Registered by hand: custom_op's own layer would cost as much as a step.
_library = torch.library.Library("seqmix", "FRAGMENT")
_library.define(
    "causal_conv1d_steps(Tensor x, Tensor weight, Tensor? bias, Tensor state, Tensor? padding, "
    "bool silu) -> (Tensor, Tensor)"
)
_library.impl("causal_conv1d_steps", _steps, "CompositeExplicitAutograd")


@torch.library.register_fake("seqmix::causal_conv1d_steps", lib=_library)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    padding: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(state.shape)


@register_flop_formula([torch.ops.seqmix.causal_conv1d, torch.ops.seqmix.causal_conv1d_steps])
def _(x: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    B, T, D = x
    return causal_conv1d_flops(B, T, D, weight[1])


@register_flop_formula(torch.ops.seqmix.causal_conv1d_backward)
def _(grad_y: Shape, x: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    B, T, D = x
    return 2 * causal_conv1d_flops(B, T, D, weight[1])
