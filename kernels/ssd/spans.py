"""How one SSD call is cut into chunks, and spans of chunks that are worked on at once.

B batch, L time, H = G R heads in G groups, P width per head, N state; c chunks of Q steps in a
span. What has a width P is time first, (B, c, G, Q, R, P), or head first, (B, c, G, R, Q, P).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.precision import accumulation_dtype

SQUARE_BYTES = 2 << 20  # of the (Q, Q) matrices of a span: they stay in a second-level cache


class Span(NamedTuple):
    """`chunks` chunks of `size` steps, from step `start` and chunk `first` on."""

    start: int
    first: int
    chunks: int
    size: int

    @property
    def time(self) -> slice:
        """The span's steps."""
        return slice(self.start, self.start + self.chunks * self.size)

    @property
    def numbers(self) -> slice:
        """The span's chunks."""
        return slice(self.first, self.first + self.chunks)


class Part(NamedTuple):
    """The inputs of one span, in the accumulation dtype."""

    x: Tensor  # (B, c, G, Q, R, P)
    z: Tensor | None  # the same
    dt: Tensor  # (B, c, G, R, Q)
    B: Tensor  # (B, c, G, Q, N)
    C: Tensor  # (B, c, G, Q, N)
    D: Tensor | None  # (G, 1, R, 1) or (G, 1, R, P)
    within: Tensor  # (Q, Q) or (B, c, 1, Q, Q), 1 where step j (row) reaches step i (column)
    between: Tensor  # (B, c, G, R, Q, Q) decay from step j to a later step i, 1 elsewhere
    arriving: Tensor  # (B, c, G, R, Q) decay from the state before the chunk to step i
    leaving: Tensor  # (B, c, G, R, Q) decay from step j to the state after the chunk
    whole: Tensor  # (B, c, G, R) decay from the state before the chunk to the one after


@dataclass(frozen=True)
class Arguments:
    """Those of one call; `log_decay` is never positive, and 0 at padding, as is `dt`."""

    x: Tensor  # (B, L, H, P)
    dt: Tensor  # (B, L, H)
    log_decay: Tensor  # (B, L, H)
    B: Tensor  # (B, L, G, N)
    C: Tensor  # (B, L, G, N)
    D: Tensor | None  # (H,) or (H, P)
    z: Tensor | None  # (B, L, H, P)
    initial_states: Tensor | None  # (B, H, P, N)
    documents: Tensor | None  # (B, L) how many documents of its row ended before a step's own
    chunk_size: int

    @property
    def dtype(self) -> torch.dtype:
        """Of states and sums."""
        return accumulation_dtype(self.x)

    @property
    def groups(self) -> int:
        """G."""
        return self.B.shape[2]

    @cached_property
    def spans(self) -> list[Span]:
        """All full chunks, then what is left over as one shorter chunk."""
        batch, length, H, _ = self.x.shape
        Q = self.chunk_size
        full, rest = divmod(length, Q)
        most = max(1, SQUARE_BYTES // (batch * H * Q * Q * self.dtype.itemsize))
        spans = [Span(c * Q, c, min(most, full - c), Q) for c in range(0, full, most)]
        return [*spans, Span(full * Q, full, 1, rest)] if rest else spans

    def first_state(self) -> Tensor:
        """The initial states (B, G, N, R P), a copy."""
        batch, _, H, P = self.x.shape
        if self.initial_states is not None:
            return grouped(self.initial_states, self.groups, self.dtype)
        shape = batch, self.groups, self.B.shape[3], H // self.groups * P
        return self.x.new_zeros(shape, dtype=self.dtype)

    def chunked(self, x: Tensor, span: Span) -> Tensor:
        """The span of x (B, L, ...) as (B, c, Q, ...)."""
        return x[:, span.time].unflatten(1, (span.chunks, span.size))

    def time_first(self, x: Tensor, span: Span) -> Tensor:
        """The span of x (B, L, H, ...) as (B, c, G, Q, R, ...)."""
        return self.chunked(x, span).unflatten(3, (self.groups, -1)).transpose(2, 3)

    def per_head(self, x: Tensor, span: Span) -> Tensor:
        """The span of x (B, L, H) as (B, c, G, R, Q)."""
        return self.time_first(x, span).transpose(3, 4).to(self.dtype).contiguous()

    def per_group(self, x: Tensor, span: Span) -> Tensor:
        """The span of x (B, L, G, N) as (B, c, G, Q, N)."""
        return self.chunked(x, span).transpose(2, 3).to(self.dtype).contiguous()

    def part(self, span: Span) -> Part:
        """Everything that the chunks of `span` need but the states before them."""
        log_decay = self.per_head(self.log_decay, span)
        Q = span.size
        # Sums of the steps from j + 1 to i and of no others: the difference of two running sums
        # would lose the small ones behind a large one, and exponents are never positive.
        between = log_decay[..., None, :].expand(*log_decay.shape, Q).triu(1).cumsum(-1).exp_()
        after = pad(log_decay[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
        arriving, leaving = log_decay.cumsum(-1).exp_(), after.exp_()
        whole = arriving[..., -1].clone()
        within = torch.ones(Q, Q, dtype=self.dtype, device=self.x.device).triu_()
        if self.documents is not None:
            number = self.chunked(self.documents, span)  # (B, c, Q)
            ended = number[..., -1:]
            first = self.documents.new_zeros(len(number), 1)
            if span.start:
                first = self.documents[:, span.start - 1, None]
            began = torch.cat([first, ended[:, :-1, 0]], dim=1)[..., None]
            within = within * (number[..., :, None] == number[..., None, :])[:, :, None]
            arriving *= (number == began)[:, :, None, None]
            leaving *= (number == ended)[:, :, None, None]
            whole *= (began == ended)[..., None]
        heads = self.x.shape[2] // self.groups
        return Part(
            self.time_first(self.x, span).to(self.dtype),
            None if self.z is None else self.time_first(self.z, span).to(self.dtype),
            self.per_head(self.dt, span),
            self.per_group(self.B, span),
            self.per_group(self.C, span),
            None if self.D is None else self.D.to(self.dtype).view(self.groups, 1, heads, -1),
            within,
            between,
            arriving,
            leaving,
            whole,
        )


def grouped(states: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(B, H, P, N) -> (B, G, N, R P), a copy: the states of a group's heads side by side."""
    split = states.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3)
    return split.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(3)


def ungrouped(states: Tensor, num_heads: int) -> Tensor:
    """(B, G, N, R P) -> (B, H, P, N), the inverse of `grouped`."""
    heads = num_heads // states.shape[1]
    return states.unflatten(3, (heads, -1)).permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()
