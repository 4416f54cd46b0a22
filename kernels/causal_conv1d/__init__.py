"""Depthwise causal convolution with a state, as short-convolution layers use it."""

from functools import partial

from torch import Tensor

from kernels.causal_conv1d.flops import causal_conv1d_flops
from kernels.causal_conv1d.op import causal_conv1d_op
from kernels.causal_conv1d.reference import causal_conv1d_reference
from kernels.checks import check_floating, check_not_empty, check_segments, check_shape
from kernels.dispatch import choose
from kernels.precision import accumulation_dtype

__all__ = ["causal_conv1d", "causal_conv1d_flops"]

_FORMS = {
    "triton": partial(causal_conv1d_op, form="triton"),
    "auto": partial(causal_conv1d_op, form="auto"),
    "cpp": partial(causal_conv1d_op, form="cpp"),
    "torch": causal_conv1d_op,
    "reference": causal_conv1d_reference,
}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    segments: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution along time.

        y_t = act(bias + sum_{j=0}^{W-1} weight[:, W-1-j] x_{t-j})

    The arguments are those of the causal-conv1d package that Mamba uses (Gu and Dao 2023), with
    time before channels.

    Args:
        x: (B, T, D).
        weight: (D, W), the last tap meets the newest input.
        bias: (D,) or None.
        activation: None or "silu".
        initial_state: (B, W-1, D) the inputs before x, newest last; it belongs to the first valid
            document of each row. None is the empty past, zeros.
        return_state: return (y, last W-1 inputs) and not y alone.
        segments: int (B, T) document numbers, non-decreasing over the valid positions; inputs of
            another document count as zeros. -1 is padding: the convolution runs as if it were not
            there, and its output is finite and otherwise unspecified.
        backend: "triton", "cpp" (on the CPU; compiled on first use, see kernels.native), "torch"
            (shifted sums), "reference" (the loop), or "auto": "triton" on a GPU, on a CPU "cpp"
            where it can be built, else "torch".

    Returns:
        y (B, T, D) in the dtype of x, and the state (B, W-1, D) of each row's last valid document
        in the dtype of x, if asked for.

    Raises:
        ValueError: shapes or dtypes do not fit, T = 0, or an unknown activation.
        BackendError: no such backend, or "cpp" without a compiler or off the CPU.
    """
    _check(x, weight, bias, activation, initial_state, segments)
    form = choose("causal_conv1d", backend, _FORMS, x.device, accumulation_dtype(x, weight))
    y, state = form(
        x,
        weight,
        bias,
        activation=activation,
        initial_state=initial_state,
        segments=segments,
        return_state=return_state,
    )
    return (y, state) if return_state else y


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
) -> None:
    check_floating("causal_conv1d", x=x, weight=weight)
    check_shape("causal_conv1d", "x", x, "(B, T, D)", None, None, None)
    B, T, D = x.shape
    check_not_empty("causal_conv1d", "x", x, 1)
    check_shape("causal_conv1d", "weight", weight, "(D, W)", D, None)
    W = weight.shape[1]
    if W == 0:
        raise ValueError(f"causal_conv1d: weight has shape {tuple(weight.shape)}; W must be >= 1")
    if bias is not None:
        check_shape("causal_conv1d", "bias", bias, "(D,)", D)
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation={activation!r}; allowed: None, 'silu'")
    if initial_state is not None:
        check_shape("causal_conv1d", "initial_state", initial_state, "(B, W-1, D)", B, W - 1, D)
    check_segments("causal_conv1d", segments, B, T)
