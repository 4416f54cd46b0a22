"""FLOPs of estimated sparse attention: a multiply-add per feature of each pair that is attended to.

How many tokens the chosen cells cover depends on the estimates; what is counted is the mean over
all choices of as many cells, which is what the budget aims at: about k tokens a query and head.
"""

import torch

from kernels.estimated_sparse_attention.select import cell_budget


def attended_pairs(
    length: int,
    num_heads: int,
    num_cells: int,
    k_cells: int,
    key_length: int | None = None,
    causal: bool = True,
    grouping: str = "causal_batch",
) -> int:
    """Pairs of query and key over all heads of one sequence: the mean over choices, rounded down.

    About H k T; more where L is above H k K (k K without "causal_batch"), whose one cell is wider
    than the budget.

    Args:
        length: T, the queries.
        key_length: S; T by default.
    """
    S = length if key_length is None else key_length
    heads = num_heads if grouping in ("causal_batch", "batch") else 1
    seen = torch.arange(S - length + 1, S + 1) if causal else torch.full((length,), S)
    if grouping in ("head", "batch"):
        cells = cell_budget(seen[:1], heads * length, num_cells, k_cells)
    else:
        cells = cell_budget(seen, heads, num_cells, k_cells)
    # Of a query's K cells, which span its L tokens together, one covers L / K in the mean.
    return int((cells * seen[: len(cells)]).sum()) * (num_heads // heads) // num_cells


def estimated_sparse_attention_flops(
    batch: int,
    length: int,
    num_heads: int,
    head_dim: int,
    num_cells: int,
    k_cells: int,
    *,
    key_length: int | None = None,
    causal: bool = True,
    grouping: str = "causal_batch",
) -> int:
    """FLOPs of one forward pass without segments, as FlopCounterMode counts them.

    Scores and weighted sums; the choice compares and adds no products.
    """
    pairs = attended_pairs(
        length,
        num_heads,
        num_cells,
        k_cells,
        key_length,
        causal,
        grouping,
    )
    return 4 * batch * pairs * head_dim
