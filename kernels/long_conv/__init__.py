"""Causal convolution with a filter as long as the sequence."""

import torch
from torch import Tensor

from kernels.checks import check_floating, check_not_empty, check_segments, check_shape
from kernels.dispatch import choose
from kernels.long_conv.flops import long_conv_flops
from kernels.long_conv.op import long_conv_auto, long_conv_torch
from kernels.long_conv.reference import long_conv_reference
from kernels.long_conv.transforms import TRANSFORMS
from kernels.precision import accumulation_dtype
from kernels.segments import first_document

__all__ = ["long_conv", "long_conv_flops"]

_FORMS = {"auto": long_conv_auto, "torch": long_conv_torch, "reference": long_conv_reference}


def long_conv(
    u: Tensor,
    k: Tensor,
    D: Tensor | None = None,
    *,
    history: Tensor | None = None,
    segments: Tensor | None = None,
    transform: str = "fft",
    backend: str = "auto",
) -> Tensor:
    """Causal convolution of every channel with its own long filter, as a product of spectra.

        y_t = D u_t + sum_{j=0}^{t} k_j u_{t-j}

    Source: Gu et al. 2022 (S4), section 3; the Monarch transform, Dao et al. 2022 (Monarch),
    section 3. Transforms are padded so that nothing wraps around, and run in float32 (float64 for
    float64 inputs) whatever the autocast. As after any transform, an output carries rounding noise
    of eps times the largest output, later inputs included. The backward pass keeps u and k alone.

    Args:
        u: (B, T, D).
        k: (D, K), k[:, 0] meets the newest input. Taps that reach before the first input are
            ignored, missing ones are zero.
        D: (D,) skip, or None.
        history: (B, P, D) inputs before u, newest last, zeros in front where a row has fewer; it
            belongs to the first valid document of each row. None is the empty past.
        segments: int (B, T) document numbers, non-decreasing over the valid positions; nothing
            crosses from one document to the next. -1 is padding, which takes no lag and whose
            output is zero. Their lengths decide what is computed: a GPU tells them to the host.
        transform: "fft", or "monarch": the discrete Fourier transform as two block-diagonal
            factors, matrix products of cost T^1.5. The same map.
        backend: "torch" (the transform), "reference" (the sum), or "auto": "torch", and a sum over
            lags for a few inputs.

    Returns:
        y (B, T, D) in the dtype of u.

    Raises:
        ValueError: shapes or dtypes do not fit, T = 0, or an unknown transform.
        BackendError: no such backend.
    """
    _check(u, k, D, history, segments, transform)
    past = 0 if history is None else history.shape[1]
    dtype = accumulation_dtype(u, k)
    inputs = u.to(dtype)
    if history is not None:
        inputs = torch.cat([history.to(dtype), inputs], 1)
        if segments is not None:
            first = first_document(segments)[:, None].expand(-1, past)
            segments = torch.cat([first, segments], 1)
    taps = k[:, : inputs.shape[1]].to(dtype)
    if D is not None:  # a skip is one more tap on the newest input
        taps = torch.cat([taps[:, :1] + D[:, None].to(dtype), taps[:, 1:]], 1)
    form = choose("long_conv", backend, _FORMS, u.device)
    return form(inputs, taps, segments, past, transform).to(u.dtype)


def _check(
    u: Tensor,
    k: Tensor,
    D: Tensor | None,
    history: Tensor | None,
    segments: Tensor | None,
    transform: str,
) -> None:
    check_floating("long_conv", u=u, k=k)
    check_shape("long_conv", "u", u, "(B, T, D)", None, None, None)
    batch, length, width = u.shape
    check_not_empty("long_conv", "u", u, 1)
    check_shape("long_conv", "k", k, "(D, K)", width, None)
    check_not_empty("long_conv", "k", k, 1)
    if D is not None:
        check_shape("long_conv", "D", D, "(D,)", width)
    if history is not None:
        check_shape("long_conv", "history", history, "(B, P, D)", batch, None, width)
    check_segments("long_conv", segments, batch, length)
    if transform not in TRANSFORMS:
        raise ValueError(f"long_conv: transform={transform!r}; allowed: {', '.join(TRANSFORMS)}")
