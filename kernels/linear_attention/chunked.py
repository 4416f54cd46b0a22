"""Linear attention in chunks: a square inside each chunk, a state between them.

With E the state before a chunk, Q, K (C, K) and V (C, V) its tokens and L the lower triangle:

    Y = (L * Q K^T) V + Q E,    E <- E + K^T V

The normaliser is one more column of V, of ones: it makes z the last column of E and the sum of
weights the last column of Y. W is V's width with that column.

B batch, T time, H heads, K features, V value width, C chunk length, n chunks in a block.
"""

import torch
from torch import Tensor

from kernels.linear_attention.blocks import Block, Masks, cut, load, masks, store
from kernels.precision import accumulation_dtype, matmul_dtype, outside_autocast


@outside_autocast
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, last state and sums of weights.

    Args:
        state: (B, H, K, W) before the first token, or None.

    Returns:
        y (B, T, H, V) in v's dtype; the state after the last token (B, H, K, W), and the sums of
        weights with eps (B, T, H, 1), empty if not `normalize`, in float32 or float64.
    """
    (B, T, H, K), V = q.shape, v.shape[3]
    dtype, exact = matmul_dtype(q, k, v), accumulation_dtype(q, k, v)
    E = _first_state(state, (B, H, K, V + normalize), exact, q.device)
    y = v.new_empty(B, T, H, V)
    sums = torch.empty((B, T, H, int(normalize)), dtype=exact, device=q.device)
    blocks = cut(T, B * H, dtype, exact, q.device)
    for block, mask in zip(blocks, masks(segments, blocks, q.device), strict=True):
        q_b, k_b = load(q, block, block.dtype), load(k, block, block.dtype)
        v_b = load(v, block, block.dtype, ones=normalize)
        if scale != 1:
            q_b.mul_(scale)
        updates = torch.bmm(k_b.mT, mask.apply(v_b, mask.writes))
        before, E = _prefix(E, updates, mask, block.chunks)
        out = torch.bmm(mask.apply_within_(torch.bmm(q_b, k_b.mT)), v_b)
        out = torch.baddbmm(out, mask.apply(q_b, mask.reads), before.to(block.dtype))
        if normalize:
            weight = out[..., V:].to(exact).add_(eps)
            store(weight, block, sums)
            out = out[..., :V].div_(weight)
        store(out, block, y)
    if segments is not None:  # 0/eps, or 0/0, stands where there is padding
        y.masked_fill_((segments < 0)[:, :, None, None], 0)
    return y, E.clone(), sums


@outside_autocast
def backward(
    grad_y: Tensor | None,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    y: Tensor,
    sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the first state.

    The chunks' states are made again, going forward; then one pass goes backward with R, the
    gradient of the state after a chunk. With G the gradient of Y:

        dQ = (L * G V^T) K + G E^T,  dK = (L * G V^T)^T Q + V R^T,  dV = (L * Q K^T)^T G + K R,
        R <- R + Q^T G

    The gradient of a sum of weights cancels that of what they weigh, which rounding to 16 bits
    would undo: there it is two numbers, the second what rounding the first has left, and two
    columns of ones stand behind V.
    """
    (B, T, H, K), V = q.shape, v.shape[3]
    normalize = sums.shape[3] == 1
    dtype, exact = matmul_dtype(q, k, v), accumulation_dtype(q, k, v)
    ones = normalize * (2 if dtype.itemsize == 2 else 1)
    blocks = cut(T, B * H, dtype, exact, q.device)
    all_masks = list(masks(segments, blocks, q.device))
    E = _first_state(state, (B, H, K, V + normalize), exact, q.device)
    if ones > 1:
        E = torch.cat([E, E[..., V:]], -1)
    starts = _states(k, v, E, blocks, all_masks)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if grad_y is None:
        grad_y = torch.zeros_like(y)
    R = _first_state(grad_state, (B, H, K, V + normalize), exact, q.device)
    R = torch.nn.functional.pad(R, (0, ones - normalize))
    for block, mask, before in zip(
        reversed(blocks), reversed(all_masks), reversed(starts), strict=True
    ):
        q_b, k_b = load(q, block, block.dtype), load(k, block, block.dtype)
        v_b = load(v, block, block.dtype, ones=ones)
        g_b = _output_gradient(grad_y, y, sums, segments, block, ones)
        if scale != 1:
            q_b.mul_(scale)
        g_reads = mask.apply(g_b, mask.reads)
        after, R = _suffix(R, torch.bmm(q_b.mT, g_reads), mask, block.chunks)
        after = after.to(block.dtype)
        dA = mask.apply_within_(torch.bmm(g_b, v_b.mT))
        dq_b = torch.baddbmm(torch.bmm(dA, k_b), g_reads, before.mT)
        if scale != 1:
            dq_b.mul_(scale)
        store(dq_b, block, dq)
        v_writes = mask.apply(v_b, mask.writes)
        store(torch.baddbmm(torch.bmm(dA.mT, q_b), v_writes, after.mT), block, dk)
        A = mask.apply_within_(torch.bmm(q_b, k_b.mT))
        dv_b = torch.bmm(A.mT, g_b[..., :V])
        k_writes = mask.apply(k_b, mask.writes)
        store(torch.baddbmm(dv_b, k_writes, after[..., :V]), block, dv)
    R = R.clone()
    if ones > 1:
        R = torch.cat([R[..., :V], R[..., V:].sum(-1, keepdim=True)], -1)
    return dq, dk, dv, R


