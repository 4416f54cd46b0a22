"""How a sequence is cut for the chunked form: blocks of whole chunks, and what each may read.

A block is a run of chunks that are worked on at once, small enough for its squares to stay in
cache. B batch, T time, H heads, D any width, C chunk length, n chunks in a block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.linear_attention.flops import CHUNK
from kernels.segments import first_document

# Bytes of one block's (C, C) squares: the second-level caches of two cores; a GPU wants long runs.
_SQUARES = {"cpu": 2 << 20}
_SQUARES_ELSEWHERE = 64 << 20
_LEAST_ROWS = 16  # of a product that is faster in 16 bits: a tile's


class Block(NamedTuple):
    """`chunks` chunks of `chunk` tokens each, from token `start` on; products are in `dtype`."""

    start: int
    chunks: int
    chunk: int
    dtype: torch.dtype

    @property
    def span(self) -> slice:
        """The block's tokens."""
        return slice(self.start, self.start + self.chunks * self.chunk)

    def view(self, x: Tensor) -> Tensor:
        """The block's part of (B, T, ...) as (n, B, C, ...)."""
        return x[:, self.span].unflatten(1, (self.chunks, self.chunk)).transpose(0, 1)


def cut(
    length: int, heads: int, dtype: torch.dtype, exact: torch.dtype, device: torch.device
) -> list[Block]:
    """Blocks of full chunks, then what is left over as one shorter chunk.

    Args:
        heads: B * H, the number of squares in a chunk.
        dtype: of the products.
        exact: of those of a few tokens, for which 16 bits save no time.
    """
    budget = _SQUARES.get(device.type, _SQUARES_ELSEWHERE)
    most = max(1, budget // (heads * CHUNK * CHUNK * dtype.itemsize))
    full, rest = divmod(length, CHUNK)
    blocks = [Block(c * CHUNK, min(most, full - c), CHUNK, dtype) for c in range(0, full, most)]
    of_rest = dtype if rest >= _LEAST_ROWS else exact
    return [*blocks, Block(full * CHUNK, 1, rest, of_rest)] if rest else blocks


def load(x: Tensor, block: Block, dtype: torch.dtype, *, ones: int = 0) -> Tensor:
    """The block of x (B, T, H, D), copied to (n*B*H, C, D + ones): so many columns of ones."""
    part = block.view(x).transpose(2, 3)  # (n, B, H, C, D)
    D = part.shape[-1]
    copy = torch.empty((*part.shape[:-1], D + ones), dtype=dtype, device=x.device)
    copy[..., :D] = part
    if ones:
        copy[..., D:] = 1
    return copy.flatten(0, 2)


def store(x: Tensor, block: Block, into: Tensor) -> None:
    """Write x (n*B*H, C, D) to its place in `into` (B, T, H, D)."""
    B, _, H, D = into.shape
    block.view(into).copy_(x.view(block.chunks, B, H, block.chunk, D).transpose(2, 3))


class Masks(NamedTuple):
    """What the tokens of a block may read, 1 or 0 in the products' dtype; None is 1 everywhere.

    `within` (C, C) or (n, B, 1, C, C): the query (row) sees the key (column) of its own chunk.
    `reads` (n, B, 1, C, 1): the query goes on with the document of the state before its chunk.
    `writes` (n, B, 1, C, 1): the key is of the document of the state after its chunk.
    `stays` (n, B, 1, 1, 1) bool: these two documents are one.
    """

    within: Tensor
    reads: Tensor | None = None
    writes: Tensor | None = None
    stays: Tensor | None = None

    def apply(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (n*B*H, C, .) times one of the masks."""
        if mask is None:
            return x
        n, B = mask.shape[:2]
        return (x.view(n, B, -1, *x.shape[1:]) * mask).view(x.shape)

    def apply_within_(self, squares: Tensor) -> Tensor:
        """squares (n*B*H, C, C), masked in place."""
        if self.within.ndim == 2:
            return squares.mul_(self.within)
        n, B = self.within.shape[:2]
        squares.view(n, B, -1, *squares.shape[1:]).mul_(self.within)
        return squares


def masks(segments: Tensor | None, blocks: list[Block], device: torch.device) -> Iterator[Masks]:
    """The masks of every block, in order."""
    if segments is None:
        for block in blocks:
            square = torch.ones(block.chunk, block.chunk, dtype=block.dtype, device=device)
            yield Masks(square.tril_())
        return
    before = first_document(segments)
    for block in blocks:
        seg = block.view(segments)  # (n, B, C)
        after = torch.maximum(seg.amax(2).cummax(0).values, before)  # (n, B)
        first = torch.cat([before[None], after[:-1]])
        before = after[-1]
        valid = seg >= 0
        within = (seg[..., :, None] == seg[..., None, :]) & valid[..., None]
        yield Masks(
            within=within.to(block.dtype).tril_()[:, :, None],
            reads=(valid & (seg == first[..., None])).to(block.dtype)[:, :, None, :, None],
            writes=(valid & (seg == after[..., None])).to(block.dtype)[:, :, None, :, None],
            stays=(first == after)[:, :, None, None, None],
        )
