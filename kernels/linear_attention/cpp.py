"""Linear attention in C++: chunks, which are SSD's without decay, and steps (step.cpp).

Decoding is call overhead, and a step is one call. B batch, T time, H heads, K features, V value
width, W = V plus the normaliser.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.linear_attention.flops import CHUNK
from kernels.native import DTYPES
from kernels.precision import accumulation_dtype, has_amx, outside_autocast
from kernels.segments import restarts
from kernels.ssd import cpp as ssd

CHUNKS = ssd.SOURCE
SOURCE = Path(__file__).with_name("step.cpp")
ONE_THREAD = 1 << 18  # numbers in the state from which on a second thread is worth its start

_SIZES = ("batch", "length", "heads", "K", "V", "dtype", "normalize", "threads")
_POINTERS = ("q", "k", "v", "S", "z", "padding", "y", "S_after", "z_after")


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_double) for name in ("scale", "eps")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


def steps(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    padding: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As step.steps."""
    (B, T, H, K), V = q.shape, v.shape[3]
    exact = accumulation_dtype(q, k, v)
    stored = v.dtype if v.dtype == q.dtype == k.dtype and v.dtype in DTYPES else exact
    q, k, values = _readable(q, stored), _readable(k, stored), _readable(v, stored)
    if S is not None and z is not None:
        S, z = _readable(S, exact), _readable(z, exact)
        S_after, z_after = torch.empty_like(S), torch.empty_like(z)
    else:
        S_after, z_after = q.new_empty(B, H, K, V, dtype=exact), q.new_empty(B, H, K, dtype=exact)
    if padding is not None:
        padding = padding.contiguous()
    y = torch.empty_like(values)
    threads = 1 if S_after.numel() < ONE_THREAD else torch.get_num_threads()
    problem = _Problem(
        B, T, H, K, V, DTYPES.index(stored), normalize, threads, scale, eps,
        q.data_ptr(), k.data_ptr(), values.data_ptr(), _address(S), _address(z), _address(padding),
        y.data_ptr(), S_after.data_ptr(), z_after.data_ptr(),
    )  # fmt: skip
    library.steps(ctypes.byref(problem))
    return y if stored == v.dtype else y.to(v.dtype), S_after, z_after


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Two calls that do nothing would cost as much as the step.
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def chunks_pay(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether chunks in C++ are the faster form: not where 16-bit products have AMX's tiles."""
    return not (has_amx() and all(x.dtype.itemsize == 2 for x in (q, k, v)))


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
    y = call.tokens("y", torch.empty(B, T, H, V, dtype=call.stored))
    last = call.sums("last", q.new_empty(B, H, K, V + normalize, dtype=call.exact))
    sums = call.sums("sums", q.new_empty(B, T, H, int(normalize), dtype=call.exact))
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
    kept = call.sums("kept", sums.new_empty(B, -(-T // call.problem.chunk), H, K, V + normalize))
    call.run("forward")
    grad_y = torch.zeros_like(y) if grad_y is None else grad_y
    if segments is not None:
        grad_y = grad_y.masked_fill((segments < 0)[:, :, None, None], 0)
    call.tokens("grad_y", grad_y)
    call.tokens("y", y)
    call.sums("sums", sums)
    first = kept.new_zeros(B, H, K, V + normalize)
    call.sums("grad_last", first if grad_state is None else grad_state)
    dv = call.tokens("dx", torch.empty(B, T, H, V, dtype=call.stored))
    dk = call.sums("parts_B", kept.new_empty(B, T, H, K))
    dq = call.sums("parts_C", kept.new_empty(B, T, H, K))
    d_state = call.sums("d_initial", kept.new_empty(B, H, K, V + normalize))
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
    same = q.dtype == k.dtype == v.dtype and q.dtype in DTYPES
    exact = accumulation_dtype(q, k, v)
    call = ssd.Call(
        library,
        q.dtype if same else exact,
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
        call.documents(restarts(segments).cumsum(1))
    return call