def _first_state(
    state: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if state is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return state.to(dtype)


def _prefix(E: Tensor, updates: Tensor, mask: Masks, chunks: int) -> tuple[Tensor, Tensor]:
    """States before each chunk (n*B*H, K, W) and after the last (B, H, K, W)."""
    updates = updates.view(chunks, *E.shape)
    states = E.new_empty(chunks + 1, *E.shape)
    states[0] = E
    for c in range(chunks):
        if mask.stays is None:
            torch.add(states[c], updates[c], out=states[c + 1])
        else:
            torch.mul(states[c], mask.stays[c], out=states[c + 1]).add_(updates[c])
    return states[:-1].flatten(0, 2), states[-1]


def _suffix(R: Tensor, updates: Tensor, mask: Masks, chunks: int) -> tuple[Tensor, Tensor]:
    """Gradients of the states after each chunk (n*B*H, K, W) and before the first (B, H, K, W)."""
    updates = updates.view(chunks, *R.shape)
    grads = R.new_empty(chunks + 1, *R.shape)
    grads[chunks] = R
    for c in reversed(range(chunks)):
        if mask.stays is None:
            torch.add(grads[c + 1], updates[c], out=grads[c])
        else:
            torch.mul(grads[c + 1], mask.stays[c], out=grads[c]).add_(updates[c])
    return grads[1:].flatten(0, 2), grads[0]


def _states(
    k: Tensor, v: Tensor, E: Tensor, blocks: list[Block], all_masks: list[Masks]
) -> list[Tensor]:
    """The states before every chunk, from E before the first: (n*B*H, K, W) per block."""
    ones = E.shape[3] - v.shape[3]
    states = []
    for block, mask in zip(blocks, all_masks, strict=True):
        k_b, v_b = load(k, block, block.dtype), load(v, block, block.dtype, ones=ones)
        updates = torch.bmm(k_b.mT, mask.apply(v_b, mask.writes))
        before, E = _prefix(E, updates, mask, block.chunks)
        states.append(before.to(block.dtype))
    return states


def _output_gradient(
    grad_y: Tensor,
    y: Tensor,
    sums: Tensor,
    segments: Tensor | None,
    block: Block,
    ones: int,
) -> Tensor:
    """Gradient of the unnormalised output and, behind it, of the sum of weights: (n*B*H, C, .)."""
    if not ones:
        return load(grad_y, block, block.dtype)
    weight = load(sums, block, sums.dtype)
    if segments is not None:
        padding = (block.view(segments) < 0)[:, :, None, :, None]  # (n, B, 1, C, 1)
        n, B = padding.shape[:2]
        weight.view(n, B, -1, *weight.shape[1:]).masked_fill_(padding, 1)
    g = load(grad_y, block, sums.dtype).div_(weight).to(block.dtype)
    of_sum = torch.linalg.vecdot(g.to(sums.dtype), load(y, block, sums.dtype)).neg_()[..., None]
    first = of_sum.to(block.dtype)
    rest = [(of_sum - first).to(block.dtype)] if ones > 1 else []
    return torch.cat([g, first, *rest], -1)
