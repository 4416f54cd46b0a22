"""Sums over windows in plain PyTorch: blocks of queries over their own and the keys before them.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, D head width,
V value width, W window, C queries of a block, n blocks.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.attention.tiles import band_block
from kernels.precision import accumulation_dtype, matmul_dtype

_NOTHING = -2  # document number of the places in front of the first key


def window_sums(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, segments: Tensor | None
) -> Tensor:
    """sum_j e^{s_tj - m_t} [v_j, 1] over each query's window, (B, T, H, V + 1)."""
    T, S = q.shape[1], k.shape[1]
    if segments is None:
        tags = torch.zeros(1, S, dtype=torch.int64, device=q.device)
        return _banded(q, k, v, tags[:, S - T :], tags, window, scale)
    own = segments[:, S - T :]
    if not _has_holes(segments):
        return _banded(q, k, v, own, segments, window, scale)
    # Without the padding between its tokens, a window is as many places as it has tokens.
    queries, keys = _closed(own), _closed(segments)
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    sums = _banded(
        q[rows, queries],
        k[rows, keys],
        v[rows, keys],
        own.gather(1, queries),
        segments.gather(1, keys),
        window,
        scale,
    )
    return sums[rows, queries.argsort(1)]


def _banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tags: Tensor,
    k_tags: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    """Window sums where each query's window is its `window` last places: see window_sums."""
    T, S = q.shape[1], k.shape[1]
    reach = min(window, S) - 1
    past = S - T
    if past < reach:
        missing = reach - past
        k, v = (pad(x, (0, 0, 0, 0, missing, 0)) for x in (k, v))
        k_tags = pad(k_tags, (missing, 0), value=_NOTHING)
    elif past > reach:
        k, v, k_tags = (x[:, past - reach :] for x in (k, v, k_tags))
    C = band_block(window)
    body = T - T % C
    sums = []
    for start, end, size in ((0, body, C), (body, T, T - body)):
        if start < end:
            own, seen = slice(start, end), slice(start, end + reach)
            block = (q[:, own], k[:, seen], v[:, seen], q_tags[:, own], k_tags[:, seen])
            sums.append(_in_blocks(*block, size, scale))
    return torch.cat(sums, 1) if len(sums) > 1 else sums[0]


def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, q_tags: Tensor, k_tags: Tensor, size: int, scale: float
) -> Tensor:
    """Queries in n blocks of `size`, the keys those of all blocks and the reach before them."""
    n = q.shape[1] // size
    reach = k.shape[1] - q.shape[1]
    dtype, exact = matmul_dtype(q, k, v), accumulation_dtype(q, k, v)
    q_b = (q.to(dtype) * scale).unflatten(1, (n, size)).transpose(2, 3)  # (B, n, H, C, D)
    k_b = _spans(k.to(dtype), n, size).permute(0, 1, 3, 4, 2)  # (B, n, H, D, reach + C)
    v_b = _spans(v.to(dtype), n, size).transpose(2, 3)  # (B, n, H, reach + C, V)
    asks, holds = q_tags.unflatten(1, (n, size))[..., None], _spans(k_tags, n, size)[:, :, None]
    # Padding sees all places, so that no query sees none.
    seen = (asks == holds) | (asks < 0)
    band = torch.ones(size, reach + size, dtype=torch.bool, device=q.device).tril(reach).triu()
    scores = (q_b @ k_b).to(exact).masked_fill(~(seen & band)[:, :, None], float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    top = (weights.to(dtype) @ v_b).to(exact)
    sums = torch.cat([top, weights.sum(-1, keepdim=True)], -1)
    return sums.transpose(2, 3).flatten(1, 2)


def _spans(x: Tensor, n: int, size: int) -> Tensor:
    """(B, reach + n C, ...) -> (B, n, reach + C, ...): each block with the reach before it."""
    if n == 1:
        return x[:, None]
    reach = x.shape[1] - n * size  # less than `size`
    before = x[:, : n * size].unflatten(1, (n, size))[:, :, :reach]
    return torch.cat([before, x[:, reach:].unflatten(1, (n, size))], 2)


def _has_holes(segments: Tensor) -> bool:
    """Whether a row has padding between its tokens."""
    valid = segments >= 0
    starts = valid & ~pad(valid, (1, 0))[:, :-1]
    return bool((starts.sum(1) > 1).any())


def _closed(segments: Tensor) -> Tensor:
    """(B, S) an order of the positions that puts padding first and keeps the tokens' order."""
    return (segments >= 0).to(torch.uint8).argsort(dim=1, stable=True)
