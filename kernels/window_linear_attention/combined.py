"""Window-and-linear attention from the sums of its two parts.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, V value width.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.linear_attention import State, linear_attention
from kernels.precision import accumulation_dtype, outside_autocast


class WindowSums(Protocol):
    """See combined."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, segments: Tensor | None
    ) -> Tensor: ...


@outside_autocast
def combined(
    window_sums: WindowSums,
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_left: Tensor,
    v_left: Tensor,
    *,
    window: int,
    window_weight: Tensor | float,
    linear_weight: Tensor | float,
    scale: float,
    eps: float,
    initial_state: State | None,
    segments: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, State | None]:
    """Numerator and denominator of either part side by side, V + 1 columns, then one division.

    Args:
        window_sums: from q, k, v, window, scale and segments to sum_j e^{s_tj - m_t} [v_j, 1] over
            each query's window, (B, T, H, V + 1).
        backend: of linear_attention.
    """
    V = v.shape[3]
    exact = accumulation_dtype(q, k, v)
    both: list[Tensor] = []
    state = initial_state
    if isinstance(window_weight, Tensor) or window_weight != 0:
        near = window_sums(q, k, v, window, scale, segments)
        both.append(near * _per_head(window_weight, near))
    if isinstance(linear_weight, Tensor) or linear_weight != 0:
        own = None if segments is None else segments[:, segments.shape[1] - q.shape[1] :]
        # Tensor cores multiply 16-bit factors; the sums are rounded once more for it.
        values = v_left if backend == "triton" else v_left.to(exact)
        far, state = _linear_sums(
            backend, phi_q, phi_left, values, initial_state, own, return_state
        )
        both.append(far * _per_head(linear_weight, far))
    elif return_state and state is None:
        (B, _, H, F) = phi_q.shape
        state = (q.new_zeros(B, H, F, V, dtype=exact), q.new_zeros(B, H, F, dtype=exact))
    if not both:
        raise ValueError("window_linear_attention: both parts are left out")
    total = both[0] + both[1] if len(both) == 2 else both[0]
    return (total[..., :V] / (total[..., V:] + eps)).to(v.dtype), state


def _linear_sums(
    backend: str,
    phi_q: Tensor,
    phi_left: Tensor,
    v_left: Tensor,
    past: State | None,
    segments: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, State | None]:
    """phi(q) [S, z] at every query, (B, T, H, V + 1), and the last S and z."""
    V = v_left.shape[3]
    if past is not None:
        past = (torch.cat([past[0], past[1][..., None]], -1), past[1])
    summed = linear_attention(
        phi_q,
        phi_left,
        pad(v_left, (0, 1), value=1.0),
        normalize=False,
        initial_state=past,
        return_state=return_state,
        segments=segments,
        backend=backend,
    )
    if not isinstance(summed, tuple):
        return summed, None
    far, (S, _) = summed
    return far, (S[..., :V].contiguous(), S[..., V].contiguous())


def _per_head(weight: Tensor | float, sums: Tensor) -> Tensor | float:
    return weight.to(sums.dtype)[:, None] if isinstance(weight, Tensor) else weight
