"""The operators and the peers that each is measured against, on inputs of one size.

B batch, T time, H heads, K key width, V value width, D channels, N state, C vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv1d, cross_entropy, linear

import kernels
from benchmarks import attention_operators as attentions
from benchmarks.contenders import OURS, REFERENCE, Contender, Operator, normal, peer, softmax


def _selective_scan(s, T, dtype, device) -> dict[str, Contender]:
    B, D, N = s["B"], s["D"], s["N"]
    u = normal(B, D, T, dtype=dtype, device=device)
    delta = torch.rand(B, D, T, device=device).mul(0.1).to(dtype)
    A = -torch.rand(D, N, device=device) - 0.5
    Bs, Cs = (normal(B, N, T, dtype=dtype, device=device) for _ in range(2))
    pscan, absent = peer("mambapy.pscan", "pscan", "mambapy")

    def ours(*inputs: Tensor, backend: str = "auto") -> Tensor:
        return kernels.selective_scan(*inputs, backend=backend)  # type: ignore[arg-type]

    def parallel(u: Tensor, delta: Tensor, A: Tensor, Bs: Tensor, Cs: Tensor) -> Tensor:
        """In mambapy's layout (B, T, D)."""
        step = delta.transpose(1, 2)[..., None]  # (B, T, D, 1)
        inputs = step * Bs.transpose(1, 2)[:, :, None] * u.transpose(1, 2)[..., None]
        states = pscan((step * A).exp(), inputs)
        return (states @ Cs.transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)

    inputs = (u, delta, A, Bs, Cs)
    return {
        OURS: Contender(ours, inputs),
        REFERENCE: Contender(lambda *x: ours(*x, backend=REFERENCE), inputs),
        "mambapy pscan": Contender(parallel, inputs, absent=absent),
    }


def _ssd(s, T, dtype, device) -> dict[str, Contender]:
    B, H, P, N = s["B"], s["H"], s["P"], s["N"]
    x = normal(B, T, H, P, dtype=dtype, device=device)
    dt = torch.rand(B, T, H, device=device).mul(0.1)
    A = -torch.rand(H, device=device) - 0.5
    Bs, Cs = (normal(B, T, 1, N, dtype=dtype, device=device) for _ in range(2))
    naive, absent = peer(
        "fla.ops.simple_gla.naive", "naive_chunk_simple_gla", "flash-linear-attention"
    )

    def ours(*inputs: Tensor, backend: str = "auto") -> Tensor:
        return kernels.ssd(*inputs, backend=backend)  # type: ignore[arg-type]

    def gla(x: Tensor, dt: Tensor, A: Tensor, Bs: Tensor, Cs: Tensor) -> Tensor:
        q, k = (y.expand(-1, -1, x.shape[2], -1) for y in (Cs, Bs))
        return naive(q, k, x * dt[..., None], dt * A, scale=1.0)[0]

    inputs = (x, dt, A, Bs, Cs)
    q, k = (y.expand(-1, -1, H, -1) for y in (Cs, Bs))
    return {
        OURS: Contender(ours, inputs),
        REFERENCE: Contender(lambda *x: ours(*x, backend=REFERENCE), inputs),
        "fla naive chunk": Contender(gla, inputs, absent=absent),
        "torch sdpa": softmax(q, k, x),
    }


def _causal_conv1d(s, T, dtype, device) -> dict[str, Contender]:
    x = normal(s["B"], T, s["D"], dtype=dtype, device=device)
    weight = normal(s["D"], s["W"], dtype=dtype, device=device)

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        D, W = weight.shape
        return conv1d(x.transpose(1, 2), weight[:, None], padding=W - 1, groups=D)[
            ..., : x.shape[1]
        ].transpose(1, 2)

    return {
        OURS: Contender(kernels.causal_conv1d, (x, weight)),
        REFERENCE: Contender(
            lambda *a: kernels.causal_conv1d(*a, backend=REFERENCE),  # type: ignore[arg-type]
            (x, weight),
        ),
        "torch conv1d, transposed": Contender(torchs, (x, weight)),
    }


