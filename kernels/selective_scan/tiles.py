"""How one selective scan is cut into blocks of rows and channels and tiles of steps.

B batch, D channels, L time, N state, G groups, S steps of a tile. Inside a tile time comes first
and channels last, so that every step is one contiguous piece and broadcasts run along long rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kernels.precision import accumulation_dtype
from kernels.segments import restarts

STEPS = 32  # of a tile; the states that the backward pass starts from lie this far apart
ELEMENTS = 65536  # state elements of a block: a tile of float32 then has 8 MiB


class Block(NamedTuple):
    """Rows, channels, and the group that these channels read."""

    rows: slice
    channels: slice
    group: int


class Tile(NamedTuple):
    """The inputs of S steps of one block, in the accumulation dtype."""

    u: Tensor  # (S, B, D)
    delta: Tensor  # (S, B, D), bias added, before softplus
    step: Tensor  # (S, B, D), after softplus, 0 at padding
    B: Tensor  # (S, B, N)
    C: Tensor  # (S, B, N)
    z: Tensor | None  # (S, B, D)
    padding: Tensor | None  # (S, B, 1) bool
    restart: Tensor | None  # (S, B, 1, 1) bool; None where no row restarts


def time_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, D, S) -> (S, B, D)."""
    return x.permute(2, 0, 1).to(dtype).contiguous()


@dataclass(frozen=True)
class Scan:
    """The arguments of one call, B and C as (B, G, N, L)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    initial_state: Tensor | None
    segments: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of states and sums."""
        return accumulation_dtype(self.u)

    @property
    def starts(self) -> range:
        """The first step of every tile."""
        return range(0, self.u.shape[2], STEPS)

    @cached_property
    def restarts(self) -> Tensor | None:
        """(B, L) bool: the state is reset in front of this step."""
        return None if self.segments is None else restarts(self.segments)

    def blocks(self) -> Iterator[Block]:
        """Blocks of about ELEMENTS state elements, each inside one group."""
        (batch, channels, _), groups, N = self.u.shape, self.B.shape[1], self.A.shape[1]
        width = channels // groups
        wide = -(-width // -(-width * N // ELEMENTS))
        tall = max(1, ELEMENTS // (wide * N))
        for group in range(groups):
            end = (group + 1) * width
            for d in range(group * width, end, wide):
                for b in range(0, batch, tall):
                    rows, channels = slice(b, min(b + tall, batch)), slice(d, min(d + wide, end))
                    yield Block(rows, channels, group)

    def rates(self, block: Block) -> Tensor:
        """A of the block, (N, D)."""
        return self.A[block.channels].to(self.dtype).T.contiguous()

    def skip(self, block: Block) -> Tensor | None:
        """D of the block, (D,)."""
        return None if self.D is None else self.D[block.channels].to(self.dtype)

    def first_state(self, block: Block) -> Tensor:
        """The block's initial state (B, N, D), a copy."""
        rows, channels, _ = block
        if self.initial_state is None:
            batch, width = rows.stop - rows.start, channels.stop - channels.start
            return self.u.new_zeros(batch, self.A.shape[1], width, dtype=self.dtype)
        return self.initial_state[rows, channels].mT.to(self.dtype, copy=True).contiguous()

    def tile(self, block: Block, start: int) -> Tile:
        """The tile of `block` that begins at step `start`."""
        rows, channels, group = block
        time = slice(start, start + STEPS)
        delta = time_first(self.delta[rows, channels, time], self.dtype)
        if self.delta_bias is not None:
            delta = delta + self.delta_bias[channels].to(self.dtype)
        step = softplus(delta) if self.delta_softplus else delta
        padding = restart = None
        if self.segments is not None and self.restarts is not None:
            padding = (self.segments[rows, time] < 0).T[..., None]
            step = step.masked_fill(padding, 0)
            restart = self.restarts[rows, time].T[..., None, None]
            restart = restart if restart.any() else None
        return Tile(
            time_first(self.u[rows, channels, time], self.dtype),
            delta,
            step,
            time_first(self.B[rows, group, :, time], self.dtype),
            time_first(self.C[rows, group, :, time], self.dtype),
            None if self.z is None else time_first(self.z[rows, channels, time], self.dtype),
            padding,
            restart,
        )
