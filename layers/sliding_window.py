"""Softmax attention over the newest tokens.

B batch, T time, D model width, H heads, G key and value heads, W window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.attention import attention, attention_flops
from layers.kv_cache import key_tags, newest
from layers.multihead import MultiHeadMixer
from layers.projection import Dense, Projection
from layers.report import Report
from layers.segments import NO_DOCUMENT, belongs, place


@dataclass(eq=False)
class WindowState:
    """The newest W keys and values of the document each row ended in, newest last.

    Row b has min(length[b], W) of them, against the right edge; slots before them hold zeros.
    """

    k: Tensor  # (B, W, G, D)
    v: Tensor  # (B, W, G, D)
    length: Tensor  # (B,) int64 tokens of the document seen, which is the next position
    segment: Tensor  # (B,) int64 document that the row ended in
    filled: int  # slots in use by any row, the newest ones
    ragged: bool = False  # whether a row may use fewer of them


class SlidingWindowAttention(MultiHeadMixer):
    """Causal softmax attention in which a token sees itself and the `window - 1` before it.

        y_t = W_o concat_h( sum_{t-W < s <= t} softmax_s(q_t.k_s / sqrt(D_h)) v_s )

    Source: Beltagy et al. 2020 (Longformer), section 3.1; as a layer of recurrent hybrids, Arora
    et al. 2024 (Based), section 4. The state is bounded: the newest W keys and values.

    Differs from Based's code in how the window is counted: its `window_size: 256` lets a token
    see itself and 128 others, which is `window=129` here.

    Args:
        window: W, how many tokens a token sees, itself included.
        Others: as of layers.attention.Attention.

    Raises:
        ValueError: a window below 1, or widths and numbers of heads that do not fit.
    """

    bounded_state = True
    state_type = WindowState

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        window: int,
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
        if window < 1:
            raise ValueError(f"window={window}: expected at least 1, the token itself")
        self.window = window

    def forward(
        self,
        x: Tensor,
        state: WindowState | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, WindowState | None]:
        """(B, T, D) -> (B, T, D) under the mixer contract."""
        self.check_input(x, state, segments)
        where = place(x, state, segments)
        q, k, v = self.project(x, where.positions)
        tags, filled = segments, 0
        if state is not None:
            filled = state.filled
            if segments is not None or state.ragged:
                tags = key_tags(state, filled, where, segments, x.shape[1])
            used = slice(self.window - filled, None)
            k = torch.cat([state.k[:, used], k.to(state.k.dtype)], dim=1)
            v = torch.cat([state.v[:, used], v.to(state.v.dtype)], dim=1)
        y = attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            window=self.window,
            segments=tags,
            backend=self.backend,
        )
        if not want_state:
            return self.merge(y), None
        filled = min(self.window, k.shape[1])
        if segments is None or tags is None:
            ragged = state is not None and state.ragged and x.shape[1] < self.window
            k, v = k[:, -filled:].clone(), v[:, -filled:].clone()  # not a view of a long past
        else:
            ragged = True
            k, v = newest(belongs(tags, where.last), filled, k, v)
        unused = (0, 0, 0, 0, self.window - filled, 0)
        after = WindowState(
            pad(k, unused), pad(v, unused), where.length, where.last, filled, ragged
        )
        return self.merge(y), after

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> WindowState:
        """W empty slots, whatever `max_len`."""
        device = self.device if device is None else device
        shape = (batch_size, self.window, self.num_kv_heads, self.key_dim)
        k, v = torch.zeros(2, *shape, device=device, dtype=dtype or self.dtype)
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return WindowState(k, v, length, torch.full_like(length, NO_DOCUMENT), filled=0)

    def state_bytes(self, batch_size: int, length: int) -> int:
        """Keys and values of W slots, and two integers per row, whatever the length."""
        slot = self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize
        return batch_size * (self.window * slot + 16)

    def flops(self, batch_size: int, length: int) -> int:
        """Projections, scores and weighted sums."""
        mixing = attention_flops(
            batch_size, length, self.num_heads, self.key_dim, window=self.window
        )
        return self.projection_flops(batch_size * length) + mixing
