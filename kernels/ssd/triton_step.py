"""One step of SSD in one Triton kernel: the state is read once and written once.

B batch, H heads in G groups, P width per head, N state.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import block_of, ceil_div, launch
from kernels.tiles import load_rows, load_tile, store_rows, store_tile


@triton.jit
def one_step(
    x, dt, log_decay, B, C, D, z, S, y, S_after,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PER_HEAD: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """S <- exp(log_decay) S + dt x B^T, y = (S C + D x) silu(z), over (P tiles, B H)."""
    bh = tl.program_id(1).to(tl.int64)
    group = bh // H * G + bh % H // (H // G)
    at_p = tl.program_id(0) * BP + tl.arange(0, BP)
    inside = at_p < P
    x_1 = load_rows(x + bh * P, at_p, inside)
    driven = x_1 * tl.load(dt + bh).to(tl.float32)
    left = tl.exp(tl.load(log_decay + bh).to(tl.float32))
    out = tl.zeros((BP,), tl.float32)
    for start in range(0, N, BN):
        at_n = start + tl.arange(0, BN)
        state = driven[:, None] * load_rows(B + group * N, at_n, at_n < N)[None]
        if S is not None:
            state += left * load_tile(S + bh * P * N, at_p, inside, at_n, N)
        store_tile(S_after + bh * P * N, state, at_p, inside, at_n, N)
        out += tl.sum(state * load_rows(C + group * N, at_n, at_n < N)[None], 1)
    if D is not None:
        place = at_p * 0 if PER_HEAD else at_p
        out += x_1 * load_rows(D + bh % H * (1 if PER_HEAD else P), place, inside)
    if z is not None:
        gate = load_rows(z + bh * P, at_p, inside)
        out *= gate * tl.sigmoid(gate)
    store_rows(y + bh * P, out, at_p, inside)


def step(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As step.step: y (B, 1, H, P) and the state (B, H, P, N), of arguments with L = 1."""
    (batch, _, H, P), (G, N) = x.shape, B.shape[2:]
    y, BP = x.new_empty(x.shape), block_of(P, 64)
    after = x.new_empty(batch, H, P, N, dtype=torch.float32)
    given = (x, dt, log_decay, B, C, D, z, initial_states)
    launch(
        one_step, (ceil_div(P, BP), batch * H),
        *(None if t is None else t.contiguous() for t in given), y, after,
        H=H, G=G, P=P, N=N, PER_HEAD=D is not None and D.ndim == 1, BP=BP, BN=block_of(N, 64),
    )  # fmt: skip
    return y, after
