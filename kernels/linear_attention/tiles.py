"""Linear attention's chunks in C++ for 16-bit inputs, by AMX's tiles (tiles.cpp).

B batch, T time, H heads, K features, V value width, W = V plus the normaliser.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels import native
from kernels.linear_attention.features import MapName, num_features
from kernels.native import Tokens, fields
from kernels.precision import has_amx
from kernels.segments import restarts

SOURCE = Path(__file__).with_name("tiles.cpp")
_CHUNK, _DEPTH = 64, 32  # of tiles.cpp and tiles.h


class _Problem(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_int64, "batch", "length", "heads", "K", "V", "threads", "hedgehog"),
        *fields(ctypes.c_int64, "normalize"),
        *fields(ctypes.c_double, "scale", "eps"),
        *fields(Tokens, "q", "k", "v", "y"),
        *fields(ctypes.c_void_p, "documents", "padding", "initial", "last", "sums", "kept"),
        *fields(Tokens, "grad_y", "dq", "dk", "dv"),
        *fields(ctypes.c_void_p, "grad_last", "d_initial"),
    )


def serve(q: Tensor, k: Tensor, v: Tensor, feature_map: str | None) -> bool:
    """Whether this CPU has tiles for the products, and the map is none or one that is made here."""
    factors = {None: (q, k, v), "hedgehog": (v,)}.get(feature_map, ())
    return bool(factors) and all(x.dtype == torch.bfloat16 for x in factors) and has_amx()


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
    feature_map: MapName | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As chunked.forward, of q and k or of the features that the map makes of them."""
    (B, T, H, X), V = q.shape, v.shape[3]
    K = num_features(X, feature_map)
    call = _call(library, q, k, v, state, segments, scale, normalize, eps, feature_map)
    y = call.point_tokens("y", v.new_empty(B, T, H, V), v.dtype)
    last = call.room("last", (B, H, K, V + normalize), torch.float32)
    sums = call.room("sums", (B, T, H, int(normalize)), torch.float32)
    call.run("forward")
    if segments is not None:  # 0/eps, or 0/0, stands where there is padding
        padding = (segments < 0)[:, :, None, None]
        y.masked_fill_(padding, 0)
        sums.masked_fill_(padding, 1)
    return y, last, sums


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
    feature_map: MapName | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As chunked.backward; the states in front of the chunks are made again."""
    (B, T, H, X), V = q.shape, v.shape[3]
    K, normalize = num_features(X, feature_map), sums.shape[3] == 1
    call = _call(library, q, k, v, state, segments, scale, normalize, 0, feature_map)
    padded = -(-(V + 2 * normalize) // _DEPTH) * _DEPTH
    call.room("kept", (B * H, -(-T // _CHUNK), K, padded), torch.bfloat16)
    call.run("forward")
    grad_y = torch.zeros_like(y) if grad_y is None else grad_y
    if segments is not None:
        grad_y = grad_y.masked_fill((segments < 0)[:, :, None, None], 0)
    call.point_tokens("grad_y", grad_y, y.dtype)
    call.point_tokens("y", y, y.dtype)
    call.point("sums", sums, torch.float32)
    if grad_state is not None:
        call.point("grad_last", grad_state, torch.float32)
    low = torch.bfloat16
    of_rows = low if feature_map is None else torch.float32
    dq, dk, dv = (
        call.point_tokens(name, torch.empty(x.shape, dtype=dtype), dtype)
        for name, x, dtype in (("dq", q, of_rows), ("dk", k, of_rows), ("dv", v, low))
    )
    d_state = call.room("d_initial", (B, H, K, V + normalize), torch.float32)
    call.run("backward")
    return dq.to(q.dtype), dk.to(k.dtype), dv, d_state


def _call(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
    feature_map: MapName | None,
) -> native.Call:
    """What both passes read."""
    (B, T, H, X), V = q.shape, v.shape[3]
    K = num_features(X, feature_map)
    sizes = {"batch": B, "length": T, "heads": H, "K": K, "V": V}
    problem = _Problem(
        **sizes, hedgehog=feature_map == "hedgehog", normalize=normalize, scale=scale, eps=eps
    )
    call = native.Call(library, problem, work=B * T * H * (K + V) * (_CHUNK + K))
    of_rows = torch.bfloat16 if feature_map is None else torch.float32
    for name, given, dtype in (("q", q, of_rows), ("k", k, of_rows), ("v", v, torch.bfloat16)):
        call.point_tokens(name, given, dtype)
    if state is not None:
        call.point("initial", state, torch.float32)
    if segments is not None:
        call.point("documents", restarts(segments).cumsum(1), torch.int64)
        call.point("padding", segments < 0, torch.bool)
    return call
