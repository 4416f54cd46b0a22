"""Attention on torch's scaled_dot_product_attention."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
    segments: Tensor | None,
) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    simple = segments is None and window is None and (not causal or T in (1, S))
    mask = None
    if not simple:
        if segments is None:
            segments = q.new_zeros(q.shape[0], S, dtype=torch.long)
        place = (segments >= 0).cumsum(1)
        mask = segments[:, S - T :, None] == segments[:, None]
        if causal:
            mask = mask & q.new_ones(T, S, dtype=torch.bool).tril(S - T)
        if window is not None:
            mask = mask & (place[:, S - T :, None] - place[:, None] < window)
        mask = mask[:, None]
    y = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=simple and causal and T > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)
