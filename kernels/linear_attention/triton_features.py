"""The feature maps of linear attention inside Triton kernels: a tile of features from its inputs.

The equations are those of features.features. C rows, BK features of a tile, X inputs of a row.
"""

import triton
import triton.language as tl

from kernels.linear_attention.features import SMALLEST_FEATURE
from kernels.tiles import dot, load_rows, load_tile, store_tile, within

SMALLEST = tl.constexpr(SMALLEST_FEATURE)
ROOT_HALF = tl.constexpr(0.5**0.5)


@triton.jit
def columns(i, K, TILE: tl.constexpr, BK: tl.constexpr):
    """The features of tile i, (BK,), and which of them are its own: the first TILE, below K."""
    lanes = tl.arange(0, BK)
    at = i * TILE + lanes
    own = at < K
    if TILE < BK:
        own = own & (lanes < TILE)
    return at, own


@triton.jit
def feature_tile(x, rows, there, at, own, MAP: tl.constexpr, X: tl.constexpr):
    """Features `at` of x[rows] in float32, (C, BK), zero outside."""
    if MAP is None:
        return load_tile(x, rows, there, at, X)
    if MAP == "hedgehog":
        phi = tl.maximum(_softmax_tile(x, rows, there, at, own, X), SMALLEST)
    else:
        left, right, factor = _products(at, X, MAP)
        phi = _take(x, rows, there, left, X) * _take(x, rows, there, right, X) * factor[None]
    return tl.where(there[:, None] & own[None], phi, 0)


