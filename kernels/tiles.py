"""Pieces that Triton kernels share: tiles of rows in memory, and what a chunk's tokens may read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import interpreting

INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def load_tile(x, rows, there, columns, width):
    """x[rows, columns] of a row-major (., width) in float32, zero outside."""
    mask = there[:, None] & (columns[None] < width)
    return tl.load(x + rows[:, None] * width + columns[None], mask=mask, other=0).to(tl.float32)


@triton.jit
def store_tile(x, values, rows, there, columns, width):
    """x[rows, columns] = values, where it is inside."""
    mask = there[:, None] & (columns[None] < width)
    at = x + rows[:, None] * width + columns[None]
    tl.store(at, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(x, rows, there):
    """x[rows] in float32, zero outside."""
    return tl.load(x + rows, mask=there, other=0).to(tl.float32)


@triton.jit
def store_rows(x, values, rows, there):
    """x[rows] = values, where it is inside."""
    tl.store(x + rows, values.to(x.dtype.element_ty), mask=there)


@triton.jit
def dot(a, b, DOT: tl.constexpr):
    """a b, of factors in DOT (see dot_dtype), summed in float32.

    Factors come in float32, whatever they were loaded from: the compiler drops a rounding of what
    was widened, and the interpreter can only round bfloat16, not calculate with it.
    """
    a, b = a.to(DOT), b.to(DOT)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def within(segments, row, c, T, C: tl.constexpr):
    """(C, C) of chunk c: the query (row) sees the key (column), earlier and of its document.

    `row` is the offset of the batch row in `segments` (B, T), which may be None.
    """
    steps = tl.arange(0, C)
    at = c * C + steps
    mask = (steps[:, None] >= steps[None]) & (at < T)[:, None]
    if segments is not None:
        number = tl.load(segments + row + at, mask=at < T, other=-1)
        mask = mask & (number[:, None] == number[None]) & (number >= 0)[:, None]
    return mask


def dot_dtype(*tensors: Tensor) -> tl.dtype:
    """What products are made of: the inputs' 16-bit dtype where they share one, else float32.

    float32 products are exact (IEEE), not the shortened ones of the tensor cores.
    """
    dtypes = {t.dtype for t in tensors}
    if dtypes == {torch.bfloat16}:
        return tl.bfloat16
    return tl.float16 if dtypes == {torch.float16} else tl.float32
