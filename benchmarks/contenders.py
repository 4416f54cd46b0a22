"""What is timed side by side: contenders of one operator, and inputs for them.

B batch, T time, H heads, K key width, V value width.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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


def peer(module: str, name: str, package: str) -> tuple[Callable[..., Any], str]:
    """A peer's function, and why it is not there."""
    try:
        return getattr(importlib.import_module(module), name), ""
    except (ImportError, AttributeError) as error:
        return missing, f"absent: {package} ({type(error).__name__})"


def missing(*_: Any) -> Tensor:
    """In the place of a peer that is not there."""
    raise RuntimeError("an absent peer was called")


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, T, H, .) -> (B, H, T, .), copied."""
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


def time_first(y: Tensor) -> Tensor:
    """(B, H, T, .) -> (B, T, H, .)."""
    return y.transpose(1, 2)


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, dtype=dtype, device=device)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """Causal softmax attention on the same q, k, v: what the operator would take the place of."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    return Contender(run, heads_first(q, k, v), same=False, to_ours=time_first)


def qkv(s: dict[str, int], T: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """(B, T, H, K) twice and (B, T, H, V)."""
    shape = (s["B"], T, s["H"])
    return [normal(*shape, s[w], dtype=dtype, device=device) for w in ("K", "K", "V")]
