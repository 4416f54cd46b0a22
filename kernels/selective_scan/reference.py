"""The selective scan as its recurrence, one step at a time.

B batch, D channels, L time, N state, G groups.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from kernels.precision import accumulation_dtype, outside_autocast
from kernels.segments import first_document


@outside_autocast
def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = (C_t h_t + D u_t) silu(z_t)."""
    batch, channels, length = u.shape
    dtype = accumulation_dtype(u)
    A, us = A.to(dtype), u.to(dtype).unbind(2)
    steps = (
        delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)[:, None]
    )
    steps = (softplus(steps) if delta_softplus else steps).unbind(2)
    Bs, Cs = (_per_channel(M.to(dtype), channels).unbind(3) for M in (B, C))  # each (B, D, N)
    h = u.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state
    h = h.to(dtype)
    document = None if segments is None else first_document(segments)
    outputs = []
    for t in range(length):
        step = steps[t][..., None]  # (B, D, 1)
        if segments is not None and document is not None:
            valid = segments[:, t] >= 0
            h = h.masked_fill((valid & (segments[:, t] != document))[:, None, None], 0)
            step = step.masked_fill(~valid[:, None, None], 0)
            document = torch.where(valid, segments[:, t], document)
        h = torch.exp(step * A) * h + step * Bs[t] * us[t][..., None]
        y = (Cs[t] * h).sum(2)
        outputs.append(y if D is None else y + D.to(dtype) * us[t])
    y = torch.stack(outputs, 2)
    return (y if z is None else y * silu(z.to(dtype))).to(u.dtype), h


def _per_channel(M: Tensor, channels: int) -> Tensor:
    """(B, N, L) or (B, G, N, L) -> (B, D, N, L): channel d reads group d // (D / G)."""
    if M.ndim == 3:
        return M[:, None].expand(-1, channels, -1, -1)
    return M.repeat_interleave(channels // M.shape[1], dim=1)
