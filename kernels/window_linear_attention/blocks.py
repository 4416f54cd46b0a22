"""Window-and-linear attention: blocks of queries over their own keys and the window before them.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, D head width,
V value width, W window, C queries of a block, n blocks.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.attention.tiles import band_block
from kernels.linear_attention import State, linear_attention
from kernels.precision import accumulation_dtype, matmul_dtype, outside_autocast

_NOTHING = -2  # document number of the places in front of the first key


@outside_autocast
def window_linear_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_left: Tensor,
    v_left: Tensor,
    *,
    window: int,
    window_weight: Tensor | float,
    linear_weight: Tensor | float,
    scale: float,
    eps: float,
    initial_state: State | None,
    segments: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, State | None]:
    """Numerator and denominator of either part side by side, V + 1 columns, then one division."""
    V = v.shape[3]
    exact = accumulation_dtype(q, k, v)
    both: list[Tensor] = []
    state = initial_state
    if isinstance(window_weight, Tensor) or window_weight != 0:
        near = window_sums(q, k, v, window, scale, segments)
        both.append(near * _per_head(window_weight, near))
    if isinstance(linear_weight, Tensor) or linear_weight != 0:
        own = None if segments is None else segments[:, segments.shape[1] - q.shape[1] :]
        far, state = _linear_sums(
            phi_q, phi_left, v_left.to(exact), initial_state, own, return_state
        )
        both.append(far * _per_head(linear_weight, far))
    elif return_state and state is None:
        (B, _, H, F) = phi_q.shape
        state = (q.new_zeros(B, H, F, V, dtype=exact), q.new_zeros(B, H, F, dtype=exact))
    if not both:
        raise ValueError("window_linear_attention: both parts are left out")
    total = both[0] + both[1] if len(both) == 2 else both[0]
    return (total[..., :V] / (total[..., V:] + eps)).to(v.dtype), state


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


def _linear_sums(
    phi_q: Tensor,
    phi_left: Tensor,
    v_left: Tensor,
    past: State | None,
    segments: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, State | None]:
    """phi(q) [S, z] at every query, (B, T, H, V + 1), and the last S and z."""
    V = v_left.shape[3]
    if past is not None:
        past = (torch.cat([past[0], past[1][..., None]], -1), past[1])
    summed = linear_attention(
        phi_q,
        phi_left,
        pad(v_left, (0, 1), value=1.0),
        normalize=False,
        initial_state=past,
        return_state=return_state,
        segments=segments,
        backend="torch",
    )
    if not isinstance(summed, tuple):
        return summed, None
    far, (S, _) = summed
    return far, (S[..., :V].contiguous(), S[..., V].contiguous())


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


def _per_head(weight: Tensor | float, sums: Tensor) -> Tensor | float:
    return weight.to(sums.dtype)[:, None] if isinstance(weight, Tensor) else weight


def _has_holes(segments: Tensor) -> bool:
    """Whether a row has padding between its tokens."""
    valid = segments >= 0
    starts = valid & ~pad(valid, (1, 0))[:, :-1]
    return bool((starts.sum(1) > 1).any())


def _closed(segments: Tensor) -> Tensor:
    """(B, S) an order of the positions that puts padding first and keeps the tokens' order."""
    return (segments >= 0).to(torch.uint8).argsort(dim=1, stable=True)
