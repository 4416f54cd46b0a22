"""Routing attention that trains as it decodes.

B batch, T time, D model width, H routing heads, K clusters, W window, Dh head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.routing_attention import cluster_attention, cluster_attention_flops
from layers.cluster_buffer import ClusterBuffer
from layers.report import Report
from layers.routing_heads import RoutingHeads
from layers.segments import NO_DOCUMENT, Place, belongs
from layers.sliding_window import WindowState


@dataclass(eq=False)
class RoutingState:
    """The newest W keys and values of every cluster, and what the local heads remember."""

    buffer: ClusterBuffer
    length: Tensor  # (B,) int64 tokens of the document seen, which is the next position
    segment: Tensor  # (B,) int64 document that the row ended in
    local: WindowState | None  # None where all heads route


class RoutingAttention(RoutingHeads):
    """Attention to the last W tokens of one's own cluster, beside local attention.

        label_i = argmax_c mu_c . x_i / |x_i|      (per head, ties to the lower c)
        y_i = sum_j softmax_j(q_i.k_j / sqrt(Dh)) v_j over the last W of j <= i with
              label(k_j) = label(q_i), and over j = i

    Source: Roy et al. 2021 (Efficient content-based sparse attention with Routing Transformers,
    TACL), section 4.1. The centroids mu are state: see KMeansRouter, which also says when they
    move. Time is T * W per head; with W a multiple of sqrt(T) the paper's T^1.5.

    Differs from the paper in the membership: there each cluster keeps the W tokens that are
    nearest to it of the whole sequence, which later tokens decide (TopWRoutingAttention). Here
    the past alone does, so that training, scoring and decoding agree, and every token is in one
    cluster. Also: positions are rotary in all heads, routing sees vectors that are not rotated;
    queries keep their length in the scores, shared keys have unit length and the scale is
    Dh^-0.5; local heads slide instead of reading blocks; no dropout of attention weights.

    Args:
        d_model: D.
        num_heads: routing and local heads together.
        num_routing_heads: H; half of them by default.
        head_dim: Dh; D / num_heads by default.
        num_clusters: K.
        window: W, how many tokens of its cluster a token sees, itself included.
        local_window: how many tokens a token sees in the local heads, itself included.
        shared_qk: queries are the keys (k = q / |q|), as in the paper's language models.
        self_rule: "last_resort": a token attends to itself only where it sees no other; "allowed":
            as to any other. A shared key is nearest to its own query, and under "allowed" a token
            mostly copies itself.
        rotary: rotate queries and keys by their positions in the document; needs an even Dh.
        rotary_base: see layers/rotary.py.
        decay: of the centroids' moving average, per update of the parameters.
        update: see KMeansRouter.
        commitment: weight of the loss that draws vectors to their centroids, reported as
            "commitment". The public TensorFlow code counts it twice for shared vectors.
        bias: biases in the projections.
        projection: makes the projections.
        backend: form of the operators.

    Parameters and buffers: see RoutingHeads.

    Raises:
        ValueError: an argument out of its range, or numbers of heads that do not fit.
    """

    state_type = RoutingState

    def route(
        self,
        routed: list[Tensor],
        v: Tensor,
        where: Place,
        state: RoutingState | None,
        segments: Tensor | None,
        want_state: bool,
        report: Report | None,
    ) -> tuple[Tensor, list[Tensor], ClusterBuffer | None]:
        """Every token among the last of its cluster."""
        labels = [self.router.labels(x) for x in routed]
        q_labels, k_labels = labels[0], labels[-1]
        q, k = self.attended(routed, where.positions)
        keys, values, key_labels, tags = k, v, k_labels, segments
        if state is not None:
            old_k, old_v, old_labels = _remembered(state.buffer, q_labels)
            if where.carry is not None:
                old_labels = old_labels.masked_fill(~where.carry[:, None, None], -1)
            keys = torch.cat([old_k.to(k.dtype), k], 1)
            values = torch.cat([old_v.to(v.dtype), v], 1)
            key_labels = torch.cat([old_labels, k_labels], 1)
            if segments is not None:
                document = state.segment.clamp(min=0)[:, None]
                tags = torch.cat([document.expand(-1, old_k.shape[1]).to(segments), segments], 1)
        y = cluster_attention(
            q,
            keys,
            values,
            None if self.shared_qk else q_labels,
            key_labels,
            num_clusters=self.router.num_clusters,
            window=self.window,
            self_rule=self.self_rule,
            segments=tags,
            backend=self.backend,
        )
        after = self._remember(k, v, k_labels, where, state, segments) if want_state else None
        return y, labels, after

    def _remember(
        self,
        k: Tensor,
        v: Tensor,
        labels: Tensor,
        where: Place,
        state: RoutingState | None,
        segments: Tensor | None,
    ) -> ClusterBuffer:
        if state is None:
            buffer, stays = ClusterBuffer.empty(self._shape(k.shape[0]), k.device, k.dtype), None
        else:
            # Numbers do not decrease: a row that ends in the document it came from saw no other.
            carry = where.carry
            stays = None if carry is None else carry & (where.last == state.segment)
            buffer = state.buffer
        mine = None if segments is None else belongs(segments, where.last)
        return buffer.written(k, v, labels, mine, stays)

    def _shape(self, batch_size: int) -> tuple[int, int, int, int, int]:
        router = self.router
        return batch_size, self.num_heads, router.num_clusters, self.window, self.head_dim

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RoutingState:
        """W empty slots for every cluster, whatever `max_len`."""
        device = self.device if device is None else device
        dtype = dtype or self.dtype
        buffer = ClusterBuffer.empty(self._shape(batch_size), device, dtype)
        local = None
        if self.local is not None:
            local = self.local.new_state(batch_size, max_len, device, dtype)
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return RoutingState(buffer, length, torch.full_like(length, NO_DOCUMENT), local)

    def state_bytes(self, batch_size: int, length: int) -> int:
        """Keys and values of W slots and a count for every cluster, two integers per row."""
        _, H, K, W, D = self._shape(1)
        local = 0 if self.local is None else self.local.state_bytes(batch_size, length)
        return batch_size * (H * K * (2 * W * D * self.dtype.itemsize + 8) + 16) + local

    def flops(self, batch_size: int, length: int) -> int:
        """Projections, labels, scores and weighted sums."""
        mixing = cluster_attention_flops(
            batch_size,
            length,
            self.num_heads,
            self.head_dim,
            window=self.window,
            shared=self.shared_qk,
        )
        local = 0 if self.local is None else self.local.flops(batch_size, length)
        return self.routing_flops(batch_size * length) + mixing + local


def _remembered(buffer: ClusterBuffer, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The keys that tokens of `labels` (B, T, H) may see: one token needs one cluster."""
    return buffer.one_cluster(labels[:, 0]) if labels.shape[1] == 1 else buffer.everything()
