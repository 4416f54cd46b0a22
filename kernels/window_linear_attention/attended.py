"""Sums over windows by attention's Triton kernels.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, D head width,
V value width.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.attention.op import attention_and_sums


def attended_window_sums(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, segments: Tensor | None
) -> Tensor:
    """sum_j e^{s_tj - m_t} [v_j, 1] = e^{l_t - m_t} [y_t, 1], (B, T, H, V + 1) in float32.

    y is attention's output, l_t its log of the sum of exponentials, and m_t, the largest score, is
    made from the key that the kernel names, so that its gradient goes there.
    """
    D, V = q.shape[3], v.shape[3]
    q, k, v = (x.to(torch.promote_types(q.dtype, v.dtype)) for x in (q, k, v))
    width = max(D, V)  # the kernels have one for keys and values
    wide_q, wide_k = (pad(x, (0, width - D)) for x in (q, k))
    y, log_sum, largest = attention_and_sums(
        wide_q, wide_k, pad(v, (0, width - V)), window=window, scale=scale, segments=segments
    )
    key = k.gather(1, largest.long().transpose(1, 2)[..., None].expand_as(q))
    most = scale * (q.float() * key.float()).sum(-1)
    # Padding sees no key: there l and y are 0, and m is of no meaning.
    above = log_sum.transpose(1, 2) - most
    if segments is not None:
        above = above.masked_fill((segments[:, -q.shape[1] :] < 0)[..., None], 0)
    weight = above.exp()[..., None]
    return weight * pad(y[..., :V].float(), (0, 1), value=1.0)
