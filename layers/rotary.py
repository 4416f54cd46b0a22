"""Rotary position embedding (Su et al. 2021, RoFormer, equations 14-16 and 34).

B batch, T time, H heads, D head width.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Turn the pair (x_i, x_{i+D/2}) of every head by the angle position * base^(-2i/D).

    The scalar product of a rotated query and a rotated key depends on the distance of their
    positions alone. Angles and the turn itself are computed in float32, or float64 where x is.

    Differs from the paper in which features make a pair: the two halves of a head (GPT-NeoX,
    Llama) and not neighbours, a fixed permutation that the projections absorb.

    Args:
        x: (B, T, H, D), D even.
        positions: integer (T,) or (B, T).
        base: the slowest pair turns by base^(-1 + 2/D) per position.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=dtype) / -half
    angle = positions[..., None].to(dtype) * base**exponent  # (T, D/2) or (B, T, D/2)
    cos, sin = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)  # every head turns alike
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