def _monarch(s, T, dtype, device) -> dict[str, Contender]:
    D, k = s["D"], s["blocks"]
    x = normal(T, D, dtype=dtype, device=device)
    w1, w2 = (normal(k, D // k, D // k, dtype=dtype, device=device) for _ in range(2))
    dense = normal(D, D, dtype=dtype, device=device)
    return {
        OURS: Contender(kernels.monarch, (x, w1, w2)),
        REFERENCE: Contender(lambda *a: kernels.monarch(*a, backend=REFERENCE), (x, w1, w2)),
        "torch linear": Contender(linear, (x, dense), same=False),
    }


def _linear_recurrence(s, T, dtype, device) -> dict[str, Contender]:
    a = torch.rand(s["B"], T, s["D"], device=device).mul(0.2).add(0.79).to(dtype)
    b = normal(s["B"], T, s["D"], dtype=dtype, device=device)
    return {
        OURS: Contender(kernels.linear_recurrence, (a, b)),
        REFERENCE: Contender(lambda *x: kernels.linear_recurrence(*x, backend=REFERENCE), (a, b)),
    }


def _long_conv(s, T, dtype, device) -> dict[str, Contender]:
    u = normal(s["B"], T, s["D"], dtype=dtype, device=device)
    k = normal(s["D"], T, dtype=torch.float32, device=device)
    return {
        OURS: Contender(kernels.long_conv, (u, k)),
        REFERENCE: Contender(lambda *x: kernels.long_conv(*x, backend=REFERENCE), (u, k)),
    }


def _linear_cross_entropy(s, T, dtype, device) -> dict[str, Contender]:
    x = normal(s["B"], T, s["D"], dtype=dtype, device=device)
    weight = normal(s["C"], s["D"], dtype=dtype, device=device).mul(s["D"] ** -0.5)
    targets = torch.randint(s["C"], (s["B"], T), device=device)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy(linear(x, weight).flatten(0, 1).float(), targets.flatten())

    return {
        OURS: Contender(lambda x, w: kernels.linear_cross_entropy(x, w, targets), (x, weight)),
        "torch, with logits": Contender(plain, (x, weight)),
    }


def _rms_norm(s, T, dtype, device) -> dict[str, Contender]:
    x = normal(s["B"], T, s["D"], dtype=dtype, device=device)
    weight = torch.ones(s["D"], dtype=dtype, device=device)

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps=1e-5)

    return {
        OURS: Contender(kernels.rms_norm, (x, weight)),
        REFERENCE: Contender(lambda *a: kernels.rms_norm(*a, backend=REFERENCE), (x, weight)),
        "torch rms_norm": Contender(torchs, (x, weight)),
    }


_HEADS = {"B": 2, "H": 4, "K": 64, "V": 64}
OPERATORS = {
    "attention": Operator(attentions.attention, _HEADS),
    "causal_conv1d": Operator(_causal_conv1d, {"B": 2, "D": 512, "W": 4}),
    "estimated_sparse_attention": Operator(
        attentions.estimated_sparse_attention, {**_HEADS, "cells": 128, "columns": 64}
    ),
    "linear_attention": Operator(attentions.linear_attention, _HEADS),
    "linear_attention_normalized": Operator(
        attentions.linear_attention_normalized, {**_HEADS, "features": 2}
    ),
    "linear_attention_step": Operator(
        attentions.linear_attention_step, {"B": 1, "H": 8, "K": 64, "V": 64}
    ),
    "linear_cross_entropy": Operator(_linear_cross_entropy, {"B": 2, "D": 256, "C": 8192}),
    "linear_recurrence": Operator(_linear_recurrence, {"B": 2, "D": 512}),
    "long_conv": Operator(_long_conv, {"B": 2, "D": 256}),
    "monarch": Operator(_monarch, {"D": 1024, "blocks": 4}),
    "rms_norm": Operator(_rms_norm, {"B": 2, "D": 512}),
    "routing_attention": Operator(
        attentions.routing_attention, {**_HEADS, "clusters": 64, "window": 256}
    ),
    "routing_attention_topw": Operator(
        attentions.routing_attention_topw, {**_HEADS, "clusters": 16, "window": 128}
    ),
    "selective_scan": Operator(_selective_scan, {"B": 2, "D": 512, "N": 16}),
    "ssd": Operator(_ssd, {"B": 2, "H": 8, "P": 64, "N": 64}),
}
