"""FLOPs of the long convolution: those of its transforms and of the products between them."""

from kernels.long_conv.spectral import DIRECT, padded_length
from kernels.long_conv.transforms import TRANSFORMS


def long_conv_flops(
    batch: int, length: int, channels: int, taps: int, *, past: int = 0, transform: str = "fft"
) -> int:
    """FLOPs of `length` outputs after a history of `past`, as FlopCounterMode counts them.

    By shape, documents or not: 2.5 n log2 n for a real FFT of length n, 2 for a multiply-add in a
    matrix product of the Monarch transform (8 where it is complex), 6 for the product of two
    frequencies; 2 per tap where the sum is direct.
    """
    inputs = past + length
    taps = min(taps, inputs)
    if length <= DIRECT:
        return 2 * batch * channels * sum(min(t + 1, taps) for t in range(past, inputs))
    chosen = TRANSFORMS[transform]
    n = padded_length(chosen, inputs, past, taps)
    there_and_back = 2 * batch * chosen.flops(n, inputs) + chosen.flops(n, taps)
    return channels * (there_and_back + 6 * batch * chosen.frequencies(n))


def long_conv_backward_flops(
    batch: int, inputs: int, channels: int, taps: int, transform: str
) -> int:
    """Three spectra in and two gradients out; two products and a sum over the batch between."""
    chosen = TRANSFORMS[transform]
    n = padded_length(chosen, inputs, 0, taps)
    transforms = 3 * batch * chosen.flops(n, inputs) + 2 * chosen.flops(n, taps)
    return channels * (transforms + 14 * batch * chosen.frequencies(n))
