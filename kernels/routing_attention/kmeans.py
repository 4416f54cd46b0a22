"""Spherical k-means over unit vectors: what a batch says of the centroids, and how they move.

B batch, T time, H heads, D head width, K clusters, P points.
"""

import torch
from torch import Tensor

from kernels.precision import outside_autocast
from kernels.routing_attention.assignment import EPS


@torch.no_grad()
@outside_autocast
def cluster_sums(
    x: Tensor, labels: Tensor, num_clusters: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum (H, K, D) and number (H, K) of the vectors x (B, T, H, D) by label (B, T, H).

    Positions where `valid` (B, T) is False are left out.
    """
    member = _members(labels, num_clusters, valid).to(x.dtype)
    return torch.einsum("bthk,bthd->hkd", member, x), member.sum((0, 1))


def histogram(labels: Tensor, num_clusters: int, valid: Tensor | None = None) -> Tensor:
    """int64 (H, K): how many valid positions of labels (B, T, H) there are of each."""
    return _members(labels, num_clusters, valid).sum((0, 1))


def _members(labels: Tensor, num_clusters: int, valid: Tensor | None) -> Tensor:
    """(B, T, H, K) bool."""
    member = labels[..., None] == torch.arange(num_clusters, device=labels.device)
    return member if valid is None else member & valid[..., None, None]


def directions(sums: Tensor, centroids: Tensor) -> Tensor:
    """Unit vectors along `sums` (H, K, D); where a sum vanishes, its centroid as it is."""
    length = sums.norm(dim=-1, keepdim=True)
    return torch.where(length > EPS, sums / length.clamp(min=EPS), centroids)


def unit_ema(centroids: Tensor, sums: Tensor, decay: float) -> Tensor:
    """mu_c <- decay mu_c + (1 - decay) m_c, m_c the direction of cluster c's sum.

    An empty cluster stays. As in the public PyTorch code (lucidrains/routing-transformer 1.6.1),
    the result is shorter than the unit.
    """
    return decay * centroids + (1 - decay) * directions(sums, centroids)


def count_ema(
    mean_sums: Tensor, mean_counts: Tensor, sums: Tensor, counts: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """M_c <- decay M_c + (1 - decay) sum_c and N_c likewise; the cluster's mean is M_c / N_c.

    Source: the released TensorFlow code of Roy et al. 2021. Differs from it in an empty cluster,
    which stays as it is: theirs starts N at 0, and a cluster without a token in the first step
    then gets a mean of length 1e5, which wins every later token on its side.

    Args:
        mean_sums, mean_counts: M (H, K, D) and N (H, K).
        sums, counts: of the step.
    """
    alive = counts > 0
    new_sums = decay * mean_sums + (1 - decay) * sums
    new_counts = decay * mean_counts + (1 - decay) * counts
    return (
        torch.where(alive[..., None], new_sums, mean_sums),
        torch.where(alive, new_counts, mean_counts),
    )


@torch.no_grad()
@outside_autocast
def lloyd(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration of Lloyd's algorithm on unit `points` (B, T, H, D).

    Returns:
        the new centroids (H, K, D), an empty cluster's unchanged, and the sums and counts that
        they come from.
    """
    labels = torch.einsum("bthd,hkd->bthk", points, centroids).argmax(-1)
    sums, counts = cluster_sums(points, labels, centroids.shape[1])
    return directions(sums, centroids), sums, counts


@torch.no_grad()
def seed_centroids(points: Tensor, num_clusters: int) -> Tensor:
    """(H, K, D): points of each head of (H, P, D), drawn far apart from torch's generator.

    Each is drawn with probability proportional to 1 - cos to the nearest drawn before, which is
    half the squared distance (k-means++, Arthur and Vassilvitskii 2007, section 2.2).
    """
    H, P, D = points.shape
    gap = points.new_ones(H, P)
    chosen = []
    for _ in range(num_clusters):
        # The bit in front keeps a draw possible where all points are taken.
        index = torch.multinomial(gap.clamp(min=0) + 1e-9, 1)
        centroid = points.gather(1, index[..., None].expand(-1, -1, D))  # (H, 1, D)
        chosen.append(centroid)
        gap = torch.minimum(gap, 1 - (points * centroid).sum(-1))
    return torch.cat(chosen, 1)


def commitment_loss(
    x: Tensor, centroids: Tensor, labels: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Mean of (x - mu)^2 over all numbers of x (B, T, H, D), mu the centroid of its label.

    The gradient reaches x alone. Positions where `valid` (B, T) is False do not count.
    """
    head = torch.arange(centroids.shape[0], device=x.device)
    distance = (x - centroids.detach().to(x.dtype)[head, labels]).square()
    if valid is None:
        return distance.mean()
    count = valid.sum().clamp(min=1) * distance[0, 0].numel()
    return (distance * valid[..., None, None]).sum() / count
