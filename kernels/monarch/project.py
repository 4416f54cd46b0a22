"""The nearest Monarch matrix to a dense one.

k blocks of p inputs, l blocks of s outputs, q = k-th part of the numbers in the middle.
"""

import torch
from torch import Tensor

from kernels.checks import check_shape
from kernels.precision import outside_autocast


def monarch_project(
    M: Tensor, nblocks: int | tuple[int, int], rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """The factors (w1, w2) whose Monarch matrix is nearest to `M` in the Frobenius norm.

    The (j, a) block of a Monarch matrix, rows j + l b and columns of block a, is any matrix of its
    rank, so that each is the truncated singular value decomposition of M's, U sqrt(S) going to w2
    and sqrt(S) V^H to w1. The squared error is the sum of the squared singular values left out.

    Source: Dao et al. 2022 (Monarch), section 3.3 and Algorithm 1, with the ranks and the index
    order (rank, block) of its public code. Differs from the paper: ranks above 1, and blocks of
    unequal rank where l does not divide q, as kernels.monarch defines them.

    Args:
        M: (l s, k p) as torch's linear layers store weights, out by in; real or complex. Half
            precision is decomposed in float32.
        nblocks: (k, l), or one number for both. k divides M's columns and l its rows.
        rank: of each block, q = rank l; by default k q is the smaller side of M, as in
            layers.monarch.MonarchLinear.

    Returns:
        w1 (k, q, p) and w2 (l, s, k q / l) in the dtype of M.

    Raises:
        ValueError: blocks that do not divide M, or a rank that no block can have.
    """
    check_shape("monarch_project", "M", M, "(out, in)", None, None)
    k, blocks = (nblocks, nblocks) if isinstance(nblocks, int) else nblocks
    out, columns = M.shape
    if min(k, blocks) < 1 or columns % k or out % blocks:
        raise ValueError(
            f"monarch_project: nblocks={nblocks} for M of shape {tuple(M.shape)}; expected k "
            f"that divides {columns} and l that divides {out}"
        )
    q = min(out, columns) // k if rank is None else rank * blocks
    most = min(out // blocks, columns // k)
    if q < blocks or -(-q // blocks) > most:
        raise ValueError(
            f"monarch_project: rank={rank} with nblocks={nblocks} for M of shape {tuple(M.shape)} "
            f"gives its blocks rank {q / blocks:.3g}; expected 1 to {most}"
        )
    if k * q % blocks:
        raise ValueError(
            f"monarch_project: nblocks={nblocks} for M of shape {tuple(M.shape)} gives "
            f"k q = {k * q} middle numbers, no multiple of l = {blocks}; expected another nblocks "
            f"or a rank"
        )
    return _project(M, k, blocks, q)


@torch.no_grad()
@outside_autocast
def _project(M: Tensor, k: int, blocks: int, q: int) -> tuple[Tensor, Tensor]:
    dtype = M.dtype if M.dtype.itemsize >= 4 else torch.float32
    tensor = M.to(dtype).reshape(M.shape[0] // blocks, blocks, k, M.shape[1] // k)
    u, s, vh = torch.linalg.svd(tensor.permute(1, 2, 0, 3), full_matrices=False)
    half = s.sqrt()[..., None].to(dtype)
    left, right = u.mT * half, vh * half  # (l, k, singular values, s) and (..., p)
    f = torch.arange(k * q, device=M.device)  # a number in the middle
    a, j = f // q, f % blocks
    # Blocks take the numbers that are theirs in order, the largest singular value first.
    order = f // blocks - (a * q - j + blocks - 1) // blocks
    w1 = right[j, a, order].unflatten(0, (k, q))
    w2 = left[j, a, order].unflatten(0, (-1, blocks)).permute(1, 2, 0)
    return w1.to(M.dtype).contiguous(), w2.to(M.dtype).contiguous()