@triton.jit
def differentiate_inputs(
    q, k, v, grad_y, sums, grad_weight, segments, documents,
    states, vectors, grad_states, grad_vectors, dx,
    scale, T, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    NORMALIZE: tl.constexpr, QUERIES: tl.constexpr, MAP: tl.constexpr, X: tl.constexpr,
    BX: tl.constexpr,
    C: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradient of what one chunk's queries, or keys, are made of, over (n, B H).

    That of a tile of features is a sum over the chunk and one over the state beside it; the map
    adds the tiles up.
    """
    c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, n = bh // H, bh % H, tl.cdiv(T, C)
    at = c * C + tl.arange(0, C)
    there = at < T
    start, rows = (batch * T + c * C) * H + head, tl.arange(0, C) * H
    here = (bh * n + c) * K
    reaches = there  # whether a token reads the state in front, or writes that behind
    if segments is not None:
        number = tl.load(segments + batch * T + at, mask=there, other=-1)
        beside = tl.load(documents + batch * (n + 1) + c + (0 if QUERIES else 1))
        reaches = (number >= 0) & (number == beside)
    A = tl.zeros((C, C), tl.float32)
    for first_v in range(0, V, BV):
        at_v = first_v + tl.arange(0, BV)
        g = _output_gradient(grad_y, sums, segments, batch * T, start, rows, at, T, at_v, V)
        A += dot(g, tl.trans(load_tile(v + start * V, rows, there, at_v, V)), DOT)
    if NORMALIZE:
        g_w = load_rows(grad_weight + start, rows, there)
        A += g_w[:, None]
    A = tl.where(within(segments, batch * T, c, T, C), A, 0) * scale
    if not QUERIES:
        A = tl.trans(A)
    own, others = (q, k) if QUERIES else (k, q)
    sides, side_vectors = (states, vectors) if QUERIES else (grad_states, grad_vectors)
    result = tl.zeros((C, BX), tl.float32)
    for i in range(0, tl.cdiv(K, TILE)):
        at_k, own_k = columns(i, K, TILE, BK)
        dphi = tl.zeros((C, BK), tl.float32)
        for first_v in range(0, V, BV):
            at_v = first_v + tl.arange(0, BV)
            if QUERIES:
                b = _output_gradient(grad_y, sums, segments, batch * T, start, rows, at, T, at_v, V)
            else:
                b = load_tile(v + start * V, rows, there, at_v, V)
            side = load_tile(sides + here * V, at_k, own_k, at_v, V)
            dphi += dot(b, tl.trans(side), DOT)
        if NORMALIZE:
            z = load_rows(side_vectors + here, at_k, own_k)[None]
            dphi += g_w[:, None] * z if QUERIES else z
        if QUERIES:
            dphi *= scale
        dphi = tl.where(reaches[:, None], dphi, 0)
        dphi += dot(A, feature_tile(others + start * X, rows, there, at_k, own_k, MAP, X), DOT)
        dphi = tl.where(there[:, None] & own_k[None], dphi, 0)
        result += _through_map(dphi, own + start * X, rows, there, at_k, own_k, MAP, X, BX, DOT)
    store_tile(dx + start * X, result, rows, there, tl.arange(0, BX), X)


@triton.jit
def _output_gradient(grad_y, sums, segments, row, start, rows, at, T, at_v, V):
    """The gradient of a chunk's outputs before their division, zero for padding."""
    g = load_tile(grad_y + start * V, rows, at < T, at_v, V)
    if sums is not None:
        g = g / tl.load(sums + start + rows, mask=at < T, other=1)[:, None]
    if segments is not None:
        number = tl.load(segments + row + at, mask=at < T, other=-1)
        g = tl.where((number >= 0)[:, None], g, 0)
    return g


@triton.jit
def _through_map(
    dphi, x, rows, there, at, own, MAP: tl.constexpr, X: tl.constexpr, BX: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """What a tile's gradient dphi (C, BK), zero outside, adds to that of its inputs, (C, BX)."""
    if MAP == "hedgehog":  # BX is BK: a tile is a softmax of all inputs
        p = _softmax_tile(x, rows, there, at, own, X)
        risen = tl.where(p > SMALLEST, p * dphi, 0)
        return (risen - p * tl.sum(risen, 1)[:, None]) * tl.where(at < X, 1.0, -1.0)[None]
    left, right, factor = _products(at, X, MAP)
    dphi *= factor[None]
    inputs = tl.arange(0, BX)
    to_left = (left[:, None] == inputs[None]).to(tl.float32)
    to_right = (right[:, None] == inputs[None]).to(tl.float32)
    dx = dot(dphi * _take(x, rows, there, right, X), to_left, DOT)
    return dx + dot(dphi * _take(x, rows, there, left, X), to_right, DOT)


@triton.jit
def _softmax_tile(x, rows, there, at, own, X):
    """softmax(x) where the features `at` lie below X, softmax(-x) where they do not."""
    column = tl.where(at < X, at, at - X)
    inside = there[:, None] & own[None]
    z = tl.load(x + rows[:, None] * X + column[None], mask=inside, other=0).to(tl.float32)
    z = tl.where(own[None], tl.where(at < X, z, -z), float("-inf"))
    e = tl.exp(z - tl.max(z, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def _products(at, X, MAP: tl.constexpr):
    """The two inputs whose product each feature of Taylor's is, -1 for one, and its factor."""
    i = tl.maximum(at - 1 - X, 0)
    if MAP == "taylor":
        a, b = i // X, i % X
        factor = tl.full(at.shape, ROOT_HALF, tl.float32)
    else:  # row by row of a triangle; roots of whole numbers are right to less than a thousandth
        a = ((tl.sqrt(8.0 * i + 1) - 1) * 0.5 + 1e-3).to(tl.int32)
        b = i - a * (a + 1) // 2
        factor = tl.where(a == b, ROOT_HALF, 1.0)
    product = at > X
    return tl.where(product, a, at - 1), tl.where(product, b, -1), tl.where(product, factor, 1.0)


@triton.jit
def _take(x, rows, there, columns, X):
    """x[rows, columns] in float32, one where a column is -1, (C, BK)."""
    mask = there[:, None] & (columns[None] >= 0) & (columns[None] < X)
    values = tl.load(x + rows[:, None] * X + columns[None], mask=mask, other=0).to(tl.float32)
    return tl.where(columns[None] < 0, 1.0, values)
