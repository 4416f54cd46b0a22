"""The first-order linear recurrence h_t = a_t h_{t-1} + b_t, real or complex."""

import torch
from torch import Tensor

from kernels.dispatch import choose
from kernels.linear_recurrence.blocked import linear_recurrence_blocked
from kernels.linear_recurrence.reference import linear_recurrence_reference

__all__ = ["linear_recurrence"]

_FORMS = {"torch": linear_recurrence_blocked, "reference": linear_recurrence_reference}


def linear_recurrence(
    a: Tensor, b: Tensor, h0: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Every state of h_t = a_t h_{t-1} + b_t, elementwise in D, over dim 1.

    A document starts where a_t = 0; a_t = 1 with b_t = 0 leaves the state as it is. Memory is
    linear in T: the backward pass, g_t = dL/dh_t + conj(a_{t+1}) g_{t+1}, keeps `a` and the result.
    Half precision is lifted to fp32, and stays there: a state is never held in half precision.

    |a| above 1 is allowed while the product of any sqrt(T) neighbours stays finite.

    FLOPs are counted as 2 per element where everything is real and 8 where it is complex.

    Args:
        a: (B, T, D), or a shape that broadcasts to it, such as (D,) for a constant.
        b: (B, T, D).
        h0: (B, D), the state before the first step; zero if None.
        backend: "auto", "torch" (blocks, no Python step per position) or "reference" (the loop).

    Returns:
        h (B, T, D) in the type that a, b and h0 promote to; the last state is h[:, -1].

    Raises:
        ValueError: a shape does not fit.
        BackendError: no such backend.

    Source: Blelloch, "Prefix Sums and Their Applications", section 1.4 (first-order recurrences);
    the gradient is the reverse recurrence of Martin and Cundy, "Parallelizing Linear Recurrent
    Neural Nets Over Sequence Length", section 2.
    """
    if b.ndim != 3:
        raise ValueError(f"linear_recurrence: b has shape {tuple(b.shape)}, expected (B, T, D)")
    batch, _, width = b.shape
    try:
        a = a.expand(b.shape)
    except RuntimeError:
        raise ValueError(
            f"linear_recurrence: a has shape {tuple(a.shape)}, expected one that broadcasts to "
            f"b's {tuple(b.shape)}"
        ) from None
    if h0 is not None and h0.shape != (batch, width):
        raise ValueError(
            f"linear_recurrence: h0 has shape {tuple(h0.shape)}, expected {(batch, width)}"
        )
    dtype = torch.promote_types(a.dtype, b.dtype)
    if h0 is not None:
        dtype = torch.promote_types(dtype, h0.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    start = b.new_zeros(batch, width, dtype=dtype) if h0 is None else h0.to(dtype)
    return choose("linear_recurrence", backend, _FORMS, b.device)(a.to(dtype), b.to(dtype), start)
