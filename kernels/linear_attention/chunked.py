"""Linear attention in chunks: the state between chunks, a square inside each."""

import torch
from torch import Tensor

from kernels.linear_attention.flops import CHUNK
from kernels.linear_attention.reference import State
from kernels.precision import accumulation_dtype, outside_autocast
from kernels.segments import first_document, last_document


@outside_autocast
def linear_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    normalize: bool,
    eps: float,
    initial_state: State | None,
    segments: Tensor | None,
) -> tuple[Tensor, State]:
    (B, T, H, K), V = q.shape, v.shape[3]
    dtype = accumulation_dtype(q, k, v)
    qs, ks, vs = ((x.to(dtype).transpose(1, 2)).split(CHUNK, 2) for x in (q * scale, k, v))
    S, z = initial_state or (q.new_zeros(B, H, K, V), q.new_zeros(B, H, K))
    S, z = S.to(dtype), z.to(dtype)
    if segments is None:
        segments = q.new_zeros(B, T, dtype=torch.long)
    document = first_document(segments)
    ys = []
    for q_c, k_c, v_c, seg in zip(qs, ks, vs, segments.split(CHUNK, 1), strict=True):
        k_c = k_c.masked_fill((seg < 0)[:, None, :, None], 0)
        carry = (seg == document[:, None])[:, None, :, None]
        same = (seg[:, :, None] == seg[:, None]).tril()[:, None]
        A = (q_c @ k_c.mT) * same
        q_s = q_c * carry
        y = q_s @ S + A @ v_c
        if normalize:
            y = y / ((q_s @ z[..., None]) + A.sum(-1, keepdim=True) + eps)
        ys.append(y.masked_fill((seg < 0)[:, None, :, None], 0))
        last = torch.maximum(document, last_document(seg))
        stays = (last == document)[:, None, None]
        k_last = k_c * (seg == last[:, None])[:, None, :, None]
        S = S * stays[..., None] + k_last.mT @ v_c
        z = z * stays + k_last.sum(2)
        document = last
    return torch.cat(ys, 2).transpose(1, 2).to(v.dtype), (S, z)
