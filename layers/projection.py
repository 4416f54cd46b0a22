"""Dense projections, as a choice: whatever makes a (d_in -> d_out) linear map."""

from typing import Protocol

from torch import nn


class Projection(Protocol):
    """Makes one linear map (..., d_in) -> (..., d_out) of a layer."""

    def __call__(self, d_in: int, d_out: int, bias: bool = False) -> nn.Module: ...


def Dense(d_in: int, d_out: int, bias: bool = False) -> nn.Linear:
    """A full matrix."""
    return nn.Linear(d_in, d_out, bias=bias)
