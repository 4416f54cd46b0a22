"""The calls whose kernels are looked at: each operator at usual sizes, forward and backward.

B batch, T time, H heads, K key width, V value width, D channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.prefix_linear_attention import prefix_linear_attention as prefix_attention
from kernels.window_linear_attention import window_linear_attention as window_attention

BF16, F32 = torch.bfloat16, torch.float32


def _random(*shape: int, dtype: torch.dtype = BF16, grad: bool = True) -> Tensor:
    return torch.rand(*shape, dtype=dtype).requires_grad_(grad)


def linear_attention() -> Any:
    """B1 T512 H2 K64 V64, normalised."""
    q, k, v = (_random(1, 512, 2, 64) for _ in range(3))
    return kernels.linear_attention(q, k, v, backend="triton")


def linear_attention_hedgehog() -> Any:
    """B1 T512 H2 V64, normalised; the K128 of Hedgehog's map made of 64."""
    q, k, v = (_random(1, 512, 2, 64, dtype=dtype) for dtype in (F32, F32, BF16))
    return kernels.linear_attention(q, k, v, feature_map="hedgehog", backend="triton")


def linear_attention_taylor() -> Any:
    """B1 T512 H2 V64, normalised; the K153 of Based's map made of 16."""
    q, k, v = (_random(1, 512, 2, X, dtype=d) for X, d in ((16, F32), (16, F32), (64, BF16)))
    return kernels.linear_attention(q, k, v, feature_map="taylor_compressed", backend="triton")


def prefix_linear_attention() -> Any:
    """B1 T256 M128 H2 K64 V64."""
    q, k, v, *prefix = (_random(1, t, 2, 64) for t in (256, 256, 256, 128, 128))
    return prefix_attention(q, k, v, *prefix, backend="triton")


def rms_norm() -> Any:
    """512 rows of 768 channels."""
    return kernels.rms_norm(_random(512, 768), _random(768), backend="triton")


def rms_norm_gated() -> Any:
    """512 rows of 1536 channels in one group, the gate first as in Mamba-2."""
    x, gate = _random(512, 1536), _random(512, 1536)
    return kernels.rms_norm(x, _random(1536), gate=gate, backend="triton")


def linear_cross_entropy() -> Any:
    """64 tokens, width 64, 50257 words; the softmax between two plain products."""
    targets = torch.randint(0, 50257, (64,))
    x, weight = _random(64, 64), _random(50257, 64)
    return kernels.linear_cross_entropy(x, weight, targets, backend="triton")


def monarch() -> Any:
    """256 rows, 1024 by 1024 in 4 blocks."""
    x, w1, w2 = _random(256, 1024), _random(4, 256, 256), _random(4, 256, 256)
    return kernels.monarch(x, w1, w2, backend="triton")


def causal_conv1d() -> Any:
    """B1 T512 D768, four taps, with bias and SiLU."""
    x, weight, bias = _random(1, 512, 768), _random(768, 4), _random(768)
    return kernels.causal_conv1d(x, weight, bias, activation="silu", backend="triton")


def ssd() -> Any:
    """B1 L256 H4 P64 N128 in one group, with skip and gate."""
    x, z = (_random(1, 256, 4, 64) for _ in range(2))
    dt, A, D = (_random(*s, dtype=torch.float32) for s in ((1, 256, 4), (4,), (4,)))
    B, C = (_random(1, 256, 1, 128) for _ in range(2))
    return kernels.ssd(x, dt, -A, B, C, D=D, z=z, backend="triton")


def attention() -> Any:
    """B1 T256 H2 D64, causal."""
    q, k, v = (_random(1, 256, 2, 64) for _ in range(3))
    return kernels.attention(q, k, v, backend="triton")


def attention_window() -> Any:
    """B1 T256 H2 D64, a window of 64 over packed documents."""
    q, k, v = (_random(1, 256, 2, 64) for _ in range(3))
    segments = (torch.arange(256) // 100)[None]
    return kernels.attention(q, k, v, window=64, segments=segments, backend="triton")


def window_linear_attention() -> Any:
    """B1 T256 H2 D64, 64 features, a window of 64."""
    q, k, v, phi_q, phi_left, v_left = (_random(1, 256, 2, 64) for _ in range(6))
    return window_attention(
        q, k, v, phi_q, phi_left, v_left, window=64, window_weight=0.5, backend="triton"
    )


def routing_attention() -> Any:
    """B1 T256 H2 D64, 8 clusters, a window of 64, strict."""
    q, k, v = (torch.randn(1, 256, 2, 64).to(BF16).requires_grad_() for _ in range(3))
    centroids = torch.nn.functional.normalize(torch.randn(2, 8, 64), dim=-1)
    return kernels.routing_attention(q, k, v, centroids, window=64, backend="triton")


def estimated_sparse_attention() -> Any:
    """B1 T128 H2 D64, 32 columns, 8 cells a row."""
    q, k, v = (_random(1, 128, 2, 64) for _ in range(3))
    probs = torch.rand(1, 2, 128, 32).softmax(-1)
    return kernels.estimated_sparse_attention(q, k, v, probs, k_cells=8, backend="triton")


def linear_recurrence() -> Any:
    """B1 T512 D256, real."""
    a, b = (_random(1, 512, 256, dtype=torch.float32) for _ in range(2))
    return kernels.linear_recurrence(a, b, backend="triton")


def linear_recurrence_complex() -> Any:
    """B1 T512 D256, complex as in LRU."""
    a, b = (torch.rand(1, 512, 256, dtype=torch.complex64).requires_grad_() for _ in range(2))
    return kernels.linear_recurrence(a, b, backend="triton").real


def selective_scan() -> Any:
    """B1 D32 N16 L128, with skip and gate as in Mamba."""
    u, delta, z = (_random(1, 32, 128) for _ in range(3))
    A, B, C = _random(32, 16, dtype=torch.float32), _random(1, 16, 128), _random(1, 16, 128)
    D, bias = (_random(32, dtype=torch.float32) for _ in range(2))
    return kernels.selective_scan(u, delta, A, B, C, D, z, bias, True, backend="triton")


def decode_steps() -> Any:
    """One token, B2 H4: linear attention K64 V64, SSD P64 N128, selective scan D64 N16."""
    one = [_random(2, 1, 4, 64, grad=False) for _ in range(3)]
    with torch.no_grad():
        kernels.linear_attention(*one, return_state=True, backend="triton")
        rates, shared = torch.rand(4), _random(2, 1, 1, 128, grad=False)
        kernels.ssd(one[0], torch.rand(2, 1, 4), -rates, shared, shared, backend="triton")
        u, A, B = torch.rand(2, 64, 1).to(BF16), torch.rand(64, 16), torch.rand(2, 16, 1).to(BF16)
        kernels.selective_scan(u, u, -A, B, B, backend="triton")
    return torch.zeros(1, requires_grad=True)


# What to call, by name: that of the operator, and what is special about it.
CALLS: dict[str, Callable[[], Any]] = {
    call.__name__: call
    for call in (
        linear_attention,
        linear_attention_hedgehog,
        linear_attention_taylor,
        prefix_linear_attention,
        rms_norm,
        rms_norm_gated,
        linear_cross_entropy,
        monarch,
        attention,
        attention_window,
        window_linear_attention,
        routing_attention,
        estimated_sparse_attention,
        causal_conv1d,
        ssd,
        selective_scan,
        linear_recurrence,
        linear_recurrence_complex,
        decode_steps,
    )
}


def run(name: str) -> None:
    """Forward and backward of a call; the numbers in it are of no interest."""
    torch.manual_seed(0)
    CALLS[name]().float().sum().backward()
