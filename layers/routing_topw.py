"""Routing attention as published: clusters of equal size, chosen over the whole sequence.

B batch, T time, D model width, H routing heads, K clusters, W window, Dh head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.routing_attention import Members, balanced_attention, balanced_attention_flops
from layers.report import Report
from layers.routing_heads import RoutingHeads
from layers.segments import NO_DOCUMENT, Place, keep_rows
from layers.sliding_window import WindowState


@dataclass(eq=False)
class ClusterMembers:
    """The W best tokens of every cluster, oldest first, against the right edge.

    A row uses min(W, length) slots of each; those before them hold zeros.
    """

    k: Tensor  # (B, H, K, W, Dh)
    v: Tensor  # (B, H, K, W, Dh)
    scores: Tensor  # (B, H, K, W) cosines with the centroid
    q_scores: Tensor | None  # of the best queries; None where queries and keys are shared


@dataclass(eq=False)
class TopWRoutingState:
    """What the clusters hold, and what the local heads remember."""

    members: ClusterMembers
    length: Tensor  # (B,) int64 tokens of the document seen, which is the next position
    segment: Tensor  # (B,) int64 document that the row ended in
    local: WindowState | None  # None where all heads route


class TopWRoutingAttention(RoutingHeads):
    """Attention inside clusters that hold their W nearest tokens, beside local attention.

        members_c = the W of all positions with the largest mu_c . x_i / |x_i|
        y_i = mean over the clusters c with i in members_c of
              sum_j softmax_j(q_i.k_j / sqrt(Dh)) v_j over j in members_c, j <= i

    Source: Roy et al. 2021 (Efficient content-based sparse attention with Routing Transformers,
    TACL), section 4.1 and algorithm 1. With K W = T it costs the paper's T^1.5. A token that no
    cluster holds gets zeros from the head; their share is reported as "in_no_cluster".

    It is not causal: which tokens a cluster holds is decided with the scores of later ones, and no
    mask repairs that. Perplexities measured in parallel are of that pass; decoding keeps the best
    W of each cluster so far, which is another function. RoutingAttention is the form without the
    leak. With segments, windows and clusters are those of a document; what share of a document of
    n tokens is covered depends on K W / n.

    Differs from the paper as RoutingAttention does in positions, scores, local heads and dropout,
    and in the mean over clusters, which has no eps.

    Args: see RoutingAttention; `window` is how many tokens a cluster holds.

    Parameters and buffers: see RoutingHeads.

    Raises:
        ValueError: an argument out of its range, or numbers of heads that do not fit.
    """

    causal = "leaky"
    leak_reason = "later tokens decide which earlier ones a cluster of top-w routing holds"
    state_type = TopWRoutingState

    def route(
        self,
        routed: list[Tensor],
        v: Tensor,
        where: Place,
        state: TopWRoutingState | None,
        segments: Tensor | None,
        want_state: bool,
        report: Report | None,
    ) -> tuple[Tensor, list[Tensor], ClusterMembers | None]:
        """Every token in the clusters that hold it."""
        scores = [self.router.similarities(x) for x in routed]
        q, k = self.attended(routed, where.positions)
        past = filled = None
        if state is not None:
            held = state.members
            past = Members(held.k, held.v, held.scores, held.q_scores)
            filled = keep_rows(where.carry, state.length.clamp(max=self.window))
        y, count, members = balanced_attention(
            q,
            k,
            v,
            None if self.shared_qk else scores[0],
            scores[-1],
            window=self.window,
            self_rule=self.self_rule,
            segments=segments,
            past=past,
            filled=filled,
            want_members=want_state,
            backend=self.backend,
        )
        if report is not None:
            alone = count == 0
            if segments is not None:
                alone = alone[segments >= 0]
            report.stat("in_no_cluster", alone.float().mean())
        labels = [s.argmax(2).transpose(1, 2) for s in scores]
        return y, labels, None if members is None else ClusterMembers(*members)

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TopWRoutingState:
        """W empty slots for every cluster, whatever `max_len`."""
        device = self.device if device is None else device
        dtype = dtype or self.dtype
        shape = (batch_size, self.num_heads, self.router.num_clusters, self.window)
        k, v = torch.zeros(2, *shape, self.head_dim, device=device, dtype=dtype)
        exact = torch.promote_types(self.dtype, torch.float32)
        scores = torch.zeros(shape, device=device, dtype=exact)
        local = None
        if self.local is not None:
            local = self.local.new_state(batch_size, max_len, device, dtype)
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        members = ClusterMembers(k, v, scores, None if self.shared_qk else scores.clone())
        return TopWRoutingState(members, length, torch.full_like(length, NO_DOCUMENT), local)

    def state_bytes(self, batch_size: int, length: int) -> int:
        """Keys, values and scores of W slots for every cluster, and two integers per row."""
        exact = torch.promote_types(self.dtype, torch.float32)
        slot = 2 * self.head_dim * self.dtype.itemsize
        slot += (1 if self.shared_qk else 2) * exact.itemsize
        local = 0 if self.local is None else self.local.state_bytes(batch_size, length)
        slots = self.num_heads * self.router.num_clusters * self.window
        return batch_size * (slots * slot + 16) + local

    def flops(self, batch_size: int, length: int) -> int:
        """Projections, scores of the clusters, attention inside them."""
        mixing = balanced_attention_flops(
            batch_size,
            length,
            self.num_heads,
            self.head_dim,
            window=self.window,
            num_clusters=self.router.num_clusters,
        )
        local = 0 if self.local is None else self.local.flops(batch_size, length)
        return self.routing_flops(batch_size * length) + mixing + local
