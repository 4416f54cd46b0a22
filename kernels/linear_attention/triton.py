"""Linear attention in chunks on a GPU: Triton kernels, forward and backward.

The equations are those of the chunked form. One kernel walks over the chunks with a tile of the
state in registers and writes the state in front of each; the others take a chunk each, in
parallel. The backward pass makes the states again, and with the same walk, from the end, their
gradients. The normaliser's column of the state is a vector of its own beside each tile.

With a feature map MAP, q and k are X wide and the kernels make K features of them, a tile at a
time; without one X is K. TILE of the BK features of a tile are its own.

B batch, T time, H heads, K features, V value width, C chunk length, n chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import block_of, ceil_div, launch
from kernels.linear_attention.features import MapName, num_features
from kernels.linear_attention.flops import CHUNK
from kernels.linear_attention.triton_features import columns, differentiate_inputs, feature_tile
from kernels.segments import documents_between
from kernels.tiles import dot, dot_dtype, load_rows, load_tile, store_rows, store_tile, within


@triton.jit
def walk(
    a, b, divisor, weight, first, segments, documents, states, vectors, last,
    scale, T, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    REVERSE: tl.constexpr, VECTOR: tl.constexpr, MAP: tl.constexpr, X: tl.constexpr,
    C: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The state in front of every chunk, S += scale a^T (b / divisor), over (B H, K, V) tiles.

    With REVERSE from the last chunk to the first: then it is the gradient of the state behind each.
    The vector beside it is sum a weight, `weight` (B, T, H) or one.
    """
    bh, ik, iv = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    batch, head = bh // H, bh % H
    n = tl.cdiv(T, C)
    at_k, own_k = columns(ik, K, TILE, BK)
    at_v, steps = iv * BV + tl.arange(0, BV), tl.arange(0, C)
    W = V + 1 if VECTOR else V
    rows = steps * H
    tile = bh * K * W + (at_k[:, None] * W + at_v[None])
    column = bh * K * W + (at_k * W + V)
    inside = own_k[:, None] & (at_v[None] < V)
    S = tl.zeros((BK, BV), tl.float32)
    z = tl.zeros((BK,), tl.float32)
    if first is not None:
        S += tl.load(first + tile, mask=inside, other=0)
        if VECTOR:
            z += tl.load(first + column, mask=own_k, other=0)
    for i in range(n):
        c = n - 1 - i if REVERSE else i
        here = (bh * n + c) * K
        if states is not None:
            store_tile(states + here * V, S, at_k, own_k, at_v, V)
        if states is not None and VECTOR and iv == 0:
            store_rows(vectors + here, z, at_k, own_k)
        at = c * C + steps
        start = (batch * T + c * C) * H + head
        a_c = feature_tile(a + start * X, rows, at < T, at_k, own_k, MAP, X)
        b_c = load_tile(b + start * V, rows, at < T, at_v, V)
        w = (at < T).to(tl.float32)
        if weight is not None:
            w = load_rows(weight + start, rows, at < T)
        if divisor is not None:
            b_c = b_c / tl.load(divisor + start + rows, mask=at < T, other=1)[:, None]
        if segments is not None:
            before = tl.load(documents + batch * (n + 1) + c)
            after = tl.load(documents + batch * (n + 1) + c + 1)
            number = tl.load(segments + batch * T + at, mask=at < T, other=-1)
            own = (number >= 0) & (number == (before if REVERSE else after))
            b_c = tl.where(own[:, None], b_c, 0)
            w = tl.where(own, w, 0)
            stays = (before == after).to(tl.float32)
            S *= stays
            z *= stays
        S += dot(tl.trans(a_c), b_c, DOT) * scale
        if VECTOR:
            z += tl.sum(a_c * w[:, None], 0) * scale
    tl.store(last + tile, S, mask=inside)
    if VECTOR and iv == 0:
        tl.store(last + column, z, mask=own_k)


