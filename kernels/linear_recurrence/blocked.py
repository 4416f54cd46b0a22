"""The recurrence in two sweeps over blocks of about sqrt(T) positions, all blocks side by side.

The first sweep finds what every block does to a state from outside, h -> product * h + local; a
short loop over the blocks turns that into the state before each block; the second sweep runs the
recurrence itself from there. Some 3 sqrt(T) tensor operations replace T, and only products inside
a block are ever formed.

B batch, T time, D width, C block length.
"""

import math

import torch
from torch import Tensor

_LOOP_BELOW = 16  # positions for which one plain loop is the faster form


def forward(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """a, b (B, T, D), h0 (B, D), all of one type -> every state (B, T, D)."""
    out = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    length = b.shape[1]
    if length < _LOOP_BELOW:
        _sweep(a, b, h0, out)
        return out
    blocks, size = _split(length)
    whole = blocks * size
    a_blocks, b_blocks, out_blocks = (
        x[:, :whole].unflatten(1, (blocks, size)) for x in (a, b, out)
    )
    entering = _carried(*_summary(a_blocks, b_blocks), h0, range(blocks))
    _sweep(a_blocks, b_blocks, entering, out_blocks)
    _sweep(a[:, whole:], b[:, whole:], out[:, whole - 1], out[:, whole:])
    return out


def reverse(a: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients to b (B, T, D) and h0 (B, D) from that of every state, `grad` (B, T, D)."""
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    length = grad.shape[1]
    nothing = grad.new_zeros(grad.shape[0], grad.shape[2])
    if length < _LOOP_BELOW:
        return out, _sweep_back(a, grad, nothing, out)
    blocks, size = _split(length)
    whole = blocks * size
    tail = _sweep_back(a[:, whole:], grad[:, whole:], nothing, out[:, whole:])
    a_blocks, grad_blocks, out_blocks = (
        x[:, :whole].unflatten(1, (blocks, size)) for x in (a, grad, out)
    )
    entering = _carried(*_summary_back(a_blocks, grad_blocks), tail, range(blocks)[::-1])
    return out, _sweep_back(a_blocks, grad_blocks, entering, out_blocks)[:, 0]


def _sweep(a: Tensor, b: Tensor, h0: Tensor, out: Tensor) -> Tensor:
    """The plain loop over dim -2 of a, b and out (..., C, D) from h0 (..., D); the last state."""
    h = h0
    for t in range(b.shape[-2]):
        h = torch.addcmul(b[..., t, :], a[..., t, :], h, out=out[..., t, :])
    return h


def _sweep_back(a: Tensor, grad: Tensor, carried: Tensor, out: Tensor) -> Tensor:
    """The loop of the gradient: g_t = grad_t + m_{t+1} is stored, m_t = conj(a_t) g_t returned."""
    m = carried
    for t in reversed(range(grad.shape[-2])):
        m = a[..., t, :].conj() * torch.add(grad[..., t, :], m, out=out[..., t, :])
    return m


def _summary(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(product, local) of every block: it sends the state h to product * h + local."""
    product, local = a[..., 0, :].clone(), b[..., 0, :]
    for t in range(1, b.shape[-2]):
        product.mul_(a[..., t, :])
        local = torch.addcmul(b[..., t, :], a[..., t, :], local)
    return product, local


def _summary_back(a: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(product, local) of every block of the gradient's recurrence, read from its end."""
    last = a.shape[-2] - 1
    product = a[..., last, :].conj().clone()
    local = product * grad[..., last, :]
    for t in reversed(range(last)):
        conjugate = a[..., t, :].conj()
        product.mul_(conjugate)
        local = conjugate * (grad[..., t, :] + local)
    return product, local


def _carried(product: Tensor, local: Tensor, start: Tensor, blocks: range) -> Tensor:
    """The state (B, blocks, D) that enters each block, the blocks visited in the given order."""
    entering = torch.empty_like(product)
    h = start
    for c in blocks:
        entering[:, c] = h
        h = torch.addcmul(local[:, c], product[:, c], h)
    return entering


def _split(length: int) -> tuple[int, int]:
    """(number of blocks, block length); what they leave over is less than one block."""
    size = math.isqrt(length)
    return length // size, size


def backward(grad: Tensor, a: Tensor, h: Tensor, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b (B, T, D) and h0 (B, D): g_t conj(h_{t-1}), g and conj(a_1) g_1."""
    grad_b, grad_h0 = reverse(a, grad)
    grad_a = torch.empty_like(grad_b)
    torch.mul(grad_b[:, :1], h0[:, None].conj(), out=grad_a[:, :1])
    torch.mul(grad_b[:, 1:], h[:, :-1].conj(), out=grad_a[:, 1:])
    return grad_a, grad_b, grad_h0.contiguous()
