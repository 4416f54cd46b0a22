"""Softmax attention: full, sliding-window, grouped-query, with documents and caches."""

from functools import partial

from torch import Tensor

from kernels.attention.flops import attention_flops
from kernels.attention.op import attention_auto, attention_op
from kernels.attention.reference import attention_reference
from kernels.attention.sdpa import attention_torch
from kernels.checks import check_floating, check_not_empty, check_segments, check_shape
from kernels.dispatch import choose
from kernels.precision import accumulation_dtype

__all__ = ["attention", "attention_flops"]

_FORMS = {
    "triton": attention_op,
    "auto": attention_auto,
    "cpp": partial(attention_op, form="cpp"),
    "torch": attention_torch,
    "reference": attention_reference,
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    segments: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention (Vaswani et al. 2017, equation 1).

    Keys may be more than queries: the queries then are the LAST T of the S positions, which is
    decoding with a cache. Rows whose caches hold different numbers of tokens say so with
    `segments`: -1 at the empty slots, wherever they lie.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, G, D) with S >= T and H a multiple of G: query head h reads head h // (H / G)
            of the keys (grouped-query attention).
        causal: position t sees positions 0..t only.
        window: how many positions a query sees, itself included; padding takes no place in it.
            Needs causal=True. Time and memory are linear in T.
        scale: of the scores before the softmax; D^-0.5 by default.
        segments: int (B, S) document numbers of the keys' positions, the last T of them the
            queries', non-decreasing over the valid positions; a query sees its own document only.
            -1 is padding: seen by no valid query, its own output finite and otherwise unspecified.
        backend: "triton", "cpp" (on the CPU, of bfloat16; compiled on first use, see
            kernels.native), "torch", "reference", or "auto": "triton" on a GPU, on a CPU with AMX
            "cpp" for bfloat16 where there is a compiler, else "torch".

    Returns:
        (B, T, H, D) in the dtype of q.

    Raises:
        ValueError: shapes or dtypes do not fit, T = 0, or `window` without `causal`.
        BackendError: no such backend, or "cpp" of another dtype, without a compiler or off the CPU.
    """
    _check(q, k, v, causal, window, segments)
    form = choose("attention", backend, _FORMS, q.device, accumulation_dtype(q, k, v))
    return form(q, k, v, causal=causal, window=window, scale=scale, segments=segments)


def _check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, segments: Tensor | None
) -> None:
    check_floating("attention", q=q, k=k, v=v)
    check_shape("attention", "q", q, "(B, T, H, D)", None, None, None, None)
    B, T, H, D = q.shape
    check_not_empty("attention", "q", q, 1)
    check_shape("attention", "k", k, "(B, S, G, D)", B, None, None, D)
    check_shape("attention", "v", v, "(B, S, G, D)", *k.shape)
    S, G = k.shape[1:3]
    if S < T:
        raise ValueError(f"attention: k has {S} positions; expected at least q's {T}")
    if G == 0 or H % G:
        raise ValueError(f"attention: k has {G} heads; expected a divisor of q's {H}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype"
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"attention: window={window} with causal={causal}; expected at least 1 and causal=True"
        )
    check_segments("attention", segments, B, S)
