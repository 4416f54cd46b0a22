"""Linear attention: softmax's exp(q.k) replaced by phi(q).phi(k).

B batch, T time, D model width, H heads, K key width per head, F features per head, V value width
per head.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.linear_attention import linear_attention, linear_attention_flops
from layers.feature_maps import EluFeatureMap, FeatureMap, ReluFeatureMap, TaylorFeatureMap
from layers.multihead import MultiHeadMixer
from layers.projection import Dense, Projection
from layers.report import Report
from layers.segments import NO_DOCUMENT, Place, keep_rows, place

FeatureMapName = Literal["elu", "relu", "taylor"]


@dataclass(frozen=True, eq=False)
class LinearAttentionState:
    """Sums over the tokens of the document each row ended in, float32 or float64."""

    S: Tensor  # (B, H, F, V) sum of phi(k) v^T
    z: Tensor  # (B, H, F) sum of phi(k)
    length: Tensor  # (B,) int64 tokens of the document seen
    segment: Tensor  # (B,) int64 document that the row ended in


class FeatureMapAttention(MultiHeadMixer):
    """What all mixers of linear attention share: everything but the two feature maps.

        y_t = sum_{s <= t} phi_q(q_t).phi_k(k_s) v_s / (sum_{s <= t} phi_q(q_t).phi_k(k_s) + eps)

    Source: Katharopoulos et al. 2020 (Transformers are RNNs), equations 10-12. The state is
    bounded: the sums S and z. A subclass sets `query_map`, `key_map`, `normalize` and `eps`.
    """

    bounded_state = True
    state_type = LinearAttentionState
    query_map: FeatureMap
    key_map: FeatureMap
    normalize: bool
    eps: float

    def forward(
        self,
        x: Tensor,
        state: LinearAttentionState | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, LinearAttentionState | None]:
        """(B, T, D) -> (B, T, D) under the mixer contract."""
        self.check_input(x, state, segments)
        where = place(x, state, segments)
        q, k, v = self.project(x, where.positions)
        k, v = self.to_all_heads(k), self.to_all_heads(v)
        past = self.past_sums(x, where, state, segments, prefix_len)
        feature_map = self.key_map.operator_map
        if feature_map is None:
            q, k = self.query_map(q).to(v.dtype), self.key_map(k).to(v.dtype)
        else:  # the operator may then keep the features out of memory
            q, k = self.query_map.inputs(q), self.key_map.inputs(k)
        mixed = linear_attention(
            q,
            k,
            v,
            normalize=self.normalize,
            eps=self.eps,
            initial_state=past,
            return_state=want_state,
            segments=segments,
            feature_map=feature_map,
            backend=self.backend,
        )
        if not isinstance(mixed, tuple):
            return self.merge(mixed), None
        y, (S, z) = mixed
        return self.merge(y), LinearAttentionState(S, z, where.length, where.last)

    def past_sums(
        self,
        x: Tensor,
        where: Place,
        state: LinearAttentionState | None,
        segments: Tensor | None,
        prefix_len: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """S and z that each row's first document starts from; None is zero."""
        if state is None:
            return None
        return keep_rows(where.carry, state.S), keep_rows(where.carry, state.z)

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LinearAttentionState:
        """Zero sums, float32 unless the parameters are float64, whatever `dtype`."""
        device = self.device if device is None else device
        shape = (batch_size, self.num_heads, self.key_map.num_features)
        z = torch.zeros(*shape, device=device, dtype=self._sum_dtype)
        S = torch.zeros(*shape, self.value_dim, device=device, dtype=self._sum_dtype)
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return LinearAttentionState(S, z, length, torch.full_like(length, NO_DOCUMENT))

    def state_bytes(self, batch_size: int, length: int) -> int:
        """S, z, and two integers per row, whatever the length."""
        sums = self.num_heads * self.key_map.num_features * (self.value_dim + 1)
        return batch_size * (sums * self._sum_dtype.itemsize + 16)

    def flops(self, batch_size: int, length: int) -> int:
        """Projections, feature maps, and the operator."""
        tokens = batch_size * length
        maps = self.query_map.flops(tokens) + self.key_map.flops(tokens)
        mixing = linear_attention_flops(
            batch_size,
            length,
            self.num_heads,
            self.key_map.num_features,
            self.value_dim,
        )
        return self.projection_flops(tokens) + maps + mixing

    @property
    def _sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)


class LinearAttention(FeatureMapAttention):
    """Linear attention with a feature map that has no parameters.

        y_t = sum_{s <= t} phi(q_t).phi(k_s) v_s / (sum_{s <= t} phi(q_t).phi(k_s) + eps)

    Source: Katharopoulos et al. 2020 (Transformers are RNNs), equations 7 and 10-12, for
    phi = 1 + elu; Arora et al. 2024 (Based), section 4.1, for the Taylor map.

    Differs from the papers in its positions: rotary, before the map, unless `rotary=False`. (Based
    leaves positions to its other layers; conf/mixer/based.yaml does the same.)

    Args:
        d_model: D.
        num_heads: H.
        feature_map: "elu" (1 + elu), "relu" or "taylor" (order 2).
        num_kv_heads: heads of keys and values, a divisor of H; H by default.
        key_dim: K; D / H by default. Based has 16.
        value_dim: V; D / H by default.
        compressed: keep each product of the Taylor map once: the same output from 153 in place of
            273 features at K = 16.
        rotary: rotate queries and keys by their positions; needs an even key_dim.
        rotary_base: see layers/rotary.py.
        normalize: divide by the sum of the weights.
        eps: added to that sum.
        bias: biases in the four projections.
        projection: makes the four projections.
        backend: form of kernels.linear_attention.

    Parameters: see MultiHeadMixer.

    Raises:
        ValueError: an unknown feature map, or widths and numbers of heads that do not fit.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        feature_map: FeatureMapName = "elu",
        num_kv_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        compressed: bool = True,
        rotary: bool = True,
        rotary_base: float = 10000.0,
        normalize: bool = True,
        eps: float = 1e-6,
        bias: bool = False,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            rotary=rotary,
            rotary_base=rotary_base,
            bias=bias,
            projection=projection,
            backend=backend,
        )
        if eps < 0:
            raise ValueError(f"eps={eps}: expected at least 0")
        self.normalize = normalize
        self.eps = eps
        # No parameters, hence one map for queries and keys.
        self.query_map = self.key_map = _feature_map(feature_map, self.key_dim, compressed)


def _feature_map(name: FeatureMapName, key_dim: int, compressed: bool) -> FeatureMap:
    if name == "elu":
        return EluFeatureMap(key_dim)
    if name == "relu":
        return ReluFeatureMap(key_dim)
    if name == "taylor":
        return TaylorFeatureMap(key_dim, compressed=compressed)
    raise ValueError(f"feature_map={name!r}: allowed: elu, relu, taylor")
