"""One token of linear attention in one Triton kernel: the state is read once and written once.

B batch, H heads, K features, V value width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import block_of, ceil_div, launch
from kernels.tiles import load_rows, load_tile, store_rows, store_tile


@triton.jit
def step(
    q, k, v, S, z, padding, y, S_after, z_after, scale, eps, H,
    K: tl.constexpr, V: tl.constexpr, NORMALIZE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """S <- S + k v^T, z <- z + k, y = q S / (q.z + eps), over (V tiles, B H)."""
    iv, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at_v = iv * BV + tl.arange(0, BV)
    inside = at_v < V
    share = 1.0 if padding is None else 1.0 - tl.load(padding + bh // H).to(tl.float32)
    v_1 = load_rows(v + bh * V, at_v, inside)
    out = tl.zeros((BV,), tl.float32)
    weight = tl.zeros((BK,), tl.float32)
    for start in range(0, K, BK):
        at_k = start + tl.arange(0, BK)
        k_1 = load_rows(k + bh * K, at_k, at_k < K) * share
        q_1 = load_rows(q + bh * K, at_k, at_k < K) * scale
        E, total = k_1[:, None] * v_1[None], k_1
        if S is not None:
            E += load_tile(S + bh * K * V, at_k, at_k < K, at_v, V)
            total += load_rows(z + bh * K, at_k, at_k < K)
        store_tile(S_after + bh * K * V, E, at_k, at_k < K, at_v, V)
        if iv == 0:
            store_rows(z_after + bh * K, total, at_k, at_k < K)
        out += tl.sum(q_1[:, None] * E, 0)
        weight += q_1 * total
    if NORMALIZE:
        out /= tl.sum(weight, 0) + eps
    out = tl.where(share > 0, out, 0)  # 0 / eps, or 0 / 0, stands where there is padding
    store_rows(y + bh * V, out, at_v, inside)


def steps(
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
    """As step.steps, of one token: y (B, 1, H, V), S (B, H, K, V) and z (B, H, K)."""
    (B, _, H, K), V = q.shape, v.shape[3]
    y, BV = v.new_empty(B, 1, H, V), block_of(V, 64)
    S_after = q.new_empty(B, H, K, V, dtype=torch.float32)
    z_after = q.new_empty(B, H, K, dtype=torch.float32)
    past = (None, None) if S is None or z is None else (S.contiguous(), z.contiguous())
    launch(
        step, (ceil_div(V, BV), B * H),
        q.contiguous(), k.contiguous(), v.contiguous(), *past,
        None if padding is None else padding.to(torch.int8).contiguous(), y, S_after, z_after,
        scale, eps, H, K=K, V=V, NORMALIZE=normalize, BK=block_of(K, 64), BV=BV,
    )  # fmt: skip
    return y, S_after, z_after
