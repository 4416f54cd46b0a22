"""Window-and-linear attention as the formula has it, one query at a time.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, F features,
V value width.
"""

import torch
from torch import Tensor

from kernels.linear_attention import State
from kernels.precision import accumulation_dtype, outside_autocast
from kernels.segments import first_document


@outside_autocast
def window_linear_attention_reference(
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
) -> tuple[Tensor, State]:
    """Both sums of every query, added with their weights and divided."""
    (B, T, H, _), S = q.shape, k.shape[1]
    F, V = phi_q.shape[3], v.shape[3]
    exact = accumulation_dtype(q, k, v)
    q, k, v, phi_q, phi_left, v_left = (x.to(exact) for x in (q, k, v, phi_q, phi_left, v_left))
    g, a = (_column(weight, q) for weight in (window_weight, linear_weight))
    if segments is None:
        segments = torch.zeros(B, S, dtype=torch.int64, device=q.device)
    document = first_document(segments[:, S - T :])
    place = (segments >= 0).cumsum(1)
    sums, keys = initial_state or (q.new_zeros(B, H, F, V), q.new_zeros(B, H, F))
    sums, keys = sums.to(exact), keys.to(exact)
    outputs = []
    for t in range(T):
        here = S - T + t
        own = segments[:, here]
        top, bottom = q.new_zeros(B, H, V), q.new_zeros(B, H, 1)
        if window and not _left_out(window_weight):
            seen = (segments == own[:, None]) & (torch.arange(S, device=q.device) <= here)
            seen = seen & (place[:, here, None] - place < window)
            scores = scale * torch.einsum("bhd,bshd->bhs", q[:, t], k)
            scores = scores.masked_fill(~seen[:, None], float("-inf"))
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            top = top + g * torch.einsum("bhs,bshv->bhv", weights, v)
            bottom = bottom + g * weights.sum(-1, keepdim=True)
        if not _left_out(linear_weight):
            valid = own >= 0
            starts = (valid & (own != document))[:, None, None]
            document = torch.where(valid, own, document)
            sums = sums.masked_fill(starts[..., None], 0)
            keys = keys.masked_fill(starts, 0)
            phi = phi_left[:, t].masked_fill(~valid[:, None, None], 0)
            sums = sums + phi[..., None] * v_left[:, t, :, None, :]
            keys = keys + phi
            top = top + a * torch.einsum("bhf,bhfv->bhv", phi_q[:, t], sums)
            bottom = bottom + a * (phi_q[:, t] * keys).sum(-1, keepdim=True)
        outputs.append(top / (bottom + eps))
    return torch.stack(outputs, 1).to(v.dtype), (sums, keys)


def _left_out(weight: Tensor | float) -> bool:
    return not isinstance(weight, Tensor) and weight == 0


def _column(weight: Tensor | float, like: Tensor) -> Tensor:
    """(H, 1), or a number."""
    return torch.as_tensor(weight, dtype=like.dtype, device=like.device)[..., None]
