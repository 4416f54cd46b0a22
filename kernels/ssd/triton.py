"""SSD in chunks on a GPU: Triton kernels, forward and backward.

With S (P, N) the state in front of a chunk, a_i the sum of the log-decays up to step i and M the
square of exp(a_i - a_j) for j <= i, a head's chunk is

    Y = (M * C B^T) (dt X) + exp(a) C S^T,    S <- exp(a_Q) S + (exp(a_Q - a) dt X)^T B

One kernel walks over the chunks with a tile of the state in registers and writes the state in front
of each; the others take a chunk each, in parallel. The backward pass makes the states' gradients
with the same walk, from the end. Chunks have Q = 64 steps whatever the call's chunk_size.

B batch, L time, H heads in G groups, P width per head, N state, Q chunk length, n chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import block_of, ceil_div, launch
from kernels.ssd.chunked import Gradients
from kernels.ssd.spans import Arguments
from kernels.tiles import dot, dot_dtype, load_rows, load_tile, store_rows, store_tile

CHUNK = 64


@triton.jit
def decays(log_decay, documents, batch, head, c, L, H: tl.constexpr, Q: tl.constexpr):
    """Of chunk c: running sums of the log-decays, in float64, and what is left of a state.

    Of the state in front at each step, of each step behind the chunk, and of the state in front
    there; nothing where another document begins between.
    """
    at = c * Q + tl.arange(0, Q)
    steps = tl.load(log_decay + batch * L * H + head + at * H, mask=at < L, other=0)
    sums = tl.cumsum(steps.to(tl.float64), 0)
    whole = tl.sum(tl.where(tl.arange(0, Q) == Q - 1, sums, 0), 0)
    arriving = tl.exp(sums.to(tl.float32))
    leaving = tl.exp((whole - sums).to(tl.float32))
    across = tl.exp(whole.to(tl.float32))
    if documents is not None:
        number = tl.load(documents + batch * L + at, mask=at < L, other=-1)
        began = tl.load(documents + batch * L + tl.maximum(c * Q - 1, 0))
        ended = tl.load(documents + batch * L + tl.minimum(c * Q + Q, L) - 1)
        arriving = tl.where(number == began, arriving, 0)
        leaving = tl.where(number == ended, leaving, 0)
        across = tl.where(began == ended, across, 0)
    return sums, arriving, leaving, across


@triton.jit
def between(sums, documents, batch, c, L, Q: tl.constexpr):
    """M (Q, Q), what is left of step j (column) at step i (row).

    Two float32 parts of the sums have exact differences: in one, the small log-decays behind a
    large one would be lost.
    """
    steps = tl.arange(0, Q)
    high = sums.to(tl.float32)
    low = (sums - high).to(tl.float32)
    exponent = (high[:, None] - high[None]) + (low[:, None] - low[None])
    mask = steps[:, None] >= steps[None]
    if documents is not None:
        at = c * Q + steps
        number = tl.load(documents + batch * L + at, mask=at < L, other=-1)
        mask = mask & (number[:, None] == number[None])
    return tl.where(mask, tl.exp(tl.minimum(exponent, 0.0)), 0)


@triton.jit
def walk(
    a, b, dt, log_decay, documents, first, states, last, L,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The state in front of every chunk, of a (B, L, G, N) and b (B, L, H, P).

    With REVERSE from the last chunk to the first: then it is the gradient of the state behind each,
    a is C and b the gradient of the output. Over (P tiles, N tiles, B H).
    """
    bh = tl.program_id(2).to(tl.int64)
    batch, head, n = bh // H, bh % H, tl.cdiv(L, Q)
    at_p = tl.program_id(0) * BP + tl.arange(0, BP)
    at_n = tl.program_id(1) * BN + tl.arange(0, BN)
    steps = tl.arange(0, Q)
    S = tl.zeros((BP, BN), tl.float32)
    if first is not None:
        S += load_tile(first + bh * P * N, at_p, at_p < P, at_n, N)
    for i in range(n):
        c = n - 1 - i if REVERSE else i
        store_tile(states + (bh * n + c) * P * N, S, at_p, at_p < P, at_n, N)
        row, there = batch * L + c * Q, c * Q + steps < L
        _, arriving, leaving, across = decays(log_decay, documents, batch, head, c, L, H, Q)
        weight = arriving if REVERSE else leaving
        if dt is not None:
            weight *= load_rows(dt + row * H + head, steps * H, there)
        a_c = load_tile(a + (row * G + head // (H // G)) * N, steps * G, there, at_n, N)
        b_c = load_tile(b + (row * H + head) * P, steps * H, there, at_p, P) * weight[:, None]
        S = S * across + dot(tl.trans(b_c), a_c, DOT)
    store_tile(last + bh * P * N, S, at_p, at_p < P, at_n, N)


@triton.jit
def read(
    x, dt, log_decay, B, C, D, z, documents, states, grad_y, y, grad_z, L,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """y of one chunk, over (n, P tiles, B H).

    With `grad_y`, the gradient of z, and in the place of y that of the output before the gate.
    """
    c, bh = tl.program_id(0), tl.program_id(2).to(tl.int64)
    batch, head, n = bh // H, bh % H, tl.cdiv(L, Q)
    steps, at_p = tl.arange(0, Q), tl.program_id(1) * BP + tl.arange(0, BP)
    row, there = batch * L + c * Q, c * Q + steps < L
    of_head, of_group = (row * H + head) * P, (row * G + head // (H // G)) * N
    products = tl.zeros((Q, Q), tl.float32)
    out = tl.zeros((Q, BP), tl.float32)
    for first_n in range(0, N, BN):
        at_n = first_n + tl.arange(0, BN)
        C_c = load_tile(C + of_group, steps * G, there, at_n, N)
        B_c = load_tile(B + of_group, steps * G, there, at_n, N)
        S = load_tile(states + (bh * n + c) * P * N, at_p, at_p < P, at_n, N)
        products += dot(C_c, tl.trans(B_c), DOT)
        out += dot(C_c, tl.trans(S), DOT)
    sums, arriving, _, _ = decays(log_decay, documents, batch, head, c, L, H, Q)
    products *= between(sums, documents, batch, c, L, Q)
    x_c = load_tile(x + of_head, steps * H, there, at_p, P)
    dt_c = load_rows(dt + row * H + head, steps * H, there)
    out = out * arriving[:, None] + dot(products, x_c * dt_c[:, None], DOT)
    if D is not None:
        out += load_rows(D + head * P, at_p, at_p < P)[None] * x_c
    if z is not None:
        gate = load_tile(z + of_head, steps * H, there, at_p, P)
        share = tl.sigmoid(gate)
        if grad_y is not None:
            g = load_tile(grad_y + of_head, steps * H, there, at_p, P)
            slope = share * (1 + gate * (1 - share))
            store_tile(grad_z + of_head, g * out * slope, steps * H, there, at_p, P)
            out = g
        out *= gate * share
    store_tile(y + of_head, out, steps * H, there, at_p, P)


@triton.jit
def differentiate_heads(
    x, dt, log_decay, B, C, D, documents, states, adjoints, grad, dx, d_dt, d_log, dD, L,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of a head's x, dt, log-decays and D (by chunk), over (n, B H).

    The gradient of a log-decay is the sum of all terms that cross its step.
    """
    c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, n = bh // H, bh % H, tl.cdiv(L, Q)
    steps = tl.arange(0, Q)
    row, there = batch * L + c * Q, c * Q + steps < L
    of_head, of_group = (row * H + head) * P, (row * G + head // (H // G)) * N
    here = (bh * n + c) * P * N
    sums, arriving, leaving, across = decays(log_decay, documents, batch, head, c, L, H, Q)
    dt_c = load_rows(dt + row * H + head, steps * H, there)
    products = tl.zeros((Q, Q), tl.float32)
    for first_n in range(0, N, BN):
        at_n = first_n + tl.arange(0, BN)
        C_c = load_tile(C + of_group, steps * G, there, at_n, N)
        B_c = load_tile(B + of_group, steps * G, there, at_n, N)
        products += dot(C_c, tl.trans(B_c), DOT)
    products *= between(sums, documents, batch, c, L, Q)
    pairs = tl.zeros((Q, Q), tl.float32)
    step_grad = tl.zeros((Q,), tl.float32)
    arrived = tl.zeros((Q,), tl.float32)
    left = tl.zeros((Q,), tl.float32)
    crossed = tl.zeros((BP,), tl.float32)
    for first_p in range(0, P, BP):
        at_p = first_p + tl.arange(0, BP)
        g = load_tile(grad + of_head, steps * H, there, at_p, P)
        x_c = load_tile(x + of_head, steps * H, there, at_p, P)
        written = tl.zeros((Q, BP), tl.float32)
        carried = tl.zeros((Q, BP), tl.float32)
        for first_n in range(0, N, BN):
            at_n = first_n + tl.arange(0, BN)
            S = load_tile(states + here, at_p, at_p < P, at_n, N)
            R = load_tile(adjoints + here, at_p, at_p < P, at_n, N)
            C_c = load_tile(C + of_group, steps * G, there, at_n, N)
            B_c = load_tile(B + of_group, steps * G, there, at_n, N)
            carried += dot(C_c, tl.trans(S), DOT)
            written += dot(B_c, tl.trans(R), DOT)
            crossed += tl.sum(S * R, 1)
        arrived += tl.sum(carried * g, 1)
        left += tl.sum(written * x_c, 1)
        pairs += dot(g, tl.trans(x_c), DOT)
        into = dot(tl.trans(products), g, DOT) + written * leaving[:, None]
        step_grad += tl.sum(into * x_c, 1)
        grad_x = into * dt_c[:, None]
        if D is not None:
            grad_x += load_rows(D + head * P, at_p, at_p < P)[None] * g
            store_rows(dD + (bh * n + c) * P, tl.sum(g * x_c, 0), at_p, at_p < P)
        store_tile(dx + of_head, grad_x, steps * H, there, at_p, P)
    store_rows(d_dt + row * H + head, step_grad, steps * H, there)
    upto = tl.cumsum(pairs * products * dt_c[None], 1)  # over j, up to each step
    later = tl.sum(tl.where(steps[:, None] > steps[None], upto, 0), 0)
    later += tl.cumsum(left * leaving * dt_c, 0)  # all of it crosses the next step
    moved = tl.where(steps[:, None] + 1 == steps[None], later[:, None], 0)
    log_grad = tl.sum(moved, 0) + tl.cumsum(arrived * arriving, 0, reverse=True)
    log_grad += tl.sum(crossed, 0) * across
    store_rows(d_log + row * H + head, log_grad, steps * H, there)


@triton.jit
def differentiate_groups(
    x, dt, log_decay, B, C, documents, states, adjoints, grad, dB, dC, L,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C, summed over a group's heads, over (n, N tiles, B G)."""
    c, bg = tl.program_id(0), tl.program_id(2).to(tl.int64)
    batch, group, n = bg // G, bg % G, tl.cdiv(L, Q)
    steps, at_n = tl.arange(0, Q), tl.program_id(1) * BN + tl.arange(0, BN)
    row, there = batch * L + c * Q, c * Q + steps < L
    of_group = (row * G + group) * N
    squares = tl.zeros((Q, Q), tl.float32)
    dB_c = tl.zeros((Q, BN), tl.float32)
    dC_c = tl.zeros((Q, BN), tl.float32)
    for r in range(H // G):
        head = group * (H // G) + r
        here = ((batch * H + head) * n + c) * P * N
        sums, arriving, leaving, _ = decays(log_decay, documents, batch, head, c, L, H, Q)
        dt_c = load_rows(dt + row * H + head, steps * H, there)
        pairs = tl.zeros((Q, Q), tl.float32)
        for first_p in range(0, P, BP):
            at_p = first_p + tl.arange(0, BP)
            g = load_tile(grad + (row * H + head) * P, steps * H, there, at_p, P)
            x_c = load_tile(x + (row * H + head) * P, steps * H, there, at_p, P) * dt_c[:, None]
            S = load_tile(states + here, at_p, at_p < P, at_n, N)
            R = load_tile(adjoints + here, at_p, at_p < P, at_n, N)
            pairs += dot(g, tl.trans(x_c), DOT)
            dC_c += dot(g * arriving[:, None], S, DOT)
            dB_c += dot(x_c * leaving[:, None], R, DOT)
        squares += pairs * between(sums, documents, batch, c, L, Q)
    C_c = load_tile(C + of_group, steps * G, there, at_n, N)
    B_c = load_tile(B + of_group, steps * G, there, at_n, N)
    dC_c += dot(squares, B_c, DOT)
    dB_c += dot(tl.trans(squares), C_c, DOT)
    store_tile(dB + of_group, dB_c, steps * G, there, at_n, N)
    store_tile(dC + of_group, dC_c, steps * G, there, at_n, N)


def forward(args: Arguments, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As chunked.forward; the kept states are (B, H, n, P, N), in the dtype of the products."""
    call = _Call(args)
    states, last = call.walk(call.B, call.x, call.dt, args.initial_states, reverse=False)
    y = torch.empty_like(call.x)
    call.read(states, None, y, None)
    return y, last, states if keep_states else last.new_empty(0)


def backward(args: Arguments, kept: Tensor, grad_y: Tensor, grad_last: Tensor) -> Gradients:
    """As chunked.backward."""
    call = _Call(args)
    grad, grad_z = grad_y.contiguous(), call.x.new_empty(0)
    if call.z is not None:
        given, grad, grad_z = grad, torch.empty_like(call.x), torch.empty_like(call.z)
        call.read(kept, given, grad, grad_z)
    adjoints, first = call.walk(call.C, grad, None, grad_last, reverse=True)
    batch, _, H, P, G, N = call.sizes
    dx, d_dt, d_log, dB, dC = map(
        torch.empty_like, (call.x, call.dt, call.log_decay, call.B, call.C)
    )
    dD = first.new_zeros(batch, H, call.n, P)
    narrow = {**call.constants, "BP": min(call.BP, 32), "BN": min(call.BN, 32)}  # wider ones spill
    launch(
        differentiate_heads, (call.n, batch * H),
        call.x, call.dt, call.log_decay, call.B, call.C, call.D, call.documents, kept, adjoints,
        grad, dx, d_dt, d_log, dD, args.x.shape[1], warps=8, stages=1, **{**narrow, "BN": 16},
    )  # fmt: skip
    launch(
        differentiate_groups, (call.n, ceil_div(N, narrow["BN"]), batch * G),
        call.x, call.dt, call.log_decay, call.B, call.C, call.documents, kept, adjoints,
        grad, dB, dC, args.x.shape[1], warps=8, **narrow,
    )  # fmt: skip
    return Gradients(dx, d_dt, d_log, dB, dC, dD.sum((0, 2)), grad_z, first)


def kept_states(x: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Room for the states in front of the chunks."""
    (batch, length, H, P), N = x.shape, B.shape[3]
    dtype = torch.float32 if dot_dtype(x, B, C) == tl.float32 else x.dtype
    return x.new_empty(batch, H, ceil_div(length, CHUNK), P, N, dtype=dtype)


class _Call:
    """What one call's kernels share: contiguous inputs and sizes of tiles."""

    def __init__(self, args: Arguments) -> None:
        self.x, self.B, self.C = (t.contiguous() for t in (args.x, args.B, args.C))
        self.dt, self.log_decay = args.dt.contiguous(), args.log_decay.contiguous()
        self.z = None if args.z is None else args.z.contiguous()
        self.documents = None if args.documents is None else args.documents.int().contiguous()
        (batch, length, H, P), (G, N) = args.x.shape, args.B.shape[2:]
        self.D = None if args.D is None else args.D.view(H, -1).expand(H, P).contiguous()
        self.sizes = batch, length, H, P, G, N
        self.n = ceil_div(length, CHUNK)
        self.BP, self.BN = block_of(P, 64), block_of(N, 64)
        self.constants = {
            "H": H, "G": G, "P": P, "N": N, "Q": CHUNK, "BP": self.BP, "BN": self.BN,
            "DOT": dot_dtype(args.x, args.B, args.C),
        }  # fmt: skip

    def walk(
        self, a: Tensor, b: Tensor, dt: Tensor | None, first: Tensor | None, *, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """States (B, H, n, P, N) in front of the chunks, and the last (B, H, P, N)."""
        batch, length, H, P, _, N = self.sizes
        states = kept_states(self.x, self.B, self.C)
        last = states.new_empty(batch, H, P, N, dtype=torch.float32)
        first = None if first is None else first.contiguous()
        launch(
            walk, (ceil_div(P, self.BP), ceil_div(N, self.BN), batch * H),
            a, b, dt, self.log_decay, self.documents, first, states, last, length,
            REVERSE=reverse, **self.constants,
        )  # fmt: skip
        return states, last

    def read(self, states: Tensor, grad_y: Tensor | None, y: Tensor, grad_z: Tensor | None) -> None:
        """Launch `read`."""
        batch, length, H, P, _, _ = self.sizes
        launch(
            read, (self.n, ceil_div(P, self.BP), batch * H),
            self.x, self.dt, self.log_decay, self.B, self.C, self.D, self.z, self.documents,
            states, grad_y, y, grad_z, length, **self.constants,
        )  # fmt: skip
