"""The feature maps that linear attention can make by itself, from narrower queries and keys.

They have no parameters; what has, a map's linear part, comes before. X is the width that is given.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from kernels.precision import accumulation_dtype

MapName = Literal["hedgehog", "taylor", "taylor_compressed"]

SMALLEST_FEATURE = 1e-12
WIDEST_TILE = 64


def features(x: Tensor, feature_map: MapName) -> Tensor:
    """phi(x) (..., K) of x (..., X), in float32 (float64 for float64).

    hedgehog           [softmax(x), softmax(-x)], each at least 1e-12; K = 2 X (Zhang et al. 2024,
                       The Hedgehog & the Porcupine, section 4.2; the softmax is LoLCATs')
    taylor             1, x, and x x^T row by row / sqrt(2), so that phi(x).phi(y) = 1 + s + s^2/2
                       with s = x.y; K = 1 + X + X^2 (Arora et al. 2024, Based, section 4.1)
    taylor_compressed  the same with each product x_a x_b kept once, a >= b, row by row, times
                       sqrt(2) off the diagonal; K = 1 + X + X (X + 1) / 2
    """
    x = x.to(accumulation_dtype(x))
    if feature_map == "hedgehog":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1).clamp(min=SMALLEST_FEATURE)
    if feature_map == "taylor":
        products = (x[..., :, None] * x[..., None, :] * 0.5**0.5).flatten(-2)
        return torch.cat([torch.ones_like(x[..., :1]), x, products], dim=-1)
    parts = [torch.ones_like(x[..., :1]), x]
    for a, x_a in enumerate(x.split(1, dim=-1)):
        parts += [x_a * x[..., :a], x_a * x_a * 0.5**0.5]
    return torch.cat(parts, dim=-1)


def num_features(width: int, feature_map: MapName | None) -> int:
    """K of a map for X = `width`; X itself for None, where the features are given."""
    if feature_map is None:
        return width
    if feature_map == "hedgehog":
        return 2 * width
    return 1 + width + (width**2 if feature_map == "taylor" else width * (width + 1) // 2)


def fits_tiles(width: int) -> bool:
    """Whether Triton's kernels make the features of rows X = `width` wide: of one tile each."""
    return width <= WIDEST_TILE


def check_map(feature_map: str | None) -> None:
    """Raise ValueError for a map that there is not."""
    if feature_map is not None and feature_map not in get_args(MapName):
        allowed = ", ".join(get_args(MapName))
        raise ValueError(f"linear_attention: feature_map={feature_map!r}: allowed: None, {allowed}")
