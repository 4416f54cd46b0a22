"""FLOPs of attention, in torch's convention: every score computed counts, masked or not."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from kernels.attention.tiles import scores

Shape = Sequence[int]


def attention_flops(
    batch: int,
    length: int,
    num_heads: int,
    head_dim: int,
    *,
    key_length: int | None = None,
    causal: bool = True,
    window: int | None = None,
) -> int:
    """FLOPs of one forward pass without segments, as FlopCounterMode counts them.

    Args:
        length: T, the queries.
        num_heads: H, the queries' heads.
        key_length: S; T by default.
    """
    keys = length if key_length is None else key_length
    return 4 * batch * num_heads * head_dim * scores(length, keys, causal, window)


def _cpu_forward(q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    B, H, T, D = q
    return 4 * B * H * T * k[2] * D


def _cpu_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    B, H, T, D = q
    return 10 * B * H * T * k[2] * D  # the scores again, then the gradients of P, v, q, k


# torch counts its CUDA kernels but, so far, not the CPU's.
_aten = torch.ops.aten
if _aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
    register_flop_formula(_aten._scaled_dot_product_flash_attention_for_cpu)(_cpu_forward)
    register_flop_formula(_aten._scaled_dot_product_flash_attention_for_cpu_backward)(_cpu_backward)
