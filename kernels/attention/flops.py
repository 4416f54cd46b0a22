"""FLOPs of attention, in torch's convention: every score computed counts, masked or not."""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula


def attention_flops(
    batch: int,
    length: int,
    num_heads: int,
    head_dim: int,
    *,
    key_length: int | None = None,
) -> int:
    """FLOPs of one forward pass without segments, as FlopCounterMode counts them."""
    return 4 * batch * num_heads * length * (key_length or length) * head_dim


def _cpu_forward(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    B, H, T, D = q
    return 4 * B * H * T * k[2] * D


def _cpu_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    B, H, T, D = q
    return 10 * B * H * T * k[2] * D  # the scores again, then the gradients of P, v, q, k


_aten = torch.ops.aten
for _op, _formula in (
    (_aten._scaled_dot_product_flash_attention_for_cpu, _cpu_forward),
    (_aten._scaled_dot_product_flash_attention_for_cpu_backward, _cpu_backward),
):
    if _op not in flop_registry:  # torch counts the CUDA kernels but, so far, not the CPU's
        register_flop_formula(_op)(_formula)
