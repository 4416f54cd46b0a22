"""Cross entropy of a linear head, a chunk of tokens at a time.

Only tokens with a target take part. The gradients are made along with the loss, while a chunk's
logits are there: they cost two products and no second pass. N tokens, n of them with a target,
D model width, V vocabulary, c tokens in a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.linear_cross_entropy.reference import IGNORE
from kernels.precision import accumulation_dtype, outside_autocast

# Logits held at once: 16 MiB of float32. Larger blocks leave glibc's heap and fault at every use.
_LOGITS = 1 << 22
_LEAST_CHUNK = 32  # tokens; fewer would read the whole head for little work


class _Chunk(NamedTuple):
    """`rows` of the n tokens; x (c, D); targets (c, 1); exponentials (c, V), their sums (c, 1)."""

    rows: slice
    x: Tensor
    targets: Tensor
    nll: Tensor  # (c,)
    exponentials: Tensor
    sums: Tensor


def chunks(
    x: Tensor, weight: Tensor, targets: Tensor, exact: torch.dtype, chunk: int | None
) -> Iterator[_Chunk]:
    """Losses of x (n, D), and softmax up to a factor; the exponentials may be overwritten."""
    size = chunk or max(_LEAST_CHUNK, _LOGITS // len(weight))
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        x_c, target = x[rows], targets[rows, None]
        logits = (x_c @ weight.T).to(exact)
        logits -= logits.amax(1, keepdim=True)
        chosen = logits.gather(1, target)
        exponentials = logits.exp_()
        sums = exponentials.sum(1, keepdim=True)
        nll = (sums.log() - chosen).squeeze(1)
        yield _Chunk(rows, x_c, target, nll, exponentials, sums)


def with_target(targets: Tensor, vocabulary: int) -> Tensor:
    """Indices (n,) of the targets that are not ignored.

    Raises:
        ValueError: one of them is outside [0, V).
    """
    kept = (targets != IGNORE).nonzero().squeeze(1)
    if len(kept):
        low, high = torch.stack(targets[kept].aminmax()).tolist()
        if low < 0 or high >= vocabulary:
            worst = low if low < 0 else high
            raise ValueError(
                f"targets contains {worst}; "
                f"expected 0 to {vocabulary - 1}, or {IGNORE} for no target"
            )
    return kept


@outside_autocast
def loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    chunk: int | None,
    wants_dx: bool,
    wants_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss and its gradients (N, D) and (V, D), empty where not wanted.

    Args:
        dtype: of the products.
    """
    exact = accumulation_dtype(x, weight)
    kept = with_target(targets, len(weight))
    loss = torch.zeros((), dtype=exact, device=x.device)
    dx = torch.zeros_like(x) if wants_dx else x.new_empty(0)
    dw = torch.zeros_like(weight, dtype=exact) if wants_dw else weight.new_empty(0, dtype=exact)
    x_kept, w, share = x[kept].to(dtype), weight.to(dtype), 1 / max(1, len(kept))
    for part in chunks(x_kept, w, targets[kept], exact, chunk):
        loss += part.nll.sum()
        if not (wants_dx or wants_dw):
            continue
        d_logits = part.exponentials.mul_(share / part.sums)
        d_logits.scatter_add_(1, part.targets, torch.full_like(part.sums, -share))
        d_logits = d_logits.to(dtype)
        if wants_dx:
            dx.index_copy_(0, kept[part.rows], (d_logits @ w).to(dx.dtype))
        if wants_dw and dtype == exact:
            dw.addmm_(d_logits.T, part.x)
        elif wants_dw:
            dw += d_logits.T @ part.x
    return loss * share, dx, dw


@outside_autocast
def nll(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, chunk: int | None
) -> Tensor:
    """The loss of every token (N,), 0 where its target is ignored."""
    exact = accumulation_dtype(x, weight)
    kept = with_target(targets, len(weight))
    losses = torch.zeros(len(x), dtype=exact, device=x.device)
    for part in chunks(x[kept].to(dtype), weight.to(dtype), targets[kept], exact, chunk):
        losses[kept[part.rows]] = part.nll
    return losses
