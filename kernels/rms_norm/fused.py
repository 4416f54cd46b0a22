"""Root-mean-square norm that keeps its inputs and the inverse roots for backward, nothing else.

Plain torch operations under an autograd function, which torch.compile traces and fuses.
D channels, G groups of C channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.precision import accumulation_dtype


def rms_norm_torch(
    x: Tensor,
    weight: Tensor,
    *,
    gate: Tensor | None,
    norm_before_gate: bool,
    group_size: int | None,
    eps: float,
) -> Tensor:
    options = (norm_before_gate, group_size or x.shape[-1], eps)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, gate, *options)
    return _normalise(x, weight, gate, *options)[0]


def _normalise(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    norm_before_gate: bool,
    group_size: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y and the inverse roots (..., G, 1)."""
    exact = accumulation_dtype(x)
    h = x.to(exact)
    if gate is not None and not norm_before_gate:
        h = h * silu(gate.to(exact))
    h = h.unflatten(-1, (-1, group_size))  # (..., G, C)
    root = torch.rsqrt(h.square().mean(-1, keepdim=True).add_(eps))
    y = (h * root).flatten(-2).mul_(weight)
    if gate is not None and norm_before_gate:
        y.mul_(silu(gate.to(exact)))
    return y.to(x.dtype), root


class _RMSNorm(torch.autograd.Function):
    """With h = x, or x silu(gate) where the gate comes first, and r = (mean h^2 + eps)^-1/2:

    n = h r,  y = n weight,  dh = r (g - n mean(g n)) where g = dy weight
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gate: Tensor | None,
        norm_before_gate: bool,
        group_size: int,
        eps: float,
    ) -> Tensor:
        y, root = _normalise(x, weight, gate, norm_before_gate, group_size, eps)
        ctx.save_for_backward(x, weight, gate, root)
        ctx.norm_before_gate, ctx.group_size = norm_before_gate, group_size
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, root = ctx.saved_tensors
        dy, wide_x = grads[0].to(root.dtype), x.to(root.dtype)
        if gate is None:
            dh, d_weight = _differentiate(dy, wide_x, weight, root, ctx.group_size)
            return dh.to(x.dtype), d_weight, None, None, None, None
        wide_gate = gate.to(root.dtype)
        passed = silu(wide_gate)
        if ctx.norm_before_gate:
            n = (wide_x.unflatten(-1, (-1, ctx.group_size)) * root).flatten(-2)
            d_passed = dy * n.mul_(weight)
            dx, d_weight = _differentiate(dy * passed, wide_x, weight, root, ctx.group_size)
        else:
            dh, d_weight = _differentiate(dy, wide_x * passed, weight, root, ctx.group_size)
            d_passed, dx = dh * wide_x, dh.mul_(passed)
        d_gate = torch.ops.aten.silu_backward(d_passed, wide_gate)
        return dx.to(x.dtype), d_weight, d_gate.to(gate.dtype), None, None, None


def _differentiate(
    dy: Tensor, h: Tensor, weight: Tensor, root: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """Gradients of h and the weight under y = h r weight."""
    n = h.unflatten(-1, (-1, group_size)) * root  # (..., G, C)
    g = dy.unflatten(-1, (-1, group_size))
    d_weight = (g * n).flatten(-2).reshape(-1, len(weight)).sum(0)
    g = g * weight.unflatten(-1, (-1, group_size))
    along = (g * n).mean(-1, keepdim=True)
    return g.addcmul_(n, along, value=-1).mul_(root).flatten(-2), d_weight.to(weight.dtype)
