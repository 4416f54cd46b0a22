"""Which cluster a vector belongs to, by its angle to the centroids.

B batch, T time, H heads, D head width, K clusters. Nothing here has a gradient or changes with
autocast.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernels.precision import accumulation_dtype, outside_autocast

EPS = 1e-6  # shorter vectors are scaled by 1 / EPS: a zero stays a zero, with a finite gradient


@outside_autocast
def unit(x: Tensor) -> Tensor:
    """x over its length along the last dimension, float32 or float64; has a gradient."""
    return normalize(x.to(accumulation_dtype(x)), dim=-1, eps=EPS)


@torch.no_grad()
@outside_autocast
def similarities(x: Tensor, centroids: Tensor) -> Tensor:
    """Cosines (B, H, K, T) of x (B, T, H, D) with the unit `centroids` (H, K, D).

    Products are divided by the lengths, and not the vectors: there are fewer of them.
    """
    (B, T, *_), x = x.shape, x.to(accumulation_dtype(x))
    rows = x.flatten(0, 1).transpose(0, 1)  # (H, B * T, D), where they lie
    products = torch.bmm(centroids.to(x.dtype), rows.mT)  # (H, K, B * T)
    products = products.unflatten(-1, (B, T)).permute(2, 0, 1, 3)
    lengths = torch.linalg.vector_norm(x, dim=3).clamp_(min=EPS)  # (B, T, H)
    lengths = lengths.transpose(1, 2)[:, :, None]
    return torch.div(products, lengths, out=products.new_empty(products.shape))


@torch.no_grad()
@outside_autocast
def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """int64 (B, T, H): the cluster whose centroid is nearest by angle, the lowest among equals.

    No length is divided by: it is the same for all centroids.
    """
    (B, T, H, D), dtype = x.shape, accumulation_dtype(x)
    rows = x.permute(2, 0, 1, 3).reshape(H, B * T, D).to(dtype)
    scores = torch.bmm(rows, centroids.to(dtype).mT)  # clusters side by side for the argmax
    return scores.argmax(2).view(H, B, T).permute(1, 2, 0)
