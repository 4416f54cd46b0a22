"""Dense projections, as a choice: whatever makes a (d_in -> d_out) linear map."""

from typing import Protocol

from torch import nn


class Projection(Protocol):
    """Makes one linear map (..., d_in) -> (..., d_out) of a layer.

    The module it makes is an nn.Linear or has a method `flops(tokens) -> int` of its own.
    """

    def __call__(self, d_in: int, d_out: int, bias: bool = False) -> nn.Module: ...


def Dense(d_in: int, d_out: int, bias: bool = False) -> nn.Linear:
    """A full matrix."""
    return nn.Linear(d_in, d_out, bias=bias)


def projection_flops(module: nn.Module, tokens: int) -> int:
    """FLOPs of a projection over `tokens` positions: its own word, or a full matrix's 2*in*out."""
    own = getattr(module, "flops", None)
    if own is not None:
        return own(tokens)
    if isinstance(module, nn.Linear):
        return 2 * tokens * module.in_features * module.out_features
    raise TypeError(f"{type(module).__name__} is no projection: it has no flops(tokens)")
