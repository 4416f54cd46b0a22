"""Projections to heads and back, for every mixer of queries, keys and values.

B batch, T time, D model width, H heads, G key and value heads, K key width per head, V value
width per head.
"""

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from layers.mixer import Mixer
from layers.norm import RMSNorm
from layers.projection import Dense, Projection, projection_flops
from layers.rotary import rotate, rotation


class MultiHeadMixer(Mixer):
    """A mixer with the projections of multi-head attention (Vaswani et al. 2017, section 3.2.2).

    Parameters, as (out, in) of a dense projection: q_proj.weight (H*K, D), k_proj.weight (G*K, D),
    v_proj.weight (G*V, D), o_proj.weight (D, H*V); q_norm.weight and k_norm.weight (K,) where
    `qk_norm` is set. Head h is rows h*K to (h+1)*K-1, and reads key head h // (H/G).
    """

    bounded_state: ClassVar[bool]

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        rotary: bool = True,
        rotary_base: float = 10000.0,
        qk_norm: bool = False,
        bias: bool = False,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_heads(d_model, num_heads, kv_heads, key_dim, value_dim)
        self.d_model = d_model
        self.num_heads = num_heads
        self.num_kv_heads = kv_heads
        self.key_dim = d_model // num_heads if key_dim is None else key_dim
        self.value_dim = d_model // num_heads if value_dim is None else value_dim
        if rotary and self.key_dim % 2:
            raise ValueError(
                f"rotary=True with {self.key_dim} features per head: "
                "rotary positions need an even number"
            )
        self.rotary = rotary
        self.rotary_base = rotary_base
        self.backend = backend
        self.q_proj = projection(d_model, num_heads * self.key_dim, bias)
        self.k_proj = projection(d_model, kv_heads * self.key_dim, bias)
        self.v_proj = projection(d_model, kv_heads * self.value_dim, bias)
        self.o_proj = projection(num_heads * self.value_dim, d_model, bias)
        self.q_norm = RMSNorm(self.key_dim, backend=backend) if qk_norm else None
        self.k_norm = RMSNorm(self.key_dim, backend=backend) if qk_norm else None

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, H, K), k (B, T, G, K), v (B, T, G, V); q and k normed, then rotated."""
        q = rearrange(self.q_proj(x), "b t (h k) -> b t h k", h=self.num_heads)
        k = rearrange(self.k_proj(x), "b t (g k) -> b t g k", g=self.num_kv_heads)
        v = rearrange(self.v_proj(x), "b t (g v) -> b t g v", g=self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            by = rotation(positions, self.key_dim, self.rotary_base, q.dtype)
            q, k = rotate(q, by), rotate(k, by)
        return q, k, v

    def to_all_heads(self, x: Tensor) -> Tensor:
        """Keys or values (B, T, G, .) -> (B, T, H, .): what each head reads."""
        groups = self.num_heads // self.num_kv_heads
        return x if groups == 1 else x.repeat_interleave(groups, dim=2)

    def merge(self, y: Tensor) -> Tensor:
        """Concatenate the heads of y (B, T, H, V) and project them back to (B, T, D)."""
        return self.o_proj(y.flatten(2))

    def projection_flops(self, tokens: int) -> int:
        """FLOPs of the four projections over `tokens` positions."""
        layers: tuple[nn.Module, ...] = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        return sum(projection_flops(layer, tokens) for layer in layers)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, and of the activations outside autocast."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device


def _check_heads(
    d_model: int, num_heads: int, kv_heads: int, key_dim: int | None, value_dim: int | None
) -> None:
    if d_model < 1 or num_heads < 1 or kv_heads < 1:
        raise ValueError(
            f"d_model={d_model}, num_heads={num_heads}, num_kv_heads={kv_heads}: "
            "each must be at least 1"
        )
    if num_heads % kv_heads:
        raise ValueError(f"num_kv_heads={kv_heads}: expected a divisor of num_heads={num_heads}")
    if d_model % num_heads and (key_dim is None or value_dim is None):
        raise ValueError(
            f"num_heads={num_heads}: expected a divisor of d_model={d_model}, "
            "or the width of a head given"
        )
    for width in (key_dim, value_dim):
        if width is not None and width < 1:
            raise ValueError(f"{width} features per head: expected at least 1")
