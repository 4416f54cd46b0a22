"""Cross entropy of a linear head without its logits."""

from functools import partial

import torch
from torch import Tensor

from kernels.checks import check_floating, check_shape
from kernels.dispatch import choose
from kernels.linear_cross_entropy.op import linear_cross_entropy_op, linear_nll_op
from kernels.linear_cross_entropy.reference import (
    IGNORE,
    linear_cross_entropy_reference,
    linear_nll_reference,
)
from kernels.precision import accumulation_dtype

__all__ = ["IGNORE", "linear_cross_entropy", "linear_nll"]

_LOSS = {
    "triton": partial(linear_cross_entropy_op, form="triton"),
    "auto": partial(linear_cross_entropy_op, form="auto"),
    "cpp": partial(linear_cross_entropy_op, form="cpp"),
    "torch": linear_cross_entropy_op,
    "reference": linear_cross_entropy_reference,
}
_NLL = {
    "triton": partial(linear_nll_op, form="triton"),
    "auto": partial(linear_nll_op, form="auto"),
    "cpp": partial(linear_nll_op, form="cpp"),
    "torch": linear_nll_op,
    "reference": linear_nll_reference,
}


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean cross entropy of softmax(x weight^T) against `targets`, over those that are not -100.

    Never holds more than a chunk's logits: memory is that of the two gradients, which are made
    together with the loss. Products run in the inputs' dtype, or in autocast's; exponentials and
    sums in float32.

    Args:
        x: (..., D).
        weight: (V, D), the head's matrix.
        targets: int (...), in [0, V), or -100 where no loss is asked for.
        chunk: tokens whose logits are held at once; None chooses.
        backend: "triton", "cpp" (on the CPU; compiled on first use, see kernels.native), "torch",
            "reference" (all logits at once), or "auto": "triton" on a GPU, on a CPU "cpp" where it
            can be built, else "torch".

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs); 0 with zero gradients when every
        target is -100.

    Raises:
        ValueError: shapes or dtypes do not fit, a target outside [0, V), or `chunk` below 1.
        BackendError: no such backend, or "cpp" without a compiler or off the CPU.
    """
    _check("linear_cross_entropy", x, weight, targets, chunk)
    form = choose("linear_cross_entropy", backend, _LOSS, x.device, accumulation_dtype(x, weight))
    return form(x.flatten(0, -2), weight, targets.flatten(), chunk)


@torch.no_grad()
def linear_nll(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Negative log-likelihood of every target in nats, for evaluation; carries no gradient.

    Arguments and errors as in `linear_cross_entropy`.

    Returns:
        float32 (float64 for float64 inputs) of the shape of `targets`, 0 where it is -100.
    """
    _check("linear_nll", x, weight, targets, chunk)
    form = choose("linear_nll", backend, _NLL, x.device, accumulation_dtype(x, weight))
    return form(x.flatten(0, -2), weight, targets.flatten(), chunk).view(targets.shape)


def _check(operator: str, x: Tensor, weight: Tensor, targets: Tensor, chunk: int | None) -> None:
    check_floating(operator, x=x, weight=weight)
    check_shape(operator, "weight", weight, "(V, D)", None, x.shape[-1])
    check_shape(operator, "targets", targets, "x.shape[:-1]", *x.shape[:-1])
    if targets.dtype.is_floating_point or targets.dtype == torch.bool:
        raise ValueError(f"{operator}: targets is {targets.dtype}; expected an integer dtype")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{operator}: chunk={chunk}; expected None or at least 1")
