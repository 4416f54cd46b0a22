"""The depthwise causal convolution on a GPU: Triton kernels, forward and backward.

The equation is that of the shifted sums. A program has a tile of tokens and channels; the backward
pass makes u again, then u's gradient, whose sums with the inputs are the weight's gradient, and
with the taps the inputs'. `reach` (B, T) says how many tokens before each are of its document.

B batch, T time, D channels, W taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.causal_conv1d.documents import Documents
from kernels.launch import block_of, ceil_div, launch

_TOKENS, _CHANNELS = 32, 64  # of a tile


@triton.jit
def earlier(
    x, state, reach, batch, t, j: tl.constexpr, T, at, D: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """x_{t-j}, from the state where that is before the start, zero where it is not visible."""
    before, inside = t - j, (at < D)[None]
    mask = ((before >= 0) & (t < T))[:, None] & inside
    x_j = tl.load(x + (batch * T + before)[:, None] * D + at[None], mask, 0).to(tl.float32)
    if state is not None:
        row = batch * (W - 1) + W - 1 + before
        mask = ((before < 0) & (t < T))[:, None] & inside
        x_j += tl.load(state + row[:, None] * D + at[None], mask, 0).to(tl.float32)
    if reach is not None:
        visible = tl.load(reach + batch * T + t, t < T, 0) >= j
        x_j = tl.where(visible[:, None], x_j, 0)
    return x_j


@triton.jit
def tap(weight, j: tl.constexpr, at, D: tl.constexpr, W: tl.constexpr):
    """w_j = weight[:, W-1-j], (1, channels)."""
    return tl.load(weight + at * W + W - 1 - j, at < D, 0).to(tl.float32)[None]


@triton.jit
def convolve(
    x, weight, bias, state, reach, grad_y, out, parts, T,
    D: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y, over (T tiles, D tiles, B).

    With `grad_y`, the gradient of u in its place, and in `parts` (B, T tiles, W + 1, D) those of
    the taps and, last, of the bias.
    """
    tile, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    t, at = tile * BT + tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD)
    u = tl.zeros((BT, BD), tl.float32)
    if bias is not None:
        u += tl.load(bias + at, at < D, 0).to(tl.float32)[None]
    for j in tl.static_range(W):
        u += tap(weight, j, at, D, W) * earlier(x, state, reach, batch, t, j, T, at, D, W)
    place = (batch * T + t)[:, None] * D + at[None]
    mask = (t < T)[:, None] & (at < D)[None]
    share = tl.sigmoid(u)
    if grad_y is None:
        y = u * share if SILU else u
        tl.store(out + place, y.to(out.dtype.element_ty), mask)
    else:
        g = tl.load(grad_y + place, mask, 0).to(tl.float32)
        if SILU:
            g *= share * (1 + u * (1 - share))
        tl.store(out + place, g, mask)
        part = parts + (batch * tl.num_programs(0) + tile) * (W + 1) * D + at
        for j in tl.static_range(W):
            x_j = earlier(x, state, reach, batch, t, j, T, at, D, W)
            tl.store(part + (W - 1 - j) * D, tl.sum(g * x_j, 0), at < D)
        tl.store(part + W * D, tl.sum(g, 0), at < D)


@triton.jit
def correlate(
    du, weight, reach, dx, d_state, T,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """sum_j w_j du_{t+j}: gradients of the state and of x behind it, over (tiles, D tiles, B)."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BT + tl.arange(0, BT)  # of the state and x together
    t, at = row - (W - 1), tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (at < D)[None]
    total = tl.zeros((BT, BD), tl.float32)
    for j in tl.static_range(W):
        later = t + j
        there = (later >= 0) & (later < T)
        if reach is not None:
            there = there & (tl.load(reach + batch * T + later, there, 0) >= j)
        place = (batch * T + later)[:, None] * D + at[None]
        total += tap(weight, j, at, D, W) * tl.load(du + place, there[:, None] & inside, 0)
    place = (batch * T + t)[:, None] * D + at[None]
    mask = ((t >= 0) & (t < T))[:, None] & inside
    tl.store(dx + place, total.to(dx.dtype.element_ty), mask)
    place = (batch * (W - 1) + row)[:, None] * D + at[None]
    tl.store(d_state + place, total, (t < 0)[:, None] & inside)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
) -> Tensor:
    """y (B, T, D)."""
    call = _Call(x, weight, bias, state, segments, silu)
    y = torch.empty_like(call.x)
    call.convolve(None, y, None)
    return call.documents.restore(y)


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the shifted sums': gradients of x, weight, bias and state."""
    call = _Call(x, weight, bias, state, segments, silu)
    (B, T, D), W = x.shape, weight.shape[1]
    du = call.x.new_empty(B, T, D, dtype=torch.float32)
    parts = du.new_empty(B, call.grid[0], W + 1, D)
    call.convolve(call.documents.arrange(grad_y).contiguous(), du, parts)
    dx, d_state = torch.empty_like(call.x), du.new_empty(B, W - 1, D)
    launch(
        correlate, (ceil_div(T + W - 1, _TOKENS), *call.grid[1:]),
        du, call.weight, call.reach, dx, d_state, T, **call.constants,
    )  # fmt: skip
    d_taps = parts.sum((0, 1))
    d_weight = d_taps[:W].T.to(weight.dtype).contiguous()
    return call.documents.restore(dx), d_weight, d_taps[W].clone(), d_state


class _Call:
    """What both passes share: inputs in order, contiguous, and sizes of tiles."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        segments: Tensor | None,
        silu: bool,
    ) -> None:
        (B, T, D), W = x.shape, weight.shape[1]
        self.documents = Documents(segments, W)
        self.reach = None if self.documents.reach is None else self.documents.reach.contiguous()
        self.x, self.weight = self.documents.arrange(x).contiguous(), weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.state = None if state is None else state.contiguous()
        self.silu = silu
        BD = block_of(D, _CHANNELS)
        self.grid = ceil_div(T, _TOKENS), ceil_div(D, BD), B
        self.constants = {"D": D, "W": W, "BT": _TOKENS, "BD": BD}

    def convolve(self, grad_y: Tensor | None, out: Tensor, parts: Tensor | None) -> None:
        """Launch `convolve`."""
        launch(
            convolve, self.grid,
            self.x, self.weight, self.bias, self.state, self.reach, grad_y, out, parts,
            self.x.shape[1], SILU=self.silu, **self.constants,
        )  # fmt: skip
