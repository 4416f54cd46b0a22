"""Cross entropy of a linear head, with all its logits.

N tokens, D model width, V vocabulary.
"""

import torch
from torch import Tensor

from kernels.precision import accumulation_dtype, outside_autocast

IGNORE = -100


@outside_autocast
def linear_nll_reference(
    x: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None
) -> Tensor:
    """nll_n = log sum_v exp(x_n.w_v) - x_n.w_target, 0 where the target is ignored; (N,)."""
    dtype = accumulation_dtype(x, weight)
    logits = x.to(dtype) @ weight.to(dtype).T
    kept = targets != IGNORE
    chosen = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(kept, logits.logsumexp(1) - chosen, 0)


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None
) -> Tensor:
    """The mean of nll over the targets that are not ignored; 0 when there is none."""
    return linear_nll_reference(x, weight, targets).sum() / (targets != IGNORE).sum().clamp(min=1)
