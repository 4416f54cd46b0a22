"""SSD as matrix products over chunks, forward and backward, in plain PyTorch.

Inside a chunk outputs are (between o C B^T) applied to the inputs; across chunks they go through
the state. The backward pass starts from the kept state before each chunk and computes the squares
of a few chunks at a time again. Every exponent is a sum of log-decays, so never positive, and the
gradient of a log-decay is the sum of the terms that cross its step, not a difference of sums.

B batch, L time, H = G R heads in G groups, P width per head, N state; c chunks of Q steps in a
span. What has a width P is time first, (B, c, G, Q, R, P), or head first, (B, c, G, R, Q, P);
squares have the steps j that write as rows and the steps i that read as columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from kernels.ssd.spans import Arguments, Part, Span, grouped, ungrouped

silu_backward = torch.ops.aten.silu_backward


class Gradients(NamedTuple):
    """Of the arguments of the same name; those of arguments that were not given are arbitrary."""

    x: Tensor
    dt: Tensor
    log_decay: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    initial_states: Tensor


def forward(args: Arguments, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, H, P), the last state (B, H, P, N), and the states before the chunks.

    The latter are (B, chunks, G, N, R P) with `keep_states`, else empty.
    """
    y, state = args.x.new_empty(args.x.shape), args.first_state()
    kept = state.new_empty(0)
    if keep_states:
        chunks = -(-args.x.shape[1] // args.chunk_size)
        kept = state.new_empty(len(state), chunks, *state.shape[1:])
    for span in args.spans:
        part = args.part(span)
        before, state = _pass_states(part, state)
        if keep_states:
            kept[:, span.numbers] = before
        out = _read(part, before)
        if part.z is not None:
            out *= silu(part.z)
        args.time_first(y, span).copy_(out)
    return y, ungrouped(state, args.x.shape[2]), kept


def backward(args: Arguments, kept: Tensor, grad_y: Tensor, grad_last: Tensor) -> Gradients:
    """Gradients from those of y (B, L, H, P) and of the last state (B, H, P, N)."""
    grads = new_gradients(args, grad_last)
    adjoint = grouped(grad_last, args.groups, args.dtype)
    for span in reversed(args.spans):
        adjoint = _backward_span(args, span, kept[:, span.numbers], grad_y, adjoint, grads)
    grads.initial_states.copy_(ungrouped(adjoint, args.x.shape[2]))
    return grads


def new_gradients(args: Arguments, grad_last: Tensor) -> Gradients:
    """Room for the gradients; zeros where spans add to them."""
    x, dtype = args.x, args.dtype
    return Gradients(
        x=x.new_empty(x.shape),
        dt=x.new_empty(args.dt.shape, dtype=dtype),
        log_decay=x.new_empty(args.dt.shape, dtype=dtype),
        B=args.B.new_empty(args.B.shape),
        C=args.C.new_empty(args.C.shape),
        D=x.new_zeros(x.shape[2:], dtype=dtype),
        z=x.new_empty(0) if args.z is None else args.z.new_empty(args.z.shape),
        initial_states=x.new_empty(grad_last.shape, dtype=dtype),
    )


def _pass_states(part: Part, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states before the span's chunks (B, c, G, N, R P), and the one after them."""
    new = part.B.mT @ _written(part)
    whole = _columns(part.whole, part.x)
    before = torch.empty_like(new)
    for c in range(new.shape[1]):
        before[:, c] = state
        state = torch.addcmul(new[:, c], state, whole[:, c])
    return before, state


def _read(part: Part, before: Tensor) -> Tensor:
    """The output before the gate, (B, c, G, Q, R, P)."""
    R, P = part.x.shape[4:]
    y = (part.C @ before).unflatten(4, (R, P)).mul_(_time_first(part.arriving))
    squares = part.between * _squares(part)[:, :, :, None]
    y += (squares.mT @ _head_first(part.x, part.dt)).transpose(3, 4)
    return y if part.D is None else y.addcmul_(part.x, part.D)


def _backward_span(
    args: Arguments, span: Span, before: Tensor, grad_y: Tensor, adjoint: Tensor, grads: Gradients
) -> Tensor:
    """Fill the span's part of `grads`; the gradient of the state before it from that after it."""
    part = args.part(span)
    g = args.time_first(grad_y, span).to(args.dtype)
    if part.z is not None:
        args.time_first(grads.z, span).copy_(silu_backward(g * _read(part, before), part.z))
        g = g * silu(part.z)

    through = _through_states(part, before, g, adjoint)
    within = _within_chunks(part, g)
    grad_input = within.input.transpose(3, 4).addcmul_(through.written, _time_first(part.leaving))
    grad_x = grad_input * _time_first(part.dt)
    if part.D is not None:
        grad_x.addcmul_(g, part.D)
        grads.D.add_((g * part.x).sum((0, 1, 3)).flatten(0, 1))
    args.time_first(grads.x, span).copy_(grad_x)
    grad_dt = (grad_input * part.x).sum(5)
    args.time_first(grads.dt, span).copy_(grad_dt)
    grad_decay = through.log_decay + within.log_decay
    args.time_first(grads.log_decay, span).copy_(grad_decay.transpose(3, 4))
    args.chunked(grads.B, span).transpose(2, 3).copy_(through.B + within.B)
    args.chunked(grads.C, span).transpose(2, 3).copy_(through.C + within.C)
    return through.adjoint


class _Through(NamedTuple):
    """Gradients that pass through the states between chunks."""

    written: Tensor  # (B, c, G, Q, R, P) of dt x, before its decay to the end of the chunk
    log_decay: Tensor  # (B, c, G, R, Q)
    B: Tensor  # (B, c, G, Q, N)
    C: Tensor  # (B, c, G, Q, N)
    adjoint: Tensor  # (B, G, N, R P) of the state before the span


def _through_states(part: Part, before: Tensor, g: Tensor, adjoint: Tensor) -> _Through:
    R, P = part.x.shape[4:]
    g = g * _time_first(part.arriving)
    arriving = (g * (part.C @ before).unflatten(4, (R, P))).sum(5).transpose(3, 4)
    g = g.flatten(4)  # (B, c, G, Q, R P)
    grad_before = part.C.mT @ g
    adjoints = torch.empty_like(before)  # of the states after the chunks
    whole = _columns(part.whole, part.x)
    for c in reversed(range(before.shape[1])):
        adjoints[:, c] = adjoint
        adjoint = torch.addcmul(grad_before[:, c], adjoint, whole[:, c])

    written = (part.B @ adjoints).unflatten(4, (R, P))
    leaving = (written * part.x).sum(5).transpose(3, 4) * part.dt * part.leaving
    over_chunk = (adjoints * before).unflatten(4, (R, P)).sum((3, 5)) * part.whole
    log_decay = (
        arriving.flip(4).cumsum(4).flip(4)  # of every step that reads at or after this one
        + pad(leaving.cumsum(4)[..., :-1], (1, 0))  # of every step that writes before it
        + over_chunk[..., None]
    )
    return _Through(written, log_decay, _written(part) @ adjoints.mT, g @ before.mT, adjoint)


class _Within(NamedTuple):
    """Gradients that stay inside the chunks."""

    input: Tensor  # (B, c, G, R, Q, P) of dt x
    log_decay: Tensor  # (B, c, G, R, Q)
    B: Tensor  # (B, c, G, Q, N)
    C: Tensor  # (B, c, G, Q, N)


def _within_chunks(part: Part, g: Tensor) -> _Within:
    products = _squares(part)[:, :, :, None]
    g = _head_first(g)
    grad_input = (part.between * products) @ g
    grad = _head_first(part.x, part.dt) @ g.mT  # of between o products
    grad *= part.between
    grad_products = grad.sum(3) * part.within
    grad *= products
    upto = torch.ones_like(grad[0, 0, 0, 0]).tril_()  # (i, k): step k lies at or before step i
    log_decay = (grad @ upto).triu_(1).sum(4)  # of the pairs j < k <= i
    return _Within(grad_input, log_decay, grad_products @ part.C, grad_products.mT @ part.B)


def _squares(part: Part) -> Tensor:
    """B_j C_i where i may read j, else 0, (B, c, G, Q, Q)."""
    return (part.B @ part.C.mT) * part.within


def _written(part: Part) -> Tensor:
    """dt x, decayed to the end of its chunk, (B, c, G, Q, R P)."""
    return (part.x * _time_first(part.dt * part.leaving)).flatten(4)


def _time_first(scale: Tensor) -> Tensor:
    """(B, c, G, R, Q) as a factor (B, c, G, Q, R, 1)."""
    return scale.transpose(3, 4)[..., None]


def _head_first(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """x (B, c, G, Q, R, P) as (B, c, G, R, Q, P), contiguous, times scale (B, c, G, R, Q)."""
    x = x.transpose(3, 4)
    if scale is None:
        return x.contiguous()
    return torch.mul(x, scale[..., None], out=x.new_empty(x.shape))


def _columns(whole: Tensor, x: Tensor) -> Tensor:
    """(B, c, G, R) as a factor (B, c, G, 1, R P)."""
    return whole.repeat_interleave(x.shape[5], dim=3)[..., None, :]
