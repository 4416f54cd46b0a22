"""Mamba's selective scan: a diagonal state space whose steps, inputs and outputs depend on time."""

from torch import Tensor

from kernels.checks import check_floating, check_not_empty, check_segments, check_shape
from kernels.dispatch import choose
from kernels.precision import accumulation_dtype
from kernels.selective_scan.flops import selective_scan_flops
from kernels.selective_scan.op import (
    selective_scan_auto,
    selective_scan_cpp,
    selective_scan_torch,
    selective_scan_triton,
)
from kernels.selective_scan.reference import selective_scan_reference

__all__ = ["selective_scan", "selective_scan_flops"]

_FORMS = {
    "triton": selective_scan_triton,
    "auto": selective_scan_auto,
    "cpp": selective_scan_cpp,
    "torch": selective_scan_torch,
    "reference": selective_scan_reference,
}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    segments: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan (S6), in time linear in L, never holding a state per step.

        step_t = softplus(delta_t + delta_bias)      (or without softplus)
        h_t = exp(step_t A) h_{t-1} + step_t B_t u_t
        y_t = (C_t h_t + D u_t) silu(z_t)

    Source: Gu and Dao 2023 (Mamba), equations 2a-2b and Algorithm 2; arguments as in its public
    `selective_scan_fn`. States and sums are float32 (float64 for float64 inputs) whatever the
    inputs; with A < 0 and steps >= 0 no exponent is ever positive.

    Differs from the paper as its code does: A is discretised by zero-order hold (equation 4), but
    B by Euler's rule, step_t B_t. Differs from the public function: an initial state, documents,
    and gradients from the last state; A is real, and B and C vary in time.

    A backward pass keeps the inputs and one state for every 32 steps, from which it computes the
    rest again.

    Args:
        u, delta: (B, D, L).
        A: (D, N), negative.
        B, C: (B, N, L), or (B, G, N, L) with channel d in group d // (D / G).
        D: (D,) skip, added before the gate.
        z: (B, D, L) gate.
        delta_bias: (D,).
        delta_softplus: steps are softplus(delta + delta_bias), the identity above 20.
        initial_state: (B, D, N), what an earlier call returned; it belongs to the first valid
            document of each row. None is zero.
        return_last_state: return (y, last state) and not y alone.
        segments: int (B, L) document numbers, non-decreasing over the valid positions; h starts
            at zero in each document. -1 is padding: a step of size zero, which leaves h alone;
            its output is finite and otherwise unspecified.
        backend: "triton", "cpp" (on the CPU; compiled on first use, see kernels.native), "torch"
            (tiles of steps), "reference" (the loop), or "auto": "triton" on a GPU, on a CPU "cpp"
            where a compiler is there, else "torch" and one warning. A single step without
            gradients is the same few torch calls in all but the reference.

    Returns:
        y (B, D, L) in the dtype of u, and if asked for the state (B, D, N) after each row's last
        valid document, in float32 or float64.

    Raises:
        ValueError: shapes or dtypes do not fit, or L = 0.
        BackendError: no such backend, or "cpp" without a compiler or off the CPU.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, segments)
    form = choose("selective_scan", backend, _FORMS, u.device, accumulation_dtype(u, delta))
    y, last = form(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, segments)
    return (y, last) if return_last_state else y


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
) -> None:
    name = "selective_scan"
    check_floating(name, u=u, delta=delta, A=A, B=B, C=C)
    check_shape(name, "u", u, "(B, D, L)", None, None, None)
    batch, channels, length = u.shape
    check_not_empty(name, "u", u, 2)
    check_shape(name, "delta", delta, "(B, D, L)", batch, channels, length)
    check_shape(name, "A", A, "(D, N)", channels, None)
    N = A.shape[1]
    groups = 1
    if B.ndim == 4:
        groups = B.shape[1]
        if groups == 0 or channels % groups:
            raise ValueError(f"{name}: B has {groups} groups; expected a divisor of D = {channels}")
    grouped = (B.ndim == 4) * (groups,)
    letters = "(B, G, N, L)" if grouped else "(B, N, L)"
    check_shape(name, "B", B, letters, batch, *grouped, N, length)
    check_shape(name, "C", C, letters, batch, *grouped, N, length)
    if D is not None:
        check_shape(name, "D", D, "(D,)", channels)
    if z is not None:
        check_shape(name, "z", z, "(B, D, L)", batch, channels, length)
    if delta_bias is not None:
        check_shape(name, "delta_bias", delta_bias, "(D,)", channels)
    if initial_state is not None:
        check_shape(name, "initial_state", initial_state, "(B, D, N)", batch, channels, N)
    check_segments(name, segments, batch, length)
