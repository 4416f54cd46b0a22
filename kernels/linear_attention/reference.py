"""Causal linear attention as its recurrence, one token at a time.

B batch, T time, H heads, K features per head, V value width per head.
"""

import torch
from torch import Tensor

from kernels.linear_attention.features import MapName, features
from kernels.precision import accumulation_dtype, outside_autocast
from kernels.segments import first_document

State = tuple[Tensor, Tensor]  # S (B, H, K, V), z (B, H, K)


@outside_autocast
def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-6,
    initial_state: State | None = None,
    segments: Tensor | None = None,
    return_state: bool = True,
    feature_map: MapName | None = None,
) -> tuple[Tensor, State]:
    """S_t = S_{t-1} + k_t v_t^T, z_t = z_{t-1} + k_t, y_t = q_t S_t / (q_t.z_t + eps)."""
    if feature_map is not None:
        q, k = (features(x, feature_map).to(v.dtype) for x in (q, k))
    (B, T, H, K), V = q.shape, v.shape[3]
    dtype = accumulation_dtype(q, k, v)
    qs, ks, vs = ((q.to(dtype) * scale).unbind(1), k.to(dtype).unbind(1), v.to(dtype).unbind(1))
    S, z = initial_state or (q.new_zeros(B, H, K, V), q.new_zeros(B, H, K))
    S, z = S.to(dtype), z.to(dtype)
    document = None if segments is None else first_document(segments)
    outputs = []
    for t in range(T):
        k_t = ks[t]  # (B, H, K)
        if segments is not None and document is not None:
            valid = segments[:, t] >= 0
            starts = (valid & (segments[:, t] != document))[:, None, None]
            S, z = S.masked_fill(starts[..., None], 0), z.masked_fill(starts, 0)
            k_t = k_t.masked_fill(~valid[:, None, None], 0)
            document = torch.where(valid, segments[:, t], document)
        S = S + k_t[..., :, None] * vs[t][..., None, :]
        z = z + k_t
        y = torch.einsum("bhk,bhkv->bhv", qs[t], S)
        if normalize:
            y = y / (torch.einsum("bhk,bhk->bh", qs[t], z) + eps)[..., None]
        outputs.append(y)
    return torch.stack(outputs, 1).to(v.dtype), (S, z)
