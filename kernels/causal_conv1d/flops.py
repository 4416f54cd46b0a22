"""FLOPs of the depthwise convolution."""


def causal_conv1d_flops(batch: int, length: int, channels: int, taps: int) -> int:
    """FLOPs of one forward pass as FlopCounterMode counts them: one multiply-add per tap."""
    return 2 * batch * length * channels * taps
