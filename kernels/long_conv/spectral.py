"""The convolution as a product of spectra, a slice of channels at a time, and its gradients.

R rows, S inputs (a history and new ones), D width, K taps, n transform length.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.long_conv.transforms import Transform

DIRECT = 8  # up to so many outputs, the sum itself is cheaper than a transform of all inputs
_SLICE = {"cpu": 2**19, "cuda": 2**25}  # padded samples transformed at once: what a cache holds


def padded_length(transform: Transform, inputs: int, past: int, taps: int) -> int:
    """Long enough that what wraps around only reaches the first `past` outputs, never read."""
    return transform.padded(max(inputs, inputs - past + taps - 1))


def convolve(x: Tensor, k: Tensor, past: int, transform: Transform) -> Tensor:
    """x (R, S, D), k (D, K) -> the outputs after the first `past`, (R, S - past, D)."""
    rows, inputs, width = x.shape
    out = x.new_empty(rows, inputs - past, width)
    if inputs - past <= DIRECT:
        for t in range(past, inputs):
            taps = k[:, : t + 1].flip(1).T.contiguous()  # (K or less, D), oldest input first
            out[:, t - past] = (x[:, t + 1 - len(taps) : t + 1] * taps).sum(1)
        return out
    n = padded_length(transform, inputs, past, k.shape[1])
    for c in _slices(rows, width, n, x.device):
        spectrum = transform.spectrum(x[:, :, c].mT, n) * transform.spectrum(k[None, c], n)
        out[:, :, c] = transform.signal(spectrum, n, inputs)[..., past:].mT
    return out


def correlate(
    grad: Tensor, x: Tensor, k: Tensor, past: int, transform: Transform
) -> tuple[Tensor, Tensor]:
    """Gradients to x (R, S, D) and k (D, K) from that of the outputs, (R, S - past, D)."""
    rows, inputs, width = x.shape
    grad_x, grad_k = x.new_empty(x.shape), k.new_empty(k.shape)
    n = padded_length(transform, inputs, 0, k.shape[1])
    for c in _slices(rows, width, n, x.device):
        g = transform.spectrum(pad(grad[:, :, c].mT, (past, 0)), n)
        lags = (g * transform.spectrum(x[:, :, c].mT, n).conj()).sum(0, keepdim=True)
        grad_k[c] = transform.signal(lags, n, k.shape[1])[0]
        g = g * transform.spectrum(k[None, c], n).conj()
        grad_x[:, :, c] = transform.signal(g, n, inputs).mT
    return grad_x, grad_k


def _slices(rows: int, width: int, n: int, device: torch.device) -> list[slice]:
    step = max(1, _SLICE.get(device.type, 2**25) // (rows * n))
    return [slice(c, min(c + step, width)) for c in range(0, width, step)]
