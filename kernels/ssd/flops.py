"""FLOPs of SSD's matrix products, as torch's FlopCounterMode counts them.

B batch, L time, H heads, P width per head, N state, G groups, Q steps of a chunk. The squares
inside chunks count whole, as torch counts attention.
"""


def ssd_flops(
    batch: int,
    length: int,
    num_heads: int,
    head_dim: int,
    d_state: int,
    num_groups: int = 1,
    chunk_size: int = 64,
) -> int:
    """FLOPs of one forward pass, for every length from 1.

    States cost 4 L H P N (written and read), squares 2 L Q (G N + H P); one step has no square.
    """
    if length == 1:
        return 2 * batch * num_heads * head_dim * d_state
    states = 4 * length * num_heads * head_dim * d_state
    square = 2 * _powers(length, chunk_size, 2) * (num_groups * d_state + num_heads * head_dim)
    return batch * (states + square)


def ssd_backward_flops(
    batch: int,
    length: int,
    num_heads: int,
    head_dim: int,
    d_state: int,
    num_groups: int = 1,
    chunk_size: int = 64,
    gated: bool = False,
) -> int:
    """FLOPs of one backward pass.

    Five products with states, 10 L H P N; squares for B C^T again, for B and for C, and two for x,
    2 L Q (3 G N + 2 H P); the sums of the decays' gradients, 2 L Q^2 H. Gates need y once more.
    """
    pairs = _powers(length, chunk_size, 2)
    states = 10 * length * num_heads * head_dim * d_state
    squares = 2 * pairs * (3 * num_groups * d_state + 2 * num_heads * head_dim)
    decays = 2 * _powers(length, chunk_size, 3) * num_heads
    again = 0
    if gated:
        again = 2 * length * num_heads * head_dim * d_state
        again += 2 * pairs * (num_groups * d_state + num_heads * head_dim)
    return batch * (states + squares + decays + again)


def _powers(length: int, chunk_size: int, power: int) -> int:
    """Sum of Q^power over the chunks."""
    full, rest = divmod(length, chunk_size)
    return full * chunk_size**power + rest**power
