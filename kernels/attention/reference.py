"""Softmax attention as the formula has it, one query at a time.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, D head width.
"""

import torch
from torch import Tensor

from kernels.precision import accumulation_dtype, outside_autocast


@outside_autocast
def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """y_t = sum_s softmax_s(scale q_t.k_s) v_s over the keys that query t may see."""
    T, S, D = q.shape[1], k.shape[1], q.shape[3]
    dtype = accumulation_dtype(q, k, v)
    groups = q.shape[2] // k.shape[2]
    qs = (q.to(dtype) * (D**-0.5 if scale is None else scale)).unbind(1)
    ks = k.to(dtype).repeat_interleave(groups, dim=2)  # (B, S, H, D)
    vs = v.to(dtype).repeat_interleave(groups, dim=2)
    if segments is None:
        segments = q.new_zeros(q.shape[0], S, dtype=torch.long)
    place = (segments >= 0).cumsum(1)  # padding takes no place in a window
    outputs = []
    for t in range(T):
        here = S - T + t
        seen = segments == segments[:, here, None]  # (B, S); padding sees padding, if unused
        if causal:
            seen = seen & (torch.arange(S, device=q.device) <= here)
        if window is not None:
            seen = seen & (place[:, here, None] - place < window)
        scores = torch.einsum("bhd,bshd->bhs", qs[t], ks)
        weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        outputs.append(torch.einsum("bhs,bshd->bhd", weights, vs))
    return torch.stack(outputs, 1).to(q.dtype)
