"""The Triton form of the norm as a torch operator: seqmix::rms_norm. D channels, G groups."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from kernels.dispatch import BackendError, implementation


def rms_norm_triton(
    x: Tensor,
    weight: Tensor,
    *,
    gate: Tensor | None,
    norm_before_gate: bool,
    group_size: int | None,
    eps: float,
) -> Tensor:
    """As rms_norm_torch.

    Raises:
        BackendError: a group does not fit into a program's registers.
    """
    D, most = x.shape[-1], implementation(__package__, "triton").MOST_CHANNELS
    if (group_size or D) > most:
        raise BackendError(
            f"backend='triton' for rms_norm: a group has {group_size or D} channels, at most "
            f"{most} fit; these can serve the call: torch, reference"
        )
    rows = x.reshape(-1, D)
    gates = None if gate is None else gate.reshape(-1, D)
    y, _ = _forward(rows, weight, gates, norm_before_gate, group_size or D, eps)
    return y.view(x.shape)


@custom_op("seqmix::rms_norm", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    norm_before_gate: bool,
    group_size: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    forward = implementation(__package__, "triton").forward
    return forward(x, weight, gate, norm_before_gate, group_size, eps)


@_forward.register_fake
def _(x, weight, gate, norm_before_gate, group_size, eps):
    rows, D = x.shape
    return x.new_empty(rows, D), x.new_empty(rows, D // group_size, dtype=torch.float32)


@custom_op("seqmix::rms_norm_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    roots: Tensor,
    norm_before_gate: bool,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    backward = implementation(__package__, "triton").backward
    return backward(grad_y, x, weight, gate, roots, norm_before_gate, group_size)


@_backward.register_fake
def _(grad_y, x, weight, gate, roots, norm_before_gate, group_size):
    d_gate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), d_gate


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, gate, ctx.norm_before_gate, ctx.group_size, _ = inputs
    ctx.save_for_backward(x, weight, gate, output[1])


def _differentiate(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gate, roots = ctx.saved_tensors
    dx, d_weight, d_gate = _backward(
        grad_y, x, weight, gate, roots, ctx.norm_before_gate, ctx.group_size
    )
    return dx, d_weight, None if gate is None else d_gate, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
