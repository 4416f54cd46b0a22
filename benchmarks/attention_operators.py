"""Attention, and what takes its place, beside their peers.

B batch, T time, H heads, K key width, V value width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

import kernels
from benchmarks.contenders import (
    OURS,
    REFERENCE,
    Contender,
    heads_first,
    normal,
    peer,
    qkv,
    softmax,
    time_first,
)


def attention(s, T, dtype, device) -> dict[str, Contender]:
    """Softmax attention."""
    q, k, v = qkv(s, T, dtype, device)
    sdpa = softmax(q, k, v)
    return {
        OURS: Contender(kernels.attention, (q, k, v)),
        REFERENCE: Contender(lambda *x: kernels.attention(*x, backend="reference"), (q, k, v)),
        "torch sdpa": Contender(sdpa.run, sdpa.inputs, to_ours=time_first),
    }


def linear_attention(s, T, dtype, device) -> dict[str, Contender]:
    """Without a normaliser, as the peer's naive form."""
    q, k, v = qkv(s, T, dtype, device)
    q, k = q.abs(), k.abs()
    naive, absent = peer(
        "fla.ops.linear_attn.naive", "naive_chunk_linear_attn", "flash-linear-attention"
    )

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
        return kernels.linear_attention(q, k, v, normalize=False, backend=backend)  # type: ignore

    def first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = naive(q, k, v, scale=1.0, normalize=False)
        return out[0] if isinstance(out, tuple) else out

    return {
        OURS: Contender(ours, (q, k, v)),
        REFERENCE: Contender(lambda *x: ours(*x, backend=REFERENCE), (q, k, v)),
        "fla naive chunk": Contender(first, (q, k, v), absent=absent),
        "torch sdpa": softmax(q, k, v),
    }


def linear_attention_normalized(s, T, dtype, device) -> dict[str, Contender]:
    """Hedgehog's: `features` times K positive features, and their sum as the normaliser."""
    features = {**s, "K": s["features"] * s["K"]}
    q, k, v = qkv(features, T, dtype, device)
    q, k = (x.softmax(-1) for x in (q, k))
    dense = qkv(s, T, dtype, device)

    def ours(*x: Tensor, backend: str = "auto") -> Tensor:
        return kernels.linear_attention(*x, backend=backend)  # type: ignore[return-value]

    return {
        OURS: Contender(ours, (q, k, v)),
        REFERENCE: Contender(lambda *x: ours(*x, backend=REFERENCE), (q, k, v)),
        "torch sdpa": softmax(*dense),
    }


def linear_attention_step(s, T, dtype, device) -> dict[str, Contender]:
    """One token behind T others: a state, beside attention to the cached keys and values."""
    q, k, v = qkv(s, 1, dtype, device)
    B, H, K, V = s["B"], s["H"], s["K"], s["V"]
    S, z = torch.rand(B, H, K, V, device=device), torch.rand(B, H, K, device=device)
    _, keys, values = heads_first(*qkv(s, T, dtype, device))

    def ours(q, k, v, S, z, backend: str = "auto") -> Tensor:
        return kernels.linear_attention(
            q, k, v, normalize=False, initial_state=(S, z), return_state=True, backend=backend
        )[0]

    return {
        OURS: Contender(ours, (q, k, v, S, z)),
        REFERENCE: Contender(lambda *x: ours(*x, backend=REFERENCE), (q, k, v, S, z)),
        "torch sdpa, cache": Contender(
            scaled_dot_product_attention, (*heads_first(q), keys, values), same=False
        ),
    }


def _routing(s, T, dtype, device, mode: str) -> dict[str, Contender]:
    q, k, v = qkv(s, T, dtype, device)
    centroids = normalize(
        normal(s["H"], s["clusters"], s["K"], dtype=torch.float32, device=device), dim=-1
    )
    window = min(s["window"], T)

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
        return kernels.routing_attention(
            q, k, v, centroids.to(q.dtype), window=window, mode=mode, backend=backend  # type: ignore
        )  # fmt: skip

    contenders = {
        OURS: Contender(ours, (q, k, v)),
        # Equal similarities in bfloat16 fall to either form's order: outputs are not compared.
        REFERENCE: Contender(
            lambda *x: ours(*x, backend=REFERENCE), (q, k, v), same=dtype == torch.float32
        ),
        "torch sdpa": softmax(q, k, v),
    }
    if mode == "topw":
        contenders["routing-transformer"] = _kmeans_attention(s, window, q, k, v, centroids)
    return contenders


def routing_attention(s, T, dtype, device) -> dict[str, Contender]:
    """The strict form: the last `window` keys of the same label."""
    return _routing(s, T, dtype, device, "strict")


def routing_attention_topw(s, T, dtype, device) -> dict[str, Contender]:
    """The published form: the `window` positions nearest to each centroid."""
    return _routing(s, T, dtype, device, "topw")


def _kmeans_attention(
    s: dict[str, int], window: int, q: Tensor, k: Tensor, v: Tensor, centroids: Tensor
) -> Contender:
    """The peer's layer on the same centroids, which it does not move in evaluation mode.

    It also computes its auxiliary loss, and adds a memory key to every cluster.
    """
    make, absent = peer(
        "routing_transformer.routing_transformer", "KmeansAttention", "routing-transformer"
    )
    if absent:
        return Contender(make, (q, k, v), same=False, absent=absent)
    layer: Any = make(s["clusters"], window, s["H"], s["K"], causal=True)
    layer.kmeans.means.copy_(centroids)
    layer.kmeans.initted.fill_(True)
    layer.to(q.device, q.dtype).eval()
    return Contender(lambda *x: layer(*x)[0], heads_first(q, k, v), same=False)


def estimated_sparse_attention(s, T, dtype, device) -> dict[str, Contender]:
    """The sparse part of SEA, on estimates that are given: choosing cells, and attending."""
    q, k, v = qkv(s, T, dtype, device)
    logits = normal(s["B"], s["H"], T, s["cells"], dtype=torch.float32, device=device)
    probs = (2 * logits).softmax(-1)

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
        return kernels.estimated_sparse_attention(
            q, k, v, probs, k_cells=s["columns"], backend=backend
        )

    return {
        OURS: Contender(ours, (q, k, v)),
        REFERENCE: Contender(lambda *x: ours(*x, backend=REFERENCE), (q, k, v)),
        "torch sdpa": softmax(q, k, v),
    }
