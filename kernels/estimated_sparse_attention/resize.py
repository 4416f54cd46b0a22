"""Stretching K cells over the tokens that a query sees (SEA, section 3.3).

Each query has its own scale: its cells always span exactly the L tokens that it sees, so that what
comes later moves nothing. Integers throughout, so that ties round alike everywhere.

B batch, H heads, T queries, S keys, K cells, L tokens that a query sees.
"""

import torch
from torch import Tensor

from kernels.checks import check_segments, check_shape
from kernels.estimated_sparse_attention.visible import Visible, visible


def cell_starts(lengths: Tensor, num_cells: int) -> Tensor:
    """First token of each cell, and L: floor(b L / K + 1/2) for b = 0 .. K, int64 (..., K + 1).

    Cell b covers the tokens from start b up to start b + 1: none where L < K leaves no room.

    Args:
        lengths: int64 (...), L.
        num_cells: K.
    """
    cells = torch.arange(num_cells + 1, device=lengths.device)
    return cell_start(cells, lengths[..., None], num_cells)


def cell_start(cells: Tensor, lengths: Tensor, num_cells: int) -> Tensor:
    """First token of the given `cells`, int64, broadcast against `lengths`."""
    return (2 * cells * lengths + num_cells) // (2 * num_cells)


def cell_of_token(numbers: Tensor, lengths: Tensor, num_cells: int) -> Tensor:
    """The cell that covers each token: ceil((s + 1/2) K / L) - 1, the inverse of `cell_starts`.

    Args:
        numbers: int64, s, 0 <= s < L.
        lengths: int64, broadcast against `numbers`.
    """
    cell = ((2 * numbers + 1) * num_cells - 1) // (2 * lengths.clamp(min=1))
    return cell.clamp(0, num_cells - 1)


def stretch(x: Tensor, seen: Visible, fill: float) -> Tensor:
    """x (B, H, T, K) -> (B, H, T, S): every token that is seen has its cell's value."""
    numbers, mask = seen.numbers()
    cells = cell_of_token(numbers, seen.lengths[..., None], x.shape[3])[:, None]
    return torch.take_along_dim(x, cells, 3).masked_fill(~mask[:, None], fill)


def stretch_cells(
    x: Tensor,
    *,
    keys: int | None = None,
    causal: bool = True,
    segments: Tensor | None = None,
    fill: float = 0.0,
) -> Tensor:
    """Copy each cell's value to the tokens that it covers: a dense (T, S) picture.

    Source: Lee et al. 2024 (SEA), section 3.3, after its public code. The linear path never calls
    this: it is for losses over chunks of queries, for drawing, and for tests.

    Args:
        x: (B, H, T, K) of any dtype.
        keys: S, the queries being the last T of S positions; T by default.
        causal: a query sees its document up to itself, and else all of it.
        segments: int (B, S) document numbers; -1 is padding, which sees nothing and is not seen.
        fill: where a key is not seen.

    Returns:
        (B, H, T, S).

    Raises:
        ValueError: shapes do not fit, or fewer keys than queries.
    """
    name = "stretch_cells"
    check_shape(name, "x", x, "(B, H, T, K)", None, None, None, None)
    B, _, T, _ = x.shape
    S = T if keys is None else keys
    if S < T:
        raise ValueError(f"{name}: keys={S}; expected at least x's {T} queries")
    check_segments(name, segments, B, S)
    return stretch(x, visible(B, T, S, causal=causal, segments=segments, device=x.device), fill)
