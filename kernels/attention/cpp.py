"""Attention in C++ for 16-bit inputs, by AMX's tiles (tiles.cpp).

B batch, T queries, S keys (the queries are the last T of S positions), H heads, G key heads,
D head width.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels import native
from kernels.attention.spans import spans
from kernels.dispatch import BackendError
from kernels.native import Tokens, fields, library_on
from kernels.precision import has_amx

SOURCE = Path(__file__).with_name("tiles.cpp")


class _Problem(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_int64, "batch", "length", "keys", "heads", "groups", "width", "threads"),
        *fields(ctypes.c_double, "scale"),
        *fields(Tokens, "q", "k", "v", "y"),
        *fields(ctypes.c_void_p, "low", "high", "there", "log_sums"),
        *fields(Tokens, "grad_y", "dq", "dk", "dv"),
        *fields(ctypes.c_void_p, "grad_log_sums"),
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, D) and l (B, H, T) in float32, 0 where a query sees no key."""
    call = _call(q, k, v, segments, causal, window, scale)
    y = call.point_tokens("y", torch.empty(q.shape, dtype=q.dtype), q.dtype)
    B, T, H, _ = q.shape
    log_sums = call.room("log_sums", (B, H, T), torch.float32)
    call.run("forward")
    return y, log_sums


def backward(
    grad_y: Tensor,
    grad_log_sums: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    y: Tensor,
    log_sums: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    call = _call(q, k, v, segments, causal, window, scale)
    call.point_tokens("y", y, q.dtype)
    call.point_tokens("grad_y", grad_y, q.dtype)
    call.point("log_sums", log_sums, torch.float32)
    if grad_log_sums is not None:
        call.point("grad_log_sums", grad_log_sums, torch.float32)
    dq, dk, dv = (
        call.point_tokens(f"d{name}", torch.empty(x.shape, dtype=x.dtype), x.dtype)
        for name, x in (("q", q), ("k", k), ("v", v))
    )
    call.run("backward")
    return dq, dk, dv


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> native.Call:
    """What both passes read.

    Raises:
        BackendError: see kernels.native.library_on, or the tiles may not be used.
    """
    library = library_on("attention", SOURCE, q.device)
    if library.in_hardware() and not has_amx():  # which asks for the tiles' registers
        raise BackendError("backend='cpp' for attention: the system keeps AMX's tiles back")
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    sizes = {"batch": B, "length": T, "keys": S, "heads": H, "groups": G, "width": D}
    call = native.Call(library, _Problem(**sizes, scale=scale), work=2 * B * T * H * D * S)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        call.point_tokens(name, tensor, q.dtype)
    given = q.new_zeros(B, S, dtype=torch.int64) if segments is None else segments
    for name, places in zip(("low", "high"), spans(given, T, causal, window), strict=True):
        call.point(name, places, torch.int32)
    if segments is not None:
        call.point("there", segments >= 0, torch.bool)
    return call
