"""Centroids that follow the tokens: the k-means of routing attention.

B batch, T time, H heads, D head width, K clusters.
"""

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from kernels.routing_attention import nearest, similarities, unit
from kernels.routing_attention.kmeans import (
    cluster_sums,
    commitment_loss,
    count_ema,
    directions,
    histogram,
    lloyd,
    seed_centroids,
    unit_ema,
)
from layers.report import Report

Update = Literal["count_ema", "unit_ema"]

LLOYD_ITERATIONS = 10  # of the initialisation
MOST_POINTS = 16384  # of it, per head


class KMeansRouter(nn.Module):
    """K centroids of unit length per head, state that no gradient trains.

    In training the first forward pass draws them from its tokens, those of all processes
    (k-means++, then Lloyd's algorithm). Each forward pass adds up its tokens by
    cluster; `after_step`, called once per update of the parameters, sums that over all processes
    and moves the centroids. Evaluation, decoding and the second forward pass of activation
    checkpointing leave no trace.

    Source: Roy et al. 2021, section 4.1 and algorithm 1, in the released code's form weighted by
    counts. Differs from both in an empty cluster, which stays; in centroids, which are scaled to
    unit length after each update, so that the largest dot product is the nearest by angle; and in
    the initialisation from data, which is lucidrains/routing-transformer's but for its seeding.

    Args:
        num_heads: H.
        num_clusters: K.
        head_dim: D.
        decay: of the moving averages, per update.
        update: "count_ema", the mean of all tokens of a cluster, newer ones weighing more, or
            "unit_ema", where every update's mean direction weighs the same however many tokens.

    Buffers: centroids (H, K, D); mean_sums (H, K, D) and mean_counts (H, K), the moving averages
    of "count_ema"; initialised, bool, whether a batch has been seen.

    Raises:
        ValueError: an argument out of its range.
    """

    centroids: Tensor
    mean_sums: Tensor
    mean_counts: Tensor
    initialised: Tensor

    def __init__(
        self,
        num_heads: int,
        num_clusters: int,
        head_dim: int,
        *,
        decay: float = 0.999,
        update: Update = "count_ema",
    ) -> None:
        super().__init__()
        if num_clusters < 1:
            raise ValueError(f"num_clusters={num_clusters}: expected at least 1")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: allowed: from 0 up to, but not, 1")
        if update not in get_args(Update):
            raise ValueError(f"update={update!r}: allowed: {', '.join(get_args(Update))}")
        self.num_clusters = num_clusters
        self.decay = decay
        self.update = update
        centroids = normalize(torch.randn(num_heads, num_clusters, head_dim), dim=-1)
        self.register_buffer("centroids", centroids)
        self.register_buffer("mean_sums", centroids.clone())
        self.register_buffer("mean_counts", torch.ones(num_heads, num_clusters))
        self.register_buffer("initialised", torch.tensor(False))
        # Not buffers: DistributedDataParallel overwrites those of all processes by the first's.
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None
        self._ready = False  # spares asking the device for `initialised` in every step

    def labels(self, x: Tensor) -> Tensor:
        """int64 (B, T, H): the nearest centroid of each head of x (B, T, H, D)."""
        return nearest(x, self.centroids)

    def similarities(self, x: Tensor) -> Tensor:
        """Cosines (B, H, K, T) with the centroids."""
        return similarities(x, self.centroids)

    def prepare(self, vectors: list[Tensor], valid: Tensor | None) -> None:
        """Draw the centroids from `vectors`, each (B, T, H, D), if training has just begun.

        A batch of fewer valid tokens than clusters is passed over.
        """
        if self.training and torch.is_grad_enabled() and not self._ready:
            self._initialise(vectors, valid)

    def observe(self, x: Tensor, labels: Tensor, valid: Tensor | None) -> None:
        """Count x (B, T, H, D) for the next update, where a training pass asks for it."""
        if self.training and torch.is_grad_enabled():
            self._accumulate(x, labels, valid)

    def after_step(self) -> None:
        """Move the centroids by what was observed since the last call, in all processes."""
        found = (self._sums, self._counts)
        self._sums = self._counts = None
        sums, counts = (
            like.new_zeros(like.shape) if x is None else x
            for x, like in zip(found, (self.mean_sums, self.mean_counts), strict=True)
        )
        if _distributed():
            both = torch.cat([sums, counts[..., None]], -1)
            dist.all_reduce(both)
            sums, counts = both[..., :-1], both[..., -1]
        self._move(sums.to(self.mean_sums), counts.to(self.mean_counts))

    def tell(
        self,
        report: Report,
        vectors: list[Tensor],
        labels: list[Tensor],
        valid: Tensor | None,
        weight: float,
    ) -> None:
        """Report the commitment loss, `weight` times the mean over `vectors`, and the histogram.

        cluster_share/<r>: the share of tokens in the r-th largest cluster, mean over the heads.
        """
        if weight:
            losses = [
                commitment_loss(unit(x), self.centroids, c, valid)
                for x, c in zip(vectors, labels, strict=True)
            ]
            report.loss("commitment", weight * torch.stack(losses).sum())
        counts = torch.stack([histogram(c, self.num_clusters, valid) for c in labels]).sum(0)
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)  # (H, K)
        entropy = torch.special.entr(share).sum(1)
        report.stat("empty_clusters", (counts == 0).sum(1).float().mean())
        report.stat("effective_clusters", entropy.exp().mean())
        ranked = share.sort(1, descending=True).values.mean(0)
        for r, value in enumerate(ranked.unbind(0)):
            report.stat(f"cluster_share/{r:03d}", value)

    @torch.compiler.disable()
    @torch.no_grad()
    def _initialise(self, vectors: list[Tensor], valid: Tensor | None) -> None:
        self._ready = bool(self.initialised)
        if self._ready:
            return
        if _distributed():
            vectors = [_whole_batch(x) for x in vectors]
            valid = None if valid is None else _whole_batch(valid)
        if not _distributed() or dist.get_rank() == 0:
            self._draw(vectors, valid)
        if _distributed():
            drawn = self.initialised.to(torch.uint8)
            for x in (self.centroids, self.mean_sums, self.mean_counts, drawn):
                dist.broadcast(x, 0)
            self.initialised.copy_(drawn)
        self._ready = bool(self.initialised)

    def _draw(self, vectors: list[Tensor], valid: Tensor | None) -> None:
        parts = [unit(x).flatten(0, 1) if valid is None else unit(x)[valid] for x in vectors]
        points = torch.cat(parts)  # (P, H, D)
        if len(points) < self.num_clusters:
            return
        points = points[:: -(-len(points) // MOST_POINTS)]
        centroids = seed_centroids(points.transpose(0, 1), self.num_clusters)
        for _ in range(LLOYD_ITERATIONS):
            centroids, *_ = lloyd(points[None], centroids)
        _, sums, counts = lloyd(points[None], centroids)
        self.centroids.copy_(centroids)
        # An empty cluster weighs one token.
        self.mean_counts.copy_(counts.clamp(min=1))
        self.mean_sums.copy_(torch.where(counts[..., None] > 0, sums, centroids))
        self.initialised.fill_(True)

    @torch.compiler.disable()
    @torch.no_grad()
    def _accumulate(self, x: Tensor, labels: Tensor, valid: Tensor | None) -> None:
        if torch._C._current_graph_task_id() != -1:  # inside backward: activations made again
            return
        sums, counts = cluster_sums(unit(x), labels, self.num_clusters, valid)
        self._sums = sums if self._sums is None else self._sums + sums
        self._counts = counts if self._counts is None else self._counts + counts

    @torch.no_grad()
    def _move(self, sums: Tensor, counts: Tensor) -> None:
        if self.update == "unit_ema":
            moved = unit_ema(self.centroids, sums, self.decay)
        else:
            moved, mean_counts = count_ema(
                self.mean_sums, self.mean_counts, sums, counts, self.decay
            )
            self.mean_sums.copy_(moved)
            self.mean_counts.copy_(mean_counts)
        # A cluster without tokens keeps every bit.
        moved = torch.where(
            (counts > 0)[..., None], directions(moved, self.centroids), self.centroids
        )
        self.centroids.copy_(moved)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._ready = False
        super()._load_from_state_dict(*args)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _whole_batch(x: Tensor) -> Tensor:
    """x (B, ...) of all n processes, (n B, ...), in the order in which one would have had them.

    They take turns at the examples of a batch (training/data.py).
    """
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)
