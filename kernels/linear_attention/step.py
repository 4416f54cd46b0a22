"""A few tokens of linear attention, one after another, in as few torch calls as it takes.

Decoding is call overhead. B batch, T time, H heads, K features, V value width.
"""

import torch
from torch import Tensor

from kernels.precision import accumulation_dtype, outside_autocast

MOST_STEPS = 3  # from here on the chunked form is faster


@outside_autocast
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
    """y (B, T, H, V), S (B, H, K, V) and z (B, H, K) after T tokens of one document.

    Args:
        padding: bool (B, T), or None.
    """
    (B, T, H, K), V = q.shape, v.shape[3]
    exact = accumulation_dtype(q, k, v)
    q, k, values = q.to(exact), k.to(exact), v.to(exact)
    if scale != 1:
        q = q * scale
    if padding is not None:
        k = k.masked_fill(padding[:, :, None, None], 0)
    if S is None or z is None:
        S, z = q.new_zeros(B, H, K, V), q.new_zeros(B, H, K)
    else:
        S, z = S.to(exact).contiguous(), z.to(exact).contiguous()
    outputs = []
    for t in range(T):
        q_t, k_t = q[:, t], k[:, t]
        S, z = torch.addcmul(S, k_t[..., None], values[:, t, :, None]), z + k_t
        out = torch.bmm(q_t.reshape(B * H, 1, K), S.view(B * H, K, V)).view(B, H, V)
        if normalize:
            out /= torch.linalg.vecdot(q_t, z).add_(eps)[..., None]
        outputs.append(out)
    y = outputs[0][:, None] if T == 1 else torch.stack(outputs, 1)
    if padding is not None:  # 0/eps, or 0/0, stands where nothing was seen yet
        y.masked_fill_(padding[:, :, None, None], 0)
    return y.to(v.dtype), S, z
