"""The recurrence as it is written, one step at a time. B batch, T time, D width."""

import torch
from torch import Tensor


def linear_recurrence_reference(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """a, b (B, T, D), h0 (B, D) -> every state (B, T, D)."""
    h, states = h0, []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, 1)
