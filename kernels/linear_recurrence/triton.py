"""The linear recurrence on a GPU: one Triton kernel forward and one backward.

A program walks over the tokens of a tile of channels, C at a time: an associative scan inside, and
the last state carried on. Complex numbers are pairs of real ones, (..., 2).

B batch, T time, D width, C tokens at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import block_of, ceil_div, launch

_STEPS, _CHANNELS = 32, 64  # C, and channels of a tile


@triton.jit
def then(a, b, a_next, b_next):
    """Two steps h -> a h + b in one."""
    return a * a_next, a_next * b + b_next


@triton.jit
def then_complex(a, ai, b, bi, a_next, ai_next, b_next, bi_next):
    """The same of complex numbers in parts."""
    return (
        a * a_next - ai * ai_next,
        a * ai_next + ai * a_next,
        a_next * b - ai_next * bi + b_next,
        a_next * bi + ai_next * b + bi_next,
    )


@triton.jit
def load(x, place, mask, COMPLEX: tl.constexpr):
    """Real and imaginary part, the latter zero of a real x."""
    if COMPLEX:
        return tl.load(x + 2 * place, mask, 0), tl.load(x + 2 * place + 1, mask, 0)
    else:
        real = tl.load(x + place, mask, 0)
        return real, tl.zeros_like(real)


@triton.jit
def store(x, place, mask, real, imaginary, COMPLEX: tl.constexpr):
    """As they were loaded."""
    if COMPLEX:
        tl.store(x + 2 * place, real, mask)
        tl.store(x + 2 * place + 1, imaginary, mask)
    else:
        tl.store(x + place, real, mask)


@triton.jit
def scan(a, ai, b, bi, carry, carry_i, COMPLEX: tl.constexpr, REVERSE: tl.constexpr):
    """Every state of the steps (C, .) from the carried one; axis 0 is time."""
    if COMPLEX:
        a, ai, b, bi = tl.associative_scan((a, ai, b, bi), 0, then_complex, reverse=REVERSE)
        return a * carry - ai * carry_i + b, a * carry_i + ai * carry + bi
    else:
        a, b = tl.associative_scan((a, b), 0, then, reverse=REVERSE)
        return a * carry + b, bi


@triton.jit
def at_row(x, row, C: tl.constexpr):
    """x[row] of (C, .), as (1, .)."""
    return tl.sum(tl.where((tl.arange(0, C) == row)[:, None], x, 0), 0)[None]


@triton.jit
def recur(
    a, b, h0, h, T, D: tl.constexpr, COMPLEX: tl.constexpr, C: tl.constexpr, BD: tl.constexpr
):
    """h (B, T, D) over (tiles of channels, B)."""
    batch = tl.program_id(1).to(tl.int64)
    at = (tl.program_id(0) * BD + tl.arange(0, BD))[None]
    steps = tl.arange(0, C)[:, None]
    carry, carry_i = load(h0, batch * D + at, at < D, COMPLEX)
    for first in range(0, T, C):
        place, mask = (batch * T + first) * D + steps * D + at, (first + steps < T) & (at < D)
        a_c, ai_c = load(a, place, mask, COMPLEX)
        b_c, bi_c = load(b, place, mask, COMPLEX)
        states, states_i = scan(a_c, ai_c, b_c, bi_c, carry, carry_i, COMPLEX, False)
        store(h, place, mask, states, states_i, COMPLEX)
        carry, carry_i = at_row(states, C - 1, C), at_row(states_i, C - 1, C)


@triton.jit
def recur_back(
    grad, a, h, h0, grad_a, grad_b, grad_h0, T,
    D: tl.constexpr, COMPLEX: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """g_t = grad_t + conj(a_{t+1}) g_{t+1}, which is b's gradient; a's is g_t conj(h_{t-1})."""
    batch = tl.program_id(1).to(tl.int64)
    at = (tl.program_id(0) * BD + tl.arange(0, BD))[None]
    steps = tl.arange(0, C)[:, None]
    start = tl.zeros((1, BD), tl.float32)
    carry, carry_i = start, start
    past, past_i = load(h0, batch * D + at, at < D, COMPLEX)
    for i in range(tl.cdiv(T, C)):
        first = (tl.cdiv(T, C) - 1 - i) * C
        time = first + steps
        place, mask = (batch * T + first) * D + steps * D + at, (time < T) & (at < D)
        a_c, ai_c = load(a, place + D, mask & (time + 1 < T), COMPLEX)
        y_c, yi_c = load(grad, place, mask, COMPLEX)
        g, g_i = scan(a_c, -ai_c, y_c, yi_c, carry, carry_i, COMPLEX, True)
        store(grad_b, place, mask, g, g_i, COMPLEX)
        h_c, hi_c = load(h, place - D, mask & (time > 0), COMPLEX)
        h_c += tl.where(time == 0, past, 0)
        hi_c += tl.where(time == 0, past_i, 0)
        store(grad_a, place, mask, g * h_c + g_i * hi_c, g_i * h_c - g * hi_c, COMPLEX)
        carry, carry_i = at_row(g, 0, C), at_row(g_i, 0, C)
    a_1, ai_1 = load(a, batch * T * D + at, at < D, COMPLEX)
    store(
        grad_h0, batch * D + at, at < D,
        a_1 * carry + ai_1 * carry_i, a_1 * carry_i - ai_1 * carry, COMPLEX,
    )  # fmt: skip


def forward(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """h (B, T, D)."""
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    _launch(recur, b.shape, [a, b, h0, h])
    return h


def backward(grad: Tensor, a: Tensor, h: Tensor, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b (B, T, D) and h0 (B, D)."""
    grad_a, grad_b = (grad.new_empty(grad.shape) for _ in range(2))
    grad_h0 = h0.new_empty(h0.shape)
    _launch(recur_back, grad.shape, [grad, a, h, h0, grad_a, grad_b, grad_h0])
    return grad_a, grad_b, grad_h0


def _launch(kernel: triton.JITFunction, shape: torch.Size, tensors: list[Tensor]) -> None:
    B, T, D = shape
    BD, is_complex = block_of(D, _CHANNELS), tensors[0].is_complex()
    # A contiguous copy keeps a lazy conjugation from being overlooked.
    plain = [x.resolve_conj().contiguous() for x in tensors]
    parts = [torch.view_as_real(x) for x in plain] if is_complex else plain
    launch(kernel, (ceil_div(D, BD), B), *parts, T, D=D, COMPLEX=is_complex, C=_STEPS, BD=BD)
