"""The first-order linear recurrence, real or complex."""

from functools import partial

import torch
from torch import Tensor

from kernels.checks import check_not_empty, check_shape
from kernels.dispatch import choose, observed
from kernels.linear_recurrence.flops import linear_recurrence_flops
from kernels.linear_recurrence.op import linear_recurrence_op
from kernels.linear_recurrence.reference import linear_recurrence_reference

__all__ = ["linear_recurrence", "linear_recurrence_flops"]

_LOOP_BELOW = 8  # positions for which the plain loop is faster than an operator's own layer


def _by_length(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    if b.shape[1] < _LOOP_BELOW and not observed():
        return linear_recurrence_reference(a, b, h0)
    return linear_recurrence_op(a, b, h0, "auto")


_FORMS = {
    "triton": partial(linear_recurrence_op, form="triton"),
    "auto": _by_length,
    "cpp": partial(linear_recurrence_op, form="cpp"),
    "torch": linear_recurrence_op,
    "reference": linear_recurrence_reference,
}


def linear_recurrence(
    a: Tensor, b: Tensor, h0: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Every state of a recurrence that is elementwise in D.

        h_t = a_t h_{t-1} + b_t

    Source: Blelloch 1990, "Prefix Sums and Their Applications", section 1.4; its gradient is the
    same recurrence backwards, g_t = dL/dh_t + conj(a_{t+1}) g_{t+1} (Martin and Cundy 2018,
    section 2). Memory is linear in T: a and the states are kept. A document starts where a_t = 0,
    and a_t = 1 with b_t = 0 leaves the state as it is. |a| may exceed 1 as long as the product of
    any sqrt(T) neighbours is finite.

    Args:
        a: (B, T, D), or a shape that broadcasts to it, such as (D,) for a constant.
        b: (B, T, D).
        h0: (B, D) state before the first step; zeros by default.
        backend: "triton", "cpp" (on the CPU; compiled on first use, see kernels.native), "torch"
            (blocks of sqrt(T) steps side by side), "reference" (the loop), or "auto": "triton" on a
            GPU; on a CPU "reference" for a few steps, else "cpp" where there is a compiler.

    Returns:
        h (B, T, D) in the dtype that a, b, h0 and float32 promote to: no state is kept in half
        precision. The final state is h[:, -1].

    Raises:
        ValueError: shapes do not fit, or T = 0.
        BackendError: no such backend.
    """
    check_shape("linear_recurrence", "b", b, "(B, T, D)", None, None, None)
    check_not_empty("linear_recurrence", "b", b, 1)
    try:
        a = a.expand(b.shape)
    except RuntimeError:
        raise ValueError(
            f"linear_recurrence: a has shape {tuple(a.shape)}; expected one that broadcasts to "
            f"b's {tuple(b.shape)}"
        ) from None
    batch, _, width = b.shape
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if h0 is None:
        h0 = b.new_zeros(batch, width)
    check_shape("linear_recurrence", "h0", h0, "(B, D)", batch, width)
    dtype = torch.promote_types(dtype, h0.dtype)
    # Of complex numbers the parts count.
    form = choose("linear_recurrence", backend, _FORMS, b.device, dtype.to_real())
    return form(a.to(dtype), b.to(dtype), h0.to(dtype))
