"""The keys and values that strict routing attention remembers: a ring of W for every cluster.

B batch, T time, H heads, K clusters, W window, D head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from layers.segments import keep_rows


@dataclass(eq=False)
class ClusterBuffer:
    """The newest W keys and values of each cluster, from one document.

    The n-th token of a cluster, from 0, stands in slot n mod W; slots never used hold zeros.
    """

    k: Tensor  # (B, H, K, W, D)
    v: Tensor  # (B, H, K, W, D)
    count: Tensor  # (B, H, K) int64 tokens of the document that went to the cluster

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int, int, int],
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> "ClusterBuffer":
        """No tokens in a buffer of `shape` (B, H, K, W, D)."""
        k, v = torch.zeros(2, *shape, device=device, dtype=dtype)
        return cls(k, v, torch.zeros(shape[:3], dtype=torch.int64, device=device))

    def everything(self) -> tuple[Tensor, Tensor, Tensor]:
        """k, v (B, K*W, H, D) and their labels (B, K*W, H), -1 in unused slots.

        The keys of a cluster stand in the order of time.
        """
        W = self.k.shape[3]
        slots, used = self._in_time(self.count)
        label = torch.arange(self.k.shape[2], device=self.k.device)[:, None].expand(-1, W)
        k, v = (
            torch.take_along_dim(x, slots[..., None], 3).flatten(2, 3).transpose(1, 2)
            for x in (self.k, self.v)
        )
        return k, v, torch.where(used, label, -1).flatten(2).transpose(1, 2)

    def one_cluster(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for one cluster, `labels` (B, H): k, v (B, W, H, D) and labels (B, W, H)."""
        B, H = labels.shape
        rows = torch.arange(B, device=labels.device)[:, None]
        heads = torch.arange(H, device=labels.device)
        slots, used = self._in_time(self.count[rows, heads, labels])  # (B, H, W)
        where = (rows[..., None], heads[:, None], labels[..., None], slots)
        tags = torch.where(used, labels[..., None], -1)
        return self.k[where].transpose(1, 2), self.v[where].transpose(1, 2), tags.transpose(1, 2)

    def written(
        self, k: Tensor, v: Tensor, labels: Tensor, mine: Tensor | None, stays: Tensor | None
    ) -> "ClusterBuffer":
        """The buffer after k, v (B, T, H, D) with labels (B, T, H).

        Args:
            mine: bool (B, T), the tokens that count; None: all.
            stays: bool (B,), the rows that go on; the others are emptied first. None: all.
        """
        (B, H, K, W, D), T = self.k.shape, k.shape[1]
        before = keep_rows(stays, self.count)
        if mine is not None:
            labels = torch.where(mine[..., None], labels, K)
        labels = labels.transpose(1, 2)  # (B, H, T)
        if T == 1:
            earlier, new = torch.zeros_like(labels), one_hot(labels[..., 0], K + 1)
        else:
            so_far = one_hot(labels, K + 1).cumsum(2)  # (B, H, T, K + 1)
            earlier = so_far.gather(3, labels[..., None]).squeeze(3) - 1
            new = so_far[:, :, -1]
        count = before + new[..., :K]
        number = pad(before, (0, 1)).gather(2, labels) + earlier
        stay = (labels < K) & (number >= pad(count, (0, 1)).gather(2, labels) - W)
        slot = torch.where(stay, labels * W + number % W, K * W)[..., None].expand(-1, -1, -1, D)

        def write(old: Tensor, x: Tensor) -> Tensor:
            old = pad(keep_rows(stays, old).flatten(2, 3), (0, 0, 0, 1))  # a slot to throw away
            return old.scatter(2, slot, x.transpose(1, 2).to(old.dtype))[:, :, :-1]

        ring_k, ring_v = (write(*x).view(B, H, K, W, D) for x in ((self.k, k), (self.v, v)))
        return ClusterBuffer(ring_k, ring_v, count)

    def _in_time(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """Slots (..., W), oldest first and unused ones before, and which of them are in use."""
        W = self.k.shape[3]
        slots = (count[..., None] + torch.arange(W, device=count.device)) % W
        return slots, slots < count[..., None]
