"""Root-mean-square norm with an optional gate."""

from torch import Tensor

from kernels.checks import check_floating, check_shape
from kernels.dispatch import choose
from kernels.precision import accumulation_dtype
from kernels.rms_norm.fused import rms_norm_torch
from kernels.rms_norm.op import rms_norm_triton
from kernels.rms_norm.reference import rms_norm_reference

__all__ = ["rms_norm"]

_FORMS = {
    "triton": rms_norm_triton,
    "torch": rms_norm_torch,
    "reference": rms_norm_reference,
}


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    gate: Tensor | None = None,
    norm_before_gate: bool = False,
    group_size: int | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019, equation 4), gated as in Mamba-2.

        y = x / sqrt(mean(x^2) + eps) * weight

    With a gate (Dao and Gu 2024, section 7.3): x * silu(gate) is normalised, or, with
    `norm_before_gate`, y is multiplied by silu(gate). Statistics are float32.

    Args:
        x: (..., D).
        weight: (D,).
        gate: of x's shape, or None.
        norm_before_gate: normalise first, gate after.
        group_size: channels that share one mean; None is all D.
        eps: added to the mean square.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        Of the shape and dtype of x.

    Raises:
        ValueError: shapes or dtypes do not fit, or `group_size` does not divide D.
        BackendError: no such backend.
    """
    check_floating("rms_norm", x=x, weight=weight)
    D = x.shape[-1]
    check_shape("rms_norm", "weight", weight, "(D,)", D)
    if gate is not None:
        check_shape("rms_norm", "gate", gate, "x.shape", *x.shape)
    if group_size is not None and (group_size < 1 or D % group_size):
        raise ValueError(f"rms_norm: group_size={group_size}; expected a divisor of D = {D}")
    form = choose("rms_norm", backend, _FORMS, x.device, accumulation_dtype(x))
    return form(
        x, weight, gate=gate, norm_before_gate=norm_before_gate, group_size=group_size, eps=eps
    )
