"""Softmax over a sliding window and linear attention behind it, under one normaliser (LoLCATs)."""

from functools import partial

from torch import Tensor

from kernels.checks import check_floating, check_not_empty, check_segments, check_shape
from kernels.dispatch import choose
from kernels.linear_attention import State
from kernels.precision import accumulation_dtype
from kernels.window_linear_attention.attended import attended_window_sums
from kernels.window_linear_attention.blocks import window_sums
from kernels.window_linear_attention.combined import combined
from kernels.window_linear_attention.flops import window_linear_attention_flops
from kernels.window_linear_attention.leaving import leaving
from kernels.window_linear_attention.reference import window_linear_attention_reference

__all__ = ["leaving", "window_linear_attention", "window_linear_attention_flops"]

_FORMS = {
    "triton": partial(combined, attended_window_sums, "triton"),
    "auto": partial(combined, window_sums, "auto"),
    "torch": partial(combined, window_sums, "torch"),
    "reference": window_linear_attention_reference,
}


def window_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_left: Tensor,
    v_left: Tensor,
    *,
    window: int,
    window_weight: Tensor | float,
    linear_weight: Tensor | float = 1.0,
    scale: float | None = None,
    eps: float = 1e-12,
    initial_state: State | None = None,
    return_state: bool = False,
    segments: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """Softmax weights for the newest `window` keys, linear ones for all before them.

        y_t = (g sum_{j in W_t} e^{s_tj - m_t} v_j + a phi(q_t) S_t)
            / (g sum_{j in W_t} e^{s_tj - m_t}     + a phi(q_t).z_t + eps)
        S_t = S_{t-1} + phi(k_{t-w}) v_{t-w}^T,  z_t = z_{t-1} + phi(k_{t-w})

    with s_tj = scale q_t.k_j, W_t the w = `window` newest keys, t's own included, and m_t the
    largest s_tj among them. m_t does not cancel: the linear part is not scaled by e^{-m_t}, so
    that it decides how much the window weighs. Time and memory are linear in T.
    Source: Zhang et al. 2024 (LoLCATs), section 3.3.1, with the subtraction of m_t of its code.

    Keys may be more than queries: the queries are the LAST T of the S positions, which is decoding
    with a ring of keys. S_t then must hold what left the window before.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, H, D) and (B, S, H, V), S >= T.
        phi_q: (B, T, H, F), features of the queries.
        phi_left, v_left: (B, T, H, F) and (B, T, H, V), of the key that leaves the window at each
            query (see `leaving`); zeros in phi_left where none does.
        window: w; 0 is linear attention alone.
        window_weight, linear_weight: g and a of each head (H,), or one number; the number 0 leaves
            that part out.
        scale: D^-0.5 by default.
        eps: added to the sum of the weights.
        initial_state: (S (B, H, F, V), z (B, H, F)) of each row's first valid document.
        return_state: return (y, state after the last token) and not y alone.
        segments: int (B, S) document numbers of the keys' positions as in `attention`; padding
            takes no place in a window, leaves the state alone, and its output is finite.
        backend: "triton", "torch", "reference", or "auto": "triton" on a GPU, else "torch" with
            linear_attention's "auto" for the linear part.

    Returns:
        y (B, T, H, V) in the dtype of v, and (S, z) of each row's last valid document in float32
        (float64 for float64 inputs), if asked for; as given where the linear part is left out.

    Raises:
        ValueError: shapes or dtypes do not fit, T = 0, or window < 0.
        BackendError: no such backend.
    """
    _check(q, k, v, phi_q, phi_left, v_left, window, initial_state, segments)
    dtype = accumulation_dtype(q, k, v, phi_q, phi_left, v_left)
    form = choose("window_linear_attention", backend, _FORMS, q.device, dtype)
    y, state = form(
        q,
        k,
        v,
        phi_q,
        phi_left,
        v_left,
        window=window,
        window_weight=window_weight if window else 0.0,
        linear_weight=linear_weight,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        eps=eps,
        initial_state=initial_state,
        segments=segments,
        return_state=return_state,
    )
    return (y, state) if return_state else y


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_left: Tensor,
    v_left: Tensor,
    window: int,
    initial_state: State | None,
    segments: Tensor | None,
) -> None:
    name = "window_linear_attention"
    check_floating(name, q=q, k=k, v=v, phi_q=phi_q, phi_left=phi_left, v_left=v_left)
    check_shape(name, "q", q, "(B, T, H, D)", None, None, None, None)
    B, T, H, D = q.shape
    check_not_empty(name, "q", q, 1)
    check_shape(name, "k", k, "(B, S, H, D)", B, None, H, D)
    S = k.shape[1]
    if S < T:
        raise ValueError(f"{name}: k has {S} positions; expected at least q's {T}")
    check_shape(name, "v", v, "(B, S, H, V)", B, S, H, None)
    V = v.shape[3]
    check_shape(name, "phi_q", phi_q, "(B, T, H, F)", B, T, H, None)
    F = phi_q.shape[3]
    check_shape(name, "phi_left", phi_left, "(B, T, H, F)", B, T, H, F)
    check_shape(name, "v_left", v_left, "(B, T, H, V)", B, T, H, V)
    if window < 0:
        raise ValueError(f"{name}: window={window}; expected at least 0")
    if initial_state is not None:
        check_shape(name, "initial_state[0]", initial_state[0], "(B, H, F, V)", B, H, F, V)
        check_shape(name, "initial_state[1]", initial_state[1], "(B, H, F)", B, H, F)
    check_segments(name, segments, B, S)
