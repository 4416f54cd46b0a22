"""Depthwise causal convolution as shifted sums over blocks of time that stay in cache.

With x before the start taken from the state and m_j(t) = 1 where t and t - j are of one document:

    u_t = bias + sum_j w_j m_j(t) x_{t-j},  y = u or silu(u),  j = 0..W-1, w_j = weight[:, W-1-j]

B batch, T time, D channels, W taps, L tokens in a block.
"""

import torch
from torch import Tensor

from kernels.causal_conv1d.documents import Documents
from kernels.precision import accumulation_dtype, outside_autocast

_BLOCK = 1 << 18  # elements: 1 MiB of float32 each for a block's inputs and sums


@outside_autocast
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
) -> Tensor:
    """y (B, T, D)."""
    conv = _Convolution(x, weight, bias, state, segments)
    y = x.new_empty(x.shape)
    for start, end in conv.blocks:
        u = conv.sums(start, end)
        y[:, start:end] = torch.nn.functional.silu(u, inplace=True) if silu else u
    return conv.documents.restore(y)


@outside_autocast
def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight (D, W), bias (D,) and state (B, W-1, D).

    Blocks run backwards in time; each hands the W - 1 first rows of its gradient to the one
    before it, whose inputs they saw.
    """
    conv = _Convolution(x, weight, bias, state, segments)
    (B, _, D), W = x.shape, weight.shape[1]
    grad_y = conv.documents.arrange(grad_y)
    dx = x.new_empty(x.shape)
    d_taps = torch.zeros_like(conv.taps)
    d_bias = conv.taps.new_zeros(D)
    later = conv.taps.new_zeros(B, W - 1, D)
    for start, end in reversed(conv.blocks):
        du = grad_y[:, start:end].to(conv.taps.dtype)
        if silu:
            du = torch.ops.aten.silu_backward(du, conv.sums(start, end))
        d_bias += du.sum((0, 1))
        inputs = conv.inputs(start, end)
        for j in range(W):
            seen = inputs[:, W - 1 - j : W - 1 - j + end - start]
            d_taps[W - 1 - j] += (conv.documents.within(du, start, j) * seen).sum((0, 1))
        du = torch.cat([du, later], 1)
        dx[:, start:end] = conv.correlate(du, start, end - start)
        later = du[:, : W - 1]
    before = torch.cat([later.new_zeros(B, W - 1, D), later], 1)
    d_state = conv.correlate(before, 1 - W, W - 1)
    d_weight = d_taps.T.to(weight.dtype).contiguous()
    return conv.documents.restore(dx), d_weight, d_bias, d_state


class _Convolution:
    """The inputs in order, and the two sums over taps."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        segments: Tensor | None,
    ) -> None:
        (B, T, D), W = x.shape, weight.shape[1]
        dtype = accumulation_dtype(x, weight)
        self.documents = Documents(segments, W)
        self.x = self.documents.arrange(x)
        self.taps = weight.to(dtype).T.contiguous()  # (W, D), the last meets the newest input
        self.bias = None if bias is None else bias.to(dtype)
        self.state = x.new_zeros(B, W - 1, D) if state is None else state
        length = max(1, _BLOCK // max(1, B * D))
        self.blocks = [(t, min(t + length, T)) for t in range(0, T, length)]

    def inputs(self, start: int, end: int) -> Tensor:
        """(B, W - 1 + end - start, D): the block and the W - 1 inputs before it."""
        reach = len(self.taps) - 1
        inputs = self.x[:, max(0, start - reach) : end].to(self.taps.dtype)
        if start < reach:
            inputs = torch.cat([self.state[:, start:].to(inputs.dtype), inputs], 1)
        return inputs

    def sums(self, start: int, end: int) -> Tensor:
        """u (B, L, D), what the activation is applied to."""
        inputs, W, L = self.inputs(start, end), len(self.taps), end - start
        u = inputs[:, W - 1 :] * self.taps[W - 1]
        for j in range(1, W):
            seen = self.documents.within(inputs[:, W - 1 - j : W - 1 - j + L], start, j)
            u.addcmul_(seen, self.taps[W - 1 - j])
        return u if self.bias is None else u.add_(self.bias)

    def correlate(self, du: Tensor, start: int, length: int) -> Tensor:
        """dx_t = sum_j w_j m_j(t+j) du_{t+j} for `length` positions from `start`, (B, L, D).

        `du` (B, L + W - 1, D) begins at `start`.
        """
        W = len(self.taps)
        dx = du[:, :length] * self.taps[W - 1]
        for j in range(1, W):
            seen_by = self.documents.within(du[:, j : j + length], start + j, j)
            dx.addcmul_(seen_by, self.taps[W - 1 - j])
        return dx
