"""FLOPs of window-and-linear attention, in torch's convention."""

from kernels.attention.tiles import band_block
from kernels.linear_attention import linear_attention_flops


def window_linear_attention_flops(
    batch: int,
    length: int,
    num_heads: int,
    d_head: int,
    d_features: int,
    d_value: int,
    *,
    window: int,
    use_window: bool = True,
    use_linear: bool = True,
) -> int:
    """FLOPs of one forward pass from the empty past, as FlopCounterMode counts them."""
    total = 0
    if use_linear:
        total += linear_attention_flops(batch, length, num_heads, d_features, d_value)
    if use_window and window:
        reach = min(window, length) - 1
        tail = length % band_block(window)
        body = length - tail
        seen = body * (band_block(window) + reach) + tail * (tail + reach)
        total += 2 * batch * num_heads * seen * (d_head + d_value)
    return total
