"""FLOPs of chunked linear attention: whole squares inside a chunk, as torch counts attention."""

CHUNK = 64


def linear_attention_flops(
    batch: int,
    length: int,
    num_heads: int,
    d_key: int,
    d_value: int,
    *,
    normalize: bool = True,
) -> int:
    """FLOPs of one forward pass as FlopCounterMode counts them, for every length from 1.

    Updating and reading the states costs 4 T K V, the squares inside chunks
    2 T min(T, CHUNK) (K + V). The normaliser is one more column of v: V + 1 in place of V.
    """
    width = d_value + normalize
    per_token = 4 * d_key * width + 2 * min(length, CHUNK) * (d_key + width)
    return batch * num_heads * length * per_token


def linear_attention_backward_flops(
    batch: int,
    length: int,
    num_heads: int,
    d_key: int,
    d_value: int,
    *,
    normalize: bool = True,
) -> int:
    """FLOPs of one backward pass: the states again, and two products for each one forward."""
    width = d_value + normalize
    per_token = 8 * d_key * width + 2 * d_key * d_value
    per_token += 2 * min(length, CHUNK) * (3 * d_key + width + d_value)
    return batch * num_heads * length * per_token
