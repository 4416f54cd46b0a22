"""Cross entropy of a linear head, a chunk of tokens at a time.

Only tokens with a target take part. The gradients are made along with the loss, while a chunk's
logits are there: they cost two products and no second pass. N tokens, n of them with a target,
D model width, V vocabulary, c tokens in a chunk.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.dispatch import implementation
from kernels.linear_cross_entropy import cpp
from kernels.linear_cross_entropy.reference import IGNORE
from kernels.native import library_for
from kernels.precision import accumulation_dtype, outside_autocast

# Of the logits held at once. Blocks of 32 MiB leave glibc's heap and fault at every use.
_BYTES = 1 << 24
_LEAST_CHUNK = 32  # tokens; fewer would read the whole head for little work


def softmax_rows(
    logits: Tensor, targets: Tensor, exact: torch.dtype, share: float | None
) -> tuple[Tensor, Tensor]:
    """Losses (c,) of logits (c, V), and `share` times their gradient, empty without a share.

    Args:
        targets: (c,), each in [0, V).
        exact: the dtype of exponentials and sums.
    """
    logits, targets = logits.to(exact), targets[:, None]
    logits -= logits.amax(1, keepdim=True)
    chosen = logits.gather(1, targets)
    exponentials = logits.exp_()
    sums = exponentials.sum(1, keepdim=True)
    losses = (sums.log() - chosen).squeeze(1)
    if share is None:
        return losses, logits.new_empty(0)
    gradient = exponentials.mul_(share / sums)
    return losses, gradient.scatter_add_(1, targets, torch.full_like(sums, -share))


def _softmax_of(
    form: str, device: torch.device, dtype: torch.dtype, exact: torch.dtype
) -> tuple[Callable[..., tuple[Tensor, Tensor]], int]:
    """The softmax_rows of `form`, and how many logits in `dtype` to give it at once."""
    library = library_for("linear_cross_entropy", cpp.SOURCE, form, device)
    if library is not None:  # makes no copy in `exact`
        return partial(cpp.softmax_rows, library), _BYTES // dtype.itemsize
    return implementation(__package__, form, "chunked").softmax_rows, _BYTES // exact.itemsize


def _chunks(n: int, vocabulary: int, chunk: int | None, most: int) -> Iterator[slice]:
    """Slices of the n tokens whose logits, by default up to `most`, are held at once."""
    size = chunk or max(_LEAST_CHUNK, most // vocabulary)
    return (slice(start, start + size) for start in range(0, n, size))


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
    form: str = "chunked",
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss and its gradients (N, D) and (V, D), empty where not wanted.

    Args:
        dtype: of the products.
        form: the module of this package whose softmax_rows is taken, "chunked" or "triton"; "cpp";
            or "auto", see kernels.native.library_for, and "chunked" where that is not C++.

    Raises:
        BackendError: see kernels.native.library_for.
    """
    exact = accumulation_dtype(x, weight)
    kept = with_target(targets, len(weight))
    loss = torch.zeros((), dtype=exact, device=x.device)
    dx = torch.zeros_like(x) if wants_dx else x.new_empty(0)
    dw = torch.zeros_like(weight, dtype=exact) if wants_dw else weight.new_empty(0, dtype=exact)
    softmax, most = _softmax_of(form, x.device, dtype, exact)
    x_kept, w, share = x[kept].to(dtype), weight.to(dtype), 1 / max(1, len(kept))
    for rows in _chunks(len(kept), len(weight), chunk, most):
        x_c, targets_c = x_kept[rows], targets[kept[rows]]
        wanted = share if wants_dx or wants_dw else None
        losses, d_logits = softmax(x_c @ w.T, targets_c, exact, wanted)
        loss += losses.sum()
        d_logits = d_logits.to(dtype)
        if wants_dx:
            dx.index_copy_(0, kept[rows], (d_logits @ w).to(dx.dtype))
        if wants_dw and dtype == exact:
            dw.addmm_(d_logits.T, x_c)
        elif wants_dw:
            dw += d_logits.T @ x_c
    return loss * share, dx, dw


@outside_autocast
def nll(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    chunk: int | None,
    form: str = "chunked",
) -> Tensor:
    """The loss of every token (N,), 0 where its target is ignored."""
    exact = accumulation_dtype(x, weight)
    kept = with_target(targets, len(weight))
    losses = torch.zeros(len(x), dtype=exact, device=x.device)
    softmax, most = _softmax_of(form, x.device, dtype, exact)
    x_kept, w = x[kept].to(dtype), weight.to(dtype)
    for rows in _chunks(len(kept), len(weight), chunk, most):
        losses[kept[rows]], _ = softmax(x_kept[rows] @ w.T, targets[kept[rows]], exact, None)
    return losses
