"""Attention on torch's scaled_dot_product_attention, in memory linear in the length.

B batch, T queries, S keys (the queries are the last T of S positions), H heads, G key heads,
D head width, W window.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from kernels.attention.documents import attend_by_document
from kernels.attention.tiles import band_block, query_blocks

# Scores that may be masked in one call, B and H aside: under 128 x 128 a mask costs less than the
# host's work of taking documents apart.
_SMALL = 128 * 128


def attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
    segments: Tensor | None,
) -> Tensor:
    """One call where a mask is small or not needed; else bands, blocks or documents."""
    T, S = q.shape[1], k.shape[1]
    if segments is None:
        return _attend(q, k, v, causal, window, scale)
    if T == 1 or T * S <= _SMALL:
        return _sdpa(q, k, v, scale, mask=_mask(segments, T, causal, window))

    def one_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, causal, window, scale)

    return attend_by_document(one_document, q, k, v, segments)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None
) -> Tensor:
    """Attention within one document."""
    T, S = q.shape[1], k.shape[1]
    if window is not None and window < S:
        return _banded(q, k, v, window, scale)
    if not causal or T == 1:
        return _sdpa(q, k, v, scale)
    if T == S:
        return _sdpa(q, k, v, scale, causal=True)
    return _later(q, k, v, scale)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    y = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


def _mask(segments: Tensor, T: int, causal: bool, window: int | None) -> Tensor:
    """(B, 1, T, S) bool. Padding sees padding, so that no row of the mask is empty."""
    S = segments.shape[1]
    mask = segments[:, S - T :, None] == segments[:, None]
    if causal:
        mask = mask & mask.new_ones(T, S).tril(S - T)
    if window is not None:
        place = (segments >= 0).cumsum(1)  # padding takes no place in the window
        mask = mask & (place[:, S - T :, None] - place[:, None] < window)
    return mask[:, None]


def _band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """(queries, keys) bool, the last query over the last key; each sees `window` keys at most."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask.triu(keys - queries - window + 1)


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """Blocks of C >= W queries, each over its own keys and the W - 1 before them.

    The first block, whose past may be shorter, and the last, which may be, are calls of their own.
    """
    (B, T), S, reach = q.shape[:2], k.shape[1], window - 1
    C = band_block(window)
    n = max(0, T // C - 1)  # whole blocks after the first
    head, body = min(T, C), n * C
    past = min(S - T, reach)
    keys = slice(S - T - past, S - T + head)
    outputs = [_in_band(q[:, :head], k[:, keys], v[:, keys], window, scale)]
    if n:
        first = S - T + head  # the body's first key
        q_b = q[:, head : head + body].unflatten(1, (n, C)).flatten(0, 1)
        k_b, v_b = (_spans(x[:, first - C : first + body], n, C, reach) for x in (k, v))
        outputs.append(_in_band(q_b, k_b, v_b, window, scale).reshape(B, body, *q.shape[2:]))
    tail = T - head - body
    if tail:
        keys = slice(S - tail - reach, S)
        outputs.append(_in_band(q[:, T - tail :], k[:, keys], v[:, keys], window, scale))
    return torch.cat(outputs, 1)


def _in_band(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    if q.shape[1] == 1:
        return _sdpa(q, k, v, scale)
    return _sdpa(q, k, v, scale, mask=_band(q.shape[1], k.shape[1], window, q.device))


def _spans(x: Tensor, n: int, C: int, reach: int) -> Tensor:
    """(B, (n+1) C, G, D) -> (B n, reach + C, G, D): every block after the first, with its past."""
    blocks = x.unflatten(1, (n + 1, C))
    return torch.cat([blocks[:, :-1, C - reach :], blocks[:, 1:]], 2).flatten(0, 1)


def _later(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal attention of the last T of S positions, in blocks of queries with a small mask each.

    The masks of all blocks together would be quadratic, so backward makes each again.
    """
    T, S = q.shape[1], k.shape[1]
    outputs = []
    for start, end in query_blocks(T, S):
        seen = S - T + end
        block = (q[:, start:end], k[:, :seen], v[:, :seen], seen, scale)
        if torch.is_grad_enabled():
            y = checkpoint(_in_band, *block, use_reentrant=False, preserve_rng_state=False)
        else:
            y = _in_band(*block)
        outputs.append(y)
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
