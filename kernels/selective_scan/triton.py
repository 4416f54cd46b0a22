"""The selective scan on a GPU: one Triton kernel forward and one backward.

A program walks over the steps of a tile of channels, S at a time, with the states (channels, N) in
registers; inside, one associative scan over time for each of the N. The forward pass keeps the
state in front of every S steps. The backward pass walks from the end: it scans a tile's states
again, from the kept one, and then the adjoint of the state backwards.

B batch, D channels, L time, N state, G groups, S steps of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import block_of, ceil_div, launch
from kernels.selective_scan.chunked import Gradients
from kernels.selective_scan.tiles import Scan

STEPS = 64
_CHANNELS = 16
RESTART, PADDING = 1, 2  # what a step's flag says


@triton.jit
def then(a, b, a_next, b_next):
    """Two steps h -> a h + b in one."""
    return a * a_next, a_next * b + b_next


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to the last bits, x above 20."""
    y = tl.exp(tl.minimum(x, 20.0))
    above = 1 + y
    # What rounding took from 1 + y, the quotient gives back.
    log1p = tl.where(above == 1, y, tl.log(above) * (y / (above - (1 - (above == 1)))))
    return tl.where(x > 20, x, log1p)


@triton.jit
def load_steps(delta, bias, flags, row, flag_row, time, real, L, SOFTPLUS: tl.constexpr):
    """delta with its bias, the step, 0 at padding, and where the state restarts, (channels, S)."""
    mask = real & (time >= 0) & (time < L)
    x = tl.load(delta + row + time, mask, 0).to(tl.float32)
    if bias is not None:
        x += bias
    step = tl.where(mask, softplus(x) if SOFTPLUS else x, 0)
    restart = time < 0
    if flags is not None:
        flag = tl.load(flags + flag_row + time, (time >= 0) & (time < L), 0)
        step = tl.where(flag == 2, 0, step)
        restart = flag == 1
    return x, step, restart


@triton.jit
def column(x, n, N: tl.constexpr):
    """x[:, n] of (., N), as (., 1)."""
    return tl.sum(tl.where(tl.arange(0, N)[None] == n, x, 0), 1)[:, None]


