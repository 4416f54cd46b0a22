"""The operators and the peers that each is measured against, on inputs of one size.

B batch, T time, H heads, K key width, V value width, D channels, N state, C vocabulary.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, cross_entropy, linear, scaled_dot_product_attention

import kernels

OURS = "seqmix"
REFERENCE = "reference"


@dataclass(frozen=True)
class Contender:
    """One form of an operator.

    Attributes:
        run: from the inputs to the output.
        inputs: in the layout that `run` likes best; converting them is not timed.
        same: whether it computes what ours does, so that the outputs can be compared.
        to_ours: its output in our layout.
        weights: parameters that training also takes the gradients of.
        absent: why it cannot be run; `run` is then not called.
    """

    run: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    same: bool = True
    to_ours: Callable[[Tensor], Tensor] = lambda y: y
    weights: tuple[Tensor, ...] = ()
    absent: str = ""


@dataclass(frozen=True)
class Operator:
    """`make(sizes, T, dtype, device)` gives the contenders by name, ours first."""

    make: Callable[[dict[str, int], int, torch.dtype, torch.device], dict[str, Contender]]
    sizes: dict[str, int] = field(default_factory=dict)


def _peer(module: str, name: str, package: str) -> tuple[Callable[..., Any], str]:
    """A peer's function, and why it is not there."""
    try:
        return getattr(importlib.import_module(module), name), ""
    except (ImportError, AttributeError) as error:
        return _missing, f"absent: {package} ({type(error).__name__})"


def _missing(*_: Any) -> Tensor:
    raise RuntimeError("an absent peer was called")


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


def _time_first(y: Tensor) -> Tensor:
    return y.transpose(1, 2)


def _normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device)


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """Causal softmax attention on the same q, k, v: what the operator would take the place of."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    return Contender(run, _heads_first(q, k, v), same=False, to_ours=_time_first)


def _qkv(s: dict[str, int], T: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    shape = (s["B"], T, s["H"])
    return [_normal(*shape, s[w], dtype=dtype, device=device) for w in ("K", "K", "V")]


def _attention(s, T, dtype, device) -> dict[str, Contender]:
    q, k, v = _qkv(s, T, dtype, device)
    sdpa = _softmax(q, k, v)
    return {
        OURS: Contender(kernels.attention, (q, k, v)),
        REFERENCE: Contender(lambda *x: kernels.attention(*x, backend="reference"), (q, k, v)),
        "torch sdpa": Contender(sdpa.run, sdpa.inputs, to_ours=_time_first),
    }


def _linear_attention(s, T, dtype, device) -> dict[str, Contender]:
    q, k, v = _qkv(s, T, dtype, device)
    q, k = q.abs(), k.abs()
    naive, absent = _peer(
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
        "torch sdpa": _softmax(q, k, v),
    }


def _selective_scan(s, T, dtype, device) -> dict[str, Contender]:
    B, D, N = s["B"], s["D"], s["N"]
    u = _normal(B, D, T, dtype=dtype, device=device)
    delta = torch.rand(B, D, T, device=device).mul(0.1).to(dtype)
    A = -torch.rand(D, N, device=device) - 0.5
    Bs, Cs = (_normal(B, N, T, dtype=dtype, device=device) for _ in range(2))
    pscan, absent = _peer("mambapy.pscan", "pscan", "mambapy")

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
    x = _normal(B, T, H, P, dtype=dtype, device=device)
    dt = torch.rand(B, T, H, device=device).mul(0.1)
    A = -torch.rand(H, device=device) - 0.5
    Bs, Cs = (_normal(B, T, 1, N, dtype=dtype, device=device) for _ in range(2))
    naive, absent = _peer(
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
        "torch sdpa": _softmax(q, k, x),
    }


def _causal_conv1d(s, T, dtype, device) -> dict[str, Contender]:
    x = _normal(s["B"], T, s["D"], dtype=dtype, device=device)
    weight = _normal(s["D"], s["W"], dtype=dtype, device=device)

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
    x = _normal(T, D, dtype=dtype, device=device)
    w1, w2 = (_normal(k, D // k, D // k, dtype=dtype, device=device) for _ in range(2))
    dense = _normal(D, D, dtype=dtype, device=device)
    return {
        OURS: Contender(kernels.monarch, (x, w1, w2)),
        REFERENCE: Contender(lambda *a: kernels.monarch(*a, backend=REFERENCE), (x, w1, w2)),
        "torch linear": Contender(linear, (x, dense), same=False),
    }


def _linear_recurrence(s, T, dtype, device) -> dict[str, Contender]:
    a = torch.rand(s["B"], T, s["D"], device=device).mul(0.2).add(0.79).to(dtype)
    b = _normal(s["B"], T, s["D"], dtype=dtype, device=device)
    return {
        OURS: Contender(kernels.linear_recurrence, (a, b)),
        REFERENCE: Contender(lambda *x: kernels.linear_recurrence(*x, backend=REFERENCE), (a, b)),
    }


def _long_conv(s, T, dtype, device) -> dict[str, Contender]:
    u = _normal(s["B"], T, s["D"], dtype=dtype, device=device)
    k = _normal(s["D"], T, dtype=torch.float32, device=device)
    return {
        OURS: Contender(kernels.long_conv, (u, k)),
        REFERENCE: Contender(lambda *x: kernels.long_conv(*x, backend=REFERENCE), (u, k)),
    }


def _linear_cross_entropy(s, T, dtype, device) -> dict[str, Contender]:
    x = _normal(s["B"], T, s["D"], dtype=dtype, device=device)
    weight = _normal(s["C"], s["D"], dtype=dtype, device=device).mul(s["D"] ** -0.5)
    targets = torch.randint(s["C"], (s["B"], T), device=device)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy(linear(x, weight).flatten(0, 1).float(), targets.flatten())

    return {
        OURS: Contender(lambda x, w: kernels.linear_cross_entropy(x, w, targets), (x, weight)),
        "torch, with logits": Contender(plain, (x, weight)),
    }


def _rms_norm(s, T, dtype, device) -> dict[str, Contender]:
    x = _normal(s["B"], T, s["D"], dtype=dtype, device=device)
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
    "attention": Operator(_attention, _HEADS),
    "causal_conv1d": Operator(_causal_conv1d, {"B": 2, "D": 512, "W": 4}),
    "linear_attention": Operator(_linear_attention, _HEADS),
    "linear_cross_entropy": Operator(_linear_cross_entropy, {"B": 2, "D": 256, "C": 8192}),
    "linear_recurrence": Operator(_linear_recurrence, {"B": 2, "D": 512}),
    "long_conv": Operator(_long_conv, {"B": 2, "D": 256}),
    "monarch": Operator(_monarch, {"D": 1024, "blocks": 4}),
    "rms_norm": Operator(_rms_norm, {"B": 2, "D": 512}),
    "selective_scan": Operator(_selective_scan, {"B": 2, "D": 512, "N": 16}),
    "ssd": Operator(_ssd, {"B": 2, "H": 8, "P": 64, "N": 64}),
}
