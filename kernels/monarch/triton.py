"""The Monarch product on a GPU: both block-diagonal products and the permutation in one kernel.

Of the k q = l r numbers in the middle, f = a q + b = r' l + j, those of block a of w1 and block j
of w2 are b = b0, b0 + l, ...: one run of r', about q / l long. So the part of output block j that
comes through block a is a small product of x_a by rows of w1[a] and of that by columns of w2[j],
and nothing of the middle ever reaches memory. The gradient of x is the same with the two factors
in the other order.

x (rows, k p), w1 (k, q, p), w2 (l, s, r), y (rows, s l); l is n in the code.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import block_of, ceil_div, launch
from kernels.tiles import dot, dot_dtype


@triton.jit
def multiply(
    x, w1, w2, y, rows,
    k: tl.constexpr, q: tl.constexpr, p: tl.constexpr,
    n: tl.constexpr, s: tl.constexpr, r: tl.constexpr,
    BACKWARD: tl.constexpr,
    R: tl.constexpr, BX: tl.constexpr, BM: tl.constexpr, BY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of one output block, over (row tiles, output blocks, tiles of a block)."""
    first, block = tl.program_id(0).to(tl.int64) * R, tl.program_id(1)
    row = tl.arange(0, R)
    there = (row < rows - first)[:, None]
    at_y = tl.program_id(2) * BY + tl.arange(0, BY)
    WX: tl.constexpr = s if BACKWARD else p
    WY: tl.constexpr = p if BACKWARD else s
    out = tl.zeros((R, BY), tl.float32)
    for other in range(n if BACKWARD else k):
        a = block if BACKWARD else other
        j = other if BACKWARD else block
        b0 = (j + n - (a * q) % n) % n
        r0 = (a * q + b0 - j) // n
        for start in range(0, (q + n - 1) // n, BM):
            i = start + tl.arange(0, BM)
            real = b0 + n * i < q
            middle = tl.zeros((R, BM), tl.float32)
            for start_x in range(0, WX, BX):
                at_x = start_x + tl.arange(0, BX)
                column = at_x * n + j if BACKWARD else a * p + at_x
                width: tl.constexpr = s * n if BACKWARD else k * p
                x_t = tl.load(
                    x + first * width + row[:, None] * width + column[None],
                    mask=there & (at_x < WX)[None], other=0,
                ).to(tl.float32)  # fmt: skip
                inside = (at_x < WX)[:, None] & real[None]
                if BACKWARD:
                    w_t = tl.load(w2 + (j * s + at_x[:, None]) * r + r0 + i[None], inside, 0)
                else:
                    w_t = tl.load(w1 + (a * q + b0 + n * i[None]) * p + at_x[:, None], inside, 0)
                middle += dot(x_t, w_t.to(tl.float32), DOT)
            inside = real[:, None] & (at_y < WY)[None]
            if BACKWARD:
                w_y = tl.load(w1 + (a * q + b0 + n * i[:, None]) * p + at_y[None], inside, 0)
            else:
                w_y = tl.load(w2 + (j * s + at_y[None]) * r + r0 + i[:, None], inside, 0)
            out += dot(middle, w_y.to(tl.float32), DOT)
    column = block * p + at_y if BACKWARD else at_y * n + block
    width_y: tl.constexpr = k * p if BACKWARD else s * n
    tl.store(
        y + first * width_y + row[:, None] * width_y + column[None],
        out.to(y.dtype.element_ty), mask=there & (at_y < WY)[None],
    )  # fmt: skip


def forward(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """x (rows, k p) -> (rows, s l)."""
    return _multiply(x, w1, w2, x.new_empty(len(x), w2.shape[0] * w2.shape[1]), backward=False)


def backward(grad_y: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The gradient of x: grad_y (rows, s l) -> (rows, k p)."""
    dx = grad_y.new_empty(len(grad_y), w1.shape[0] * w1.shape[2])
    return _multiply(grad_y, w1, w2, dx, backward=True)


def _multiply(x: Tensor, w1: Tensor, w2: Tensor, y: Tensor, *, backward: bool) -> Tensor:
    (k, q, p), (blocks, s, r) = w1.shape, w2.shape
    (into, width_x), width_y = ((k, s), p) if backward else ((blocks, p), s)
    R, BY = block_of(len(x), 64), block_of(width_y, 128)
    launch(
        multiply, (ceil_div(len(x), R), into, ceil_div(width_y, BY)),
        x.contiguous(), w1.contiguous(), w2.contiguous(), y, len(x), k, q, p, blocks, s, r,
        BACKWARD=backward, R=R, BX=block_of(width_x, 64), BM=block_of(ceil_div(q, blocks), 64),
        BY=BY, DOT=dot_dtype(x, w1, w2), warps=8,
    )  # fmt: skip
    return y