@triton.jit
def read(
    q, k, v, segments, documents, states, vectors, y, sums,
    scale, eps, T, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    NORMALIZE: tl.constexpr, MAP: tl.constexpr, X: tl.constexpr,
    C: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk and their sums of weights, over (n, V tiles, B H)."""
    c, iv, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, head, n = bh // H, bh % H, tl.cdiv(T, C)
    at, at_v = c * C + tl.arange(0, C), iv * BV + tl.arange(0, BV)
    start, rows = (batch * T + c * C) * H + head, tl.arange(0, C) * H
    A = tl.zeros((C, C), tl.float32)
    out = tl.zeros((C, BV), tl.float32)
    weight = tl.zeros((C,), tl.float32)
    here = (bh * n + c) * K
    for ik in range(0, tl.cdiv(K, TILE)):
        at_k, own_k = columns(ik, K, TILE, BK)
        q_c = feature_tile(q + start * X, rows, at < T, at_k, own_k, MAP, X)
        k_c = feature_tile(k + start * X, rows, at < T, at_k, own_k, MAP, X)
        A += dot(q_c, tl.trans(k_c), DOT)
        E = load_tile(states + here * V, at_k, own_k, at_v, V)
        out += dot(q_c, E, DOT)
        if NORMALIZE:
            z = load_rows(vectors + here, at_k, own_k)
            weight += tl.sum(q_c * z[None], 1)
    mask = within(segments, batch * T, c, T, C)
    if segments is not None:
        number = tl.load(segments + batch * T + at, mask=at < T, other=-1)
        reads = (number >= 0) & (number == tl.load(documents + batch * (n + 1) + c))
        out = tl.where(reads[:, None], out, 0)
        weight = tl.where(reads, weight, 0)
    A = tl.where(mask, A, 0)
    v_c = load_tile(v + start * V, rows, at < T, at_v, V)
    out = (out + dot(A, v_c, DOT)) * scale
    if NORMALIZE:
        weight = (weight + tl.sum(A, 1)) * scale + eps
        if iv == 0:
            store_rows(sums + start, weight, rows, at < T)
        out /= weight[:, None]
    if segments is not None:  # 0 / eps, or 0 / 0, stands where there is padding
        out = tl.where((number >= 0)[:, None], out, 0)
    store_tile(y + start * V, out, rows, at < T, at_v, V)


@triton.jit
def differentiate_weight(
    grad_y, y, sums, segments, grad_weight, rows_in_all, V: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient of each sum of weights, -(grad_y . y) / sum, over blocks of (B T H) rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < rows_in_all
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, V, BV):
        at_v = start + tl.arange(0, BV)
        g = load_tile(grad_y, rows, there, at_v, V)
        total += tl.sum(g * load_tile(y, rows, there, at_v, V), 1)
    result = -total / tl.load(sums + rows, mask=there, other=1)
    if segments is not None:
        number = tl.load(segments + rows // HEADS, mask=there, other=-1)
        result = tl.where(number >= 0, result, 0)
    tl.store(grad_weight + rows, result, mask=there)


@triton.jit
def differentiate_qk(
    q, k, v, grad_y, sums, grad_weight, segments, documents,
    states, vectors, grad_states, grad_vectors, dq, dk,
    scale, T, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    NORMALIZE: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's queries and keys, over (n, K tiles, B H)."""
    c, ik, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, head, n = bh // H, bh % H, tl.cdiv(T, C)
    at, at_k = c * C + tl.arange(0, C), ik * BK + tl.arange(0, BK)
    start, rows = (batch * T + c * C) * H + head, tl.arange(0, C) * H
    here = (bh * n + c) * K
    reads, writes = at < T, at < T
    if segments is not None:
        number = tl.load(segments + batch * T + at, mask=at < T, other=-1)
        between = documents + batch * (n + 1) + c
        reads = (number >= 0) & (number == tl.load(between))
        writes = (number >= 0) & (number == tl.load(between + 1))
    dA = tl.zeros((C, C), tl.float32)
    dq_c = tl.zeros((C, BK), tl.float32)
    dk_c = tl.zeros((C, BK), tl.float32)
    for first_v in range(0, V, BV):
        at_v = first_v + tl.arange(0, BV)
        g = load_tile(grad_y + start * V, rows, at < T, at_v, V)
        if NORMALIZE:
            g = g / tl.load(sums + start + rows, mask=at < T, other=1)[:, None]
        if segments is not None:
            g = tl.where((number >= 0)[:, None], g, 0)
        v_c = load_tile(v + start * V, rows, at < T, at_v, V)
        dA += dot(g, tl.trans(v_c), DOT)
        E = load_tile(states + here * V, at_k, at_k < K, at_v, V)
        dq_c += dot(g, tl.trans(E), DOT)
        R = load_tile(grad_states + here * V, at_k, at_k < K, at_v, V)
        dk_c += dot(v_c, tl.trans(R), DOT)
    if NORMALIZE:
        g_w = load_rows(grad_weight + start, rows, at < T)
        dA += g_w[:, None]
        dq_c += g_w[:, None] * load_rows(vectors + here, at_k, at_k < K)[None]
        dk_c += load_rows(grad_vectors + here, at_k, at_k < K)[None]
    dq_c = tl.where(reads[:, None], dq_c, 0)
    dk_c = tl.where(writes[:, None], dk_c, 0)
    dA = tl.where(within(segments, batch * T, c, T, C), dA, 0)
    q_c = load_tile(q + start * K, rows, at < T, at_k, K)
    k_c = load_tile(k + start * K, rows, at < T, at_k, K)
    dq_c += dot(dA, k_c, DOT)
    dk_c += dot(tl.trans(dA), q_c, DOT) * scale
    store_tile(dq + start * K, dq_c * scale, rows, at < T, at_k, K)
    store_tile(dk + start * K, dk_c, rows, at < T, at_k, K)


@triton.jit
def differentiate_v(
    q, k, grad_y, sums, segments, documents, grad_states, dv,
    scale, T, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    NORMALIZE: tl.constexpr, MAP: tl.constexpr, X: tl.constexpr,
    C: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's values, over (n, V tiles, B H)."""
    c, iv, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, head, n = bh // H, bh % H, tl.cdiv(T, C)
    at, at_v = c * C + tl.arange(0, C), iv * BV + tl.arange(0, BV)
    start, rows = (batch * T + c * C) * H + head, tl.arange(0, C) * H
    here = (bh * n + c) * K
    A = tl.zeros((C, C), tl.float32)
    dv_c = tl.zeros((C, BV), tl.float32)
    for ik in range(0, tl.cdiv(K, TILE)):
        at_k, own_k = columns(ik, K, TILE, BK)
        q_c = feature_tile(q + start * X, rows, at < T, at_k, own_k, MAP, X)
        k_c = feature_tile(k + start * X, rows, at < T, at_k, own_k, MAP, X)
        A += dot(q_c, tl.trans(k_c), DOT)
        R = load_tile(grad_states + here * V, at_k, own_k, at_v, V)
        dv_c += dot(k_c, R, DOT)
    g = load_tile(grad_y + start * V, rows, at < T, at_v, V)
    if NORMALIZE:
        g = g / tl.load(sums + start + rows, mask=at < T, other=1)[:, None]
    if segments is not None:
        number = tl.load(segments + batch * T + at, mask=at < T, other=-1)
        writes = (number >= 0) & (number == tl.load(documents + batch * (n + 1) + c + 1))
        dv_c = tl.where(writes[:, None], dv_c, 0)
        g = tl.where((number >= 0)[:, None], g, 0)
    A = tl.where(within(segments, batch * T, c, T, C), A, 0) * scale
    dv_c += dot(tl.trans(A), g, DOT)
    store_tile(dv + start * V, dv_c, rows, at < T, at_v, V)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
    feature_map: MapName | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, V), the last state (B, H, K, W), sums (B, T, H, 0 or 1), as the chunked form."""
    B, T, H, V = v.shape
    call = _Call(q, k, v, segments, feature_map)
    states, vectors, last = call.states(k, v, None, None, state, normalize, 1.0, reverse=False)
    y = v.new_empty(B, T, H, V)
    sums = q.new_empty(B, T, H, int(normalize), dtype=torch.float32)
    launch(
        read, (call.n, ceil_div(V, call.BV), B * H),
        call.q, call.k, call.v, call.segments, call.documents, states, vectors, y, sums,
        scale, eps, T, H, call.K, V, NORMALIZE=normalize, warps=call.warps, **call.tiles,
    )  # fmt: skip
    return y, last, sums


def sums(k: Tensor, v: Tensor) -> Tensor:
    """sum_t k_t (v_t, 1)^T, (B, H, K, V + 1) in float32, of k (B, T, H, K) and v (B, T, H, V)."""
    call = _Call(k, k, v, None, None)
    return call.walk(k, v, None, None, None, None, None, 1.0, vector=True, reverse=False)


def backward(
    grad_y: Tensor | None,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    y: Tensor,
    sums: Tensor,
    scale: float,
    feature_map: MapName | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the chunked form's: gradients of q, k, v and the first state."""
    B, T, H, V = v.shape
    normalize = sums.shape[3] == 1
    call = _Call(q, k, v, segments, feature_map)
    y, sums = y.contiguous(), sums.contiguous()
    grad_y = torch.zeros_like(y) if grad_y is None else grad_y.contiguous()
    divisor = grad_weight = None
    if normalize:
        divisor, grad_weight = sums, torch.empty_like(sums)
        launch(
            differentiate_weight, (ceil_div(B * T * H, 64),),
            grad_y, y, sums, call.segments, grad_weight, B * T * H, V, H, ROWS=64, BV=call.BV,
        )  # fmt: skip
    states, vectors, _ = call.states(k, v, None, None, state, normalize, 1.0, reverse=False)
    grad_states, grad_vectors, first = call.states(
        q, grad_y, divisor, grad_weight, grad_state, normalize, scale, reverse=True
    )
    dq, dk, dv = (torch.empty_like(x) for x in (call.q, call.k, call.v))
    given = (
        grad_y, divisor, grad_weight, call.segments, call.documents,
        states, vectors, grad_states, grad_vectors,
    )  # fmt: skip
    if feature_map is None:
        launch(
            differentiate_qk, (call.n, call.num_tiles, B * H),
            call.q, call.k, call.v, *given, dq, dk,
            scale, T, H, call.K, V, NORMALIZE=normalize, warps=8,
            C=CHUNK, BK=call.BK, BV=call.BV, DOT=call.dtype,
        )  # fmt: skip
    else:
        for queries, dx in ((True, dq), (False, dk)):
            launch(
                differentiate_inputs, (call.n, B * H),
                call.q, call.k, call.v, *given, dx,
                scale, T, H, call.K, V, NORMALIZE=normalize, QUERIES=queries,
                BX=block_of(call.X, 64), warps=8, **call.tiles,
            )  # fmt: skip
    launch(
        differentiate_v, (call.n, ceil_div(V, call.BV), B * H),
        call.q, call.k, grad_y, divisor, call.segments, call.documents, grad_states, dv,
        scale, T, H, call.K, V, NORMALIZE=normalize, warps=call.warps, **call.tiles,
    )  # fmt: skip
    return dq, dk, dv, first


class _Call:
    """What one call's kernels share: contiguous inputs, sizes of tiles, documents at chunks."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Tensor | None,
        feature_map: MapName | None,
    ) -> None:
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.X = q.shape[3]
        self.K = num_features(self.X, feature_map)
        self.n = ceil_div(q.shape[1], CHUNK)
        self.BV = block_of(v.shape[3], 64)
        if feature_map == "hedgehog":  # a tile is one of its softmaxes
            self.BK, tile = block_of(self.X, 64), self.X
        else:  # making products takes registers
            self.BK = tile = block_of(self.K, 64 if feature_map is None else 32)
        self.num_tiles = ceil_div(self.K, tile)
        self.warps = 4 if feature_map is None else 8
        # Features are rounded to the dtype of v.
        self.dtype = dot_dtype(q, k, v) if feature_map is None else dot_dtype(v)
        self.tiles = {
            "MAP": feature_map, "X": self.X,
            "C": CHUNK, "TILE": tile, "BK": self.BK, "BV": self.BV, "DOT": self.dtype,
        }  # fmt: skip
        self.segments = self.documents = None
        if segments is not None:
            self.segments = segments.contiguous()
            self.documents = documents_between(self.segments, CHUNK)

    def states(
        self,
        a: Tensor,
        b: Tensor,
        divisor: Tensor | None,
        weight: Tensor | None,
        first: Tensor | None,
        normalize: bool,
        scale: float,
        *,
        reverse: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """States (B H n, K, V) in front of the chunks, their vectors, and the last state."""
        B, _, H, V = self.v.shape
        stored = self.v.dtype if self.dtype != tl.float32 else torch.float32
        states = a.new_empty(B * H, self.n, self.K, V, dtype=stored)
        vectors = a.new_empty(B * H, self.n, self.K, dtype=torch.float32) if normalize else None
        last = self.walk(
            a, b, divisor, weight, first, states, vectors, scale, vector=normalize, reverse=reverse
        )
        return states, vectors, last

    def walk(
        self,
        a: Tensor,
        b: Tensor,
        divisor: Tensor | None,
        weight: Tensor | None,
        first: Tensor | None,
        states: Tensor | None,
        vectors: Tensor | None,
        scale: float,
        *,
        vector: bool,
        reverse: bool,
    ) -> Tensor:
        """The last state of a walk; those in front of the chunks are written to `states`."""
        B, T, H, V = self.v.shape
        last = a.new_empty(B, H, self.K, V + vector, dtype=torch.float32)
        launch(
            walk, (B * H, self.num_tiles, ceil_div(V, self.BV)),
            a.contiguous(), b.contiguous(), divisor, weight,
            None if first is None else first.contiguous(), self.segments, self.documents,
            states, vectors, last, scale, T, H, self.K, V,
            REVERSE=reverse, VECTOR=vector, warps=8, **self.tiles,
        )  # fmt: skip
        return last
