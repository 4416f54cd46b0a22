"""Hedgehog behind a softmax window: exact weights for the newest tokens, learned ones for the rest.

B batch, T time, D model width, H heads, G key and value heads, K key width per head, F features
per head, V value width per head, W window.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kernels.window_linear_attention import (
    leaving,
    window_linear_attention,
    window_linear_attention_flops,
)
from layers.attention_transfer import Rows, window_rows
from layers.feature_maps import Activation, MapInit
from layers.hedgehog import HedgehogAttention
from layers.kv_cache import key_tags, newest
from layers.marks import mark
from layers.projection import Dense, Projection
from layers.report import Report
from layers.segments import belongs, keep_rows, place

Parts = Literal["both", "window", "linear"]


@dataclass(eq=False)
class WindowLinearState:
    """The newest W keys and values of each row's document, and the sums over all before them.

    Row b has min(length[b], W) keys, against the right edge; slots before them hold zeros.
    """

    k: Tensor  # (B, W, G, K)
    v: Tensor  # (B, W, G, V)
    S: Tensor  # (B, H, F, V) sum of phi(k) v^T, float32 or float64
    z: Tensor  # (B, H, F) sum of phi(k)
    length: Tensor  # (B,) int64 tokens of the document seen, which is the next position
    segment: Tensor  # (B,) int64 document that the row ended in
    filled: int  # slots in use by any row, the newest ones
    ragged: bool = False  # whether a row may use fewer of them


class HedgehogWindowAttention(HedgehogAttention):
    """Softmax attention within a sliding window, Hedgehog's linear attention behind it.

        y_t = (g sum_{j in W_t} e^{s_tj - m_t} v_j + a sum_{j < W_t} phi_q(q_t).phi_k(k_j) v_j)
            / (the same sums without v_j)
        s_tj = q_t.k_j / sqrt(K),  m_t = max_{j in W_t} s_tj,  g = sigmoid(c_h)

    Source: Zhang et al. 2024 (LoLCATs: On low-rank linearizing of large language models), section
    3.3.1, with the factors g and a and the subtraction of m_t of its public code; the maps are
    Hedgehog's (Zhang et al. 2024, The Hedgehog & the Porcupine). W_t are the newest `window`
    tokens, t's own included. The state is bounded: W keys and values, S and z.

    Differs from LoLCATs' default in the shape of the window, which there is of whole blocks and
    in decoding a plain sliding one, so that it decodes something else than it trained. Here it is
    sliding in both.

    Its publications warn of themselves: in published models the linear part did next to nothing
    (arXiv 2510.05901). `parts` leaves one of the two out of the same parameters.

    Args:
        window: W; 0 is Hedgehog, and one no shorter than the sequence is softmax attention.
        init_window_factor: c of every head at the start; -2.1972 is g = 0.1.
        affine_attention_factors: a = 1 - g in place of a = 1.
        parts: "both", "window" (a = 0) or "linear" (g = 0: a query sees nothing that is nearer
            than `window`, and the first ones nothing at all).
        Others: as of layers.hedgehog.HedgehogAttention.

    Parameters: those of HedgehogAttention, and window_factors (H,), c of each head, without
    weight decay.

    Raises:
        ValueError: a window below 0, parts="window" without one, or what HedgehogAttention refuses.
    """

    state_type = WindowLinearState

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        window: int = 64,
        init_window_factor: float = -2.1972245773362196,
        affine_attention_factors: bool = False,
        parts: Parts = "both",
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        feature_dim: int | None = None,
        activation: Activation = "softmax",
        halfspace: bool = False,
        map_bias: bool = False,
        skip: bool = False,
        init: MapInit = "identity",
        tie: bool = False,
        rotary: bool = True,
        rotary_base: float = 10000.0,
        eps: float = 1e-12,
        bias: bool = False,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            feature_dim=feature_dim,
            activation=activation,
            halfspace=halfspace,
            map_bias=map_bias,
            skip=skip,
            init=init,
            tie=tie,
            rotary=rotary,
            rotary_base=rotary_base,
            eps=eps,
            bias=bias,
            projection=projection,
            backend=backend,
        )
        if parts not in get_args(Parts):
            raise ValueError(f"parts={parts!r}: allowed: {', '.join(get_args(Parts))}")
        if window < 0 or (window == 0 and parts == "window"):
            raise ValueError(
                f"window={window} with parts={parts!r}: expected at least "
                f"{1 if parts == 'window' else 0}"
            )
        self.window = window
        self.affine_attention_factors = affine_attention_factors
        self.parts: Parts = parts
        self.window_factors = nn.Parameter(torch.full((num_heads,), float(init_window_factor)))
        mark(self, "window_factors", decay=False, own_init=True)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        state: WindowLinearState | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, WindowLinearState | None]:
        """(B, T, D) -> (B, T, D) under the mixer contract."""
        self.check_input(x, state, segments)
        where = place(x, state, segments)
        q, k, v = self.project(x, where.positions)
        tags, past = segments, None
        if state is not None:
            if segments is not None or state.ragged:
                tags = key_tags(state, state.filled, where, segments, x.shape[1])
            used = slice(self.window - state.filled, None)
            k = torch.cat([state.k[:, used], k.to(state.k.dtype)], dim=1)
            v = torch.cat([state.v[:, used], v.to(state.v.dtype)], dim=1)
            past = keep_rows(where.carry, state.S), keep_rows(where.carry, state.z)
        mixed = self._mix(q, k.to(q.dtype), v.to(q.dtype), tags, past, want_state)
        if not isinstance(mixed, tuple):
            return self.merge(mixed), None
        y, (S, z) = mixed
        filled = min(self.window, k.shape[1])
        if segments is None or tags is None:
            ragged = state is not None and state.ragged and x.shape[1] < self.window
            first = k.shape[1] - filled
            k, v = k[:, first:].clone(), v[:, first:].clone()  # not a view of a long past
        else:
            ragged = True
            k, v = newest(belongs(tags, where.last), filled, k, v)
        unused = (0, 0, 0, 0, self.window - filled, 0)
        after = WindowLinearState(
            pad(k, unused), pad(v, unused), S, z, where.length, where.last, filled, ragged
        )
        return self.merge(y), after

    def _mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tags: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
        want_state: bool,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """The operator on q (B, T, H, K) and k, v of the ring and the call, (B, S, G, .)."""
        (k_left, v_left), there = leaving(self.window, q.shape[1], tags, k, v)
        k, v, k_left, v_left = map(self.to_all_heads, (k, v, k_left, v_left))
        if self.parts == "window":  # the maps are not asked
            phi_q = phi_left = q.new_zeros(1).expand(*q.shape[:3], self.key_map.num_features)
        else:
            phi_q = self.query_map(q)
            # Not phi of a key of zeros, which is not zero.
            phi_left = self.key_map(k_left).masked_fill(~there[..., None, None], 0)
        g, a = self.factors()
        return window_linear_attention(
            q,
            k,
            v,
            phi_q,
            phi_left,
            v_left,
            window=self.window,
            window_weight=g,
            linear_weight=a,
            eps=self.eps,
            initial_state=past,
            return_state=want_state,
            segments=tags,
            backend=self.backend,
        )

    def factors(self) -> tuple[Tensor | float, Tensor | float]:
        """g and a, each (H,) or a number; 0 for a part that is left out."""
        g = self.window_factors.sigmoid()
        a = 1 - g if self.affine_attention_factors else 1.0
        return 0.0 if self.parts == "linear" else g, 0.0 if self.parts == "window" else a

    def attention_rows(self, q: Tensor, k: Tensor, segments: Tensor | None) -> Rows:
        """The weights of forward, see HedgehogAttention."""
        g, a = self.factors()
        return window_rows(
            q,
            k,
            self.query_map(q),
            self.key_map(k),
            window=self.window,
            window_weight=g,
            linear_weight=a,
            eps=self.eps,
            segments=segments,
        )

    def new_state(  # type: ignore[override]
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> WindowLinearState:
        """W empty slots and zero sums, whatever `max_len`; the sums are float32 at least."""
        sums = super().new_state(batch_size, max_len, device, dtype)
        slots = (batch_size, self.window, self.num_kv_heads)
        dtype = self.dtype if dtype is None else dtype
        k = torch.zeros(*slots, self.key_dim, device=sums.z.device, dtype=dtype)
        v = torch.zeros(*slots, self.value_dim, device=sums.z.device, dtype=dtype)
        return WindowLinearState(k, v, sums.S, sums.z, sums.length, sums.segment, filled=0)

    def state_bytes(self, batch_size: int, length: int) -> int:
        """Keys and values of W slots, S, z, and two integers per row, whatever the length."""
        slot = self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize
        return super().state_bytes(batch_size, length) + batch_size * self.window * slot

    def flops(self, batch_size: int, length: int) -> int:
        """Projections, feature maps, and the operator."""
        tokens = batch_size * length
        total = self.projection_flops(tokens)
        if self.parts != "window":
            total += self.query_map.flops(tokens) + self.key_map.flops(tokens)
        return total + window_linear_attention_flops(
            batch_size,
            length,
            self.num_heads,
            self.key_dim,
            self.key_map.num_features,
            self.value_dim,
            window=self.window,
            use_window=self.parts != "linear",
            use_linear=self.parts != "window",
        )


@contextmanager
def only(parts: Parts, model: nn.Module) -> Iterator[bool]:
    """Inside, every HedgehogWindowAttention of `model` with parts="both" has `parts`.

    Yields whether there is one.
    """
    layers = [m for m in model.modules() if isinstance(m, HedgehogWindowAttention)]
    both = [layer for layer in layers if layer.parts == "both"]
    for layer in both:
        layer.parts = parts
    try:
        yield bool(both)
    finally:
        for layer in both:
            layer.parts = "both"
