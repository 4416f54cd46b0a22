"""The convolution as torch operators: seqmix::long_conv and its gradient.

Being operators, they are counted by FlopCounterMode through their formulas, keep only their inputs
for the backward pass, and are not traced by torch.compile. B batch, S inputs, D width, K taps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import observed
from kernels.long_conv.documents import bundles
from kernels.long_conv.flops import long_conv_backward_flops, long_conv_flops
from kernels.long_conv.spectral import convolve, correlate
from kernels.long_conv.transforms import TRANSFORMS
from kernels.precision import outside_autocast

Shape = Sequence[int]


_SUM_UP_TO = 8  # inputs for which the sum is faster than an operator's own layer


def long_conv_auto(
    u: Tensor, k: Tensor, segments: Tensor | None, past: int, transform: str
) -> Tensor:
    """As long_conv_torch, by the sum over lags for a few inputs of one document."""
    length = u.shape[1]
    if length > _SUM_UP_TO or segments is not None or observed():
        return long_conv_torch(u, k, segments, past, transform)
    return _lagged_sum(u, k)[:, past:]


@outside_autocast
def _lagged_sum(u: Tensor, k: Tensor) -> Tensor:
    """Outputs (B, S, D)."""
    y = u * k[:, 0]
    for lag in range(1, min(k.shape[1], u.shape[1])):
        y = y + pad(u[:, :-lag] * k[:, lag], (0, 0, lag, 0))
    return y


@custom_op("seqmix::long_conv", mutates_args=())
def long_conv_torch(
    u: Tensor, k: Tensor, segments: Tensor | None, past: int, transform: str
) -> Tensor:
    """u (B, S, D), k (D, K), segments (B, S) -> the outputs after the first `past`."""
    return _forward(u, k, segments, past, transform)


@long_conv_torch.register_fake
def _(u: Tensor, k: Tensor, segments: Tensor | None, past: int, transform: str) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[1] - past, u.shape[2])


@custom_op("seqmix::long_conv_backward", mutates_args=())
def _backward(
    grad: Tensor, u: Tensor, k: Tensor, segments: Tensor | None, transform: str
) -> tuple[Tensor, Tensor]:
    return _gradients(grad, u, k, segments, transform)


@_backward.register_fake
def _(
    grad: Tensor, u: Tensor, k: Tensor, segments: Tensor | None, transform: str
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, k, segments, _, ctx.transform = inputs
    ctx.save_for_backward(u, k, segments)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_u, grad_k = _backward(grad, *ctx.saved_tensors, ctx.transform)
    return grad_u, grad_k, None, None, None


long_conv_torch.register_autograd(_differentiate, setup_context=_save)


@outside_autocast
def _forward(u: Tensor, k: Tensor, segments: Tensor | None, past: int, transform: str) -> Tensor:
    chosen = TRANSFORMS[transform]
    if segments is None:
        return convolve(u, k, past, chosen)
    out = u.new_zeros(u.shape)
    for index, real in bundles(segments):
        x = u.flatten(0, 1)[index] * real[..., None]
        out.view(-1, u.shape[2])[index[real]] = convolve(x, k[:, : x.shape[1]], 0, chosen)[real]
    return out[:, past:].contiguous()


@outside_autocast
def _gradients(
    grad: Tensor, u: Tensor, k: Tensor, segments: Tensor | None, transform: str
) -> tuple[Tensor, Tensor]:
    """Gradients to u (B, S, D) and k (D, K) from that of the last outputs, `grad`."""
    chosen = TRANSFORMS[transform]
    past = u.shape[1] - grad.shape[1]
    if segments is None:
        return correlate(grad, u, k, past, chosen)
    grad_u, grad_k = u.new_zeros(u.shape), k.new_zeros(k.shape)
    grad = pad(grad, (0, 0, past, 0))
    for index, real in bundles(segments):
        g, x = (y.flatten(0, 1)[index] * real[..., None] for y in (grad, u))
        reach = min(x.shape[1], k.shape[1])
        grad_x, grad_taps = correlate(g, x, k[:, :reach], 0, chosen)
        grad_u.view(-1, u.shape[2])[index[real]] = grad_x[real]
        grad_k[:, :reach] += grad_taps
    return grad_u, grad_k


@register_flop_formula(torch.ops.seqmix.long_conv)
def _(u: Shape, k: Shape, segments: Any, past: int, transform: str, *_: Any, **__: Any) -> int:
    B, S, D = u
    return long_conv_flops(B, S - past, D, k[1], past=past, transform=transform)


@register_flop_formula(torch.ops.seqmix.long_conv_backward)
def _(grad: Shape, u: Shape, k: Shape, segments: Any, transform: str, *_: Any, **__: Any) -> int:
    B, S, D = u
    return long_conv_backward_flops(B, S, D, k[1], transform)
