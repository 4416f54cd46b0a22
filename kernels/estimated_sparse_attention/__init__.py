"""Sparse attention on cells that an estimate of the attention matrix chooses (SEA)."""

from functools import partial
from typing import Literal, overload

from torch import Tensor

from kernels.checks import check_floating, check_not_empty, check_segments, check_shape
from kernels.dispatch import choose
from kernels.estimated_sparse_attention.flops import (
    attended_pairs,
    estimated_sparse_attention_flops,
)
from kernels.estimated_sparse_attention.op import estimated_sparse_attention_torch
from kernels.estimated_sparse_attention.reference import estimated_sparse_attention_reference
from kernels.estimated_sparse_attention.resize import (
    cell_of_token,
    cell_start,
    cell_starts,
    stretch,
    stretch_cells,
)
from kernels.estimated_sparse_attention.select import (
    GROUPINGS,
    Grouping,
    cell_budget,
    check_choice,
    select_cells,
)
from kernels.estimated_sparse_attention.visible import Visible, visible
from kernels.precision import accumulation_dtype

__all__ = [
    "GROUPINGS",
    "Grouping",
    "Visible",
    "attended_pairs",
    "cell_budget",
    "cell_of_token",
    "cell_start",
    "cell_starts",
    "estimated_sparse_attention",
    "estimated_sparse_attention_flops",
    "select_cells",
    "stretch",
    "stretch_cells",
    "visible",
]

_FORMS = {
    "triton": partial(estimated_sparse_attention_torch, form="triton"),
    "auto": partial(estimated_sparse_attention_torch, form="auto"),
    "cpp": partial(estimated_sparse_attention_torch, form="cpp"),
    "torch": estimated_sparse_attention_torch,
    "reference": estimated_sparse_attention_reference,
}


@overload
def estimated_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probs: Tensor,
    *,
    k_cells: int,
    causal: bool = True,
    grouping: Grouping = "causal_batch",
    scale: float | None = None,
    segments: Tensor | None = None,
    return_cells: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def estimated_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probs: Tensor,
    *,
    k_cells: int,
    causal: bool = True,
    grouping: Grouping = "causal_batch",
    scale: float | None = None,
    segments: Tensor | None = None,
    return_cells: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def estimated_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probs: Tensor,
    *,
    k_cells: int,
    causal: bool = True,
    grouping: Grouping = "causal_batch",
    scale: float | None = None,
    segments: Tensor | None = None,
    return_cells: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention on about `k_cells` tokens per query and head, where `probs` is largest.

        y_t = sum_{s in C_t} softmax_{s in C_t}(scale q_t.k_s) v_s

    C_t are the tokens under the cells that are chosen for query t and its head: `select_cells`
    chooses, and cell b of a query that sees L tokens covers those from floor(b L / K + 1/2) on,
    see `cell_starts`. A head whose estimates are flat may get no cell: its output is then zero.
    Time and memory are linear in T up to about H k K tokens (beyond, the one cell that every group
    gets is wider than its budget), and no (T, S) matrix is built. Source: Lee et al. 2024 (SEA),
    sections 3.3 and 3.4, after its public code.

    Keys may be more than queries, as in kernels.attention: the queries then are the LAST T of the
    S positions, which is decoding with a cache.

    Args:
        q: (B, T, H, D).
        k: (B, S, G, D) with S >= T and H a multiple of G: query head h reads head h // (H / G).
        v: (B, S, G, V).
        probs: (B, H, T, K), the estimated attention of each query over its K cells. Only its order
            counts, and no gradient goes to it.
        k_cells: the paper's k, in tokens per query and head: what is chosen are round(H k K / L)
            cells of L / K tokens each. It may be raised after training.
        causal: position t sees positions 0..t only.
        grouping: which cells compete, see `select_cells`; with `causal`, "causal_batch" or "query".
        scale: of the scores before the softmax; D^-0.5 by default.
        segments: int (B, S) document numbers of the keys' positions, the last T of them the
            queries', non-decreasing over the valid positions; a query sees its own document only.
            -1 is padding: seen by no query, its own output zero.
        return_cells: return (y, cells) and not y alone.
        backend: "triton", "cpp" (on the CPU; compiled on first use, see kernels.native), "torch",
            "reference", or "auto": "triton" on a GPU, on a CPU "cpp" where there is a compiler.

    Returns:
        y (B, T, H, V) in the dtype of v; sums are float32 (float64 for float64 inputs) whatever
        the inputs. cells: bool (B, H, T, K), what was chosen.

    Raises:
        ValueError: shapes or dtypes do not fit, T = 0, k_cells below 1, or a grouping that is
            unknown or sees the future.
        BackendError: no such backend, or "cpp" without a compiler or off the CPU.
    """
    name = "estimated_sparse_attention"
    check_floating(name, q=q, k=k, v=v, probs=probs)
    check_shape(name, "q", q, "(B, T, H, D)", None, None, None, None)
    B, T, H, D = q.shape
    check_not_empty(name, "q", q, 1)
    check_shape(name, "k", k, "(B, S, G, D)", B, None, None, D)
    S, G = k.shape[1:3]
    check_shape(name, "v", v, "(B, S, G, V)", B, S, G, None)
    check_shape(name, "probs", probs, "(B, H, T, K)", B, H, T, None)
    if probs.shape[3] == 0:
        raise ValueError(f"{name}: probs has shape {tuple(probs.shape)}; expected at least 1 cell")
    if S < T:
        raise ValueError(f"{name}: k has {S} positions; expected at least q's {T}")
    if G == 0 or H % G:
        raise ValueError(f"{name}: k has {G} heads; expected a divisor of q's {H}")
    check_choice(name, k_cells, causal, grouping)
    check_segments(name, segments, B, S)
    form = choose(name, backend, _FORMS, q.device, accumulation_dtype(q, k, v))
    y, cells = form(
        q,
        k,
        v,
        probs,
        k_cells=k_cells,
        causal=causal,
        grouping=grouping,
        scale=D**-0.5 if scale is None else scale,
        segments=segments,
    )
    return (y, cells) if return_cells else y
