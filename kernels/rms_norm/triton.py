"""RMS norm with its gate on a GPU: one Triton kernel forward and one backward.

With h = x, or x silu(gate) where the gate comes first, and r = (mean h^2 + eps)^-1/2:

    n = h r,  y = n weight,  dh = r (g - n mean(g n)) where g = dy weight

A program takes R rows of one group at a time, whole groups in registers.

D channels, G groups of C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import block_of, ceil_div, launch

# Elements of one tile, and programs that each sum the weight's gradient over rows of their own.
_TILE, _PROGRAMS = 4096, 256
MOST_CHANNELS = 16384


@triton.jit
def normalize(
    x, weight, gate, y, roots, eps, rows,
    D: tl.constexpr, C: tl.constexpr, BEFORE: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y and the inverse roots (rows, G) of R rows of a group."""
    first, group = tl.program_id(0).to(tl.int64) * R, tl.program_id(1)
    row, at = tl.arange(0, R), tl.arange(0, BC)
    there, start = row < rows - first, first * D + group * C
    mask = there[:, None] & (at[None] < C)
    place = row[:, None] * D + at[None]
    h = tl.load(x + start + place, mask=mask, other=0).to(tl.float32)
    if gate is not None:
        a = tl.load(gate + start + place, mask=mask, other=0).to(tl.float32)
        passed = a * tl.sigmoid(a)
        if not BEFORE:
            h *= passed
    root = tl.rsqrt(tl.sum(h * h, 1) / C + eps)
    out = h * root[:, None] * tl.load(weight + group * C + at, mask=at < C, other=0).to(tl.float32)
    if gate is not None and BEFORE:
        out *= passed
    tl.store(y + start + place, out.to(y.dtype.element_ty), mask=mask)
    G: tl.constexpr = D // C
    tl.store(roots + (first + row) * G + group, root, mask=there)


@triton.jit
def differentiate(
    x, weight, gate, roots, grad_y, dx, d_gate, d_weights, rows,
    D: tl.constexpr, C: tl.constexpr, BEFORE: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of x and gate, and a part of the weight's: (programs, D)."""
    program, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, at = tl.arange(0, R), tl.arange(0, BC)
    w = tl.load(weight + group * C + at, mask=at < C, other=0).to(tl.float32)
    G: tl.constexpr = D // C
    d_weight = tl.zeros((BC,), tl.float32)
    for i in range(program, tl.cdiv(rows, R), tl.num_programs(0)):
        first = i * R
        there, start = row < rows - first, first * D + group * C
        mask = there[:, None] & (at[None] < C)
        place = row[:, None] * D + at[None]
        root = tl.load(roots + (first + row) * G + group, mask=there, other=0)[:, None]
        x_r = tl.load(x + start + place, mask=mask, other=0).to(tl.float32)
        dy = tl.load(grad_y + start + place, mask=mask, other=0).to(tl.float32)
        h = x_r
        if gate is not None:
            a = tl.load(gate + start + place, mask=mask, other=0).to(tl.float32)
            open_share = tl.sigmoid(a)
            passed = a * open_share
            slope = open_share * (1 + a * (1 - open_share))
            if BEFORE:
                d_passed = dy * h * root * w[None]
                dy *= passed
            else:
                h *= passed
        n = h * root
        d_weight += tl.sum(dy * n, 0)
        g = dy * w[None]
        dh = root * (g - n * (tl.sum(g * n, 1) / C)[:, None])
        if gate is not None:
            if not BEFORE:
                d_passed = dh * x_r
                dh *= passed
            d_a = d_passed * slope
            tl.store(d_gate + start + place, d_a.to(d_gate.dtype.element_ty), mask=mask)
        tl.store(dx + start + place, dh.to(dx.dtype.element_ty), mask=mask)
    tl.store(d_weights + program * D + group * C + at, d_weight, mask=at < C)


def forward(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    norm_before_gate: bool,
    group_size: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y of x (rows, D), and the inverse roots (rows, G) in float32."""
    x, gate = x.contiguous(), None if gate is None else gate.contiguous()
    rows, D = x.shape
    y, roots = torch.empty_like(x), x.new_empty(rows, D // group_size, dtype=torch.float32)
    tiles = _tiles(D, group_size, norm_before_gate)
    launch(
        normalize, (ceil_div(rows, tiles["R"]), D // group_size),
        x, weight.contiguous(), gate, y, roots, eps, rows, **tiles,
    )  # fmt: skip
    return y, roots


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    roots: Tensor,
    norm_before_gate: bool,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and gate; the last is empty without one."""
    x, gate = x.contiguous(), None if gate is None else gate.contiguous()
    rows, D = x.shape
    tiles = _tiles(D, group_size, norm_before_gate)
    programs = min(ceil_div(rows, tiles["R"]), _PROGRAMS)
    dx, d_gate = torch.empty_like(x), x.new_empty(0) if gate is None else torch.empty_like(gate)
    d_weights = x.new_empty(programs, D, dtype=torch.float32)
    launch(
        differentiate, (programs, D // group_size),
        x, weight.contiguous(), gate, roots, grad_y.contiguous(), dx, d_gate, d_weights, rows,
        **tiles,
    )  # fmt: skip
    return dx, d_weights.sum(0).to(weight.dtype), d_gate


def _tiles(D: int, group_size: int, norm_before_gate: bool) -> dict[str, int]:
    BC = block_of(group_size, MOST_CHANNELS)
    rows = max(1, _TILE // BC)
    warps = max(4, min(16, BC // 512))
    return {
        "D": D,
        "C": group_size,
        "BEFORE": norm_before_gate,
        "R": rows,
        "BC": BC,
        "warps": warps,
    }
