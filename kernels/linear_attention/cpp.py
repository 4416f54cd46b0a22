"""Linear attention in C++: chunks, which are SSD's without decay, and steps (step.cpp).

Decoding is call overhead, and a step is one call. B batch, T time, H heads, K features, V value
width, W = V plus the normaliser.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.linear_attention.flops import CHUNK
from kernels.native import stored_dtype
from kernels.precision import accumulation_dtype, outside_autocast
from kernels.segments import restarts
from kernels.ssd import cpp as ssd

CHUNKS = ssd.SOURCE
SOURCE = Path(__file__).with_name("step.cpp")


@outside_autocast
def forward(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As chunked.forward."""
    (B, T, H, K), V = q.shape, v.shape[3]
    call = _chunks(library, q, k, v, state, segments, scale, normalize, eps)
    y = call.new_tokens("y", B, T, H, V)
    last = call.new_sums("last", B, H, K, V + normalize)
    sums = call.new_sums("sums", B, T, H, int(normalize))
    call.run("forward")
    if segments is not None:  # 0/eps, or 0/0, stands where there is padding
        padding = (segments < 0)[:, :, None, None]
        y.masked_fill_(padding, 0)
        sums.masked_fill_(padding, 1)
    return y.to(v.dtype), last, sums


@outside_autocast
def backward(
    library: ctypes.CDLL,
    grad_y: Tensor | None,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    y: Tensor,
    sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As chunked.backward; the states in front of the chunks are made again."""
    (B, T, H, K), V = q.shape, v.shape[3]
    normalize = sums.shape[3] == 1
    call = _chunks(library, q, k, v, state, segments, scale, normalize, 0)
    kept = call.new_sums("kept", B, -(-T // call.problem.chunk), H, K, V + normalize)
    call.run("forward")
    grad_y = torch.zeros_like(y) if grad_y is None else grad_y
    if segments is not None:
        grad_y = grad_y.masked_fill((segments < 0)[:, :, None, None], 0)
    call.tokens("grad_y", grad_y)
    call.tokens("y", y)
    call.sums("sums", sums)
    first = kept.new_zeros(B, H, K, V + normalize)
    call.sums("grad_last", first if grad_state is None else grad_state)
    dv = call.new_tokens("dx", B, T, H, V)
    dk = call.new_sums("parts_B", B, T, H, K)
    dq = call.new_sums("parts_C", B, T, H, K)
    d_state = call.new_sums("d_initial", B, H, K, V + normalize)
    call.run("backward")
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_state


def _chunks(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
) -> ssd.Call:
    """What both passes read."""
    (B, T, H, K), V = q.shape, v.shape[3]
    exact = accumulation_dtype(q, k, v)
    call = ssd.Call(
        library,
        stored_dtype(exact, q, k, v),
        exact,
        batch=B,
        length=T,
        heads=H,
        groups=H,
        width=V,
        states=K,
        chunk=min(CHUNK, T),
        block=1,
        normalize=normalize,
        state_down=1,
        state_along=V + normalize,
        scale=scale,
        eps=eps,
    )
    for name, given in (("x", v), ("B", k), ("C", q)):
        call.tokens(name, given)
    if state is not None:
        call.sums("initial", state)
    if segments is not None:
        call.sums("dt", (segments >= 0)[..., None].expand(B, T, H))
        call.point("documents", restarts(segments).cumsum(1), torch.int64)
    return call
