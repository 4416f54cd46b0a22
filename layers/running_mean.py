"""The mean of what a document has shown so far. B batch, T time, G heads, V width per head."""

import torch
from torch import Tensor

from kernels.linear_attention import linear_attention, linear_attention_flops

EPS = 1e-12  # beside a number of tokens: felt where padding has seen none


def running_mean(
    x: Tensor,
    past: tuple[Tensor, Tensor] | None,
    *,
    segments: Tensor | None,
    want_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """mean_{s <= t} x_s within each document: linear attention in which every key is 1.

    Args:
        x: (B, T, G, V).
        past: sum (B, G, V) and number (B,) of the tokens before; of the first document.
        segments: int (B, T) or None.

    Returns:
        (B, T, G, V), and the sum over the last document (B, G, V) in float32 or float64, if asked
        for.
    """
    ones = torch.ones_like(x[..., :1])
    state = None
    if past is not None:
        total, count = past
        counts = count.to(total.dtype)[:, None, None].expand(-1, total.shape[1], 1)
        state = total[:, :, None], counts
    mixed = linear_attention(
        ones,
        ones,
        x,
        eps=EPS,
        initial_state=state,
        return_state=want_state,
        segments=segments,
        backend=backend,
    )
    if not isinstance(mixed, tuple):
        return mixed, None
    mean, (S, _) = mixed
    return mean, S.squeeze(2)


def running_mean_flops(batch_size: int, length: int, heads: int, width: int) -> int:
    """FLOPs of a forward pass, as FlopCounterMode counts them."""
    return linear_attention_flops(batch_size, length, heads, 1, width)
