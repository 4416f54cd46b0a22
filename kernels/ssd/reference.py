"""Mamba-2's state space (SSD) as its recurrence, one step at a time.

B batch, L time, H heads, P width per head, N state, G groups.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.precision import accumulation_dtype, outside_autocast


@outside_autocast
def ssd_reference(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    documents: Tensor | None,
    chunk_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay_t) S_{t-1} + dt_t x_t B_t^T, y_t = (S_t C_t + D x_t) silu(z_t).

    `documents` (B, L) counts the documents before each step's; `chunk_size` has no meaning here.
    """
    (batch, _, H, P), N = x.shape, B.shape[3]
    dtype = accumulation_dtype(x)
    xs = x.to(dtype).unbind(1)
    inputs = (x.to(dtype) * dt.to(dtype)[..., None]).unbind(1)
    decays = torch.exp(log_decay.to(dtype))[..., None, None].unbind(1)  # (B, H, 1, 1)
    per_head = (M.to(dtype).repeat_interleave(H // M.shape[2], dim=2) for M in (B, C))
    Bs, Cs = (M.unbind(1) for M in per_head)  # (B, H, N)
    S = x.new_zeros(batch, H, P, N) if initial_states is None else initial_states
    S = S.to(dtype)
    outputs = []
    for t, x_t in enumerate(xs):
        if documents is not None and t > 0:
            S = S.masked_fill((documents[:, t] != documents[:, t - 1])[:, None, None, None], 0)
        S = decays[t] * S + inputs[t][..., :, None] * Bs[t][..., None, :]
        y = (S @ Cs[t][..., None]).squeeze(3)
        outputs.append(y if D is None else y + D.to(dtype).view(H, -1) * x_t)
    y = torch.stack(outputs, 1)
    return (y if z is None else y * silu(z.to(dtype))).to(x.dtype), S
