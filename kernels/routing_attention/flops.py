"""FLOPs of routing attention: every score computed counts, masked or not, as torch counts them.

T queries, S keys, D head width, W window, K clusters.
"""

from kernels.routing_attention.tiles import Tiles


def cluster_attention_flops(
    batch: int,
    length: int,
    num_heads: int,
    head_dim: int,
    *,
    window: int,
    key_length: int | None = None,
    causal: bool = True,
    shared: bool = True,
) -> int:
    """FLOPs of one forward pass of strict attention as FlopCounterMode counts them.

    Args:
        length: T.
        key_length: S; T by default.
        shared: queries and keys of one position have one label.
    """
    keys = length if key_length is None else key_length
    return 4 * batch * num_heads * head_dim * _scores(length, keys, window, causal, shared)


def cluster_attention_backward_flops(
    batch: int,
    length: int,
    num_heads: int,
    head_dim: int,
    *,
    window: int,
    key_length: int,
    causal: bool,
    shared: bool,
) -> int:
    """The scores again, then the gradients of the weights, of v, k and q."""
    scores = _scores(length, key_length, window, causal, shared)
    return 10 * batch * num_heads * head_dim * scores


def balanced_attention_flops(
    batch: int, length: int, num_heads: int, head_dim: int, *, window: int, num_clusters: int
) -> int:
    """FLOPs of one forward pass of top-w attention without a past or documents."""
    members = min(window, length)
    return 4 * batch * num_heads * num_clusters * members * members * head_dim


def similarity_flops(
    batch: int, length: int, num_heads: int, head_dim: int, num_clusters: int
) -> int:
    """FLOPs of comparing every token with every centroid."""
    return 2 * batch * length * num_heads * head_dim * num_clusters


def _scores(queries: int, keys: int, window: int, causal: bool, shared: bool) -> int:
    """Scores per head."""
    if queries == 1:
        return keys
    tiles = Tiles.of(queries, keys, window, causal, shared)
    return tiles.chunks * tiles.block * tiles.columns
