"""Softmax attention over the whole past.

B batch, T time, S slots of the cache, D model width, H heads, G key and value heads.
"""

import torch
from torch import Tensor

from kernels.attention import attention, attention_flops
from layers.kv_cache import KVCache, empty_cache, remember
from layers.multihead import MultiHeadMixer
from layers.projection import Dense, Projection
from layers.report import Report
from layers.segments import place


class Attention(MultiHeadMixer):
    """Causal softmax attention with grouped-query heads (Ainslie et al. 2023) and rotary positions.

        y_t = W_o concat_h( sum_{s <= t} softmax_s(q_t.k_s / sqrt(D_h)) v_s )

    Source: Vaswani et al. 2017, section 3.2. The state is a KV cache, which grows by one slot per
    token. Differs from the paper in its positions: rotary (layers/rotary.py), from 0 in every
    document, and not added to the input.

    Args:
        d_model: D.
        num_heads: H.
        num_kv_heads: G, a divisor of H; H by default.
        head_dim: width of a head; D / H by default.
        rotary: rotate queries and keys by their positions; needs an even head_dim.
        rotary_base: see layers/rotary.py.
        qk_norm: RMSNorm over each query's and key's head (Dehghani et al. 2023, section 2).
        bias: biases in the four projections.
        projection: makes the four projections.
        backend: form of kernels.attention.

    Parameters: see MultiHeadMixer.

    Raises:
        ValueError: widths and numbers of heads that do not fit.
    """

    bounded_state = False
    time_exponent = 2.0
    state_type = KVCache

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: bool = True,
        rotary_base: float = 10000.0,
        qk_norm: bool = False,
        bias: bool = False,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            rotary=rotary,
            rotary_base=rotary_base,
            qk_norm=qk_norm,
            bias=bias,
            projection=projection,
            backend=backend,
        )

    def forward(
        self,
        x: Tensor,
        state: KVCache | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, KVCache | None]:
        """(B, T, D) -> (B, T, D) under the mixer contract.

        With `segments` the state takes the shape of its longest row, which a GPU must tell the
        host: `want_state` then waits for the device.
        """
        self.check_input(x, state, segments)
        where = place(x, state, segments)
        q, k, v = self.project(x, where.positions)
        k, v, tags, after = remember(state, k, v, where, segments, want_state)
        y = attention(q, k.to(q.dtype), v.to(q.dtype), segments=tags, backend=self.backend)
        return self.merge(y), after

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """No tokens; the first append takes memory for `max_len` of them at once."""
        device = self.device if device is None else device
        dtype = self.dtype if dtype is None else dtype
        return empty_cache(batch_size, max_len, self.num_kv_heads, self.key_dim, device, dtype)

    def state_bytes(self, batch_size: int, length: int) -> int:
        """Keys and values of `length` slots, and two integers per row; spare room not counted."""
        slot = self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize
        return batch_size * (length * slot + 16)

    def flops(self, batch_size: int, length: int) -> int:
        """Projections, scores and weighted sums."""
        mixing = attention_flops(batch_size, length, self.num_heads, self.key_dim)
        return self.projection_flops(batch_size * length) + mixing
