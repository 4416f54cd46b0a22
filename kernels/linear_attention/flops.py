"""FLOPs of chunked linear attention: whole squares inside a chunk, as torch counts attention."""

CHUNK = 128


def linear_attention_flops(
    batch: int, length: int, num_heads: int, d_key: int, d_value: int
) -> int:
    """FLOPs of one forward pass as FlopCounterMode counts them, for every length from 1.

    States cost 4 T K V (update and read) and the squares inside chunks 2 T min(T, CHUNK) (K + V);
    a single token has no square.
    """
    square = 0 if length == 1 else 2 * min(length, CHUNK) * (d_key + d_value)
    return batch * num_heads * length * (4 * d_key * d_value + square)
