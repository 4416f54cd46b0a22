"""Two ways to the spectrum of a real signal: the FFT, and the DFT as two Monarch factors.

A transform has a padded length for a wanted one; `spectrum` pads with zeros to it, and `signal`
returns the first samples of the inverse. Spectra (..., *) of one transform may be multiplied with
each other elementwise (circular convolution) and conjugated (correlation); how the frequencies
are ordered inside is the transform's own business.
"""

import math
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """A discrete Fourier transform of real signals."""

    def padded(self, length: int) -> int:
        """The transform length to use where at least `length` is needed."""
        ...

    def spectrum(self, x: Tensor, n: int) -> Tensor:
        """x (R, D, S), S <= n, padded with zeros to n -> its spectrum (R, D, ...)."""
        ...

    def signal(self, spectrum: Tensor, n: int, length: int) -> Tensor:
        """The first `length` samples (R, D, length) of the inverse of `spectrum`."""
        ...

    def frequencies(self, n: int) -> int:
        """How many complex numbers hold one spectrum."""
        ...

    def flops(self, n: int, samples: int) -> int:
        """FLOPs of one transform, either way, with `samples` samples that are not padding."""
        ...


class FFT:
    """torch.fft at lengths with factors 2, 3 and 5 only."""

    def padded(self, length: int) -> int:
        scale = 1
        while 15 * scale < length:
            scale *= 2
        return next(m * scale for m in (8, 9, 10, 12, 15) if m * scale >= length)

    def spectrum(self, x: Tensor, n: int) -> Tensor:
        return torch.fft.rfft(x.contiguous(), n=n)

    def signal(self, spectrum: Tensor, n: int, length: int) -> Tensor:
        return torch.fft.irfft(spectrum, n=n)[..., :length]

    def frequencies(self, n: int) -> int:
        return n // 2 + 1

    def flops(self, n: int, samples: int) -> int:
        return int(2.5 * n * math.log2(n))


@lru_cache(maxsize=16)
def _factors(
    n1: int, n2: int, samples: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """R (n2, A, 2 * K1) real, the twiddles inside, and L (n2, n2) complex, of the DFT of n1 * n2.

    A = ceil(samples / n2) rows of the signal are not padding; K1 = n1 / 2 + 1 columns are enough
    for a real signal. R holds real and imaginary parts next to each other.
    """
    n, rows = n1 * n2, -(-samples // n2)
    a = torch.arange(rows)[None, :, None]
    b = torch.arange(n2)[:, None, None]
    k1 = torch.arange(n1 // 2 + 1)[None, None, :]
    # angles are reduced as integers, so that long transforms lose no precision
    right = (((n2 * a + b) * k1) % n).double() * (-2 * math.pi / n)
    b = torch.arange(n2)
    left = ((b[:, None] * b) % n2).double() * (-2 * math.pi / n2)
    parts = torch.stack([right.cos(), right.sin()], -1).flatten(-2)
    return (
        parts.to(device, dtype),
        torch.polar(torch.ones_like(left), left).to(device, dtype.to_complex()),
    )


class MonarchDFT:
    """The DFT of n = n1 * n2 as two block-diagonal factors (Monarch, section 3): x[n2 a + b] goes
    by n2 blocks of n1 x n1, twiddles inside, and by n1 blocks of n2 x n2 to frequency k1 + n1 k2.

    Rows of the signal that are padding, and the half of the k1 that a real signal mirrors, are
    left out of the products. n1 = 4 n2 makes both products cost about the same.
    """

    def padded(self, length: int) -> int:
        n2 = self._block(length)
        return 2 * -(-length // (2 * n2)) * n2

    def _split(self, n: int) -> tuple[int, int]:
        n2 = next(m for m in range(self._block(n), 0, -1) if n % (2 * m) == 0)
        return n // n2, n2

    def _block(self, n: int) -> int:
        half_root = math.sqrt(n) / 2
        return max(1, round(half_root)) if half_root < 8 else 8 * round(half_root / 8)

    def spectrum(self, x: Tensor, n: int) -> Tensor:
        n1, n2 = self._split(n)
        right, left = _factors(n1, n2, x.shape[-1], x.dtype, x.device)
        rows, width, samples = x.shape
        blocks = x.new_zeros(rows * width, right.shape[1] * n2)
        blocks[:, :samples] = x.reshape(rows * width, samples)
        y = torch.bmm(blocks.unflatten(1, (-1, n2)).permute(2, 0, 1), right)  # (n2, R*D, 2*K1)
        y = torch.view_as_complex(y.unflatten(-1, (-1, 2))).permute(2, 1, 0)  # (K1, R*D, n2)
        return (y @ left).unflatten(1, (rows, width)).permute(1, 2, 0, 3)  # (R, D, K1, n2)

    def signal(self, spectrum: Tensor, n: int, length: int) -> Tensor:
        n1, n2 = self._split(n)
        dtype = spectrum.real.dtype
        right, left = _factors(n1, n2, length, dtype, spectrum.device)
        rows, width = spectrum.shape[:2]
        z = spectrum.permute(2, 0, 1, 3).flatten(1, 2)  # (K1, R*D, n2)
        y = torch.view_as_real((z @ left.conj()).permute(2, 1, 0).contiguous())
        once = torch.full((n1 // 2 + 1,), 2.0 / n, dtype=dtype, device=y.device)
        once[0] = once[-1] = 1.0 / n  # every other k1 stands for its mirror image too
        inverse = right * once.repeat_interleave(2)
        blocks = torch.bmm(y.flatten(-2), inverse.mT)  # (n2, R*D, A)
        x = blocks.permute(1, 2, 0).reshape(rows, width, -1)
        return x[..., :length]

    def frequencies(self, n: int) -> int:
        n1, n2 = self._split(n)
        return (n1 // 2 + 1) * n2

    def flops(self, n: int, samples: int) -> int:
        n1, n2 = self._split(n)
        columns = n1 // 2 + 1
        rows = -(-samples // n2)
        return n2 * 2 * rows * 2 * columns + columns * 8 * n2 * n2


TRANSFORMS: dict[str, Transform] = {"fft": FFT(), "monarch": MonarchDFT()}