@triton.jit
def walk(
    u, delta, A, B, C, D, z, bias, first, flags, y, last, states, L,
    CHANNELS: tl.constexpr, G: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr,
    S: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y (B, D, L), the last state (B, D, N) and the kept ones, over (D tiles, G, B)."""
    batch, group = tl.program_id(2).to(tl.int64), tl.program_id(1)
    WIDTH: tl.constexpr = CHANNELS // G
    inside = tl.program_id(0) * BD + tl.arange(0, BD)
    channel, real = (group * WIDTH + inside)[:, None], (inside < WIDTH)[:, None]
    numbers = tl.arange(0, BN)[None]
    state = (batch * CHANNELS + channel) * N + numbers
    there = real & (numbers < N)
    rates = tl.load(A + channel * N + numbers, there, 0).to(tl.float32)
    h = tl.zeros((BD, BN), tl.float32)
    if first is not None:
        h += tl.load(first + state, there, 0).to(tl.float32)
    b_delta = None if bias is None else tl.load(bias + channel, real, 0).to(tl.float32)
    row = (batch * CHANNELS + channel) * L
    shared = (batch * G + group) * N * L
    tiles = tl.cdiv(L, S)
    for i in range(tiles):
        if states is not None:
            kept = ((i * tl.num_programs(2) + batch) * N + numbers) * CHANNELS + channel
            tl.store(states + kept, h, there)
        time = (i * S + tl.arange(0, S))[None]
        mask = real & (time < L)
        u_t = tl.load(u + row + time, mask, 0).to(tl.float32)
        _, step, restart = load_steps(
            delta, b_delta, flags, row, batch * L, time, real, L, SOFTPLUS
        )
        out = tl.zeros((BD, S), tl.float32)
        for n in range(N):
            place = shared + n * L + time
            B_n = tl.load(B + place, time < L, 0).to(tl.float32)
            C_n = tl.load(C + place, time < L, 0).to(tl.float32)
            a = tl.where(restart, 0.0, tl.exp(step * column(rates, n, BN)))
            a, b = tl.associative_scan((a, step * u_t * B_n), 1, then)
            h_n = a * column(h, n, BN) + b
            out += C_n * h_n
            end = tl.sum(tl.where(tl.arange(0, S)[None] == S - 1, h_n, 0), 1)[:, None]
            h = tl.where(numbers == n, end, h)
        if D is not None:
            out += tl.load(D + channel, real, 0).to(tl.float32) * u_t
        if z is not None:
            gate = tl.load(z + row + time, mask, 0).to(tl.float32)
            out *= gate * tl.sigmoid(gate)
        tl.store(y + row + time, out.to(y.dtype.element_ty), mask)
    tl.store(last + state, h, there)


@triton.jit
def walk_back(
    u, delta, A, B, C, D, z, bias, flags, states, grad_y, grad_last,
    du, d_delta, dA, dB, dC, dD, dz, d_bias, d_first, L,
    CHANNELS: tl.constexpr, G: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr,
    S: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients, over (D tiles, G, B); those of A, B, C, D and the bias in parts, per program.

    With lam the adjoint of the state, lam_t = C_t g_t + a_{t+1} lam_{t+1}, and g that of C h + D u:
    the exponent step A has the gradient lam a h_{t-1}.
    """
    batch, group = tl.program_id(2).to(tl.int64), tl.program_id(1)
    batches = tl.num_programs(2)
    WIDTH: tl.constexpr = CHANNELS // G
    inside = tl.program_id(0) * BD + tl.arange(0, BD)
    channel, real = (group * WIDTH + inside)[:, None], (inside < WIDTH)[:, None]
    numbers, steps = tl.arange(0, BN)[None], tl.arange(0, S)[None]
    state = (batch * CHANNELS + channel) * N + numbers
    there = real & (numbers < N)
    rates = tl.load(A + channel * N + numbers, there, 0).to(tl.float32)
    adjoint = tl.load(grad_last + state, there, 0).to(tl.float32)
    b_delta = None if bias is None else tl.load(bias + channel, real, 0).to(tl.float32)
    skip = None if D is None else tl.load(D + channel, real, 0).to(tl.float32)
    row = (batch * CHANNELS + channel) * L
    shared = (batch * G + group) * N * L
    part = ((tl.program_id(0) * batches + batch) * G + group) * N * L
    rates_grad = tl.zeros((BD, BN), tl.float32)
    skip_grad, bias_grad = tl.zeros((BD, 1), tl.float32), tl.zeros((BD, 1), tl.float32)
    tiles = tl.cdiv(L, S)
    for back in range(tiles):
        i = tiles - 1 - back
        kept = ((i * batches + batch) * N + numbers) * CHANNELS + channel
        before = tl.load(states + kept, there, 0)
        time = i * S + steps
        mask = real & (time < L)
        u_t = tl.load(u + row + time, mask, 0).to(tl.float32)
        x, step, restart = load_steps(
            delta, b_delta, flags, row, batch * L, time, real, L, SOFTPLUS
        )
        # The step before each, for the states before; and the one after, for the adjoints.
        earlier = tl.where(steps > 0, time - 1, -1)
        u_e = tl.load(u + row + earlier, real & (earlier >= 0) & (earlier < L), 0).to(tl.float32)
        _, step_e, restart_e = load_steps(
            delta, b_delta, flags, row, batch * L, earlier, real, L, SOFTPLUS
        )
        restart_e = restart_e & (steps > 0)
        _, step_l, restart_l = load_steps(
            delta, b_delta, flags, row, batch * L, time + 1, real, L, SOFTPLUS
        )
        g = tl.load(grad_y + row + time, mask, 0).to(tl.float32)
        if z is not None:
            gate = tl.load(z + row + time, mask, 0).to(tl.float32)
            share = tl.sigmoid(gate)
            grad_gate = g * share * (1 + gate * (1 - share))
            g *= gate * share
        out = tl.zeros((BD, S), tl.float32)
        into = tl.zeros((BD, S), tl.float32)  # the gradient of step * u
        step_grad = tl.zeros((BD, S), tl.float32)
        for n in range(N):
            place = shared + n * L + time
            rate = column(rates, n, BN)
            B_e = tl.load(B + place - time + earlier, (earlier >= 0) & (earlier < L), 0)
            B_n = tl.load(B + place, time < L, 0).to(tl.float32)
            C_n = tl.load(C + place, time < L, 0).to(tl.float32)
            a_e = tl.where(restart_e, 0.0, tl.exp(step_e * rate))
            a_e, b_e = tl.associative_scan((a_e, step_e * u_e * B_e.to(tl.float32)), 1, then)
            past = a_e * column(before, n, BN) + b_e
            a = tl.where(restart, 0.0, tl.exp(step * rate))
            h = a * past + step * u_t * B_n
            out += C_n * h
            a_l = tl.where(restart_l, 0.0, tl.exp(step_l * rate))
            a_l, lam = tl.associative_scan((a_l, C_n * g), 1, then, reverse=True)
            lam += a_l * column(adjoint, n, BN)
            start = tl.sum(tl.where(steps == 0, lam, 0), 1)[:, None]
            adjoint = tl.where(numbers == n, start, adjoint)
            tl.store(dC + part + n * L + time, tl.sum(tl.where(mask, g * h, 0), 0)[None], time < L)
            into_B = tl.where(mask, lam * step * u_t, 0)
            tl.store(dB + part + n * L + time, tl.sum(into_B, 0)[None], time < L)
            into += B_n * lam
            exponent = lam * a * past
            step_grad += exponent * rate
            total = tl.sum(exponent * step, 1)[:, None]
            rates_grad += tl.where(numbers == n, total, 0)
        grad_u = step * into
        step_grad += u_t * into
        if D is not None:
            grad_u += g * skip
            out += skip * u_t
            skip_grad += tl.sum(tl.where(mask, g * u_t, 0), 1)[:, None]
        if z is not None:
            tl.store(dz + row + time, (grad_gate * out).to(dz.dtype.element_ty), mask)
        if flags is not None:
            flag = tl.load(flags + batch * L + time, time < L, 0)
            step_grad = tl.where(flag == 2, 0, step_grad)
        if SOFTPLUS:
            step_grad *= tl.where(x > 20, 1.0, tl.sigmoid(x))
        bias_grad += tl.sum(tl.where(mask, step_grad, 0), 1)[:, None]
        tl.store(du + row + time, grad_u.to(du.dtype.element_ty), mask)
        tl.store(d_delta + row + time, step_grad.to(d_delta.dtype.element_ty), mask)
    # Through the first step back to the given state.
    _, step, restart = load_steps(
        delta, b_delta, flags, row, batch * L, tl.zeros((1, 1), tl.int32), real, L, SOFTPLUS
    )
    adjoint *= tl.where(restart, 0.0, tl.exp(step * rates))
    tl.store(d_first + state, adjoint, there)
    tl.store(dA + state, rates_grad, there)
    tl.store(dD + batch * CHANNELS + channel, skip_grad, real)
    tl.store(d_bias + batch * CHANNELS + channel, bias_grad, real)


def forward(scan: Scan, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As chunked.forward, with the states in front of every STEPS steps."""
    call = _Call(scan)
    B, D, L, _, N = call.sizes
    y = torch.empty_like(call.u)
    last = y.new_empty(B, D, N, dtype=torch.float32)
    states = last.new_empty(ceil_div(L, STEPS) if keep_states else 0, B, N, D)
    first = None if scan.initial_state is None else scan.initial_state.contiguous()
    launch(
        walk, call.grid, *call.inputs, first, call.flags, y, last,
        states if keep_states else None, L, **call.constants,
    )  # fmt: skip
    return _as(scan.u, y), last, states if keep_states else last.new_empty(0)


def backward(scan: Scan, states: Tensor, grad_y: Tensor, grad_last: Tensor) -> Gradients:
    """As chunked.backward."""
    call = _Call(scan)
    B, D, L, G, N = call.sizes
    blocks = call.grid[0]
    parts = states.new_empty(2, blocks, B, G, N, L)
    rows = states.new_empty(2, B, D)
    dA, first = states.new_empty(B, D, N), states.new_empty(B, D, N)
    du, d_delta = torch.empty_like(call.u), torch.empty_like(call.delta)
    dz = None if call.z is None else torch.empty_like(call.z)
    launch(
        walk_back, call.grid, *call.inputs, call.flags, states, grad_y.contiguous(),
        grad_last.contiguous(), du, d_delta, dA, parts[0], parts[1], rows[0], dz, rows[1], first,
        L, **call.constants,
    )  # fmt: skip
    return Gradients(
        u=_as(scan.u, du),
        delta=_as(scan.delta, d_delta),
        A=dA.sum(0),
        B=parts[0].sum(0),
        C=parts[1].sum(0),
        D=rows[0].sum(0),
        z=du.new_empty(0) if dz is None or scan.z is None else _as(scan.z, dz),
        delta_bias=rows[1].sum(0),
        initial_state=first,
    )


def _as(given: Tensor, made: Tensor) -> Tensor:
    """`made`, laid out in memory as `given` is: the operator promises that of all its forms."""
    laid_out = torch.empty_like(given)
    return made if laid_out.is_contiguous() else laid_out.copy_(made)


class _Call:
    """What both kernels are given: contiguous inputs, flags of the steps, sizes."""

    def __init__(self, scan: Scan) -> None:
        self.u, self.delta = scan.u.contiguous(), scan.delta.contiguous()
        self.z = None if scan.z is None else scan.z.contiguous()
        (B, D, L), (_, G, N, _) = scan.u.shape, scan.B.shape
        self.sizes = B, D, L, G, N
        self.flags = None
        if scan.segments is not None and scan.restarts is not None:
            flags = RESTART * scan.restarts.to(torch.int8)
            self.flags = flags.masked_fill_(scan.segments < 0, PADDING).contiguous()
        given = (scan.A, scan.B, scan.C, scan.D)
        A, B_in, C_in, skip = (None if x is None else x.contiguous() for x in given)
        bias = None if scan.delta_bias is None else scan.delta_bias.contiguous()
        self.inputs = (self.u, self.delta, A, B_in, C_in, skip, self.z, bias)
        self.grid = (ceil_div(D // G, _CHANNELS), G, B)
        self.constants = {
            "CHANNELS": D, "G": G, "N": N, "SOFTPLUS": scan.delta_softplus,
            "S": block_of(L, STEPS, 1), "BD": _CHANNELS, "BN": block_of(N, 256, 1),
        }  # fmt: skip
