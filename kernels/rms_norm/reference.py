"""Root-mean-square norm with Mamba-2's gate, as the formula has it.

D channels, G channels per group.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.precision import accumulation_dtype


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    *,
    gate: Tensor | None = None,
    norm_before_gate: bool = False,
    group_size: int | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, with x or y times silu(gate)."""
    dtype = accumulation_dtype(x)
    h = x.to(dtype)
    if gate is not None and not norm_before_gate:
        h = h * silu(gate.to(dtype))
    groups = h.unflatten(-1, (-1, group_size or x.shape[-1]))
    h = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    h = h * weight.to(dtype)
    if gate is not None and norm_before_gate:
        h = h * silu(gate.to(dtype))
    return h.to(x.dtype)
