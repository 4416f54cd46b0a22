"""The chunked loss as a torch operator: seqmix::linear_cross_entropy.

Being an operator, it is counted by FlopCounterMode through its formula and is not traced by
torch.compile. N tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from kernels.linear_cross_entropy import chunked
from kernels.linear_cross_entropy.reference import IGNORE
from kernels.precision import accumulation_dtype, autocast_dtype, matmul_dtype


def linear_cross_entropy_op(
    x: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None, form: str = "chunked"
) -> Tensor:
    grad = torch.is_grad_enabled()
    loss, _, _ = _loss(
        x,
        weight,
        targets.long(),
        _products(x, weight),
        chunk,
        grad and x.requires_grad,
        grad and weight.requires_grad,
        form,
    )
    return loss


def linear_nll_op(
    x: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None, form: str = "chunked"
) -> Tensor:
    return chunked.nll(x, weight, targets.long(), _products(x, weight), chunk, form)


def _products(x: Tensor, weight: Tensor) -> torch.dtype:
    return matmul_dtype(x, weight, low=autocast_dtype(x.device))


@custom_op("seqmix::linear_cross_entropy", mutates_args=())
def _loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    chunk: int | None,
    wants_dx: bool,
    wants_dw: bool,
    form: str = "chunked",
) -> tuple[Tensor, Tensor, Tensor]:
    return chunked.loss_and_gradients(x, weight, targets, dtype, chunk, wants_dx, wants_dw, form)


@_loss.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    chunk: int | None,
    wants_dx: bool,
    wants_dw: bool,
    form: str = "chunked",
) -> tuple[Tensor, Tensor, Tensor]:
    exact = accumulation_dtype(x, weight)
    dx = torch.empty_like(x) if wants_dx else x.new_empty(0)
    dw = torch.empty_like(weight, dtype=exact) if wants_dw else weight.new_empty(0, dtype=exact)
    return x.new_empty((), dtype=exact), dx, dw


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, dx, dw = output
    *_, ctx.wants_dx, ctx.wants_dw, _form = inputs
    ctx.weight_dtype = inputs[1].dtype
    ctx.save_for_backward(dx, dw)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dw = ctx.saved_tensors
    wanted = grad is not None
    dx = dx * grad.to(dx.dtype) if wanted and ctx.wants_dx else None
    dw = (dw * grad).to(ctx.weight_dtype) if wanted and ctx.wants_dw else None
    return dx, dw, None, None, None, None, None, None


_loss.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.seqmix.linear_cross_entropy, get_raw=True)
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    chunk: int | None,
    wants_dx: bool,
    wants_dw: bool,
    form: str = "chunked",
    out_val: Any = None,
) -> int:
    """One product per token with a target (per token, where the targets are not known)."""
    unknown = targets.is_meta or isinstance(targets, FakeTensor)
    tokens = len(targets) if unknown else int((targets != IGNORE).sum())
    return 2 * tokens * weight.shape[0] * weight.shape[1] * (1 + wants_dx + wants_dw)
