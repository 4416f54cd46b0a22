"""Rotary position embedding (Su et al. 2021, RoFormer, equations 14-16 and 34).

B batch, T time, H heads, D head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosine and sine of every angle, (T, 1, D/2) or (B, T, 1, D/2); all heads turn alike."""

    cos: Tensor
    sin: Tensor


def rotation(
    positions: Tensor, head_dim: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Rotation:
    """The angles position * base^(-2i/D) of the pairs i = 0 .. D/2 - 1.

    Args:
        positions: integer (T,) or (B, T).
        head_dim: D, even.
        base: the slowest pair turns by base^(-1 + 2/D) per position.
        dtype: of the queries and keys; angles are at least float32.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    half = head_dim // 2
    exponent = torch.arange(half, device=positions.device, dtype=dtype) / -half
    angle = (positions[..., None].to(dtype) * base**exponent).unsqueeze(-2)
    return Rotation(angle.cos(), angle.sin())


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn every pair (x_i, x_{i+D/2}) of x (B, T, H, D), in at least float32.

    The scalar product of a rotated query and a rotated key depends on the distance of their
    positions alone. Differs from the paper in which features make a pair: the two halves of a
    head (GPT-NeoX, Llama) and not neighbours, a permutation that the projections absorb.
    """
    a, b = x.to(by.cos.dtype).chunk(2, dim=-1)
    turned = torch.cat([a * by.cos - b * by.sin, b * by.cos + a * by.sin], dim=-1)
    return turned.to(x.dtype)
