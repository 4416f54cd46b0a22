"""Mamba-2's state space (SSD): one decay per head and step, computed by matrix products."""

from functools import partial

from torch import Tensor
from torch.nn.functional import softplus

from kernels.checks import check_floating, check_not_empty, check_segments, check_shape
from kernels.dispatch import choose
from kernels.precision import accumulation_dtype
from kernels.segments import restarts
from kernels.ssd.flops import ssd_flops
from kernels.ssd.op import ssd_torch
from kernels.ssd.reference import ssd_reference

__all__ = ["ssd", "ssd_flops"]

_FORMS = {
    "triton": partial(ssd_torch, form="triton"),
    "auto": partial(ssd_torch, form="auto"),
    "cpp": partial(ssd_torch, form="cpp"),
    "torch": ssd_torch,
    "reference": ssd_reference,
}


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    segments: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's scan, in chunks, in time and memory linear in L.

        step_t = softplus(dt_t + dt_bias), clamped to dt_limit      (or without softplus)
        S_t = exp(step_t A) S_{t-1} + step_t x_t B_t^T
        y_t = (S_t C_t + D x_t) silu(z_t)

    Source: Dao and Gu 2024 (Transformers are SSMs), section 6; arguments as in its public
    `mamba_chunk_scan_combined`. Steps, decays, states and sums are float32 (float64 for float64
    inputs) whatever the inputs; with A < 0 and steps >= 0 no exponent is ever positive.

    Differs from the public function: documents are `segments`, where an initial state belongs to
    the first of them whatever its number, and -1 is padding anywhere; gradients flow from the
    final states.

    A backward pass keeps the inputs and one state per chunk, from which it computes the rest again.

    Args:
        x: (B, L, H, P).
        dt: (B, L, H).
        A: (H,), negative.
        B, C: (B, L, G, N); head h reads group h // (H / G).
        chunk_size: steps per chunk; changes speed and memory, and results by rounding only. The
            Triton form has chunks of 64; FLOPs are those of this chunk_size in every form.
        D: (H,) or (H, P) skip, added before the gate.
        z: (B, L, H, P) gate.
        dt_bias: (H,).
        dt_softplus: steps are softplus(dt + dt_bias), the identity above 20.
        dt_limit: lower and upper bound of the steps.
        initial_states: (B, H, P, N), what an earlier call returned; it belongs to the first valid
            document of each row. None is zero.
        return_final_states: return (y, final states) and not y alone.
        segments: int (B, L) document numbers, non-decreasing over the valid positions; S starts
            at zero in each document. -1 is padding: a step of size zero, which leaves S alone;
            its output is finite and otherwise unspecified.
        backend: "triton", "cpp" (on the CPU; compiled on first use, see kernels.native), "torch"
            (chunks), "reference" (the loop), or "auto": "triton" on a GPU, on a CPU "cpp" where
            there is a compiler.

    Returns:
        y (B, L, H, P) in the dtype of x, and if asked for the states (B, H, P, N) after each
        row's last valid document, in float32 or float64.

    Raises:
        ValueError: shapes or dtypes do not fit, L = 0, or chunk_size < 1.
        BackendError: no such backend, or "cpp" without a compiler or off the CPU.
    """
    _check(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, segments)
    dtype = accumulation_dtype(x)
    form = choose("ssd", backend, _FORMS, x.device, dtype)
    steps = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    steps = softplus(steps) if dt_softplus else steps
    if dt_limit != (0.0, float("inf")):
        steps = steps.clamp(*dt_limit)
    documents = None
    if segments is not None:
        steps = steps.masked_fill((segments < 0)[..., None], 0)  # last: bias and bounds move zeros
        documents = restarts(segments).cumsum(1)
    y, states = form(
        x, steps, steps * A.to(dtype), B, C, D, z, initial_states, documents, chunk_size
    )
    return (y, states) if return_final_states else y


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    segments: Tensor | None,
) -> None:
    name = "ssd"
    check_floating(name, x=x, dt=dt, A=A, B=B, C=C)
    check_shape(name, "x", x, "(B, L, H, P)", None, None, None, None)
    batch, length, H, P = x.shape
    check_not_empty(name, "x", x, 1)
    check_shape(name, "dt", dt, "(B, L, H)", batch, length, H)
    check_shape(name, "A", A, "(H,)", H)
    check_shape(name, "B", B, "(B, L, G, N)", batch, length, None, None)
    G, N = B.shape[2:]
    check_shape(name, "C", C, "(B, L, G, N)", batch, length, G, N)
    if G == 0 or H % G:
        raise ValueError(f"{name}: B has {G} groups; expected a divisor of H = {H}")
    if chunk_size < 1:
        raise ValueError(f"{name}: chunk_size={chunk_size}; expected at least 1")
    if D is not None:
        check_shape(name, "D", D, "(H,) or (H, P)", H, *((P,) if D.ndim == 2 else ()))
    if z is not None:
        check_shape(name, "z", z, "(B, L, H, P)", batch, length, H, P)
    if dt_bias is not None:
        check_shape(name, "dt_bias", dt_bias, "(H,)", H)
    if initial_states is not None:
        check_shape(name, "initial_states", initial_states, "(B, H, P, N)", batch, H, P, N)
    check_segments(name, segments, batch, length)
