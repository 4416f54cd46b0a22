"""Depthwise causal convolution as its sum, one token at a time.

B batch, T time, D channels, W taps.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.precision import accumulation_dtype, outside_autocast
from kernels.segments import first_document


@outside_autocast
def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_j weight[:, W-1-j] x_{t-j}), x before the start from the state."""
    (B, _, D), W = x.shape, weight.shape[1]
    dtype = accumulation_dtype(x, weight)
    taps = weight.to(dtype).T  # (W, D), the last one meets the newest input
    past = x.new_zeros(B, W - 1, D) if initial_state is None else initial_state
    past = past.to(dtype)
    document = None if segments is None else first_document(segments)
    outputs = []
    for t, x_t in enumerate(x.to(dtype).unbind(1)):
        valid = None
        if segments is not None and document is not None:
            valid = segments[:, t] >= 0
            past = past.masked_fill((valid & (segments[:, t] != document))[:, None, None], 0)
            document = torch.where(valid, segments[:, t], document)
        seen = torch.cat([past, x_t[:, None]], dim=1)  # (B, W, D)
        y = (seen * taps).sum(1)
        if bias is not None:
            y = y + bias.to(dtype)
        outputs.append(silu(y) if activation == "silu" else y)
        past = (
            seen[:, 1:] if valid is None else torch.where(valid[:, None, None], seen[:, 1:], past)
        )
    return torch.stack(outputs, 1).to(x.dtype), past.to(x.dtype)
