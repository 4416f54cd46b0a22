"""Monarch matrices: products of two block-diagonal matrices with permutations between them."""

import torch
from torch import Tensor

from kernels.checks import check_shape
from kernels.dispatch import choose
from kernels.monarch.blocks import monarch_blocks
from kernels.monarch.op import monarch_triton
from kernels.monarch.project import monarch_project
from kernels.monarch.reference import monarch_reference

__all__ = ["monarch", "monarch_flops", "monarch_project"]

_FORMS = {"triton": monarch_triton, "torch": monarch_blocks, "reference": monarch_reference}


def monarch(x: Tensor, w1: Tensor, w2: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiply by a Monarch matrix: two block-diagonal matrices, a permutation after each.

    The n = k p inputs are k blocks of p, which w1 maps to k blocks of q. These k q = l r numbers
    are read as r rows of l, and column j of l is block j of w2, which maps its r to s numbers. The
    output is again rows of l: s of them. As a dense matrix,

        M[j + l b, i + p a] = sum of w2[j, b, f // l] w1[a, f - q a, i]
                              over q a <= f < q (a + 1) with f % l = j

    so that the (j, a) block, rows j + l b and columns of a, has rank q / l or thereabouts. The
    square case k = l = q = r = p = s = sqrt(n) is M = P L P^T R of the paper.

    Source: Dao et al. 2022 (Monarch), section 3, in the index order of its public code. FLOPs: two
    per weight and row of x, 2 (k p q + l r s).

    Args:
        x: (..., n), real or complex.
        w1: (k, q, p), k p = n.
        w2: (l, s, r), l r = k q.
        backend: "auto", "triton" (of real numbers), "torch" (two batched products) or "reference"
            (the dense matrix).

    Returns:
        (..., l s) in the dtype that products of x and the weights have; autocast applies.

    Raises:
        ValueError: shapes do not fit.
        BackendError: no such backend.
    """
    _check(x, w1, w2)
    dtype = torch.promote_types(x.dtype, torch.promote_types(w1.dtype, w2.dtype))
    return choose("monarch", backend, _FORMS, x.device, dtype)(x, w1, w2)


def monarch_flops(tokens: int, w1: tuple[int, ...], w2: tuple[int, ...]) -> int:
    """FLOPs of `tokens` rows by factors of these shapes, as FlopCounterMode counts them."""
    (k, q, p), (blocks, s, r) = w1, w2
    return 2 * tokens * (k * q * p + blocks * s * r)


def _check(x: Tensor, w1: Tensor, w2: Tensor) -> None:
    check_shape("monarch", "w1", w1, "(k, q, p)", None, None, None)
    check_shape("monarch", "w2", w2, "(l, s, r)", None, None, None)
    (k, q, p), (blocks, _, r) = w1.shape, w2.shape
    if x.ndim == 0 or x.shape[-1] != k * p:
        raise ValueError(
            f"monarch: x has shape {tuple(x.shape)}; expected (..., {k * p}), "
            f"k p for w1 (k, q, p) = {tuple(w1.shape)}"
        )
    if k * q != blocks * r:
        raise ValueError(
            f"monarch: w1 (k, q, p) = {tuple(w1.shape)} gives k q = {k * q} numbers, "
            f"w2 (l, s, r) = {tuple(w2.shape)} takes l r = {blocks * r}; these must be equal"
        )
