"""The calls whose kernels are looked at: each operator at usual sizes, forward and backward.

B batch, T time, H heads, K key width, V value width, D channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernels

BF16 = torch.bfloat16


def _random(*shape: int, dtype: torch.dtype = BF16, grad: bool = True) -> Tensor:
    return torch.rand(*shape, dtype=dtype).requires_grad_(grad)


def linear_attention() -> Any:
    """B1 T512 H2 K64 V64, normalised."""
    q, k, v = (_random(1, 512, 2, 64) for _ in range(3))
    return kernels.linear_attention(q, k, v, backend="triton")


# What to call, by the operator's name; an operator with several usual forms has several.
CALLS: dict[str, Callable[[], Any]] = {
    "linear_attention": linear_attention,
}


def run(name: str) -> None:
    """Forward and backward of a call; the numbers in it are of no interest."""
    torch.manual_seed(0)
    CALLS[name]().float().sum().backward()
